"""How many floating-point operations a function does at given shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Matrix products, convolutions and attention, counted while the function runs once.

    Element-wise work is not counted; give an explicit cost where it matters.

    >>> import torch
    >>> count_flops(torch.mm, torch.ones(2, 3), torch.ones(3, 4))
    48.0
    """
    with _Counter() as counter:
        function(*args)
    return float(counter.flops)


class _Counter(TorchDispatchMode):
    """Counts by torch's own formulas. torch's own mode loads its compiler, and so takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # In inference mode an operation that consists of others arrives whole.
        with self:
            whole = func.decompose(*args, **kwargs)
        if whole is not NotImplemented:
            return whole
        out = func(*args, **kwargs)
        formula = _IN_PLACE.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The compiler is not asked to keep its hands off operations that nobody compiles.
        return False


def _products(into: Tensor, left: Tensor, right: Tensor, **_: object) -> int:
    rows, high, inner = left.shape
    return 2 * rows * high * inner * right.shape[2]


_IN_PLACE = {torch.ops.aten.baddbmm_: _products}
"""torch counts every form of this product but the one that overwrites its first argument."""
