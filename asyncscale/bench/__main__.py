"""The command line of the benchmarks; each command is a module with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from asyncscale import AsyncScaleError
from asyncscale.bench import chaos, model, overload, quality, routing, scale, serve, start, tandem

_COMMANDS = {
    "serve": serve,
    "scale": scale,
    "routing": routing,
    "overload": overload,
    "chaos": chaos,
    "start": start,
    "model": model,
    "quality": quality,
    "tandem": tandem,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m asyncscale.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.__doc__))
    arguments = parser.parse_args(argv)
    try:
        exit_code: int = _COMMANDS[arguments.command].run(arguments)
        return exit_code
    except (AsyncScaleError, ValueError, OSError) as error:
        print(f"asyncscale.bench: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
