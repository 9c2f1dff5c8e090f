from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from jupyter_kernel import Kernel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # jupyter_client tells in this way that a kernel on this host is reached over plain TCP.
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client"))
            item.add_marker(pytest.mark.filterwarnings("ignore:Kernel is running over TCP"))


@pytest.fixture
def fresh_kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    try:
        yield kernel
    finally:
        kernel.close()


@pytest.fixture(scope="package")
def shared_kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    try:
        yield kernel
    finally:
        kernel.close()


@pytest.fixture
def kernel(shared_kernel: Kernel) -> Iterator[Kernel]:
    """One in which no client is open; which cells ran before is no test's business."""
    yield shared_kernel
    shared_kernel.close_clients()
