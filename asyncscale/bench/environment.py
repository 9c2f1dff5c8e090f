"""Where figures were measured: versions and machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

_PACKAGES = ("asyncscale", "numpy", "torch", "uvloop", "pyzmq")


def environment() -> dict[str, Any]:
    """For the JSON file of a benchmark."""
    return {
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "machine": {"platform": platform.platform(), "num_cpus": os.cpu_count()},
    }
