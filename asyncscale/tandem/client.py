"""Whether a request of this client must wake the engines. No I/O."""

from __future__ import annotations

from asyncscale.tandem.messages import GroupState, Wake


class ClientWaves:
    """One client's part in the waves of the engines::

        wake = waves.request_sent()
        if wake is not None:
            ...  # send it to the coordinator

    It only saves time: when what is known here is out of date, the engine that gets the request says so itself.
    """

    __slots__ = ("_group", "_woken")

    def __init__(self) -> None:
        self._group = GroupState()
        self._woken = (0, 0)  # of the newest Wake: generation, wave

    def on_group_state(self, state: GroupState) -> None:
        """What the coordinator has decided."""
        if state.version > self._group.version:
            self._group = state

    def request_sent(self) -> Wake | None:
        """A request is on its way to an engine. What the coordinator must hear now, if anything: once for each wave."""
        here = (self._group.generation, self._group.wave)
        if self._group.running or here <= self._woken:
            return None
        self._woken = here
        return Wake(*here)
