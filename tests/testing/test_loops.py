"""The fixtures on every kind of event loop that runs a test, with warnings as errors."""

from __future__ import annotations

import pytest

from .conftest import LOOP_SCOPE, RunPytest

ASYNCIO = """
import pytest, pytest_asyncio

async def ask(client):
    assert len((await client.generate("x", max_tokens=3, ignore_eos=True)).token_ids) == 3

@pytest_asyncio.fixture
async def answer(asyncscale_client):
    yield (await asyncscale_client.generate("x", max_tokens=3, temperature=0)).text
    await ask(asyncscale_client)

@pytest.mark.asyncio
async def test_function(asyncscale_client, answer):
    assert (await asyncscale_client.generate("x", max_tokens=3, temperature=0)).text == answer

@pytest.mark.asyncio(loop_scope="class")
class TestClass:
    async def test_one(self, asyncscale_client):
        await ask(asyncscale_client)

    async def test_two(self, asyncscale_client, asyncscale_client_factory):
        await ask(asyncscale_client)
        private = await asyncscale_client_factory(num_engines=2)
        await ask(private)
        assert (len(private.engine_loads()), len(asyncscale_client.engine_loads())) == (2, 1)

@pytest.mark.asyncio(loop_scope="module")
async def test_module(asyncscale_client):
    await ask(asyncscale_client)

@pytest.mark.asyncio(loop_scope="package")
async def test_package(asyncscale_client):
    await ask(asyncscale_client)

@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("_", range(2))
async def test_session(asyncscale_client, _):
    await ask(asyncscale_client)
"""

ANYIO = """
import asyncio, anyio, pytest
pytestmark = pytest.mark.anyio

@pytest.fixture(params=["asyncio", ("asyncio", {"use_uvloop": True}), "trio"], ids=["asyncio", "uvloop", "trio"])
def anyio_backend(request):
    return request.param

@pytest.fixture
async def answer(asyncscale_client):
    yield (await asyncscale_client.generate("x", max_tokens=3, temperature=0)).text
    await asyncscale_client.generate("x", max_tokens=3)

async def test_answer(asyncscale_client, answer, anyio_backend):
    assert (await asyncscale_client.generate("x", max_tokens=3, temperature=0)).text == answer
    assert ("uvloop" in repr(asyncio.get_running_loop())) == (anyio_backend != "asyncio")

async def test_factory(asyncscale_client_factory):
    async with anyio.create_task_group() as group:
        group.start_soon(asyncscale_client_factory)
"""

BLOCKING = """
import unittest, pytest

def test_blocking(asyncscale_client, asyncscale_client_factory):
    answer = asyncscale_client.generate("x", max_tokens=3, ignore_eos=True).result()
    private = asyncscale_client_factory(num_engines=2)
    assert [token.token_id for token in private.generate("x", max_tokens=3, ignore_eos=True)] == answer.token_ids

class TestUnittest(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def take_client(self, asyncscale_client):
        self.client = asyncscale_client

    def test_blocking(self):
        self.assertEqual(len(self.client.generate("x", max_tokens=3, ignore_eos=True).result().token_ids), 3)
"""

UNITTEST = """
import unittest, pytest
from asyncscale import AsyncScaleClient

class TestIsolated(unittest.IsolatedAsyncioTestCase):
    @pytest.fixture(autouse=True)
    def take_engines(self, asyncscale_engines):
        self.engines = asyncscale_engines

    async def test_attached(self):
        async with AsyncScaleClient.attach(self.engines) as client:
            await client.generate("x", max_tokens=3)
"""

HYPOTHESIS = """
import hypothesis, pytest
from hypothesis import given, strategies

@hypothesis.settings(max_examples=5, suppress_health_check=list(hypothesis.HealthCheck), deadline=None, database=None)
@given(strategies.integers(1, 5))
@pytest.mark.asyncio
async def test_examples(asyncscale_client, max_tokens):
    completion = await asyncscale_client.generate("x", max_tokens=max_tokens, ignore_eos=True)
    assert len(completion.token_ids) == max_tokens
"""

OWN_HOOK = """
import asyncio, inspect

def pytest_pyfunc_call(pyfuncitem):
    if inspect.iscoroutinefunction(pyfuncitem.obj):
        asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}))
        return True
"""

UNMARKED = """
async def ask(client):
    assert len((await client.generate("x", max_tokens=3, ignore_eos=True)).token_ids) == 3

async def test_function(asyncscale_client, asyncscale_client_factory):
    await ask(asyncscale_client)
    await ask(await asyncscale_client_factory())

class TestClass:
    async def test_method(self, asyncscale_client):
        await ask(asyncscale_client)

async def test_leaves_a_request_behind(asyncscale_client):
    generation = asyncscale_client.generate("x", max_tokens=8000, ignore_eos=True, request_id="forgotten")
"""


def test_strict_mode_with_every_loop_scope_beside_anyio_hypothesis_and_tests_that_are_synchronous(
    run_pytest: RunPytest,
) -> None:
    result = run_pytest(
        test_asyncio=ASYNCIO,
        test_anyio=ANYIO,
        test_blocking=BLOCKING,
        test_hypothesis=HYPOTHESIS,
        test_unittest=UNITTEST,
    )
    result.assert_outcomes(passed=15, skipped=2)
    result.stdout.no_fnmatch_line("*warning*")
    assert result.errlines == []


@pytest.mark.parametrize("loop_scope", ["function", "session"])
def test_auto_mode(run_pytest: RunPytest, loop_scope: str) -> None:
    result = run_pytest(
        ini=LOOP_SCOPE + f"asyncio_mode = auto\nasyncio_default_test_loop_scope = {loop_scope}\n",
        test_asyncio=ASYNCIO.replace("@pytest_asyncio.fixture", f"@pytest_asyncio.fixture(loop_scope='{loop_scope}')"),
        test_unmarked=UNMARKED,
    )
    result.assert_outcomes(passed=10, errors=1)


def test_a_hook_of_the_users_that_runs_coroutines(run_pytest: RunPytest) -> None:
    result = run_pytest("-p", "no:asyncio", "-p", "no:anyio", ini="", conftest=OWN_HOOK, test_unmarked=UNMARKED)
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines("the test left a request behind: 'forgotten'.*")


def test_of_a_loop_that_no_fixture_reaches_it_is_said_what_to_do(run_pytest: RunPytest) -> None:
    result = run_pytest(test_unittest=UNITTEST.replace("asyncscale_engines", "asyncscale_client"))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines("*Take the fixture asyncscale_engines*")


def test_under_xdist_each_worker_has_engines_of_its_own(run_pytest: RunPytest) -> None:
    pytest.importorskip("xdist")
    run_pytest("-n", "2", test_asyncio=ASYNCIO, test_blocking=BLOCKING).assert_outcomes(passed=9)
