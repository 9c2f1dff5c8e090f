"""How those who fetch and check models say how far they are."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called now and then, in the thread that does the work. total_bytes: None while it is unknown."""

    def __call__(self, description: str, done_bytes: int, total_bytes: int | None, /) -> None: ...


def no_progress(description: str, done_bytes: int, total_bytes: int | None, /) -> None:
    """A `Progress` that shows nothing."""
