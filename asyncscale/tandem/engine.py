"""When an engine of a group steps, pauses, and compares notes with the others. No I/O."""

from __future__ import annotations

from asyncscale.tandem.messages import Broken, FromTandemEngine, GroupState, Paused


class EngineWaves:
    """One engine's part in the waves of its group::

        waves = EngineWaves()
        while True:
            ...  # take what has arrived; while not waves.running, sleep until something does
            #      a GroupState: waves.on_group_state(state)
            if (generation := waves.generation_to_join) is not None:
                ...  # leave the old group, meet the others; then waves.joined(generation) or waves.broke(generation)
            if waves.running:
                ...  # compute a batch, if need be a dummy
                if waves.step_done():
                    waves.agreed(all_reduce(waves.vote(has_work), max))
            if (report := waves.report(has_work)) is not None:
                ...  # send it to the coordinator

    A collective operation that fails, be it a step or an agreement, is `waves.broke(waves.generation)`.

    sync_interval: steps between agreements; the same in all engines. The first is after the first step, so that a wave
    which nobody needs is short.
    running: whether to step. generation, wave, num_steps: where this engine is; num_steps counts within the wave, so
    that it is the same in all engines whenever they meet.
    """

    __slots__ = (
        "_group", "_is_whole", "_next_sync", "_sync_interval", "_told", "_told_broken",
        "generation", "num_steps", "running", "wave",
    )  # fmt: skip

    def __init__(self, sync_interval: int = 16) -> None:
        if sync_interval < 1:
            raise ValueError(f"sync_interval must be at least 1, not {sync_interval}")
        self.running = False
        self.generation = 0
        self.wave = 0
        self.num_steps = 0
        self._sync_interval = sync_interval
        self._next_sync = 1
        self._group = GroupState()  # the newest that is known
        self._is_whole = False  # the group of self.generation stands, as far as is known here
        self._told = (0, 0, False)  # of the newest Paused: generation, wave, has_work
        self._told_broken = 0  # the generation of the newest Broken

    # --- the group

    def on_group_state(self, state: GroupState) -> None:
        """What the coordinator has decided. A wave that it began begins here too, also without work, also when held:
        the others are in it, or will be."""
        if state.version <= self._group.version:
            return
        self._group = state
        if self.generation_to_join is not None:
            self._leave()
        else:
            self._follow()

    @property
    def generation_to_join(self) -> int | None:
        """The generation under which the group is to be formed anew, if it is."""
        group = self._group
        return group.generation if group.whole and group.generation > self.generation else None

    def joined(self, generation: int) -> None:
        """All engines have met under this number."""
        self.generation = generation
        self.wave = 0
        self.num_steps = 0
        self._is_whole = True
        self._told = (generation, 0, False)  # goes without saying
        self._follow()

    def broke(self, generation: int) -> None:
        """The engines could not meet under this number, or a collective operation failed since."""
        self.generation = generation
        self._leave()

    def report(self, has_work: bool) -> FromTandemEngine | None:
        """What the coordinator must hear now, if anything. has_work: whether any request is here that is not done."""
        if self.running or self.generation_to_join is not None:
            return None
        if not self._is_whole:
            if self._told_broken == self.generation:
                return None
            self._told_broken = self.generation
            return Broken(self.generation)
        here = (self.generation, self.wave, has_work)
        if here <= self._told:
            return None
        self._told = here
        return Paused(*here)

    # --- steps

    def step_done(self) -> bool:
        """A step is done. Whether all engines are to agree now if there is another."""
        self.num_steps += 1
        return self.num_steps == self._next_sync

    def vote(self, has_work: bool) -> bool:
        """What this engine contributes to the agreement: whether it wants the wave to go on."""
        return has_work and not self._group.held

    def agreed(self, go_on: bool) -> None:
        """go_on: whether any engine wants the wave to go on; the same in all of them."""
        if go_on:
            self._next_sync += self._sync_interval
        else:
            self.running = False
            self.wave += 1

    def _follow(self) -> None:
        group = self._group
        begun = group.running and (group.generation, group.wave) == (self.generation, self.wave)
        if begun and self._is_whole and not self.running:
            self.running = True
            self.num_steps = 0
            self._next_sync = 1

    def _leave(self) -> None:
        self.running = False
        self._is_whole = False
