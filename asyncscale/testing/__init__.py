"""asyncscale for tests: a pytest plugin, and what tests do to engines and clients.

::

    async def test_answer(asyncscale_client):
        completion = await asyncscale_client.generate("The capital of France is", max_tokens=8)
        assert completion.finish_reason == "length"

The plugin is installed with the package; with a source checkout, `pytest -p asyncscale.testing` loads it. Fixtures:
asyncscale_client, asyncscale_engines, asyncscale_client_factory; see asyncscale/docs/pytest.md. The functions need no
fixtures, nor pytest's.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# The plugin's: this module is what pytest loads, in every project of the environment that it is installed in. So it
# imports nothing but pytest until a fixture is used.
from asyncscale.testing.hooks import pytest_addoption as pytest_addoption
from asyncscale.testing.hooks import pytest_collection as pytest_collection
from asyncscale.testing.hooks import pytest_configure as pytest_configure
from asyncscale.testing.hooks import pytest_generate_tests as pytest_generate_tests
from asyncscale.testing.hooks import pytest_plugin_registered as pytest_plugin_registered
from asyncscale.testing.hooks import pytest_runtest_call as pytest_runtest_call
from asyncscale.testing.hooks import pytest_runtest_setup as pytest_runtest_setup

if TYPE_CHECKING:
    from asyncscale.testing.faults import cut_client as cut_client
    from asyncscale.testing.faults import hang_engine as hang_engine
    from asyncscale.testing.faults import kill_engine as kill_engine
    from asyncscale.testing.faults import resume_engine as resume_engine
    from asyncscale.testing.faults import slow_engine as slow_engine
    from asyncscale.testing.waiting import wait_engines_ready as wait_engines_ready
    from asyncscale.testing.waiting import wait_idle as wait_idle
    from asyncscale.testing.waiting import wait_until as wait_until

# Without a __dir__ that lists them: pytest looks at everything that it lists.
_HOMES = {
    "asyncscale.testing.faults": ("cut_client", "hang_engine", "kill_engine", "resume_engine", "slow_engine"),
    "asyncscale.testing.waiting": ("wait_engines_ready", "wait_idle", "wait_until"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> object:
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(module), name)
