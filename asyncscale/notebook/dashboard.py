"""A live picture of a client's engines in a notebook."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Self

from asyncscale.client.state import State
from asyncscale.notebook.cells import MadeInCells
from asyncscale.notebook.engine_rows import EngineRow, engine_rows, held_html, rows_html, rows_text
from asyncscale.notebook.live_output import LiveOutput
from asyncscale.notebook.markup import card, note, strong
from asyncscale.notebook.token_rates import TokenRates

if TYPE_CHECKING:
    from asyncscale.client.client import AsyncScaleClient

logger = logging.getLogger(__name__)

# Between two pictures, at least.
_INTERVAL_S = 0.1

_made: MadeInCells[Dashboard] = MadeInCells()


class Dashboard:
    """Bars of every engine, which follow its load.

    ::

        dashboard = await client.dashboard()  # and there it is
        dashboard.close()

    At most ten pictures a second, and none while nothing changes. It ends with its client, and when the cell that made
    it is run again; the last picture stays. It does not keep its client alive. widget: of ipywidgets, for a layout of
    your own.
    """

    def __init__(self, client: AsyncScaleClient) -> None:
        self._output = LiveOutput(text=self.__repr__)
        self._client = weakref.ref(client)
        self._dispatcher = client._dispatcher  # to wait for a change of load, which must not keep the client
        self._rates = TokenRates()
        self._rows: list[EngineRow] = self._look(client)
        self._num_held = self._dispatcher.num_held
        _, replaced = _made.replaced_by(self)
        for earlier in replaced:
            earlier.close()
        self._task: asyncio.Task[None] | None = asyncio.get_running_loop().create_task(self._follow())
        # In time for the last picture to be among the outputs of the cell that closes the client.
        client._life.cleanup.callback(_end_with_client, weakref.ref(self))
        self._output.draw(self._html())
        self._output.show()

    @property
    def widget(self) -> Any:
        return self._output.widget

    @property
    def closed(self) -> bool:
        """Whether it follows the loads no longer."""
        return self._task is None

    def close(self) -> None:
        """Stop, and leave the last picture. Idempotent."""
        self._end("this dashboard was closed")

    def __await__(self) -> Generator[Any, None, Self]:
        yield from asyncio.sleep(0).__await__()
        return self

    async def _follow(self) -> None:
        while (client := self._client()) is not None and client._life.state is State.RUNNING:
            rows, num_held = self._look(client), self._dispatcher.num_held
            del client
            if (rows, num_held) != (self._rows, self._num_held):
                self._rows, self._num_held = rows, num_held
                self._output.draw(self._html())
            elif not any(row.running or row.waiting for row in rows):
                await self._dispatcher.wait_load_change()
                continue
            await asyncio.sleep(_INTERVAL_S)

    def _look(self, client: AsyncScaleClient) -> list[EngineRow]:
        counts = {engine_id: engine.generation_tokens for engine_id, engine in client.metrics().engines.items()}
        return engine_rows(client, self._rates.update(counts, time.monotonic()))

    def _end(self, why: str) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
            self._output.end(self._html(why))

    def _html(self, why_ended: str | None = None) -> str:
        notes = [] if why_ended is None else [note(f"{why_ended}; this is how it was last")]
        return card(strong("Engines"), rows_html(self._rows), held_html(self._num_held), *notes)

    def _ipython_display_(self) -> None:
        self._output.show()

    def __repr__(self) -> str:
        return f"<Dashboard, {'closed' if self.closed else 'live'}>\n{rows_text(self._rows)}"


def _end_with_client(dashboard: weakref.ref[Dashboard]) -> None:
    if (alive := dashboard()) is None:
        return
    try:
        alive._end("the client is closed")
    except Exception:  # a frontend that is gone must not keep the engines from ending
        logger.exception("the last picture of a dashboard could not be shown")
