"""Where requests wait, simulated to the last message but for the router; and what affinity saves on real engines."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from asyncscale.bench.conversations import Conversations, measure_affinity
from asyncscale.bench.routing_simulation import SCENARIOS, STRATEGIES, Scenario, simulate

LATE_BINDING, *OTHERS = STRATEGIES


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_with_late_binding_next_to_no_request_waits_at_one_engine_while_another_has_room(
    scenario: Scenario, seed: int
) -> None:
    late_binding = simulate(scenario, LATE_BINDING, 2000, seed)
    assert late_binding.waiting_s > 0.01  # there is something to be misplaced
    assert late_binding.misplaced < 0.01
    assert late_binding.held_beside_room < 0.01
    for strategy in OTHERS:
        assert late_binding.misplaced < simulate(scenario, strategy, 2000, seed).misplaced


def test_all_strategies_get_the_same_requests_and_a_seed_repeats_them() -> None:
    roomy = replace(SCENARIOS[1], occupancy=0.01, speeds=(1.0,))  # nobody waits, so only the requests make a difference
    outcomes = [simulate(roomy, strategy, 100, seed=5) for strategy in (*STRATEGIES, LATE_BINDING)]
    assert len({outcome.latency_s for outcome in outcomes}) == 1
    assert {outcome.waiting_s for outcome in outcomes} == {0.0}
    assert simulate(roomy, LATE_BINDING, 100, seed=6) != outcomes[0]


def test_one_engine_alone_has_nowhere_to_misplace_a_request() -> None:
    scenario = Scenario("alone", speeds=(1.0,), rates=(1.0,), occupancy=1.5, capacity=4)
    for strategy in STRATEGIES:
        outcome = simulate(scenario, strategy, 200, seed=0)
        assert outcome.waiting_s > 1
        assert outcome.misplaced == 0


async def test_affinity_raises_the_hit_rate_of_real_prefix_caches() -> None:
    plan = Conversations(count=12, num_turns=4, num_system_prompts=3, num_engines=3)
    without, prompts, sessions = await measure_affinity(plan, seed=0)
    assert without.hit_rate + 0.1 < prompts.hit_rate < 1
    assert without.hit_rate + 0.1 < sessions.hit_rate < 1
    assert max(prompts.balance, sessions.balance) < 2


def test_the_command_prints_every_scenario_and_every_way_to_route() -> None:
    command = [sys.executable, "-W", "error", "-m", "asyncscale.bench", "routing", "--num-requests", "50"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line[:30].strip() for line in result.stdout.splitlines()]
    assert [name for name in lines if name in {scenario.name for scenario in SCENARIOS}] == [
        scenario.name for scenario in SCENARIOS
    ]
    for strategy in STRATEGIES:
        assert lines.count(strategy.name) == len(SCENARIOS)
    assert lines[-3:] == ["no affinity", "shared prompts", "sessions"]
