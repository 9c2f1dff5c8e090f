"""Connections to engines that live on: what was under way is sent again, once, and nothing old counts any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from asyncscale import AsyncScaleError, SamplingParams, SimulatedModel, messages
from asyncscale.client.dispatcher import Dispatcher
from asyncscale.client.engines import AttachedEngines
from asyncscale.client.options import Limits
from asyncscale.client.policies import least_loaded
from asyncscale.client.preparation import Preparation, RequestOptions
from asyncscale.client.submission import Submission
from asyncscale.tokenization.loading import load_codec

MakeFleet = Callable[[int], Awaitable[Any]]
LOAD = messages.Load(1, 0, 0, 0, 0, 0, 0, 1000)


def ask(fleet: Any, engine: int | None = None, **sampling: Any) -> Any:
    """A request with the prompt (1, 2, 3)."""
    facts, codec = fleet.engines[0].member.facts, load_codec(SimulatedModel())
    submission = Submission(Preparation(codec, facts), fleet.dispatcher)
    params = SamplingParams.of(None, {"max_tokens": 5, "ignore_eos": True, "seed": 9, **sampling})
    return submission.submit(lambda: [1, 2, 3], params, RequestOptions(engine=engine), fleet)


def adds(engine: Any) -> list[tuple[bytes, messages.Add]]:
    return [entry for entry in engine.received if isinstance(entry[1], messages.Add)]


def tokens(add: messages.Add) -> list[int]:
    return np.frombuffer(add.token_ids, "<i4").tolist()


def outputs(add: messages.Add, *token_ids: int, done: bool = False) -> messages.Outputs:
    finished = [messages.Finished(add.request_id, "length")] if done else []
    return messages.Outputs([add.request_id] * len(token_ids), list(token_ids), finished, LOAD)


async def sent(fleet: Any, engine: Any, count: int) -> tuple[bytes, messages.Add]:
    """The newest of so many requests that the engine was sent."""
    await fleet.until(lambda: len(adds(engine)) == count)
    return adds(engine)[-1]


@pytest.mark.parametrize("pinned", [None, 0])
async def test_what_was_under_way_goes_on_behind_the_tokens_that_have_arrived(
    make_fleet: MakeFleet, pinned: int | None
) -> None:
    fleet = await make_fleet(1)
    (engine,) = fleet.engines
    generation = ask(fleet, engine=pinned)
    old, add = await sent(fleet, engine, 1)
    engine.send(old, outputs(add, 10, 11))
    stream = aiter(generation)
    assert [(await anext(stream)).token_id for _ in range(2)] == [10, 11]
    engine.cut()
    new, again = await sent(fleet, engine, 2)
    assert (new != old, again.request_id != add.request_id) == (True, True)
    assert (tokens(again), again.num_prompt_tokens, again.sampling.seed) == ([1, 2, 3, 10, 11], 3, 9)
    assert [(load.mine, load.my_tokens) for load in fleet.dispatcher.loads()] == [(1, add.weight)]
    engine.send(new, outputs(add, 99))  # of the old one: nobody's any more
    engine.send(new, outputs(again, 12, 13, 14, done=True))
    completion = await generation
    assert (completion.token_ids, completion.timing.num_moves) == ([10, 11, 12, 13, 14], 1)
    assert [load.mine for load in fleet.dispatcher.loads()] == [0]


async def test_a_loss_is_no_death_however_often(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    (engine,) = fleet.engines
    generation = ask(fleet)
    stream = aiter(generation)
    for token_id in range(5):
        client, add = await sent(fleet, engine, token_id + 1)
        engine.send(client, outputs(add, token_id, done=token_id == 4))
        assert (await anext(stream)).token_id == token_id
        engine.cut()
    assert (await generation).token_ids == [0, 1, 2, 3, 4]
    assert fleet.dispatcher.last_death is None


async def test_only_choices_that_have_not_ended_are_sent_again(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    (engine,) = fleet.engines
    generation = ask(fleet, n=3)
    client, add = await sent(fleet, engine, 1)
    first, second, third = range(add.request_id, add.request_id + 3)
    ended = messages.Finished(second, "length")
    engine.send(client, messages.Outputs([first, second, second, third], [1, 2, 3, 4], [ended], LOAD))
    stream = aiter(generation)
    assert [(await anext(stream)).token_id for _ in range(4)] == [1, 2, 3, 4]
    engine.cut()
    await sent(fleet, engine, 3)
    again = [add for _, add in adds(engine)[1:]]
    assert [(tokens(add), add.sampling.seed, add.n) for add in again] == [([1, 2, 3, 1], 9, 1), ([1, 2, 3, 4], 11, 1)]
    generation.abort()


async def test_an_engine_is_told_again_what_the_client_wants_to_know_and_how_it_is_to_work(
    make_fleet: MakeFleet,
) -> None:
    fleet = await make_fleet(1)
    (engine,) = fleet.engines
    fleet.dispatcher.watch_loads(lambda engine_id, report: None)
    await fleet.dispatcher.call("pause", [])
    engine.cut()
    await fleet.until(lambda: len(engine.calls()) == 2)
    assert engine.calls() == [("pause", []), ("pause", [])]
    assert engine.connects() == [False, True, True]


async def test_a_call_without_an_answer_is_answered_with_the_loss(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    (engine,) = fleet.engines
    engine.silent = True
    answer = fleet.dispatcher.call("profile", [])
    await fleet.until(lambda: bool(engine.calls()))
    engine.cut()
    (result,) = await answer
    assert (result.engine_id, result.error, result.died) == (0, "the connection to engine 0 was lost", False)


async def test_a_lost_connection_to_an_address_where_nobody_is_means_a_dead_engine(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(2)
    unreachable: list[int] = []
    fleet.dispatcher.on_unreachable = lambda member: unreachable.append(member.engine_id)
    fleet.engines[1].close()
    await fleet.until(lambda: unreachable == [1])
    generation = ask(fleet, engine=0)
    await sent(fleet, fleet.engines[0], 1)
    generation.abort()


async def test_a_client_tells_what_it_has_read(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    (engine,) = fleet.engines

    def reads() -> list[messages.ToEngine]:
        return [message for _, message in engine.received if isinstance(message, messages.Read)]

    for number in range(2 * messages.READ_INTERVAL):
        engine.tell_owner(running=number)
    await fleet.until(lambda: len(reads()) == 2)
    assert [msgspec.structs.astuple(read) for read in reads()] == [(messages.READ_INTERVAL,)] * 2


# --- to the owner


async def test_a_client_that_lost_its_connection_to_a_living_owner_is_welcomed_anew(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(2)
    scissors = fleet.coordinator_scissors()
    client_id = b"c" * messages.CLIENT_ID_SIZE
    dispatcher = Dispatcher(fleet.context, client_id, least_loaded, Limits())
    attached = AttachedEngines(fleet.context, client_id, fleet.coordinator.address, dispatcher)
    await attached.start()
    fleet.engines[0].silent = True
    call = asyncio.ensure_future(attached.call("profile", []))
    await fleet.until(lambda: bool(fleet.engines[0].calls()))
    scissors.cut()
    fleet.kill(fleet.engines[1])
    joiner = fleet.join()
    with pytest.raises(AsyncScaleError, match="lost before it answered"):
        await call
    await fleet.until(lambda: [member.engine_id for member in attached.roster.members] == [0, joiner.engine_id])
    await fleet.until(lambda: len(fleet.coordinator._clients) == 1)  # the old connection is forgotten
    dispatcher.close(RuntimeError("the test is over"))
    await attached.stop()
