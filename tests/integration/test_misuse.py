"""What a new user does wrong, and what he is told: the cure, in one line, and no secret."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import pickle
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import pytest
import pytest_asyncio

from asyncscale import (
    AsyncScaleClient,
    ClientClosedError,
    ClientStateError,
    Generation,
    InvalidRequestError,
    SamplingParams,
    SimulatedModel,
    run_frontends,
)

FAST = SimulatedModel(base_ms=0.2)
T = TypeVar("T")

MESSAGE = {"role": "user", "content": "Hello!"}


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[AsyncScaleClient]:
    async with AsyncScaleClient(FAST, num_engines=1) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def generation(client: AsyncScaleClient) -> AsyncIterator[Generation]:
    generation = client.generate("hello", max_tokens=5, ignore_eos=True)
    yield generation
    assert len((await generation).token_ids) == 5  # whatever was done to it


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """In a thread that is gone then."""
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)


# --- no await


@pytest.mark.parametrize("name", ["text", "token_ids", "finish_reason", "choices", "logprobs"])
async def test_what_only_a_completion_has(generation: Generation, name: str) -> None:
    with pytest.raises(AttributeError, match=rf"Write `\(await generation\)\.{name}`") as caught:
        getattr(generation, name)
    assert (caught.value.name, caught.value.obj) == (name, generation)
    assert not hasattr(generation, name)
    assert getattr(generation, name, "default") == "default"


async def test_what_nobody_has_is_a_plain_attribute_error(generation: Generation) -> None:
    with pytest.raises(AttributeError) as caught:
        generation.txet  # type: ignore[attr-defined]  # noqa: B018
    assert str(caught.value) == "'Generation' object has no attribute 'txet'"


async def test_printing_a_request_says_how_to_read_it(generation: Generation) -> None:
    for text in (str(generation), repr(generation), f"{generation}"):
        assert generation.request_id in text
        assert text.endswith(" tokens: `await` gives all of it, `async for` reads it>")


@pytest.mark.parametrize("loop", [list, iter, enumerate])
async def test_a_plain_for_names_async_for_and_the_blocking_client(
    generation: Generation, loop: Callable[[object], object]
) -> None:
    with pytest.raises(TypeError, match=r"`async for`.*asyncscale\.blocking"):
        loop(generation)


async def test_async_for_over_a_completion(client: AsyncScaleClient) -> None:
    completion = await client.generate("hello", max_tokens=2)
    with pytest.raises(TypeError, match="a Completion is all of it"):
        [token async for token in completion]  # type: ignore[attr-defined]
    assert copy.deepcopy(completion) == completion
    assert pickle.loads(pickle.dumps(completion)).text == completion.text


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
async def test_a_client_cannot_be_duplicated_but_its_address_can(
    client: AsyncScaleClient, duplicate: Callable[[object], object]
) -> None:
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*AsyncScaleClient\.attach\(address\)"):
        duplicate(client)
    assert client.generate("x", max_tokens=1)


async def test_a_front_end_that_refers_to_the_client_of_its_caller(client: AsyncScaleClient) -> None:
    async def main(mine: AsyncScaleClient, index: int) -> object:
        return await client.generate("x")

    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*a client is passed to it"):
        await run_frontends(main, 1, client.address)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
async def test_a_request_under_way_cannot_be_duplicated(
    generation: Generation, duplicate: Callable[[object], object]
) -> None:
    with pytest.raises(TypeError, match="a Generation cannot be copied or pickled"):
        duplicate(generation)


async def test_a_plain_with_names_async_with_and_the_blocking_client() -> None:
    with pytest.raises(TypeError, match=r"`async with`.*asyncscale\.blocking"), AsyncScaleClient(FAST):  # type: ignore[attr-defined]
        pass


@pytest.mark.filterwarnings("ignore:coroutine 'AsyncScaleClient.start' was never awaited")
async def test_a_start_that_is_not_awaited() -> None:
    client = AsyncScaleClient(FAST)
    client.start()  # type: ignore[unused-coroutine]
    with pytest.raises(ClientStateError, match="await client"):
        client.generate("x")


# --- the wrong time and the wrong place


async def test_after_async_with() -> None:
    async with AsyncScaleClient(FAST, num_engines=1) as client:
        pass
    with pytest.raises(ClientClosedError, match="leaving `async with` does that"):
        client.generate("x")


async def test_from_a_thread(client: AsyncScaleClient, generation: Generation) -> None:
    with pytest.raises(ClientStateError, match=r"outside of the event loop.*asyncscale\.blocking"):
        await in_thread(client.generate, "x")


@pytest.mark.parametrize("by_token", [False, True])
async def test_a_request_on_another_threads_loop(client: AsyncScaleClient, by_token: bool) -> None:
    generation = client.generate("x", max_tokens=5000, ignore_eos=True)

    async def read() -> None:
        if by_token:
            [token async for token in generation]
        await generation

    with pytest.raises(ClientStateError, match=r"request 'request-\d+' was started on another event loop"):
        await in_thread(asyncio.run, read())
    assert not generation.done


async def test_a_request_that_has_ended_can_be_read_anywhere(client: AsyncScaleClient) -> None:
    generation = client.generate("x", max_tokens=5, ignore_eos=True)
    completion = await generation

    async def read() -> tuple[str, str]:
        return "".join([str(token) async for token in generation]), (await generation).text

    assert await in_thread(asyncio.run, read()) == (completion.text, completion.text)


# --- wrong arguments


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (["a", "b"], r"One call is one prompt: `await asyncio.gather\(\*map\(client.generate, prompts\)\)`"),
        ([[1], [2]], "One call is one prompt"),
        (("a", "b"), "One call is one prompt"),
        ([MESSAGE], r"`client\.chat`"),
        (None, "got NoneType"),
        (b"hello", "got bytes"),
    ],
)
async def test_prompts(client: AsyncScaleClient, prompt: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        client.generate(prompt)


@pytest.mark.parametrize("messages", ["Hello!", MESSAGE, None])
async def test_conversations(client: AsyncScaleClient, messages: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r'chat\(\[\{"role": "user", "content": "Hello!"\}\]\)'):
        client.chat(messages)


async def test_several_conversations_at_once(client: AsyncScaleClient) -> None:
    with pytest.raises(InvalidRequestError, match="One call is one conversation"):
        client.chat([[MESSAGE], [MESSAGE]])  # type: ignore[list-item]


async def test_a_collective_call_of_something_else(client: AsyncScaleClient) -> None:
    with pytest.raises(TypeError, match="method must be the name of an engine's method"):
        await client.collective_rpc(print)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keyword", "words"),
    [
        ("max_token", "did you mean 'max_tokens'"),
        ("max_new_tokens", "did you mean 'max_tokens'"),
        ("temp", "did you mean 'temperature'"),
        ("sesion", "did you mean 'session'"),
        ("params", r"generate\(prompt, params\)"),
        ("sampling_params", r"generate\(prompt, params\)"),
        ("stream", "`async for token"),
    ],
)
async def test_keywords_of_a_request(client: AsyncScaleClient, keyword: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        client.generate("x", **{keyword: SamplingParams()})


async def yields(client: AsyncScaleClient, index: int) -> AsyncIterator[int]:
    yield index


async def takes_one(client: AsyncScaleClient) -> None: ...


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (5, "got int"),
        (yields, "it yields"),
        (takes_one, r"its arguments are \(client: .*too many positional"),
    ],
)
async def test_front_ends_that_cannot_run_are_refused_before_any_process_starts(main: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        await run_frontends(main, 1, "ipc:///nobody/is/here")


async def test_a_front_end_that_was_called_rather_than_named() -> None:
    called = takes_one(AsyncScaleClient(FAST))
    with pytest.raises(TypeError, match="pass main itself"):
        await run_frontends(called, 1, "ipc:///nobody/is/here")  # type: ignore[arg-type]
    await called
