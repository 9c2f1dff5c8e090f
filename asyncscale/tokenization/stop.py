"""Stop strings, found in text that comes piece by piece and may split them anywhere."""

from __future__ import annotations


class StopStrings:
    """Passes text on until one of the `stop` strings is complete.

    ::

        stop = StopStrings(("\\n\\n", "END"), include=False)
        shown = "".join(map(stop.push, pieces)) + stop.finish()      # stop.stopped says whether one was found

    The string that is completed first wins; of two that end at the same character, the longer one. So the result does
    not depend on how the text is cut into pieces. include: whether the stop string itself is passed on.
    """

    def __init__(self, stop: tuple[str, ...], include: bool) -> None:
        self.stopped = False
        self._stop = stop
        self._include = include
        self._held = ""

    def push(self, text: str) -> str:
        """The text that may be shown now; what may be the beginning of a stop string is held back."""
        if self.stopped or not text:
            return ""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self.stopped, self._held = True, ""
            return text[: end if self._include else start]
        shown = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """No more text comes: what was held back is no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of `stop`, but not all of it, that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
