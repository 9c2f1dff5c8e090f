"""The fixtures that tests take."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from asyncscale.testing import loops
from asyncscale.testing.settings import Settings, configured, marked

if TYPE_CHECKING:
    from asyncscale.blocking.client import AsyncScaleClient as BlockingClient
    from asyncscale.client.client import AsyncScaleClient
    from asyncscale.testing.blocking_clients import BlockingScope
    from asyncscale.testing.clients import ClientScope, WatchedClient
    from asyncscale.testing.shared import EnginePool, SharedEngines

_MAX_NAMES = 10
test_passed: pytest.StashKey[bool] = pytest.StashKey()
_pool: pytest.StashKey[EnginePool] = pytest.StashKey()


def engine_pool(config: pytest.Config) -> EnginePool:
    """That of the session: it starts nothing until it is asked to."""
    if _pool not in config.stash:
        from asyncscale.testing.shared import EnginePool

        config.stash[_pool] = EnginePool()
        config.add_cleanup(config.stash[_pool].close)
    return config.stash[_pool]


def settings_of(item: pytest.Item) -> Settings:
    """What the markers of a test, flags and the ini file say, in this order. Raises UsageError."""
    return marked(item).over(configured(item.config))


@pytest.fixture(scope="session")
def asyncscale_engines(request: pytest.FixtureRequest) -> Iterator[SharedEngines]:
    """The address of the engines that tests share, for `AsyncScaleClient.attach`, also in another process.

    Those of a test with the marker `asyncscale` are its own, and fixtures of any scope that take this one are made anew
    for it.
    """
    settings: Settings = getattr(request, "param", Settings({}))
    with engine_pool(request.config).hold(settings.over(configured(request.config))) as engines:
        yield engines


@pytest.fixture
def asyncscale_client(request: pytest.FixtureRequest) -> Iterator[AsyncScaleClient | BlockingClient]:
    """A client of its own for each test, started on the event loop that runs the test, on engines that tests share.

    ::

        async def test_answer(asyncscale_client):
            completion = await asyncscale_client.generate("The capital of France is", max_tokens=8)

    A test that leaves requests behind fails with their names. In a test that is no coroutine function, it is the client
    of `asyncscale.blocking`.
    """
    if not loops.is_async(request.node):
        with _blocking_scope(request) as blocking_scope:
            yield blocking_scope.start(_shared_client(request))
        return
    scope: ClientScope = request.getfixturevalue("_asyncscale_client_scope")
    loops.enter(request, "_asyncscale_client_scope")
    yield scope.client
    _check(scope.left_behind(), request)


@pytest.fixture
def asyncscale_client_factory(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes clients with engines of their own, which end with the test.

    ::

        async def test_failover(asyncscale_client_factory):
            client = await asyncscale_client_factory(num_engines=2)

    Takes the arguments of `AsyncScaleClient`; what is not given is as for `asyncscale_client`.
    """
    defaults = settings_of(request.node)

    def private_client(model: Any, arguments: dict[str, Any]) -> WatchedClient:
        chosen = arguments if model is None else {**arguments, "model": model}
        return Settings(chosen).over(defaults).client()

    if not loops.is_async(request.node):
        with _blocking_scope(request) as blocking_scope:
            yield lambda model=None, **arguments: blocking_scope.start(private_client(model, arguments))
        return
    scope: ClientScope = request.getfixturevalue("_asyncscale_factory_scope")
    loops.enter(request, "_asyncscale_factory_scope")

    async def make(model: Any = None, **arguments: Any) -> AsyncScaleClient:
        return await scope.start(private_client(model, arguments))

    yield make
    _check(scope.left_behind(), request)


@pytest.fixture
def _asyncscale_client_scope(request: pytest.FixtureRequest) -> ClientScope:
    from asyncscale.testing.clients import ClientScope

    return ClientScope(_shared_client(request))


@pytest.fixture
def _asyncscale_factory_scope() -> ClientScope:
    from asyncscale.testing.clients import ClientScope

    return ClientScope()


@pytest.fixture
async def _asyncscale_client_scope_entered_by_anyio(_asyncscale_client_scope: ClientScope) -> AsyncIterator[None]:
    async with _asyncscale_client_scope:
        yield


@pytest.fixture
async def _asyncscale_factory_scope_entered_by_anyio(_asyncscale_factory_scope: ClientScope) -> AsyncIterator[None]:
    async with _asyncscale_factory_scope:
        yield


def _shared_client(request: pytest.FixtureRequest) -> WatchedClient:
    return engine_pool(request.config).acquire(settings_of(request.node)).attach()


@contextmanager
def _blocking_scope(request: pytest.FixtureRequest) -> Iterator[BlockingScope]:
    from asyncscale.testing.blocking_clients import BlockingScope

    with BlockingScope() as scope:
        yield scope
    _check(scope.left_behind, request)


def _check(left_behind: list[str], request: pytest.FixtureRequest) -> None:
    """Fail the test for requests that it left behind; not one that failed, or was interrupted, and therefore did."""
    if left_behind and request.node.stash.get(test_passed, False):
        names = ", ".join(map(repr, left_behind[:_MAX_NAMES]))
        more = f" and {len(left_behind) - _MAX_NAMES} more" if len(left_behind) > _MAX_NAMES else ""
        what = "a request" if len(left_behind) == 1 else f"{len(left_behind)} requests"
        pytest.fail(f"the test left {what} behind: {names}{more}. Await, read or abort() what it starts", pytrace=False)
