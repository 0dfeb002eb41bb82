"""The rectified path from a sample (t = 0) to noise (t = 1), and its velocity.

One convention for everything in this package: x_t = (1 - t) x_0 + t e with standard normal e, and
the velocity to learn is dx_t/dt = e - x_0. Sampling goes from t = 1 down to t = 0.
Source: Liu et al. 2023 (arXiv 2209.03003); Lipman et al. 2023 (arXiv 2210.02747).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.tensor import keyed
from shoal.tensor.types import Key


def on_path(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t [..., dim] of samples and noise [..., dim] at times [...].

    >>> on_path(torch.tensor([[4.0]]), torch.tensor([[0.0]]), torch.tensor([0.25]))
    tensor([[3.]])
    """
    t = t.unsqueeze(-1)
    return (1 - t) * x + t * noise


def draws(key: Key, samples: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Times [..., samples], uniform in [0, 1), and noise [..., samples, width] of keys [...]."""
    each = keyed.grid(key, samples)
    return keyed.uniform(each, "time", dtype=dtype), keyed.normal(keyed.grid(each, width)).to(dtype)


def time_features(t: Tensor, frequencies: int) -> Tensor:
    """What a network sees of the time: [..., 2 * frequencies] of times [...].

    Cosines and sines of (pi / 2) 2^i t. The slowest pair tells all of [0, 1] apart.
    """
    # On the time's own device, and a power of two is exact in any precision.
    powers = 2.0 ** torch.arange(frequencies, device=t.device, dtype=t.dtype)
    angles = t.unsqueeze(-1) * powers * (math.pi / 2)
    return torch.cat((angles.cos(), angles.sin()), -1)


def check_times(t: Tensor) -> None:
    """UsageError for times outside [0, 1]; looks at the numbers, so it waits for a device."""
    low, high = float(t.min()), float(t.max())
    if not 0.0 <= low <= high <= 1.0:
        raise UsageError(
            f"flow: times from {low:.4g} to {high:.4g}; need 0 (a sample) to 1 (noise), both "
            "included (divide step numbers by their count)"
        )
