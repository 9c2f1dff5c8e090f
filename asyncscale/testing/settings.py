"""Which engines a test wants: by its markers, by flags, by the ini file, by default, in this order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from asyncscale.testing.clients import WatchedClient

SIMULATED = "simulated"
_DEFAULTS: Mapping[str, Any] = {"model": SIMULATED, "num_engines": 1, "pin_engines": False, "progress": False}


@dataclass(frozen=True)
class Settings:
    """The arguments that an `AsyncScaleClient` is made with. Equal ones share engines.

    arguments: model, num_engines, and options of the client and its engines, by name.
    """

    arguments: Mapping[str, Any]

    def over(self, others: Settings) -> Settings:
        """These, and what only `others` say."""
        return Settings({**others.arguments, **self.arguments})

    def client(self) -> WatchedClient:
        """One that is not started. Raises TypeError and ValueError for what cannot be, with the cure."""
        from asyncscale.config import SimulatedModel
        from asyncscale.testing.clients import WatchedClient

        arguments = {**_DEFAULTS, **self.arguments}
        if arguments["model"] == SIMULATED:
            arguments["model"] = SimulatedModel(base_ms=0.2, decode_us=0.0, prefill_us=0.0)
        return WatchedClient(**arguments)


def add_options(parser: pytest.Parser) -> None:
    """Flags, and the keys of the ini file."""
    model = f'a name, path or hub id, as AsyncScaleClient takes it, or "{SIMULATED}" (default), which needs no weights'
    number = 'engine processes that tests share, a number or "auto" (default: 1)'
    group = parser.getgroup("asyncscale", "asyncscale: clients for tests")
    group.addoption("--asyncscale-model", metavar="MODEL", help=model)
    group.addoption("--asyncscale-num-engines", metavar="N", help=number)
    group.addoption(
        "--asyncscale-option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of AsyncScaleClient or its engines, such as max_num_seqs=8; may be repeated",
    )
    parser.addini("asyncscale_model", f"model of the engines that tests share: {model}")
    parser.addini("asyncscale_num_engines", number)
    parser.addini("asyncscale_options", "options of AsyncScaleClient, a line KEY=VALUE for each", type="linelist")


def configured(config: pytest.Config) -> Settings:
    """What flags and ini file say. Raises UsageError."""
    flags = _parse(
        "--asyncscale-model",
        config.getoption("asyncscale_model"),
        "--asyncscale-num-engines",
        config.getoption("asyncscale_num_engines"),
        "--asyncscale-option",
        config.getoption("asyncscale_option"),
    )
    ini = _parse(
        "asyncscale_model",
        config.getini("asyncscale_model"),
        "asyncscale_num_engines",
        config.getini("asyncscale_num_engines"),
        "asyncscale_options",
        config.getini("asyncscale_options"),
    )
    return flags.over(ini)


def marked(node: pytest.Item) -> Settings:
    """What the markers of a test, its class and its module say; the closest one has the last word.

    Fails the test for what they cannot say.
    """
    settings = Settings({})
    for marker in node.iter_markers("asyncscale"):
        if marker.args:
            pytest.fail(
                f"mark.asyncscale takes keyword arguments, such as num_engines=2, got {marker.args!r}", pytrace=False
            )
        settings = settings.over(Settings(marker.kwargs))
    if settings.arguments:
        try:
            settings.client()
        except (TypeError, ValueError) as error:
            pytest.fail(f"mark.asyncscale: {error}", pytrace=False)
    return settings


def _parse(
    model_name: str, model: str | None, number_name: str, number: str | None, options_name: str, options: Iterable[str]
) -> Settings:
    arguments: dict[str, Any] = {}
    for entry in options:
        key, separator, value = entry.partition("=")
        if not separator or not key.strip().isidentifier():
            raise pytest.UsageError(f"{options_name}: expected KEY=VALUE, such as max_num_seqs=8, got {entry!r}")
        arguments[key.strip()] = _value(value.strip())
    if model:
        arguments["model"] = model
    if number:
        arguments["num_engines"] = _value(number)
    return Settings(arguments)


def _value(text: str) -> Any:
    """A number, true, false or null as JSON writes them; anything else is a string."""
    try:
        return json.loads(text)
    except ValueError:
        return text
