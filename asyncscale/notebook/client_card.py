"""What a notebook shows of a client."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncscale.address import shown
from asyncscale.client.state import State
from asyncscale.config import CheckpointFiles
from asyncscale.errors import ClientStateError
from asyncscale.notebook.engine_rows import engine_rows, held_html, rows_html
from asyncscale.notebook.markup import AMBER, GREEN, Html, badge, card, code, note, strong

if TYPE_CHECKING:
    from asyncscale.client.client import AsyncScaleClient

_STATE_COLORS = {State.STARTING: AMBER, State.RUNNING: GREEN, State.CLOSING: AMBER}


def client_html(client: AsyncScaleClient) -> str:
    """State, model, engines with their load, and what can be done next. Never raises."""
    state = client._life.state
    title = [strong("AsyncScaleClient"), Html(" &nbsp; "), badge(state.value, _STATE_COLORS.get(state, "currentColor"))]
    parts: list[Html] = []
    if state is State.RUNNING:
        parts += _running(client)
    else:
        parts.append(note(_model(client)))
    return card(Html("".join(title)), *parts, _what_next(state))


def _running(client: AsyncScaleClient) -> list[Html]:
    facts = client._submission.facts
    about = (
        f"{_model(client)}, {facts.dtype}, context {facts.max_model_len:,} tokens, "
        f"KV cache {facts.num_blocks * facts.block_size:,} tokens per engine"
    )
    parts = [note(about)]
    try:
        parts += [rows_html(engine_rows(client)), held_html(client._dispatcher.num_held)]
    except ClientStateError as error:  # shown on another loop than its own, or in a fork
        parts.append(note(str(error)))
    owner = "attached to" if client._attach_to is not None else "attach at"
    return [*parts, note(f"{owner} ", code(shown(client.address)))]


def _model(client: AsyncScaleClient) -> str:
    engines = getattr(client, "_engines", None)
    source = getattr(engines, "model", None)
    if source is not None:
        return source.name if isinstance(source, CheckpointFiles) else "simulated model"
    if client._attach_to is not None:
        return f"engines at {shown(client._attach_to)}"
    return str(client._plan.model) if isinstance(client._plan.model, str) else repr(client._plan.model)


def _what_next(state: State) -> Html:
    match state:
        case State.NEW:
            return note("next: ", code("await client.start()"))
        case State.STARTING:
            return note("it can be used when ", code("await client.start()"), " has returned")
        case State.RUNNING:
            return note(
                "next: ", code('await client.generate("...")'), ", ", code("await client.dashboard()"), ", ",
                code("await client.close()"),
            )  # fmt: skip
        case _:
            return note("make a new one to go on: ", code("client = await AsyncScaleClient(...).start()"))
