"""Flow matching on a mixture of Gaussians in the plane, whose exact flow is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.parts.flow.distance import energy_distance, sliced_wasserstein
from shoal.parts.flow.gaussians import Gaussians
from shoal.parts.tasks._flow import Flow, FlowTable
from shoal.tensor import keyed
from shoal.tensor.types import Mask

SAMPLES, HELD_OUT = 16384, 2048


@dataclass(frozen=True, eq=False, kw_only=True)
class FlowGaussians(Flow):
    """Samples of `components` equal Gaussians on a circle of `radius`; see `Flow`.

    16,384 samples for training, the same for every seed. A model is held against the exact flow
    (`velocity_error`, the mean squared distance over held-out samples at all times), and generated
    samples against the training samples: `energy_distance`, `sliced_wasserstein`, and `mode_error`,
    the largest difference in how much of both is in a component.

    >>> task = FlowGaussians(peers=4, components=4, hidden=(8,), train_samples=400)
    >>> sorted(task.shard(torch.arange(4)).size.tolist())
    [100, 100, 100, 100]
    """

    components: int = 8
    radius: float = 2.0
    deviation: float = 0.2

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"peers": 4, "hidden": (8,), "train_samples": 200},
        {"peers": 3, "hidden": (8,), "train_samples": 200, "split": "iid"},
    )

    def __post_init__(self) -> None:
        shape = (self.components, self.radius, self.deviation)
        self.prepare(_table(*shape, self.frequencies, self.device))
        exact = Gaussians.ring(
            self.components, radius=self.radius, deviation=self.deviation, dtype=torch.float64
        ).to(torch.float64, self.x.device)
        object.__setattr__(self, "exact", exact)
        object.__setattr__(self, "owned", self._owned())

    def _owned(self) -> Tensor:
        """How many samples of each component each peer has: [components, peers]."""
        kept = (self.owner >= 0).nonzero().squeeze(-1)
        component = self.exact.component(self.x[kept, : self.width].double())
        flat = component * self.peers + self.owner[kept]
        counts = torch.bincount(flat, minlength=self.components * self.peers)
        return counts.view(self.components, self.peers).double()

    def posterior(self, x: Tensor, t: Tensor) -> Tensor:
        """p_t(k | x_t) [n, peers]: exact where who has a sample depends on its component alone."""
        share = self.owned / self.owned.sum(-1, keepdim=True).clamp_min(1)
        return (self.exact.posterior(x.double(), t.double()) @ share).to(x.dtype)

    def held_out(self, velocity: Callable[[Tensor, Tensor], Tensor]) -> Mapping[str, float]:
        x, t = self.test_points()
        exact = self.exact.velocity(x.double(), t.double())
        apart = (velocity(x, t).double() - exact).square().sum(-1)
        return {**super().held_out(velocity), "velocity_error": float(apart.mean())}

    def quality(self, samples: Tensor, present: Mask) -> Mapping[str, float]:
        real = self.clean(present)[: len(samples)]
        most = min(len(real), len(samples))
        wanted = self.owned[:, present].sum(-1)
        component = self.exact.component(samples.double())
        found = torch.bincount(component, minlength=self.components).double()
        key = keyed.key_of(0, "projections", device=samples.device)
        return {
            "energy_distance": energy_distance(samples, real),
            "sliced_wasserstein": sliced_wasserstein(samples[:most], real[:most], key),
            "mode_error": float((found / found.sum() - wanted / wanted.sum()).abs().max()),
        }


@lru_cache(maxsize=4)
def _table(
    components: int, radius: float, deviation: float, frequencies: int, device: str
) -> FlowTable:
    exact = Gaussians.ring(components, radius=radius, deviation=deviation)
    x, label = exact.draw(keyed.key_of(0, "flow gaussians"), SAMPLES)
    held, _ = exact.draw(keyed.key_of(0, "flow gaussians", "held out"), HELD_OUT)
    clean, held = (part.float().to(device) for part in (x, held))
    return FlowTable.of(clean, held, label.numpy(), x.numpy(), frequencies)
