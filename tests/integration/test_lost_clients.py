"""Attached clients that are killed, stopped or blocked: what is theirs ends or waits, and others notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from asyncscale import AsyncScaleClient, Completion, FrontendError, SimulatedModel, run_frontends
from asyncscale.testing import wait_until

MODEL = SimulatedModel(base_ms=2, decode_us=1, prefill_us=0.1)
LONG: dict[str, Any] = {"max_tokens": 8000, "ignore_eos": True}
PROMISE_S = 2.0
KINDS: list[dict[str, Any]] = [
    {"max_tokens": 700, "ignore_eos": True, **kind}
    for kind in [
        {"temperature": 0},
        {"seed": 3},
        {"seed": 4, "n": 3},
        {"seed": 5, "logprobs": 2, "prompt_logprobs": 1},
        {"seed": 6, "stop": " w17"},
        {"seed": 8, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    ]
]

Body = Callable[[AsyncScaleClient, Any], Awaitable[Any]]


class Other:
    """A client in a process of its own; `end` is a pipe to what it runs."""

    def __init__(self, process: psutil.Process, end: Any, run: asyncio.Future[list[Any]]) -> None:
        self.process = process
        self.end = end
        self._run = run

    async def hear(self) -> Any:
        """What it says next."""
        return await asyncio.to_thread(self.end.recv)

    async def stop(self) -> None:
        self.process.suspend()
        await wait_until(lambda: self.process.status() == psutil.STATUS_STOPPED)

    async def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.kill()
        with contextlib.suppress(FrontendError):
            await self._run

    async def result(self) -> Any:
        (result,) = await self._run
        return result


Start = Callable[[AsyncScaleClient, Body], Awaitable[Other]]


@pytest.fixture
async def start(runtime_folders: Path) -> AsyncIterator[Start]:
    """start(owner, body) runs body(client, end) in a new process; `end` is a pipe to this one."""
    with contextlib.ExitStack() as stack:
        others: list[Other] = []

        async def start_other(owner: AsyncScaleClient, body: Body) -> Other:
            path = str(runtime_folders / f"other-{len(others)}")
            listener = stack.enter_context(connection.Listener(path))

            async def main(client: AsyncScaleClient, index: int) -> Any:
                with connection.Client(path) as end:
                    end.send(os.getpid())
                    return await body(client, end)

            run = asyncio.ensure_future(run_frontends(main, 1, owner.address))
            end = stack.enter_context(await asyncio.to_thread(listener.accept))
            others.append(Other(psutil.Process(end.recv()), end, run))
            return others[-1]

        yield start_other


async def reach(client: AsyncScaleClient, in_flight: int, timeout: float = 20.0) -> None:
    """Wait until the engines themselves report so many requests."""
    async with asyncio.timeout(timeout):
        async for loads in client.watch_loads():
            if sum(load.running + load.waiting for load in loads) == in_flight:
                return


async def used_blocks(client: AsyncScaleClient) -> int:
    return sum(stats["used_blocks"] for stats in await client.collective_rpc("kv_cache_stats"))


async def ask(client: AsyncScaleClient, end: Any) -> None:
    """More requests than an engine runs at once, of which nothing is expected; says when they are known there."""
    generations = [client.generate("never finished", **LONG) for _ in range(20)]
    first = aiter(generations[0])
    await anext(first)
    end.send("asked")
    await asyncio.gather(*generations)


def end_of(how: str, other: Other) -> Awaitable[None]:
    return other.kill() if how == "killed" else other.stop()


# --- gone


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_a_client_that_is_gone_has_no_requests_and_no_blocks_within_two_seconds_and_others_notice_nothing(
    start: Start, how: str, paused: bool
) -> None:
    """Some of its requests run and some wait, or all of them do because the engines are paused."""
    async with (
        AsyncScaleClient(MODEL, num_engines=2, max_num_seqs=8) as owner,
        AsyncScaleClient.attach(owner.address) as reader,
    ):
        undisturbed = await reader.generate("another's", seed=1, max_tokens=1500, ignore_eos=True)
        stream = reader.generate("another's", seed=1, max_tokens=1500, ignore_eos=True)
        other = await start(owner, ask)
        assert await other.hear() == "asked"
        if paused:
            await owner.collective_rpc("pause")
        began = time.monotonic()
        await end_of(how, other)
        await reach(owner, 1)
        assert time.monotonic() - began < PROMISE_S + 1  # the machine may be slow, the promise is not
        if paused:
            await owner.collective_rpc("resume")
        completion = await stream
        assert completion.token_ids == undisturbed.token_ids
        assert completion.timing.num_moves == 0
        assert await used_blocks(owner) == 0
        await other.kill()


# --- stopped, and back


async def half_read(client: AsyncScaleClient, end: Any) -> tuple[list[Completion], list[list[tuple[int, int]]], bool]:
    """Streams of every kind, stopped when some tokens are read; (what they gave, what was read of each, all moved)."""
    generations = [client.generate("half read", **kind) for kind in KINDS]
    streams = [aiter(generation) for generation in generations]
    read = [[await anext(stream) for _ in range(20)] for stream in streams]
    end.send("half read")
    for tokens, stream in zip(read, streams, strict=True):
        tokens += [token async for token in stream]
    completions = [await generation for generation in generations]
    seen = [[(token.choice, token.token_id) for token in tokens] for tokens in read]
    return completions, seen, any(completion.timing.num_moves for completion in completions)


def values(completion: Completion) -> Any:
    return [(choice.token_ids, choice.text, choice.finish_reason) for choice in completion.choices]


@pytest.mark.parametrize("how", ["stopped", "blocked"])
async def test_a_client_that_goes_on_after_a_stop_or_a_block_has_every_token_once(start: Start, how: str) -> None:
    async def body(client: AsyncScaleClient, end: Any) -> Any:
        class Blocking:
            def send(self, text: str) -> None:
                end.send(text)
                if how == "blocked":
                    time.sleep(5)

        return await half_read(client, Blocking())

    async with AsyncScaleClient(SimulatedModel(base_ms=4), num_engines=2) as owner:
        other = await start(owner, body)
        assert await other.hear() == "half read"
        if how == "stopped":
            await other.stop()
            await reach(owner, 0)
            other.process.resume()
        completions, seen, moved = await other.result()
        assert moved == (how == "stopped")
        all_undisturbed = await asyncio.gather(*(owner.generate("half read", **kind) for kind in KINDS))
        for undisturbed, completion, tokens in zip(all_undisturbed, completions, seen, strict=True):
            assert values(completion) == values(undisturbed)
            assert completion.prompt_logprobs == undisturbed.prompt_logprobs
            for mine, theirs in zip(completion.choices, undisturbed.choices, strict=True):
                assert mine.logprobs == theirs.logprobs
                assert [token_id for choice, token_id in tokens if choice == mine.index] == mine.token_ids
        assert owner.health()[0].restarts == 0
        assert await used_blocks(owner) == 0


async def test_tokens_that_nobody_reads_wait_in_some_bytes_each_and_others_stream_on(start: Start) -> None:
    """Half a million tokens for a client whose event loop is blocked meanwhile; another's requests are complete."""
    num_requests, num_tokens = 64, 8000

    async def body(client: AsyncScaleClient, end: Any) -> tuple[int, bool]:
        generations = [client.generate("unread", **LONG) for _ in range(num_requests)]
        streams = [aiter(generation) for generation in generations]
        await asyncio.gather(*map(anext, streams))
        before = psutil.Process().memory_info().rss
        end.send("blocked")
        end.recv()
        growth = psutil.Process().memory_info().rss - before
        completions = await asyncio.gather(*generations)
        return growth, all(len(completion.token_ids) == num_tokens for completion in completions)

    model = SimulatedModel(base_ms=0.2, decode_us=0, prefill_us=0)
    async with AsyncScaleClient(model, num_engines=1, max_num_seqs=num_requests + 1) as owner:
        alone = await owner.generate("read", seed=1, max_tokens=1000, ignore_eos=True)
        engine = psutil.Process(owner._engines.supervisor.engines[0].pid)  # type: ignore[attr-defined]
        other = await start(owner, body)
        assert await other.hear() == "blocked"
        before = engine.memory_info().rss
        meanwhile = await owner.generate("read", seed=1, max_tokens=1000, ignore_eos=True)
        await reach(owner, 0, timeout=50)
        engine_growth = engine.memory_info().rss - before
        other.end.send("go on")
        client_growth, complete = await other.result()
        assert complete
        assert meanwhile.token_ids == alone.token_ids
        assert client_growth < 24 * num_requests * num_tokens
        assert engine_growth < 40 * num_requests * num_tokens


# --- an engine that is gone, seen by the connection


async def test_attached_clients_move_their_requests_though_the_owner_is_blocked(start: Start) -> None:
    async def body(client: AsyncScaleClient, end: Any) -> list[Completion]:
        generations = [client.generate("goes on", seed=seed, max_tokens=1000, ignore_eos=True) for seed in range(6)]
        streams = [aiter(generation) for generation in generations]
        await asyncio.gather(*map(anext, streams))
        end.send("streams")
        completions = await asyncio.gather(*generations)
        end.send("complete")
        return completions

    async with AsyncScaleClient(MODEL, num_engines=2) as owner:
        other = await start(owner, body)
        assert await other.hear() == "streams"
        engine = owner._engines.supervisor.engines[1]  # type: ignore[attr-defined]
        os.kill(engine.pid, signal.SIGKILL)
        assert other.end.poll(30)  # and nothing else runs in this process
        assert other.end.recv() == "complete"
        completions = await other.result()
        assert {completion.timing.num_moves for completion in completions} == {0, 1}
        undisturbed = await asyncio.gather(
            *(owner.generate("goes on", seed=seed, max_tokens=1000, ignore_eos=True) for seed in range(6))
        )
        assert [completion.token_ids for completion in completions] == [alone.token_ids for alone in undisturbed]
