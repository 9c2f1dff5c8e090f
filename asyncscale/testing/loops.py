"""How the clients of a test are started and closed on the event loop that runs the test, whoever runs that.

pytest-asyncio and anyio run asynchronous fixtures on the loop of the test: one of those enters the `ClientScope` of the
test. For any other plugin, or a hook of the user's conftest, the test function is wrapped in a coroutine that does.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from asyncscale.testing.clients import ClientScope

_ANYIO = ("anyio", "anyio.pytest_plugin")  # the plugin's names: as it is installed, and as a module
_wrapped: pytest.StashKey[list[ClientScope]] = pytest.StashKey()


def is_async(item: pytest.Item) -> bool:
    """Whether the test is a coroutine function."""
    function = getattr(item, "obj", None)
    hypothesis = getattr(function, "hypothesis", None)
    return inspect.iscoroutinefunction(function if hypothesis is None else hypothesis.inner_test)


def enter(request: pytest.FixtureRequest, scope_fixture: str) -> None:
    """Have the ClientScope that is the value of `scope_fixture` entered on the loop of an asynchronous test.

    Called by a fixture that depends on it; it is left after that fixture.
    """
    item: pytest.Item = request.node
    runs_anyio = "anyio_backend" in request.fixturenames and any(map(item.config.pluginmanager.has_plugin, _ANYIO))
    runs_asyncio = _is_of_pytest_asyncio(item)
    if runs_anyio and not runs_asyncio:
        backend = request.getfixturevalue("anyio_backend")
        if (backend if isinstance(backend, str) else backend[0]) != "asyncio":
            pytest.skip(f"asyncscale runs on asyncio, and this is on {backend!r}: see the fixture anyio_backend")
        request.getfixturevalue(f"{scope_fixture}_entered_by_anyio")
    elif runs_asyncio and not runs_anyio:
        request.getfixturevalue(f"{scope_fixture}_entered_in_{_loop_scope(item)}_loop")
    elif isinstance(item, pytest.Function) and not _is_of_unittest(item):
        item.stash.setdefault(_wrapped, []).append(request.getfixturevalue(scope_fixture))
    else:
        pytest.fail(
            "no fixture reaches the event loop of this kind of test. Take the fixture asyncscale_engines, and in the "
            "test use `async with AsyncScaleClient.attach(engines) as client:`",
            pytrace=False,
        )


def forget(item: pytest.Item) -> None:
    """What an earlier run of the same test wanted."""
    item.stash[_wrapped] = []


@contextlib.contextmanager
def scopes_entered_by_test(item: pytest.Item) -> Iterator[None]:
    """While the test runs, it is wrapped as far as `enter` wanted that."""
    scopes = item.stash.get(_wrapped, [])
    if not scopes or not isinstance(item, pytest.Function):
        yield
        return
    item.obj, original = _entering(item.obj, scopes), item.obj
    try:
        yield
    finally:
        item.obj = original


def _entering(test: Callable[..., Awaitable[object]], scopes: list[ClientScope]) -> Callable[..., Awaitable[object]]:
    @functools.wraps(test)
    async def entered(*args: Any, **kwargs: Any) -> object:
        __tracebackhide__ = True
        import asyncio

        if asyncio._get_running_loop() is None:
            pytest.fail("asyncscale runs on asyncio, and something else runs this test", pytrace=False)
        async with contextlib.AsyncExitStack() as stack:
            for scope in scopes:
                await stack.enter_async_context(scope)
            return await test(*args, **kwargs)

    return entered


def _is_of_pytest_asyncio(item: pytest.Item) -> bool:
    pytest_asyncio = sys.modules.get("pytest_asyncio")
    return pytest_asyncio is not None and pytest_asyncio.is_async_test(item)


def _is_of_unittest(item: pytest.Function) -> bool:
    from unittest import TestCase

    return issubclass(item.cls or object, TestCase)


def _loop_scope(item: pytest.Item) -> str:
    """As the documentation of pytest-asyncio has it: what the closest marker says, else the ini file."""
    marker = item.get_closest_marker("asyncio")
    keywords = {} if marker is None else marker.kwargs
    scope = keywords.get("loop_scope") or keywords.get("scope")
    if scope is None:
        with contextlib.suppress(ValueError):  # versions before 1.0 do not know it
            scope = item.config.getini("asyncio_default_test_loop_scope")
    return scope or "function"
