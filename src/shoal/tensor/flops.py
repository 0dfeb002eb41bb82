"""How many floating-point operations a function does at given shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import FlopCounterMode


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Matrix products, convolutions and attention, counted while the function runs once.

    Element-wise work is not counted; give an explicit cost where it matters.

    >>> import torch
    >>> count_flops(torch.mm, torch.ones(2, 3), torch.ones(3, 4))
    48.0
    """
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return float(counter.get_total_flops())
