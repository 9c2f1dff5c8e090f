"""`python -m asyncscale PROMPT...`: stream the answers of a model, then one line of figures."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Literal

import uvloop

from asyncscale import AsyncScaleClient, AsyncScaleError, Generation, Timing


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(arguments))
    except (AsyncScaleError, ValueError) as error:
        print(f"asyncscale: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at its exit
        return 141  # what a shell shows for SIGPIPE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m asyncscale",
        description="Stream a language model's answers through engine processes on this machine.",
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="several stream at once, to labelled lines")
    parser.add_argument(
        "--model",
        default="smollm2-135m-instruct",
        help="built-in name, folder, GGUF file or hub id (default: %(default)s)",
    )
    parser.add_argument(
        "--num-engines", type=_engine_count, default="auto", help='engine processes, or "auto" (default)'
    )
    parser.add_argument("--max-tokens", type=int, default=128, help="per prompt (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument("--chat", action="store_true", help="take each prompt as a user's message")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    return parser


def _engine_count(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else int(text)


async def _run(arguments: argparse.Namespace) -> None:
    client = AsyncScaleClient(arguments.model, num_engines=arguments.num_engines, dtype=arguments.dtype)
    async with client:
        started = time.monotonic()
        generations = [_start(client, prompt, arguments) for prompt in arguments.prompts]
        if len(generations) == 1:
            await _stream(generations[0])
        else:
            await asyncio.gather(*(_stream_labelled(g, number) for number, g in enumerate(generations, 1)))
        timings = [(await generation).timing for generation in generations]
        print(_summary(timings, time.monotonic() - started, len(client.engine_loads())))


def _start(client: AsyncScaleClient, prompt: str, arguments: argparse.Namespace) -> Generation:
    sampling = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature, "seed": arguments.seed}
    if arguments.chat:
        return client.chat([{"role": "user", "content": prompt}], **sampling)
    return client.generate(prompt, **sampling)


async def _stream(generation: Generation) -> None:
    async for token in generation:
        print(token, end="", flush=True)
    print()


async def _stream_labelled(generation: Generation, number: int) -> None:
    """Print a line as soon as it is full, so that several answers can share the screen."""
    label = f"[{number}] "
    width = max(20, shutil.get_terminal_size().columns - len(label))
    line = ""
    async for token in generation:
        line += token.text
        while (end := _line_end(line, width)) is not None:
            print(label + line[:end].rstrip("\n"), flush=True)
            line = line[end:].removeprefix(" ")
    print(label + line, flush=True)


def _line_end(text: str, width: int) -> int | None:
    """Where the first line of `text` ends: after its newline, or at the last space that fits."""
    newline = text.find("\n", 0, width + 1)
    if newline >= 0:
        return newline + 1
    if len(text) <= width:
        return None
    space = text.rfind(" ", 1, width + 1)
    return space if space > 0 else width


def _summary(timings: Sequence[Timing], duration: float, num_engines: int) -> str:
    used = sorted({timing.engine for timing in timings if timing.engine is not None})
    tokens = sum(timing.num_output_tokens for timing in timings)
    ttft = statistics.median(timing.ttft or 0.0 for timing in timings)
    return (
        f"engines used: {len(used)} of {num_engines} ({', '.join(map(str, used))}) | {tokens} tokens | "
        f"TTFT {1000 * ttft:.0f} ms{' (median)' if len(timings) > 1 else ''} | {tokens / duration:.1f} tokens/s"
    )


if __name__ == "__main__":
    sys.exit(main())
