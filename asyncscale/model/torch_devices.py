"""Whether there is a device that only torch computes on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def has_gpu() -> bool:
    """Whether torch finds a CUDA device. It is not even imported, which takes a second, where there can be none."""
    if not any(map(os.path.exists, _DRIVERS)):
        return False
    import torch

    return torch.cuda.is_available()


def engine_device(engine_id: int) -> torch.device:
    """Where this engine's share of the work is done."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", engine_id % torch.cuda.device_count())
    return torch.device("cpu")
