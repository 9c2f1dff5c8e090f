"""The client with real engine processes and the simulated model."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest

from asyncscale import (
    AsyncScaleClient,
    ClientClosedError,
    ClientStateError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    InvalidRequestError,
    RequestAbortedError,
    RequestTimeoutError,
    SamplingParams,
    SimulatedModel,
)

FAST = SimulatedModel(base_ms=0.2, decode_us=1, prefill_us=0.1)
LONG = {"max_tokens": 5000, "ignore_eos": True}


@pytest.fixture
async def client() -> AsyncIterator[AsyncScaleClient]:
    async with AsyncScaleClient(FAST, num_engines=2) as client:
        yield client
        await assert_idle(client)


async def assert_idle(client: AsyncScaleClient) -> None:
    """Every engine's own counts, and this client's, are back at zero, and every KV block is free."""
    for stats in await client.collective_rpc("kv_cache_stats"):
        assert stats["free_blocks"] == stats["num_blocks"]
    async with asyncio.timeout(5):
        async for loads in client.watch_loads():
            if all(load.in_flight == load.running == load.waiting == 0 for load in loads):
                break
    assert all(load.mine == 0 for load in client.engine_loads())


async def reach(client: AsyncScaleClient, in_flight: int) -> None:
    """Wait until the engines themselves report so many requests."""
    async with asyncio.timeout(10):
        async for loads in client.watch_loads():
            if sum(load.running + load.waiting for load in loads) == in_flight:
                return


async def engine_pids(client: AsyncScaleClient) -> list[int]:
    return [info["pid"] for info in await client.collective_rpc("process_info")]


# --- generate


async def test_tokens_stream_one_by_one_and_the_completion_is_the_same(client: AsyncScaleClient) -> None:
    generation = client.generate("hello", max_tokens=20, temperature=0, ignore_eos=True)
    tokens = [token async for token in generation]
    completion = await generation
    assert len(tokens) == 20
    assert [token.token_id for token in tokens] == completion.token_ids
    assert "".join(map(str, tokens)) == completion.text
    assert [token.index for token in tokens] == list(range(20))
    assert [token.finish_reason for token in tokens] == [None] * 19 + ["length"]
    assert completion.finish_reason == "length"
    assert completion.prompt_token_ids == list(b"hello")


async def test_first_tokens_come_while_later_ones_are_computed() -> None:
    async with AsyncScaleClient(SimulatedModel(base_ms=20), num_engines=1) as client:
        generation = client.generate("hello", **LONG)
        async for _ in generation:
            assert not generation.done
            break


async def test_a_prompt_may_be_text_or_token_ids(client: AsyncScaleClient) -> None:
    as_text = await client.generate("hello", temperature=0, max_tokens=5)
    as_ids = await client.generate(list(b"hello"), temperature=0, max_tokens=5)
    assert as_text.token_ids == as_ids.token_ids


async def test_the_same_seed_gives_the_same_tokens_alone_in_a_crowd_and_on_either_engine(
    client: AsyncScaleClient,
) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=30, ignore_eos=True)
    alone = await client.generate("hello", params, engine=0)
    crowd = [client.generate(f"other {i}", max_tokens=50) for i in range(40)]
    crowded = await asyncio.gather(*(client.generate("hello", params, engine=engine) for engine in (0, 1)))
    await asyncio.gather(*crowd)
    assert {tuple(completion.token_ids) for completion in crowded} == {tuple(alone.token_ids)}
    assert (await client.generate("hello", params, seed=8)).token_ids != alone.token_ids


async def test_n_choices_are_separate_and_the_first_is_that_of_n_1(client: AsyncScaleClient) -> None:
    three = await client.generate("hello", n=3, seed=5, max_tokens=10, ignore_eos=True)
    one = await client.generate("hello", seed=5, max_tokens=10, ignore_eos=True)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in three.choices}) == 3
    assert three.token_ids == one.token_ids
    assert three.timing.num_output_tokens == 30


async def test_logprobs_come_with_tokens_and_completion(client: AsyncScaleClient) -> None:
    generation = client.generate("hello", logprobs=2, prompt_logprobs=1, max_tokens=3, ignore_eos=True)
    assert [token.logprob async for token in generation] == [0.0, 0.0, 0.0]
    completion = await generation
    assert completion.logprobs is not None
    assert [len(table) for table in completion.logprobs] == [2, 2, 2]
    assert completion.prompt_logprobs is not None
    assert len(completion.prompt_logprobs) == len("hello")
    assert completion.prompt_logprobs[0] is None


async def test_a_stop_string_ends_the_request_on_its_engine_too(client: AsyncScaleClient) -> None:
    text = (await client.generate("hello", temperature=0, max_tokens=20, ignore_eos=True)).text
    stop = text[20:26]
    completion = await client.generate("hello", temperature=0, stop=stop, **LONG)
    assert completion.finish_reason == "stop"
    assert completion.text == text[: text.index(stop)]


async def test_chat_uses_the_models_template(client: AsyncScaleClient) -> None:
    completion = await client.chat([{"role": "user", "content": "hi"}], max_tokens=3)
    assert b"hi" in bytes(completion.prompt_token_ids)
    with pytest.raises(InvalidRequestError):
        client.chat("not a list of messages")  # type: ignore[arg-type]


async def test_a_thousand_prompts_at_once(client: AsyncScaleClient) -> None:
    prompts = [f"prompt {i}" for i in range(1000)]
    completions = await asyncio.gather(*map(client.generate, prompts))
    assert [bytes(completion.prompt_token_ids).decode() for completion in completions] == prompts
    assert all(completion.finish_reason == "stop" for completion in completions)
    assert {completion.timing.engine for completion in completions} == {0, 1}


async def test_a_thousand_tasks_cancelled_midway_leave_nothing_behind(client: AsyncScaleClient) -> None:
    tasks = [asyncio.ensure_future(client.generate(f"prompt {i}", **LONG)) for i in range(1000)]
    await reach(client, 128)
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {asyncio.CancelledError}


async def test_requests_are_held_back_while_every_engine_is_full(client: AsyncScaleClient) -> None:
    generations = [client.generate(f"prompt {i}", **LONG) for i in range(200)]
    await reach(client, 128)
    assert [load.in_flight for load in client.engine_loads()] == [64, 64]
    for generation in generations:
        generation.abort()


async def test_a_slot_that_an_abort_frees_is_used_without_waiting_for_the_engine() -> None:
    async with AsyncScaleClient(SimulatedModel(base_ms=50), num_engines=1, max_num_seqs=1) as client:
        running, held = client.generate("a", **LONG), client.generate("b", **LONG)
        assert client.engine_loads()[0].mine == 1
        running.abort()
        await asyncio.sleep(0)
        assert client.engine_loads()[0].mine == 1
        held.abort()


async def test_a_timeout_may_be_as_long_as_you_like(client: AsyncScaleClient) -> None:
    for timeout in (float("inf"), 10**400):
        await client.generate("hello", max_tokens=2, timeout=timeout)


async def test_a_better_priority_goes_first_among_those_held_back() -> None:
    async with AsyncScaleClient(FAST, num_engines=1, max_num_seqs=1) as client:
        finished: list[str] = []

        async def run(name: str, priority: int) -> None:
            await client.generate(name, priority=priority, max_tokens=20, ignore_eos=True)
            finished.append(name)

        await asyncio.gather(run("running", 0), run("last", 5), run("middle", 0), run("first", -5))
        assert finished == ["running", "first", "middle", "last"]


async def test_timing_says_what_happened(client: AsyncScaleClient) -> None:
    prompt = "a prompt that is long enough to fill some blocks of the cache"
    await client.generate(prompt, max_tokens=5, engine=1)
    timing = (await client.generate(prompt, max_tokens=5, engine=1, ignore_eos=True)).timing
    assert timing.engine == 1
    assert timing.num_cached_tokens == len(prompt) // 16 * 16
    assert timing.num_output_tokens == 5
    assert timing.ttft is not None
    assert timing.tpot is not None
    assert 0 <= timing.queued_s <= timing.ttft


async def test_a_burst_of_equal_requests_is_spread_evenly(client: AsyncScaleClient) -> None:
    generations = [client.generate("x", **LONG) for _ in range(51)]
    assert sorted(load.mine for load in client.engine_loads()) == [25, 26]
    for generation in generations:
        generation.abort()


# --- ends


async def test_leaving_the_loop_early_frees_the_engine(client: AsyncScaleClient) -> None:
    async for _ in client.generate("hello", **LONG):
        break
    assert sum(load.mine for load in client.engine_loads()) == 0


async def test_abort_ends_the_request_and_is_idempotent(client: AsyncScaleClient) -> None:
    generation = client.generate("hello", **LONG)
    generation.abort()
    generation.abort()
    with pytest.raises(RequestAbortedError):
        await generation


async def test_a_timeout_aborts_the_request(client: AsyncScaleClient) -> None:
    with pytest.raises(RequestTimeoutError, match=r"did not finish within 0\.05 s") as caught:
        await client.generate("hello", timeout=0.05, **LONG)
    assert isinstance(caught.value, TimeoutError)


async def test_cancelling_the_task_that_reads_aborts_the_request(client: AsyncScaleClient) -> None:
    async def read() -> None:
        async for _ in client.generate("hello", **LONG):
            pass

    task = asyncio.ensure_future(read())
    await reach(client, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sum(load.mine for load in client.engine_loads()) == 0


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
async def test_a_generation_may_outlive_the_functions_of_its_module(
    client: AsyncScaleClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As at the end of the interpreter, in whatever order it takes modules apart.
    generation = client.generate("hello", max_tokens=1)
    async for _ in generation:
        pass
    monkeypatch.setattr("asyncscale.client.generation._abort_unread", None)
    del generation


async def test_a_forgotten_generation_is_aborted(client: AsyncScaleClient) -> None:
    client.generate("hello", **LONG)
    gc.collect()
    assert sum(load.mine for load in client.engine_loads()) == 0


async def test_one_requests_error_on_the_engine_fails_that_request_only() -> None:
    # Two prompts that fit the KV cache by themselves, one of which grows out of it.
    async with AsyncScaleClient(FAST, num_engines=1, num_kv_blocks=10, block_size=16) as client:
        small = client.generate("small", max_tokens=20, ignore_eos=True)
        large = client.generate("x" * 150, max_tokens=100, ignore_eos=True)
        with pytest.raises(EngineError, match="blocks"):
            await large
        assert len((await small).token_ids) == 20
        await assert_idle(client)


# --- misuse


async def test_bad_arguments_raise_from_the_call_itself_and_send_nothing(client: AsyncScaleClient) -> None:
    for arguments, keywords in [(("",), {}), (("x",), {"temperature": -1}), (("x",), {"engine": 9}), ((5,), {})]:
        with pytest.raises(InvalidRequestError):
            client.generate(*arguments, **keywords)
    assert sum(load.mine for load in client.engine_loads()) == 0


async def test_a_request_id_that_is_in_use_is_refused_and_may_be_used_again_later(client: AsyncScaleClient) -> None:
    first = client.generate("hello", request_id="mine", **LONG)
    with pytest.raises(InvalidRequestError, match="'mine' is in use"):
        client.generate("hello", request_id="mine")
    first.abort()
    assert (await client.generate("hello", request_id="mine", max_tokens=2)).request_id == "mine"


async def test_use_before_start_names_the_cure() -> None:
    client = AsyncScaleClient(FAST)
    with pytest.raises(ClientStateError, match="async with"):
        client.generate("hello")
    await client.close()
    with pytest.raises(ClientClosedError):
        await client.start()


async def test_use_after_close_says_so() -> None:
    client = AsyncScaleClient(FAST, num_engines=1)
    async with client:
        pass
    with pytest.raises(ClientClosedError):
        client.generate("hello")


async def test_use_from_another_loop_names_the_cure(client: AsyncScaleClient) -> None:
    async def use() -> None:
        client.generate("hello")

    with pytest.raises(ClientStateError, match="attach"):
        await asyncio.to_thread(asyncio.run, use())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_num_seq": 5}, TypeError, "did you mean 'max_num_seqs'"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs"),
        ({"max_num_seqs": "many"}, ValueError, "max_num_seqs"),
        ({"dtype": "float8"}, ValueError, "dtype"),
        ({"num_engines": 0}, ValueError, "num_engines"),
        ({"routing": "fastest"}, ValueError, "least-loaded"),
    ],
)
def test_wrong_options_raise_when_the_client_is_made(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        AsyncScaleClient(FAST, **options)
    assert words in str(caught.value)


# --- start and close


async def test_an_engine_that_does_not_start_raises_its_traceback_and_exit_code() -> None:
    # More memory than any machine addresses: the engine process itself fails.
    client = AsyncScaleClient(FAST, num_engines=2, max_model_len=2**44)
    with pytest.raises(EngineStartError) as caught:
        await client.start()
    assert caught.value.exit_code == 1
    assert "Traceback" in str(caught.value)
    assert "MemoryError" in str(caught.value)


async def test_an_engine_that_is_killed_while_it_loads_raises_how_it_ended() -> None:
    task = asyncio.ensure_future(AsyncScaleClient(SimulatedModel(load_s=60), num_engines=2).start())
    (engine, *_) = await loading_engines(2)
    engine.kill()
    with pytest.raises(EngineStartError, match="SIGKILL") as caught:
        await task
    assert caught.value.exit_code == -signal.SIGKILL


async def test_start_is_bounded() -> None:
    with pytest.raises(EngineStartError, match=r"not ready within 0\.3 s"):
        await AsyncScaleClient(SimulatedModel(load_s=60), num_engines=2, start_timeout=0.3).start()


async def test_a_cancelled_start_leaves_nothing_behind() -> None:
    task = asyncio.ensure_future(AsyncScaleClient(SimulatedModel(load_s=60), num_engines=2).start())
    await loading_engines(2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_closing_while_it_starts_ends_the_start() -> None:
    client = AsyncScaleClient(SimulatedModel(load_s=60), num_engines=2)
    task = asyncio.ensure_future(client.start())
    await loading_engines(2)
    await client.close()
    with pytest.raises(ClientClosedError, match="while it started"):
        await task


async def loading_engines(count: int) -> list[psutil.Process]:
    """The processes of engines that are starting, once there are so many."""
    async with asyncio.timeout(10):
        while True:
            engines = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
            if len(engines) == count:
                return engines
            await asyncio.sleep(0.01)


async def test_close_with_drain_lets_requests_finish_and_refuses_new_ones() -> None:
    client = await AsyncScaleClient(FAST, num_engines=1).start()
    generation = client.generate("hello", max_tokens=200, ignore_eos=True)
    closing = asyncio.ensure_future(client.close())
    await asyncio.sleep(0)
    with pytest.raises(ClientClosedError):
        client.generate("late")
    await closing
    assert len((await generation).token_ids) == 200


async def test_close_without_drain_ends_requests_with_client_closed_error() -> None:
    client = await AsyncScaleClient(FAST, num_engines=1).start()
    generation = client.generate("hello", **LONG)
    await asyncio.gather(client.close(drain=False), client.close(drain=False))
    with pytest.raises(ClientClosedError):
        await generation
    await client.close()


async def test_a_drain_that_takes_too_long_ends_like_close_without_drain() -> None:
    client = await AsyncScaleClient(FAST, num_engines=1).start()
    generation = client.generate("hello", **LONG)
    await client.close(drain=True, timeout=0.05)
    with pytest.raises(ClientClosedError):
        await generation


async def test_engines_of_the_simulated_model_do_not_load_torch(client: AsyncScaleClient) -> None:
    for pid in await engine_pids(client):
        assert not any("libtorch" in mapping.path for mapping in psutil.Process(pid).memory_maps())


def test_a_client_does_not_import_torch_either() -> None:
    script = """
import asyncio, sys
from asyncscale import AsyncScaleClient, SimulatedModel

async def main():
    async with AsyncScaleClient(SimulatedModel(), num_engines=1) as client:
        await client.generate("hello", max_tokens=2)

asyncio.run(main())
print([name for name in ("torch", "transformers", "tokenizers", "gguf") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


# --- calls, and other clients


async def test_collective_rpc_runs_once_on_every_engine_in_order(client: AsyncScaleClient) -> None:
    await client.generate("x" * 64, max_tokens=2, engine=1)
    stats = await client.collective_rpc("kv_cache_stats")
    assert [entry["cached_blocks"] > 0 for entry in stats] == [False, True]
    await client.collective_rpc("reset_prefix_cache")
    assert [entry["cached_blocks"] for entry in await client.collective_rpc("kv_cache_stats")] == [0, 0]


async def test_an_unknown_engine_method_is_refused(client: AsyncScaleClient) -> None:
    with pytest.raises(EngineError, match="unknown engine method '__init__'; known are drain, kv_cache_stats"):
        await client.collective_rpc("__init__")


async def test_an_attached_client_shares_the_engines_and_each_sees_the_others_load(client: AsyncScaleClient) -> None:
    async with AsyncScaleClient.attach(client.address) as other:
        mine = client.generate("hello", engine=0, **LONG)
        theirs = other.generate("hello", engine=0, **LONG)
        await reach(client, 2)
        await reach(other, 2)
        assert [(c.engine_loads()[0].mine, c.engine_loads()[0].others) for c in (client, other)] == [(1, 1), (1, 1)]
        mine.abort()
        theirs.abort()
    completion = await client.generate("hello", max_tokens=2)
    assert len(completion.token_ids) == 2


async def test_requests_of_an_attached_client_that_leaves_are_freed(client: AsyncScaleClient) -> None:
    other = await AsyncScaleClient.attach(client.address).start()
    generations = [other.generate("hello", **LONG) for _ in range(10)]
    await reach(client, 10)
    await other.close(drain=False)
    await reach(client, 0)
    for generation in generations:
        with pytest.raises(ClientClosedError):
            await generation


async def test_attached_clients_hear_at_once_that_the_owner_closed() -> None:
    owner = await AsyncScaleClient(FAST, num_engines=1).start()
    async with AsyncScaleClient.attach(owner.address) as other:
        generation = other.generate("hello", **LONG)
        await reach(other, 1)
        await owner.close(drain=False)
        with pytest.raises(EngineDeadError, match="owner closed"):
            await generation
