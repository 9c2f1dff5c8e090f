"""The blocking client with real engine processes: the same results, from any thread, and nothing left behind."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import inspect
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from programs import assert_prints, run, script, signalled

import asyncscale
from asyncscale import (
    ClientClosedError,
    ClientStateError,
    InvalidRequestError,
    RequestAbortedError,
    RequestTimeoutError,
    SamplingParams,
    SimulatedModel,
)
from asyncscale.blocking import AsyncScaleClient, Generation

FAST = SimulatedModel(base_ms=0.2, decode_us=1, prefill_us=0.1)
LONG = {"max_tokens": 5000, "ignore_eos": True}


@pytest.fixture
def client() -> Iterator[AsyncScaleClient]:
    with AsyncScaleClient(FAST, num_engines=2) as client:
        yield client
        assert_idle(client)


def assert_idle(client: AsyncScaleClient) -> None:
    for loads in client.watch_loads():
        if all(load.in_flight == load.running == load.waiting == 0 for load in loads):
            return


# --- the same client

ONLY_ASYNCHRONOUS = {"dashboard"}  # it runs beside the cells of a notebook


def public_methods(kind: type) -> dict[str, Any]:
    return {name: inspect.getattr_static(kind, name) for name in dir(kind) if not name.startswith("_")}


def test_it_has_every_public_name_of_the_asynchronous_client_with_the_same_arguments() -> None:
    ours, theirs = public_methods(AsyncScaleClient), public_methods(asyncscale.AsyncScaleClient)
    assert theirs.keys() - ours.keys() <= ONLY_ASYNCHRONOUS
    assert ours.keys() <= theirs.keys()
    assert inspect.signature(AsyncScaleClient).parameters == inspect.signature(asyncscale.AsyncScaleClient).parameters
    for name, member in theirs.items():
        if name not in ours:
            continue
        if isinstance(member, property):
            assert isinstance(ours[name], property)
            continue
        their_signature = inspect.signature(getattr(asyncscale.AsyncScaleClient, name))
        assert inspect.signature(getattr(AsyncScaleClient, name)).parameters == their_signature.parameters, name
        assert ours[name].__doc__


def test_a_generation_has_what_the_asynchronous_one_has() -> None:
    assert public_methods(Generation).keys() >= public_methods(asyncscale.Generation).keys()


def test_tokens_and_completion_are_those_of_the_asynchronous_client(client: AsyncScaleClient) -> None:
    async def ask() -> tuple[list[Any], asyncscale.Completion]:
        async with asyncscale.AsyncScaleClient.attach(client.address) as other:
            generation = other.generate("hello", n=2, seed=3, logprobs=1, max_tokens=20, ignore_eos=True)
            return [seen(token) async for token in generation], await generation

    def seen(token: asyncscale.Token) -> tuple[object, ...]:
        return token.choice, token.index, token.token_id, token.text, token.logprob, token.finish_reason

    tokens, completion = asyncio.run(ask())
    generation = client.generate("hello", SamplingParams(n=2, seed=3), logprobs=1, max_tokens=20, ignore_eos=True)
    assert sorted(map(seen, generation)) == sorted(tokens)
    assert generation.result().choices == completion.choices
    assert (generation.done, generation.num_tokens) == (True, 40)


def test_chat_submit_and_the_rest(client: AsyncScaleClient) -> None:
    chat = client.chat([{"role": "user", "content": "hello"}], max_tokens=3, ignore_eos=True)
    assert len(chat.result().token_ids) == 3
    assert len(client.submit("x", max_tokens=3, ignore_eos=True, request_id="mine").result().token_ids) == 3
    assert [engine.state for engine in client.health()] == ["ready", "ready"]
    assert [load.engine_id for load in client.engine_loads()] == [0, 1]
    assert len({info["pid"] for info in client.collective_rpc("process_info")} | {os.getpid()}) == 3
    assert client.num_malformed == 0
    assert sum(client.metrics().requests.request_success.values()) == 2
    assert client.metrics().requests.tokens_received >= 6
    with AsyncScaleClient.attach(client.address) as other:
        assert len(other.generate("x", max_tokens=3, ignore_eos=True).result().token_ids) == 3


def test_errors_are_raised_by_the_call_itself(client: AsyncScaleClient) -> None:
    with pytest.raises(InvalidRequestError, match="temperature"):
        client.generate("x", temperature=-1)
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        client.submit([])
    with pytest.raises(asyncscale.EngineError, match="no_such"):
        client.collective_rpc("no_such")


# --- reading


def test_many_prompts_at_once_from_one_thread(client: AsyncScaleClient) -> None:
    generations = [client.generate(f"prompt {i}", max_tokens=10, ignore_eos=True) for i in range(200)]
    futures = [generation.future() for generation in generations]
    assert len({future.result().request_id for future in concurrent.futures.as_completed(futures)}) == 200
    assert generations[0].future() is futures[0]


def test_many_threads_at_once(client: AsyncScaleClient) -> None:
    def ask(index: int) -> str:
        return "".join(map(str, client.generate(f"prompt {index % 5}", temperature=0, max_tokens=20)))

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        texts = list(pool.map(ask, range(100)))
    assert len(set(texts)) == 5
    assert texts[:5] * 20 == texts


def test_several_threads_may_read_one_request_and_each_sees_all_of_it(client: AsyncScaleClient) -> None:
    generation = client.generate("hello", max_tokens=300, ignore_eos=True, stop="never")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = set(pool.map(lambda _: "".join(map(str, generation)), range(8)))
    assert texts == {generation.result().text}


class CountedQueue(SimpleQueue[Any]):
    num_gets = 0

    def get(self, *arguments: Any, **options: Any) -> Any:
        CountedQueue.num_gets += 1
        return super().get(*arguments, **options)


def test_tokens_that_have_arrived_cross_threads_in_one_go(
    client: AsyncScaleClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncscale.blocking.generation.SimpleQueue", CountedQueue)
    generation = client.generate("hello", max_tokens=1000, ignore_eos=True)
    generation.result()
    assert sum(1 for _ in generation) == 1000
    assert CountedQueue.num_gets == 2  # all of them, and the end


async def test_it_works_in_a_thread_that_runs_an_event_loop(client: AsyncScaleClient) -> None:
    generation = client.generate("hello", max_tokens=5, ignore_eos=True)
    assert len(list(generation)) == 5
    completion = await asyncio.wrap_future(client.generate("hello", max_tokens=5, ignore_eos=True).future())
    assert len(completion.token_ids) == 5


def test_its_own_thread_is_refused_rather_than_left_waiting_for_itself(client: AsyncScaleClient) -> None:
    errors: SimpleQueue[BaseException | None] = SimpleQueue()
    other = client.generate("hello", **LONG)

    def wait(_: object) -> None:
        for read in (other.result, lambda: list(other), lambda: client.submit("x"), client.close):
            try:
                read()
                errors.put(None)
            except BaseException as error:
                errors.put(error)

    client.generate("hello", max_tokens=1).future().add_done_callback(wait)
    for _ in range(4):
        error = errors.get(timeout=5)
        assert isinstance(error, ClientStateError)
        assert "own thread" in str(error)


# --- ends


def test_leaving_the_loop_early_and_forgetting_a_request_end_it_on_its_engine() -> None:
    with AsyncScaleClient(SimulatedModel(base_ms=20), num_engines=1) as client:  # a hundred seconds for all tokens
        generation = client.generate("hello", **LONG)
        for _ in generation:
            break
        assert isinstance(generation.exception(), RequestAbortedError)
        client.generate("hello", **LONG)
        assert_idle(client)


def test_abort_from_another_thread_ends_the_reader(client: AsyncScaleClient) -> None:
    generation = client.generate("hello", **LONG)
    tokens = iter(generation)
    assert next(tokens).index == 0
    threading.Thread(target=generation.abort).start()
    with pytest.raises(RequestAbortedError):
        list(tokens)
    with pytest.raises(RequestAbortedError):
        generation.result()
    assert isinstance(generation.exception(), RequestAbortedError)
    generation.abort()


def test_a_result_that_is_waited_for_too_short_goes_on(client: AsyncScaleClient) -> None:
    generation = client.generate("hello", max_tokens=2000, ignore_eos=True)
    with pytest.raises(TimeoutError, match="it goes on"):
        generation.result(timeout=0.001)
    assert len(generation.result().token_ids) == 2000
    assert generation.exception() is None


def test_the_requests_own_timeout_and_a_cancelled_future_abort_it(client: AsyncScaleClient) -> None:
    with pytest.raises(RequestTimeoutError):
        client.generate("hello", **LONG, timeout=0.01).result()
    generation = client.generate("hello", **LONG)
    assert generation.future().cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        generation.result()
    assert_idle(client)


def test_close_with_drain_lets_requests_finish_and_they_can_be_read_afterwards() -> None:
    client = AsyncScaleClient(FAST, num_engines=1).start()
    generations = [client.generate("hello", max_tokens=200, ignore_eos=True, seed=1) for _ in range(3)]
    client.close()
    client.close()
    assert {len(generation.result().token_ids) for generation in generations[1:]} == {200}
    assert "".join(map(str, generations[0])) == generations[0].result().text == generations[1].result().text


def test_leaving_with_ends_what_runs_and_everybody_who_waits_for_it() -> None:
    errors: SimpleQueue[BaseException] = SimpleQueue()
    reading = threading.Barrier(3)

    def read(generation: Generation, by_token: bool) -> None:
        try:
            for token in generation:
                if token.index == 0:
                    reading.wait()
                    if not by_token:
                        generation.result()
        except BaseException as error:
            errors.put(error)

    with AsyncScaleClient(SimulatedModel(base_ms=2), num_engines=1) as client:
        generations = [client.generate("hello", **LONG) for _ in range(3)]
        threads = [threading.Thread(target=read, args=(g, b)) for g, b in zip(generations, (True, False), strict=False)]
        for thread in threads:
            thread.start()
        reading.wait()
    for thread in threads:
        thread.join(10)
    assert [type(errors.get(timeout=5)) for _ in threads] == [ClientClosedError] * 2
    for read_it in (generations[2].result, lambda: list(generations[2])):
        with pytest.raises(ClientClosedError):
            read_it()


def test_use_before_start_after_close_and_twice_names_the_cure() -> None:
    client = AsyncScaleClient(FAST, num_engines=1)
    with pytest.raises(ClientStateError, match="use `with AsyncScaleClient"):
        client.generate("x")
    assert "not started" in repr(client)
    with client:
        with pytest.raises(ClientStateError, match="started already"):
            client.start()
        assert repr(client).startswith("<blocking AsyncScaleClient SimulatedModel(")
    for call in (client.start, lambda: client.generate("x"), client.engine_loads, lambda: client.address):
        with pytest.raises(ClientClosedError, match="it is closed"):
            call()
    assert list(client.watch_loads()) == []


def test_a_request_taken_for_its_completion_says_what_to_write() -> None:
    with AsyncScaleClient(FAST, num_engines=1) as client:
        generation = client.generate("hello", max_tokens=5, ignore_eos=True)
        with pytest.raises(AttributeError, match=r"Write `generation\.result\(\)\.text`"):
            generation.text  # type: ignore[attr-defined]  # noqa: B018
        assert "`.result()` waits for all of it, `for` reads it" in str(generation)
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copy.copy(generation)
        assert len(generation.result().token_ids) == 5
    with pytest.raises(ClientClosedError, match="leaving `with` does that"):
        client.generate("x")


async def test_async_syntax_names_the_asynchronous_client(client: AsyncScaleClient) -> None:
    with pytest.raises(TypeError, match="that for `async with` is asyncscale's"):
        async with AsyncScaleClient(FAST):  # type: ignore[attr-defined]
            pass
    generation: Any = client.generate("hello", max_tokens=1)
    with pytest.raises(TypeError, match=r"a Generation of asyncscale\.blocking"):
        await generation
    with pytest.raises(TypeError, match=r"a Generation of asyncscale\.blocking"):
        [token async for token in generation]


def test_a_start_that_fails_leaves_nothing() -> None:
    with pytest.raises(asyncscale.ModelLoadError, match="no-such-model"):
        AsyncScaleClient("no-such-model").start()
    with pytest.raises(asyncscale.EngineStartError), AsyncScaleClient(SimulatedModel(load_s=60), start_timeout=0.1):
        pass


def test_closing_it_in_another_thread_while_it_starts() -> None:
    client = AsyncScaleClient(SimulatedModel(load_s=60), num_engines=1)
    timer = threading.Timer(0.2, client.close)
    timer.start()
    with pytest.raises(ClientClosedError):
        client.start()
    timer.join()


def test_a_forgotten_client_ends_its_engines_and_warns() -> None:
    def forget() -> Generation:
        client = AsyncScaleClient(FAST, num_engines=1).start()
        return client.generate("hello", max_tokens=3, ignore_eos=True)

    generation = forget()
    assert len(generation.result().token_ids) == 3  # as long as somebody reads, it is not forgotten
    with pytest.warns(ResourceWarning, match="unclosed client <blocking AsyncScaleClient"):
        del generation


# --- whole programs

PRELUDE = "from asyncscale.blocking import AsyncScaleClient\n"


def blocking_script(folder: Path, body: str) -> str:
    return script(folder, PRELUDE + body)


@pytest.mark.parametrize("call", ["for token in generation: pass", "generation.result()", "client.close()"])
def test_ctrl_c_while_it_waits_ends_the_request_and_the_program_at_once(workspace: Path, call: str) -> None:
    path = blocking_script(
        workspace,
        f"""
with AsyncScaleClient(SimulatedModel(base_ms=5), num_engines=1) as client:
    generation = client.generate("x", max_tokens=5000, ignore_eos=True)
    next(iter(client.watch_loads()))
    try:
        print("waiting", flush=True)
        {call}
    except KeyboardInterrupt:
        error = generation.exception()
        print(type(error).__name__, flush=True)
        raise
""",
    )
    code, stdout, stderr = signalled(path, line="waiting", sent=[signal.SIGINT], delay=0.2)
    ended = "ClientClosedError" if "close" in call else "RequestAbortedError"
    assert (code, stdout) == (-signal.SIGINT, f"{ended}\n")
    assert (stderr.count("Traceback"), stderr.splitlines()[-1]) == (1, "KeyboardInterrupt")


def test_ctrl_c_while_it_starts_leaves_nothing(workspace: Path) -> None:
    body = 'print("starting", flush=True)\nAsyncScaleClient(SimulatedModel(load_s=60), num_engines=1).start()\n'
    path = blocking_script(workspace, body)
    code, _, stderr = signalled(path, line="starting", sent=[signal.SIGINT], delay=0.5)
    assert code == -signal.SIGINT
    assert stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "import atexit; atexit.register(client.close, drain=False)"])
def test_a_program_may_end_without_closing_its_client(workspace: Path, end: str) -> None:
    path = blocking_script(
        workspace,
        f"""
client = AsyncScaleClient(FAST, num_engines=1).start()
print(len(client.generate("x", max_tokens=3, ignore_eos=True).result().token_ids), flush=True)
generation = client.generate("x", max_tokens=8000, ignore_eos=True)
{end}
""",
    )
    assert_prints("3\n", path)


def test_a_fork_is_told_to_attach(workspace: Path) -> None:
    path = blocking_script(
        workspace,
        """
client = AsyncScaleClient(FAST, num_engines=1).start()
if os.fork() == 0:
    try:
        client.generate("x")
    except ClientStateError as error:
        print("attach(client.address)" in str(error), flush=True)
    with AsyncScaleClient.attach(client.address) as mine:
        print(len(mine.generate("x", max_tokens=3, ignore_eos=True).result().token_ids), flush=True)
    client.close()
    os._exit(0)
os.wait()
print(len(client.generate("x", max_tokens=3, ignore_eos=True).result().token_ids), flush=True)
client.close()
""",
    )
    assert_prints("True\n3\n3\n", path)


def test_a_program_that_closes_it_is_quiet_with_all_warnings_as_errors(workspace: Path) -> None:
    done = run("-W", "error", blocking_script(workspace, "with AsyncScaleClient(FAST) as client: print(client)\n"))
    assert (done.returncode, done.stderr) == (0, "")
