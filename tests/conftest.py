"""Fixtures that every part of the test suite may use."""

from __future__ import annotations

import pytest

from asyncscale.checkpoint.resolve import resolve_model
from asyncscale.config import CheckpointFiles


@pytest.fixture(scope="session")
def smollm2_files() -> CheckpointFiles:
    """The built-in model's files, from the user's own cache; fetched once, whichever process comes first."""
    return resolve_model("smollm2-135m-instruct")
