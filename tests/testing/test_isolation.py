"""What a test leaves behind is said, and does not hurt the next one."""

from __future__ import annotations

from .conftest import LOOP_SCOPE, RunPytest

AUTO = LOOP_SCOPE + "asyncio_mode = auto\n"

LEFT_BEHIND = """
import asyncio
import pytest

LONG = {"max_tokens": 8000, "ignore_eos": True}
kept = []

async def test_unread(asyncscale_client):
    generation = asyncscale_client.generate("x", request_id="unread", **LONG)

async def test_not_awaited(asyncscale_client):
    asyncscale_client.generate("x", request_id="not-awaited", **LONG)
    await asyncio.sleep(0)

async def test_kept(asyncscale_client):
    kept.append(asyncscale_client.generate("x", request_id="kept", **LONG))

async def test_many(asyncscale_client):
    kept.extend([asyncscale_client.generate("x", **LONG) for _ in range(200)])

async def test_private(asyncscale_client_factory):
    client = await asyncscale_client_factory()
    kept.append(await client.submit("x", request_id="private", **LONG))

async def test_task(asyncscale_client):
    async def read():
        return await asyncscale_client.generate("x", request_id="task", **LONG)

    kept.append(asyncio.create_task(read()))
    await asyncio.sleep(0)

def test_blocking(asyncscale_client):
    kept.append(asyncscale_client.generate("x", request_id="blocking", **LONG))

async def test_idle(asyncscale_client):
    (load,) = asyncscale_client.engine_loads()
    assert (load.in_flight, load.running, load.waiting) == (0, 0, 0)
"""

ENDED = """
import asyncio
import pytest

LONG = {"max_tokens": 8000, "ignore_eos": True}

async def test_left_early(asyncscale_client):
    async for token in asyncscale_client.generate("x", **LONG):
        break

def test_left_early_blocking(asyncscale_client):
    for token in asyncscale_client.generate("x", **LONG):
        break

async def test_aborted(asyncscale_client):
    asyncscale_client.generate("x", **LONG).abort()

async def test_timed_out(asyncscale_client):
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncscale_client.generate("x", **LONG), 0.01)

async def test_closed(asyncscale_client):
    generation = asyncscale_client.generate("x", **LONG)
    await asyncscale_client.close(drain=False)

@pytest.fixture
async def background(asyncscale_client):
    generation = asyncscale_client.generate("x", **LONG)
    yield
    generation.abort()

async def test_a_fixture_ends_it(background):
    pass
"""


def test_a_test_that_leaves_requests_behind_fails_with_their_names(run_pytest: RunPytest) -> None:
    result = run_pytest(ini=AUTO, test_left_behind=LEFT_BEHIND)
    result.assert_outcomes(passed=8, errors=7)
    assert result.errlines == []
    for name in ("unread", "not-awaited", "kept", "private", "task", "blocking"):
        result.stdout.fnmatch_lines(f"the test left a request behind: '{name}'. *")
    result.stdout.fnmatch_lines("the test left 200 requests behind: 'request-0', *, 'request-9' and 190 more. *")


def test_what_has_ended_in_whatever_way_is_not_left_behind(run_pytest: RunPytest) -> None:
    run_pytest(ini=AUTO, test_ended=ENDED).assert_outcomes(passed=6)


def test_of_a_test_that_fails_the_failure_is_reported_and_nothing_else(run_pytest: RunPytest) -> None:
    result = run_pytest(
        ini=AUTO,
        test_failing="""
            import asyncio, time, pytest
            LONG = {"max_tokens": 8000, "ignore_eos": True}

            async def test_fails(asyncscale_client):
                generation = asyncscale_client.generate("x", **LONG)
                assert False

            async def test_is_cancelled(asyncscale_client):
                generation = asyncscale_client.generate("x", **LONG)
                asyncio.current_task().cancel()
                await asyncio.sleep(1)

            @pytest.mark.timeout(0.1, func_only=True)
            async def test_takes_too_long(asyncscale_client):
                await asyncscale_client.collective_rpc("pause")
                async for token in asyncscale_client.generate("x", **LONG):
                    pass

            @pytest.mark.timeout(0.1, func_only=True)
            async def test_blocks(asyncscale_client):
                generation = asyncscale_client.generate("x", **LONG)
                time.sleep(5)

            async def test_idle(asyncscale_client):
                assert asyncscale_client.engine_loads()[0].in_flight == 0
                await asyncscale_client.generate("x")
        """,
    )
    result.assert_outcomes(failed=4, passed=1)


def test_engines_that_a_test_paused_killed_or_stopped_are_ready_for_the_next(run_pytest: RunPytest) -> None:
    result = run_pytest(
        ini=AUTO,
        test_harm="""
            import os, signal
            import pytest
            from asyncscale import AsyncScaleClient
            pids = []

            @pytest.mark.parametrize("harm", ["pause", "drain", "kill", "stop", "none"])
            async def test_works(asyncscale_client, harm):
                assert (await asyncscale_client.generate("x", max_tokens=3)).token_ids
                (engine,) = asyncscale_client.health()
                pids.append(engine.pid)
                match harm:
                    case "pause" | "drain":
                        await asyncscale_client.collective_rpc(harm)
                    case "kill":
                        os.kill(engine.pid, signal.SIGKILL)
                    case "stop":
                        os.kill(engine.pid, signal.SIGSTOP)

            async def test_attached_by_hand(asyncscale_engines):
                async with AsyncScaleClient.attach(asyncscale_engines) as client:
                    await client.collective_rpc("pause")

            async def test_attached_after_that(asyncscale_engines):
                async with AsyncScaleClient.attach(asyncscale_engines) as client:
                    assert (await client.generate("x", max_tokens=3)).token_ids

            def test_only_the_one_that_was_killed_was_started_again():
                assert len(set(pids)) == 2
        """,
    )
    result.assert_outcomes(passed=8)


def test_after_ctrl_c_nothing_is_left_and_nothing_else_is_said(run_pytest: RunPytest) -> None:
    result = run_pytest(
        ini=AUTO,
        test_interrupted="""
            import os, signal

            async def test_interrupted(asyncscale_client):
                generation = asyncscale_client.generate("x", max_tokens=8000, ignore_eos=True)
                os.kill(os.getpid(), signal.SIGINT)
                async for token in generation:
                    pass
        """,
    )
    assert (result.ret, result.errlines) == (2, [])
    result.stdout.fnmatch_lines("*KeyboardInterrupt*")


def test_after_ctrl_c_in_a_synchronous_test_nothing_is_left_and_nothing_else_is_said(run_pytest: RunPytest) -> None:
    result = run_pytest(
        ini=AUTO,
        test_interrupted="""
            import os, signal

            def test_interrupted(asyncscale_client):
                generation = asyncscale_client.generate("x", max_tokens=8000, ignore_eos=True)
                os.kill(os.getpid(), signal.SIGINT)
                generation.result()
        """,
    )
    assert (result.ret, result.errlines) == (2, [])
    result.stdout.fnmatch_lines("*KeyboardInterrupt*")


def test_a_test_that_is_run_again_begins_anew(run_pytest: RunPytest) -> None:
    result = run_pytest(
        "-p", "no:asyncio", "-p", "no:anyio",
        ini="",
        conftest="""
            import asyncio, inspect
            from _pytest.runner import runtestprotocol

            def pytest_runtest_protocol(item, nextitem):
                for _ in range(2):
                    item._initrequest()
                    for report in runtestprotocol(item, nextitem=nextitem, log=False):
                        item.ihook.pytest_runtest_logreport(report=report)
                return True

            def pytest_pyfunc_call(pyfuncitem):
                if inspect.iscoroutinefunction(pyfuncitem.obj):
                    asyncio.run(pyfuncitem.obj(**{"asyncscale_client": pyfuncitem.funcargs["asyncscale_client"]}))
                    return True
        """,
        test_twice="""
            runs = []

            async def test_fails_at_its_second_run(asyncscale_client):
                await asyncscale_client.generate("x", max_tokens=3)
                runs.append(asyncscale_client.generate("x", max_tokens=8000, ignore_eos=True))
                assert len(runs) == 1
        """,
    )  # fmt: skip
    result.assert_outcomes(passed=1, errors=1, failed=1)
    result.stdout.fnmatch_lines("E * assert 2 == 1")
