"""What a notebook shows of a completion, and of a request that is under way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncscale.notebook.markup import Html, card, code, note, strong, table, text_block

if TYPE_CHECKING:
    from asyncscale.client.completion import ChoiceCompletion, Completion, Timing
    from asyncscale.client.generation import Generation


def completion_html(completion: Completion) -> str:
    """The text of every choice, why it ended, and when what happened."""
    choices = completion.choices
    parts = [part for choice in choices for part in _choice_html(choice, len(choices))]
    return card(
        Html(f"{strong('Completion')} &nbsp; {code(completion.request_id)}"),
        *parts,
        timing_html(completion.timing, len(completion.prompt_token_ids)),
    )


def generation_html(generation: Generation) -> str:
    """How far it is, the text so far, and how to read it."""
    stream = generation._stream
    title = Html(f"{strong('Generation')} &nbsp; {code(generation.request_id)}")
    state = "ended with {} tokens" if generation.done else "running, {} tokens so far"
    parts = [note(state.format(stream.num_tokens))]
    parts += [text_block(choice.text()) for choice in stream.choices if choice.token_ids]
    if stream.error is not None:
        parts.append(note(f"{type(stream.error).__name__}: {stream.error}"))
    else:
        parts.append(
            note(code("await"), " it for the completion, or ", code("async for token in"), " it for the tokens")
        )
    return card(title, *parts)


def _choice_html(choice: ChoiceCompletion, num_choices: int) -> list[Html]:
    which = f"choice {choice.index}: " if num_choices > 1 else ""
    return [
        text_block(choice.text),
        note(f"{which}{len(choice.token_ids)} tokens, finish_reason {choice.finish_reason!r}"),
    ]


def timing_html(timing: Timing, num_prompt_tokens: int) -> Html:
    """One row; what did not happen is left out."""
    prompt = f"{num_prompt_tokens:,}"
    if timing.num_cached_tokens:
        prompt += f", {timing.num_cached_tokens:,} cached"
    cells = {
        "TTFT": _duration(timing.ttft),
        "TPOT": _duration(timing.tpot),
        "total": _duration(timing.e2e),
        "held here": _duration(timing.held_s),
        "queued": _duration(timing.queued_s),
        "engine": None if timing.engine is None else str(timing.engine),
        "prompt tokens": prompt,
        "preemptions": str(timing.num_preemptions) if timing.num_preemptions else None,
        "moves": str(timing.num_moves) if timing.num_moves else None,
    }
    shown = {name: value for name, value in cells.items() if value is not None}
    return table("timing", list(shown), [list(shown.values())])


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
