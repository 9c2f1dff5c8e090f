"""Fixtures that every part of the test suite may use."""

from __future__ import annotations

import signal

import pytest

from asyncscale.checkpoint.resolve import resolve_model
from asyncscale.config import CheckpointFiles

pytest_plugins = ["pytester", "asyncscale.testing"]

# A shell ignores these for what it runs in the background, and programs that are started from there would do, too.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


@pytest.fixture(scope="session")
def smollm2_files() -> CheckpointFiles:
    """The built-in model's files, from the user's own cache; fetched once, whichever process comes first."""
    return resolve_model("smollm2-135m-instruct")
