"""`python -m asyncscale.bench start`: from a new process to its first token, and where the time goes."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

# A user's program, that says when it got how far. Its first argument: when it was started, of the system-wide clock.
_PROGRAM = """
import time
times = {"interpreter": time.monotonic()}
import asyncio, json, sys
from asyncscale import AsyncScaleClient, SimulatedModel
times["imports"] = time.monotonic()

async def main():
    options = json.loads(sys.argv[2])
    if options["model"] == "simulated":
        options["model"] = SimulatedModel()
    async with AsyncScaleClient(**options, progress=False) as client:
        times["engines ready"] = time.monotonic()
        async for _ in client.generate("The capital of France is", max_tokens=1, ignore_eos=True):
            times["first token"] = time.monotonic()
    times["closed"] = time.monotonic()

asyncio.run(main())
started = float(sys.argv[1])
print(json.dumps({name: at - started for name, at in times.items()}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `start`."""
    parser.add_argument("--model", default="smollm2-135m-instruct", help='any model, or "simulated" (%(default)s)')
    parser.add_argument("--num-engines", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="of the engines; repeatable")
    parser.add_argument("--times", type=int, default=5, help="after one that is not counted (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code."""
    options = {"model": arguments.model, "num_engines": arguments.num_engines}
    options |= {name: json.loads(value) for name, _, value in (option.partition("=") for option in arguments.option)}
    _measure(options)  # files come into the system's cache, and weights are packed
    runs = [_measure(options) for _ in range(arguments.times)]
    print(
        f"{arguments.model}, {arguments.num_engines} engines; seconds since the process was started, {len(runs)} times"
    )
    for name in runs[0]:
        values = sorted(run[name] for run in runs)
        print(f"{name:<16} median {statistics.median(values):6.3f}   {' '.join(f'{value:.3f}' for value in values)}")
    return 0


def _measure(options: dict[str, object]) -> dict[str, float]:
    """When the program got how far; and what it took of the CPU, with its engines."""
    before = _cpu_s()
    command = [sys.executable, "-c", _PROGRAM, str(time.monotonic()), json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise ValueError("the measured program failed, as it says above")
    times: dict[str, float] = json.loads(done.stdout)
    return times | {"CPU, all of it": _cpu_s() - before}


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
