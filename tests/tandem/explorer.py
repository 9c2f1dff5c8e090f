"""An explicit-state model checker: every state that a system can reach, whatever happens in whatever order."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

_MAX_LINES = 40  # of a trace, at its beginning and at its end


class System(Protocol):
    """What is explored. States are hashable values."""

    def start(self) -> Any: ...

    def successors(self, state: Any) -> Iterable[tuple[str, Any]]:
        """What may happen next, and the state after it; raises Violation if it must not."""

    def canonical(self, state: Any) -> Hashable:
        """The one that stands for all states that are like this one; what may happen next is alike in all of them."""

    def find_defect(self, state: Any) -> str | None:
        """What is wrong with the state."""

    def find_unfinished(self, state: Any) -> str | None:
        """What is wrong if nothing can happen any more."""


class Violation(Exception):
    """Raised by the system itself: this must not happen."""


class CounterExample(AssertionError):
    """What is wrong, and the shortest way from the start to it."""

    def __init__(self, defect: str, trace: list[str]) -> None:
        lines = [f"  {number:2}. {label}" for number, label in enumerate(trace, 1)]
        if len(lines) > 2 * _MAX_LINES:
            lines[_MAX_LINES:-_MAX_LINES] = ["   ..."]
        super().__init__("\n".join([defect, *lines]))


@dataclass(frozen=True)
class Explored:
    num_states: int
    num_transitions: int
    num_ends: int


def explore(system: System, max_states: int) -> Explored:
    """Check that no reachable state has a defect, and that every run ends, and ends well. Raises CounterExample.

    Every run ends if there is no cycle; states without end are reported as more than max_states. It ends well if where
    nothing can happen any more nothing is unfinished. This is more than absence of deadlock and livelock under fair
    scheduling: no schedule at all may go on for ever.
    """
    reached = _Reached(system)
    num_ends = 0
    for number, state in enumerate(reached.states):  # grows meanwhile: breadth first, so that traces are short
        if system.find_defect(state) is not None:
            raise reached.counter_example(number, "", system.find_defect)
        try:
            is_end = not reached.expand(number, system.successors(state))
        except Violation as violation:
            raise reached.counter_example(number, str(violation)) from None
        num_ends += is_end
        if is_end and system.find_unfinished(state) is not None:
            raise reached.counter_example(number, "nothing can happen any more, and ", system.find_unfinished)
        if len(reached.states) > max_states:
            raise reached.counter_example(number, f"no end after {max_states} states")
    first = _find_endless(reached.edges)
    if first is not None:
        raise reached.counter_example(first, "this may go on for ever")
    return Explored(len(reached.states), sum(map(len, reached.edges)), num_ends)


class _Reached:
    """The states that were reached, numbered in that order. edges: of each number, those that may follow."""

    def __init__(self, system: System) -> None:
        self._system = system
        self.states = [system.canonical(system.start())]
        self._numbers = {self.states[0]: 0}
        self._origins = [-1]  # of each number, the one from which it was reached
        self.edges: list[list[int]] = []

    def expand(self, number: int, successors: Iterable[tuple[str, Any]]) -> list[int]:
        """The numbers of what may follow."""
        following = []
        for _, successor in successors:
            state = self._system.canonical(successor)
            if state not in self._numbers:
                self._numbers[state] = len(self.states)
                self._origins.append(number)
                self.states.append(state)
            following.append(self._numbers[state])
        self.edges.append(following)
        return following

    def counter_example(self, number: int, defect: str, find: Any = lambda state: "") -> CounterExample:
        """How that state is reached. No state is replaced by one that is like it here, so that names stay the same.

        find: what to add to the defect, of the state.
        """
        path = []
        while number:
            path.append(number)
            number = self._origins[number]
        state, labels = self._system.start(), []
        for number in reversed(path):
            label, state = next(pair for pair in self._system.successors(state) if self._number(pair[1]) == number)
            labels.append(label)
        return CounterExample(f"{defect}{find(state)}", labels)

    def _number(self, state: Any) -> int | None:
        return self._numbers.get(self._system.canonical(state))


def _find_endless(edges: list[list[int]]) -> int | None:
    """The first state that is on a cycle or after one: take away, again and again, those that nothing leads to."""
    num_predecessors = [0] * len(edges)
    for following in edges:
        for number in following:
            num_predecessors[number] += 1
    free = [number for number, count in enumerate(num_predecessors) if count == 0]
    for number in free:
        for successor in edges[number]:
            num_predecessors[successor] -= 1
            if num_predecessors[successor] == 0:
                free.append(successor)
    return next((number for number, count in enumerate(num_predecessors) if count), None)
