"""A request's life on the client, without processes: tokens pushed by the test, text read as a consumer would."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from array import array

import pytest

from asyncscale.client.generation import Generation
from asyncscale.client.stream import RequestStream
from asyncscale.config import SimulatedModel
from asyncscale.errors import RequestAbortedError
from asyncscale.messages import TokenLogprobs
from asyncscale.params import Sampling, SamplingParams
from asyncscale.tokenization.simulated import SimulatedTokenizer

CODEC = SimulatedTokenizer(SimulatedModel())


def make_stream(**params: object) -> RequestStream:
    return RequestStream(
        request_id="r",
        wire_id=0,
        prompt_token_ids=array("i", [1, 2, 3]),
        params=SamplingParams.of(None, params),
        sampling=Sampling(max_tokens=10),
        codec=CODEC,
        priority=0,
        session=None,
        pinned_engine=None,
        arrival=0.0,
        expected_output_tokens=10,
        on_end=lambda stream: None,
    )


def push_text(stream: RequestStream, text: str, choice: int = 0) -> None:
    """Tokens whose text is `text`, a byte each."""
    for token_id in CODEC.encode(text):
        stream.choices[choice].push(token_id, now=0.0)


def pieces(stream: RequestStream) -> list[str]:
    choice = stream.choices[0]
    return [choice.text_at(index) for index in range(len(choice.token_ids))]


def test_text_is_whole_characters_and_comes_with_their_last_token() -> None:
    stream = make_stream()
    push_text(stream, "aé€")
    stream.choices[0].finish("length")
    assert pieces(stream) == ["a", "", "é", "", "", "€"]


def test_half_a_character_at_the_end_is_shown_as_the_tokenizer_shows_it() -> None:
    stream = make_stream()
    for token_id in b"a\xe2\x82":
        stream.choices[0].push(token_id, now=0.0)
    stream.choices[0].finish("length")
    assert stream.choices[0].text() == CODEC.decode(list(b"a\xe2\x82")) == "a\ufffd"


def test_text_can_be_read_out_of_order() -> None:
    stream = make_stream()
    push_text(stream, "abc")
    assert stream.choices[0].text_at(2) == "c"
    assert stream.choices[0].text_at(0) == "a"


def test_a_stop_string_ends_the_choice_and_what_follows_is_dropped() -> None:
    stream = make_stream(stop=["END"])
    push_text(stream, "ab EN")
    assert not stream.choices[0].check_stop_strings()
    assert "".join(pieces(stream)) == "ab "
    push_text(stream, "D more")
    assert stream.choices[0].check_stop_strings()
    assert stream.choices[0].finish_reason == "stop"
    assert stream.choices[0].text() == "ab "
    assert len(stream.choices[0].token_ids) == len("ab END")


def test_a_stop_string_may_be_kept_in_the_text() -> None:
    stream = make_stream(stop="END", include_stop_str_in_output=True)
    push_text(stream, "ab END")
    assert stream.choices[0].check_stop_strings()
    assert stream.choices[0].text() == "ab END"


def test_what_looked_like_a_stop_string_is_shown_when_the_text_ends() -> None:
    stream = make_stream(stop="END")
    push_text(stream, "ab EN")
    stream.choices[0].finish("length")
    stream.choices[0].check_stop_strings()
    assert stream.choices[0].text() == "ab EN"
    assert stream.choices[0].finish_reason == "length"


def test_a_stop_string_in_the_last_token_counts_although_the_length_ended_it_too() -> None:
    stream = make_stream(stop="END")
    push_text(stream, "ab END")
    stream.choices[0].finish("length")
    assert not stream.choices[0].check_stop_strings(), "its engine has ended it already"
    assert stream.choices[0].finish_reason == "stop"
    assert stream.choices[0].text() == "ab "


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    stream = make_stream(stop="a", min_tokens=3)
    push_text(stream, "aaab")
    assert not stream.choices[0].check_stop_strings()
    push_text(stream, "a")
    assert stream.choices[0].check_stop_strings()
    assert stream.choices[0].text() == "aaab"


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abc")])
def test_the_text_of_a_stop_token_is_left_out_unless_asked_for(include: bool, text: str) -> None:
    stream = make_stream(stop_token_ids=[ord("c")], include_stop_str_in_output=include)
    push_text(stream, "abc")
    stream.choices[0].finish("stop", ord("c"))
    assert stream.choices[0].text() == text
    assert len(stream.choices[0].token_ids) == 3


def test_nobody_pays_for_text_that_nobody_reads() -> None:
    stream = make_stream()
    push_text(stream, "abc")
    stream.choices[0].finish("length")
    assert stream.choices[0]._pieces == []
    assert stream.choices[0]._detokenizer is None


def test_tokens_that_cross_the_end_are_dropped() -> None:
    stream = make_stream()
    push_text(stream, "ab")
    stream.fail(RequestAbortedError("aborted"))
    push_text(stream, "c")
    stream.choices[0].finish("length")
    assert stream.choices[0].token_ids == [97, 98]
    assert stream.choices[0].finish_reason == "abort"


def test_the_first_ending_wins() -> None:
    stream = make_stream()
    stream.choices[0].finish("length")
    stream.fail(RequestAbortedError("too late"))
    assert stream.error is None


def test_the_end_is_told_once_when_all_choices_have_ended() -> None:
    ended: list[RequestStream] = []
    stream = make_stream(n=2)
    stream._on_end = ended.append
    stream.choices[1].finish("length")
    assert not ended
    stream.choices[0].finish("stop")
    stream.fail(RequestAbortedError("late"))
    assert ended == [stream]


async def test_tokens_of_several_choices_come_in_the_order_of_their_arrival() -> None:
    stream = make_stream(n=2)
    for choice, token_id in [(0, 97), (1, 120), (1, 121), (0, 98)]:
        stream.choices[choice].push(token_id, now=0.0)
    for choice in stream.choices:
        choice.finish("length")
    tokens = [token async for token in Generation(stream, lambda *_: None)]
    assert [(t.choice, t.index, t.text, t.finish_reason) for t in tokens] == [
        (0, 0, "a", None),
        (1, 0, "x", None),
        (1, 1, "y", "length"),
        (0, 1, "b", "length"),
    ]


async def test_await_is_woken_once_and_not_for_every_token() -> None:
    stream = make_stream()
    generation = Generation(stream, lambda *_: None)
    task = asyncio.ensure_future(generation)
    await asyncio.sleep(0)
    assert len(stream._end_waiters) == 1
    push_text(stream, "abc")
    assert not task.done()
    assert len(stream._end_waiters) == 1
    stream.choices[0].finish("length")
    assert (await task).text == "abc"


async def test_a_reader_who_comes_late_gets_all_tokens() -> None:
    stream = make_stream()
    push_text(stream, "abc")
    stream.choices[0].finish("length")
    generation = Generation(stream, lambda *_: None)
    for _ in range(2):
        assert [str(token) async for token in generation] == ["a", "b", "c"]
    assert str(await generation) == "abc"


async def test_an_error_reaches_every_reader_after_the_tokens_that_came_before_it() -> None:
    stream = make_stream()
    push_text(stream, "ab")
    stream.fail(RequestAbortedError("aborted"))
    generation = Generation(stream, lambda *_: None)
    tokens = aiter(generation)
    assert [str(await anext(tokens)), str(await anext(tokens))] == ["a", "b"]
    with pytest.raises(RequestAbortedError):
        await anext(tokens)
    with pytest.raises(RequestAbortedError):
        await generation


async def test_a_reader_that_held_a_token_when_an_error_came_leaves_nothing_behind() -> None:
    async def read(stream: RequestStream) -> None:
        async for _token in Generation(stream, lambda *_: None):
            stream.fail(RequestAbortedError("aborted"))

    stream = make_stream()
    push_text(stream, "a")
    with contextlib.suppress(RequestAbortedError):
        await read(stream)
    reference = weakref.ref(stream)
    del stream
    gc.collect()
    assert reference() is None


async def test_leaving_the_loop_early_aborts_at_once() -> None:
    aborted: list[Exception] = []
    stream = make_stream()
    push_text(stream, "abc")
    generation = Generation(stream, lambda stream, error: (aborted.append(error), stream.fail(error)))
    async for _ in generation:
        break
    assert [type(error) for error in aborted] == [RequestAbortedError]


async def test_a_generation_that_is_forgotten_is_aborted() -> None:
    aborted: list[Exception] = []
    stream = make_stream()
    generation = Generation(stream, lambda stream, error: (aborted.append(error), stream.fail(error)))
    del generation
    assert len(aborted) == 1


async def test_a_generation_that_is_forgotten_in_another_thread_is_aborted_on_its_loop() -> None:
    aborted = asyncio.Event()
    stream = make_stream()
    holder = [Generation(stream, lambda stream, error: (stream.fail(error), aborted.set()))]
    await asyncio.to_thread(holder.clear)
    await asyncio.wait_for(aborted.wait(), 5)


def test_logprobs_name_the_chosen_token_and_the_most_likely_ones() -> None:
    stream = make_stream(logprobs=2)
    choice = stream.choices[0]
    choice.push(97, now=0.0)
    choice.logprobs.append(TokenLogprobs([97, 98, 99], [-3.0, -0.5, -1.0], rank=5))
    choice.finish("length")
    completion = stream.completion()
    assert completion.logprobs == [{97: (-3.0, 5), 98: (-0.5, 1), 99: (-1.0, 2)}]
    assert choice.logprob_at(0) == -3.0
