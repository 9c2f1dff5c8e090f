"""When the waves of a group of engines begin, and under which number the group is formed. No I/O."""

from __future__ import annotations

from collections.abc import Hashable

import msgspec

from asyncscale.tandem.messages import Broken, FromTandemEngine, GroupState, Paused, Wake


class CoordinatorWaves:
    """The one place where waves begin::

        waves = CoordinatorWaves(num_engines=2)
        state = waves.on_report(report)  # or another event
        if state is not None:
            ...  # send it to all engines and clients

    Every event returns the state that is to be sent, or None if nothing of it changed. Who comes later is sent `state`.
    """

    def __init__(self, num_engines: int) -> None:
        self._num_engines = num_engines
        self._engines: set[int] = set()  # that live
        self._holders: set[Hashable] = set()
        self._is_wanted = False  # some engine has work, and pauses before state.wave
        self.state = GroupState()
        self._told_version = 0

    @property
    def at_rest(self) -> bool:
        """Whether no engine of the group steps or will, until `release`: what is done now to all of them is done
        between the same two steps."""
        return self.state.whole and self.state.held and not self.state.running

    @property
    def idle(self) -> bool:
        """Whether no engine has work, as far as is known."""
        return self.state.whole and not self.state.running and not self._is_wanted

    # --- engines

    def engine_joined(self, engine_id: int) -> GroupState | None:
        """An engine is ready, for the first time or again."""
        self._engines.add(engine_id)
        return self._break()

    def engine_died(self, engine_id: int) -> GroupState | None:
        """An engine is dead. The group waits for its return: a part of the model is gone with it."""
        self._engines.discard(engine_id)
        return self._break()

    def on_report(self, report: FromTandemEngine) -> GroupState | None:
        """What an engine says. Of another generation, or of a wave that is over, it means nothing any more."""
        if not self.state.whole or report.generation != self.state.generation:
            return None
        match report:
            case Broken():
                return self._break()
            case Paused(wave=wave, has_work=has_work):
                if self.state.running and wave == self.state.wave + 1:
                    self._change(wave=wave, running=False)
                if has_work and wave == self.state.wave and not self.state.running:
                    self._is_wanted = True
        return self._decide()

    # --- clients

    def on_wake(self, wake: Wake) -> GroupState | None:
        """A client has sent a request, and the engines may be spared the time until one of them says so.

        If it is of a wave that has begun or is over, then the request is part of that, or its engine will say so.
        """
        state = self.state
        if self.state.whole and not state.running and (wake.generation, wake.wave) == (state.generation, state.wave):
            self._is_wanted = True
        return self._decide()

    def hold(self, holder: Hashable) -> GroupState | None:
        """Have the engines come to rest, work or not; wait for `at_rest`. holder: who wants that, and is to release."""
        self._holders.add(holder)
        return self._decide()

    def release(self, holder: Hashable) -> GroupState | None:
        """Let the engines go on, when nobody else holds them."""
        self._holders.discard(holder)
        return self._decide()

    # --- decisions

    def _break(self) -> GroupState | None:
        """The generation cannot go on."""
        if self.state.whole:
            self._change(whole=False, running=False)
        return self._decide()

    def _decide(self) -> GroupState | None:
        """Do what follows from what is known, and return the state if it changed."""
        held = bool(self._holders)
        if held != self.state.held:
            self._change(held=held)
        if not self.state.whole and len(self._engines) == self._num_engines:
            self._is_wanted = False
            self._change(generation=self.state.generation + 1, whole=True, wave=0)
        elif self.state.whole and self._is_wanted and not held and not self.state.running:
            self._is_wanted = False
            self._change(running=True)
        if self.state.version == self._told_version:
            return None
        self._told_version = self.state.version
        return self.state

    def _change(self, **changes: int) -> None:
        self.state = msgspec.structs.replace(self.state, version=self.state.version + 1, **changes)
