"""How long a computation takes on a peer: formulas and settings, no engine.

Like `shoal.world.links`, the formulas take a peer as a number or as an int64 tensor `[...]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from shoal.base.errors import UsageError
from shoal.kernel.peer import Cost
from shoal.world.links import log_normal


class DeviceModel(Protocol):
    """What an engine asks of the devices; peers as numbers or int64 tensors `[...]`."""

    def seconds(self, peer: Any, cost: Cost, slow: Any = 1.0) -> Any: ...

    def store_seconds(self, peer: Any, slow: Any = 1.0) -> Any: ...


@dataclass(frozen=True)
class Device:
    """Peers of one kind of machine whose speeds are log-normal around the median.

    flops_per_s: median sustained floating-point rate; bytes_per_s: median memory bandwidth, inf =
    never the limit; spread: sigma of the logarithm of a peer's slowness, one draw for all that it
    does; overhead_s: what any call costs besides; store_s: what a durable commit costs.

    A call takes overhead + seconds + max(flops / rate, bytes / bandwidth), times the peer's
    slowness and the fault's `slow` (the roofline of Williams, Waterman and Patterson 2009: the
    slower of arithmetic and memory). `Cost.seconds` are seconds on the median machine. Breaks where
    a kernel reaches neither bound: give `seconds` then.

    >>> from shoal.kernel.peer import Cost
    >>> Device(flops_per_s=1e9, overhead_s=0.5).seconds(3, Cost(flops=2e9), slow=2.0)
    5.0
    """

    flops_per_s: float = 1e10
    bytes_per_s: float = math.inf
    spread: float = 0.0
    overhead_s: float = 0.0
    store_s: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "bytes_per_s"):
            value = getattr(self, name)
            if not value > 0.0:
                raise UsageError(f"Device: {name}={value}; need > 0 (inf = takes no time)")
        for name in ("spread", "overhead_s", "store_s"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise UsageError(
                    f"Device: {name}={value}; need a finite number >= 0 (0 switches it off)"
                )

    def slowness(self, peer: Any) -> Any:
        """How many times slower than the median this peer is; median 1."""
        if not self.spread:
            return 1.0 if isinstance(peer, int) else _ones_of(peer)
        return log_normal(self.spread, self.seed, "device", peer)

    def seconds(self, peer: Any, cost: Cost, slow: Any = 1.0) -> Any:
        """How long `cost` takes on `peer`; `slow` is a fault's multiplier (1 = none)."""
        arithmetic = cost.flops / self.flops_per_s
        memory = cost.bytes / self.bytes_per_s
        work = self.overhead_s + cost.seconds + _larger(arithmetic, memory)
        return self.slowness(peer) * work * slow

    def store_seconds(self, peer: Any, slow: Any = 1.0) -> Any:
        """How long a durable commit takes on `peer`."""
        return self.slowness(peer) * self.store_s * slow


def _ones_of(peer: Any) -> Any:
    import torch

    return torch.ones_like(peer, dtype=torch.float64)


def _larger(first: Any, second: Any) -> Any:
    # Costs are numbers as a rule, tensors when peers of one call do unequal amounts of work.
    if isinstance(first, float) and isinstance(second, float):
        return max(first, second)
    import torch

    like = second if isinstance(first, float) else first
    return torch.maximum(*(torch.as_tensor(x, device=like.device) for x in (first, second)))
