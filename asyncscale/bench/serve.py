"""`python -m asyncscale.bench serve`: replay a workload against engines of any model, and print what it took."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

import uvloop

from asyncscale import AsyncScaleClient, SimulatedModel
from asyncscale.bench.environment import environment
from asyncscale.bench.measure import measured_replay
from asyncscale.bench.replay import replay
from asyncscale.bench.report import Report
from asyncscale.bench.workload import WorkloadRequest, corpus, file_requests, lognormal_requests
from asyncscale.checkpoint.resolve import resolve_model
from asyncscale.client.progress import StartProgress
from asyncscale.config import DType, Quantization
from asyncscale.tokenization.loading import load_codec

_ENGINE_OPTIONS = ("max_num_seqs", "max_num_batched_tokens", "dtype", "quantization", "threads_per_engine")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `serve`."""
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name, path, hub id, or: simulated")
    parser.add_argument("--sim-base-ms", type=float, default=8.0, help="of a simulated step (default: %(default)s)")
    parser.add_argument("--sim-decode-us", type=float, default=35.0, help="per decoding request (%(default)s)")
    parser.add_argument("--sim-prefill-us", type=float, default=10.0, help="per prompt token (%(default)s)")
    parser.add_argument("--num-engines", type=int, help="default: one per core, at most four")
    parser.add_argument("--max-num-seqs", type=int, help="requests that run at once on one engine")
    parser.add_argument("--max-num-batched-tokens", type=int, help="tokens computed in one step")
    parser.add_argument("--dtype", choices=get_args(DType))
    parser.add_argument("--quantization", choices=get_args(Quantization))
    parser.add_argument("--threads-per-engine", type=int)
    parser.add_argument("--prompts", type=Path, help='JSONL file: {"prompt": text or ids, "max_tokens": 64, ...}')
    parser.add_argument("--num-prompts", type=_positive, help="default: 128, or all of --prompts")
    parser.add_argument("--rate", type=_rate, default=math.inf, help="requests/s, Poisson (default: all at once)")
    parser.add_argument("--mean-in", type=float, default=220.6, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--mean-out", type=float, default=199.5, help="output tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, prompts and arrivals (default: %(default)s)")
    parser.add_argument("--warmup", action="store_true", help="replay it all once before, unmeasured")
    parser.add_argument("--read-text", action="store_true", help="detokenize each token as it comes")
    parser.add_argument("--uvloop", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, configuration and versions")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code, 1 when a request failed."""
    model = _model(arguments)
    requests = _workload(arguments, model)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if arguments.uvloop else None) as runner:
        report = runner.run(_measure(arguments, model, requests))
    print(report)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(_machine_readable(arguments, report), indent=2) + "\n")
    return 1 if report.failed else 0


async def _measure(
    arguments: argparse.Namespace, model: str | SimulatedModel, requests: list[WorkloadRequest]
) -> Report:
    options = {name: getattr(arguments, name) for name in _ENGINE_OPTIONS if getattr(arguments, name) is not None}
    num_engines: int | Literal["auto"] = "auto" if arguments.num_engines is None else arguments.num_engines
    async with AsyncScaleClient(model, num_engines=num_engines, **options) as client:
        if arguments.warmup:
            await replay(client, requests, read_text=arguments.read_text)
            await client.collective_rpc("reset_prefix_cache")
        return (await measured_replay(client, requests, read_text=arguments.read_text))[1]


def _model(arguments: argparse.Namespace) -> str | SimulatedModel:
    if arguments.model != "simulated":
        return str(arguments.model)
    return SimulatedModel(
        base_ms=arguments.sim_base_ms, decode_us=arguments.sim_decode_us, prefill_us=arguments.sim_prefill_us
    )


def _workload(arguments: argparse.Namespace, model: str | SimulatedModel) -> list[WorkloadRequest]:
    with StartProgress() as progress:
        source = model if isinstance(model, SimulatedModel) else resolve_model(model, progress.on_fetch)
    codec = load_codec(source)
    num_prompts, rate, seed = arguments.num_prompts, arguments.rate, arguments.seed
    if arguments.prompts is not None:
        return file_requests(arguments.prompts, num_prompts, rate, seed, lambda text: len(codec.encode(text)))
    num_special = len(codec.encode(""))  # what the tokenizer puts before every text
    token_ids = codec.encode(corpus())[num_special:]
    return lognormal_requests(token_ids, num_prompts or 128, rate, arguments.mean_in, arguments.mean_out, seed)


def _machine_readable(arguments: argparse.Namespace, report: Report) -> dict[str, Any]:
    configuration = {name: value for name, value in vars(arguments).items() if not callable(value)}
    configuration |= {"rate": "inf" if math.isinf(arguments.rate) else arguments.rate}
    return report.to_dict() | {
        "configuration": {name: str(v) if isinstance(v, Path) else v for name, v in configuration.items()},
        **environment(),
    }


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _rate(text: str) -> float:
    rate = float(text)
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {text}")
    return rate
