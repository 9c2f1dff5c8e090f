"""What the plugin does in a pytest run, besides offering fixtures."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest

from asyncscale.testing import fixtures, loops
from asyncscale.testing.fixtures import engine_pool, settings_of, test_passed
from asyncscale.testing.settings import Settings, add_options, configured, marked

_NAMES = ("asyncscale", "asyncscale.testing")
_marker_settings: pytest.StashKey[list[Settings]] = pytest.StashKey()


def pytest_plugin_registered(plugin: object, plugin_name: str, manager: pytest.PytestPluginManager) -> None:
    """Who asks for the plugin by the name of its module has it already, if it is installed, or the other way round."""
    if plugin_name in _NAMES and getattr(plugin, "pytest_plugin_registered", None) is pytest_plugin_registered:
        for name in _NAMES:
            if name != plugin_name:
                manager.set_blocked(name)


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(fixtures, fixtures.__name__)
    config.addinivalue_line(
        "markers",
        "asyncscale(model, num_engines, **options): the engines of the fixtures asyncscale_client and "
        "asyncscale_engines; keywords are those of AsyncScaleClient",
    )
    settings = configured(config)
    if settings.arguments:
        try:
            settings.client()
        except (TypeError, ValueError) as error:
            raise pytest.UsageError(
                f"the flags --asyncscale-* or the options asyncscale_* of the ini file: {error}"
            ) from None


def pytest_collection(session: pytest.Session) -> None:
    if "pytest_asyncio" in sys.modules:  # fixtures that it shall run it wants to know before it sees tests
        session.config.pluginmanager.import_plugin("asyncscale.testing.pytest_asyncio_fixtures")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Engines that a marker asks for are a parameter of the fixture: of any scope, whoever takes it is made anew."""
    if "asyncscale_engines" not in metafunc.fixturenames:
        return
    settings = marked(metafunc.definition)
    if settings.arguments:
        known = metafunc.config.stash.setdefault(_marker_settings, [])
        if settings not in known:
            known.append(settings)
        same = known[known.index(settings)]  # pytest compares parameters by identity
        hidden = getattr(pytest, "HIDDEN_PARAM", "asyncscale")
        metafunc.parametrize("asyncscale_engines", [same], indirect=True, ids=[hidden], scope="session")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Engines that a fixture of a wider scope keeps in use are as good as new for each test.

    And a test that is run again, as some plugins do, begins anew.
    """
    loops.forget(item)
    item.stash[test_passed] = False
    if "asyncscale_engines" in getattr(item, "fixturenames", ()):
        engine_pool(item.config).acquire(settings_of(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    with loops.scopes_entered_by_test(item):
        result = yield
    item.stash[test_passed] = True
    return result
