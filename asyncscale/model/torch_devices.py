"""Whether there is a device that only torch computes on."""

from __future__ import annotations

import os

_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def has_gpu() -> bool:
    """Whether torch finds a CUDA device. It is not even imported, which takes a second, where there can be none."""
    if not any(map(os.path.exists, _DRIVERS)):
        return False
    import torch

    return torch.cuda.is_available()
