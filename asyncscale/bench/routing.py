"""`python -m asyncscale.bench routing`: where requests wait under each way to route, and what prefix caches save."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

from asyncscale.bench.conversations import AffinityFigures, Conversations, measure_affinity
from asyncscale.bench.routing_simulation import SCENARIOS, STRATEGIES, Outcome, simulate

_NAME_WIDTH, _COLUMN_WIDTH = 30, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `routing`."""
    parser.add_argument("--num-requests", type=_positive, default=3000, help="per simulated scenario (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and prompts (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code."""
    print("Where requests wait (simulated engines and clock, the real router):")
    print(_line("", ["mean wait s", "misplaced %", "beside room %", "mean latency s", "makespan s"]))
    for scenario in SCENARIOS:
        print(scenario.name)
        for strategy in STRATEGIES:
            outcome = simulate(scenario, strategy, arguments.num_requests, arguments.seed)
            print(_line("  " + strategy.name, _outcome_columns(outcome)))
    print("misplaced: of waiting time, at a full engine while another has a free slot; beside room: at a client that")
    print("has not heard of a free slot yet")
    plan = Conversations()
    print(
        f"\nPrefix caches ({plan.count} conversations of {plan.num_turns} turns, {plan.num_system_prompts} system "
        f"prompts, {plan.num_engines} engines, each with room for a {plan.num_engines}th of it):"
    )
    print(_line("", ["hit rate %", "busiest/mean", "mean TTFT ms"]))
    for figures in asyncio.run(measure_affinity(plan, arguments.seed)):
        print(_line("  " + figures.name, _affinity_columns(figures)))
    return 0


def _outcome_columns(outcome: Outcome) -> list[str]:
    return [
        f"{outcome.waiting_s:.3f}",
        f"{100 * outcome.misplaced:.3f}",
        f"{100 * outcome.held_beside_room:.3f}",
        f"{outcome.latency_s:.3f}",
        f"{outcome.makespan_s:.1f}",
    ]


def _affinity_columns(figures: AffinityFigures) -> list[str]:
    return [f"{100 * figures.hit_rate:.1f}", f"{figures.balance:.2f}", f"{figures.ttft_ms:.1f}"]


def _line(label: str, columns: Sequence[str]) -> str:
    return f"{label:<{_NAME_WIDTH}}" + "".join(f"{column:>{_COLUMN_WIDTH}}" for column in columns)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number
