"""Fixtures that pytest-asyncio runs on the loop of a test. Registered where that plugin is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal

import pytest
import pytest_asyncio

LoopScope = Literal["function", "class", "module", "package", "session"]


def _entering(scope_fixture: str, loop_scope: LoopScope) -> Any:
    name = f"{scope_fixture}_entered_in_{loop_scope}_loop"

    @pytest_asyncio.fixture(loop_scope=loop_scope, name=name)
    async def entered(request: pytest.FixtureRequest) -> AsyncIterator[None]:
        async with request.getfixturevalue(scope_fixture):
            yield

    return entered


_SCOPE_FIXTURES = ("_asyncscale_client_scope", "_asyncscale_factory_scope")
client_in_function_loop, factory_in_function_loop = (_entering(name, "function") for name in _SCOPE_FIXTURES)
client_in_class_loop, factory_in_class_loop = (_entering(name, "class") for name in _SCOPE_FIXTURES)
client_in_module_loop, factory_in_module_loop = (_entering(name, "module") for name in _SCOPE_FIXTURES)
client_in_package_loop, factory_in_package_loop = (_entering(name, "package") for name in _SCOPE_FIXTURES)
client_in_session_loop, factory_in_session_loop = (_entering(name, "session") for name in _SCOPE_FIXTURES)
