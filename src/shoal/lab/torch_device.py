"""The torch device that a run's models live on."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path

from shoal.base.errors import UsageError


def resolved(device: str) -> str:
    """The full name of the device that is meant: `auto` is a GPU wherever there is one.

    UsageError for one that this machine or this torch does not have, or that has no float64:
    distances, times and random draws are computed in it.

    >>> resolved("cpu")
    'cpu'
    """
    chosen = _automatic() if device == "auto" else device
    # What nearly everybody has needs no torch.
    return chosen if chosen == "cpu" else _usable(chosen)


@lru_cache(maxsize=1)
def _automatic() -> str:
    # Torch takes seconds to load, and a program without tensors may never need it.
    if "torch" not in sys.modules and not _has_driver():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _has_driver() -> bool:
    """Whether this machine has the driver of a GPU, without which torch finds none."""
    if Path("/dev/kfd").exists():
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _usable(device: str) -> str:
    import torch

    repair = "use auto, cpu, or a device of this machine such as cuda:0"
    if device.startswith("meta"):
        raise UsageError(f"engine.device={device!r}; need a device that holds numbers ({repair})")
    try:
        one = torch.ones((), dtype=torch.float64, device=device)
        float(one + one)
    except Exception as error:
        # What a backend raises for a device that it cannot use is its own affair.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"engine.device={device!r}; torch cannot compute in float64 there: {reason} ({repair})"
        ) from None
    return str(one.device)
