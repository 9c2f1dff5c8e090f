"""Every test here looks for what it left behind."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from leftovers import nothing_left_over, runtime_folders, workspace

__all__ = ["nothing_left_over", "runtime_folders", "workspace"]


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """A page that sets it speaks for programs, not for the tests that follow."""
    logger = logging.getLogger("asyncscale")
    level = logger.level
    yield
    logger.setLevel(level)
