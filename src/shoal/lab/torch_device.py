"""The torch device that a run's models live on."""

from __future__ import annotations

from functools import lru_cache

from shoal.base.errors import UsageError


def resolved(device: str) -> str:
    """The full name of the device that is meant: `auto` is a GPU wherever there is one.

    UsageError for one that this machine or this torch does not have, or that has no float64:
    distances, times and random draws are computed in it.

    >>> resolved("cpu")
    'cpu'
    """
    if device == "cpu":
        # What nearly everybody has needs no torch.
        return device
    return _usable(_automatic() if device == "auto" else device)


@lru_cache(maxsize=1)
def _automatic() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


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
