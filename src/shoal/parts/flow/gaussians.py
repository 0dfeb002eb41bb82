"""Mixtures of Gaussians in clusters, with the exact flow of the whole and of each cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.flow.path import check_times
from shoal.tensor import keyed
from shoal.tensor.types import Key


@dataclass(frozen=True, eq=False)
class Gaussians:
    """Spherical Gaussians: means [m, dim], deviations [m], weights [m], cluster [m] of each.

    The flow that rectified flow matching learns from infinitely many samples, in closed form: at
    x_t every component is a Gaussian with mean (1 - t) mu and variance (1 - t)^2 s^2 + t^2, and
    noise and sample are linear in x_t given the component. Clusters are numbered from 0; `velocity`
    is the mean of `cluster_velocity` with the weights `posterior`, which is the identity that
    decentralised flow matching rests on (McAllister et al. 2025, section 3, arXiv 2501.05450).
    Works in the precision of the means.

    >>> one = Gaussians.ring(4, clusters=2)
    >>> one.cluster.tolist(), one.posterior(torch.zeros(1, 2), torch.ones(1)).tolist()
    ([0, 0, 1, 1], [[0.5, 0.5]])
    """

    means: Tensor
    deviations: Tensor
    weights: Tensor
    cluster: Tensor

    def __post_init__(self) -> None:
        count = self.means.shape[0]
        shapes = {tuple(t.shape) for t in (self.deviations, self.weights, self.cluster)}
        if self.means.dim() != 2 or shapes != {(count,)}:
            raise UsageError(
                f"gaussians: means {tuple(self.means.shape)} with {sorted(shapes)}; need means "
                "[m, dim], and deviations, weights and clusters [m]"
            )
        if not (bool((self.deviations > 0).all()) and bool((self.weights > 0).all())):
            raise UsageError("gaussians: need deviations and weights above 0 (drop the component)")
        present = torch.unique(self.cluster)
        if not torch.equal(present, torch.arange(len(present), device=present.device)):
            raise UsageError(
                f"gaussians: clusters {present.tolist()}; number them from 0 without a gap"
            )

    @classmethod
    def ring(
        cls, components: int = 8, clusters: int | None = None, radius: float = 2.0,
        deviation: float = 0.2, dtype: torch.dtype = torch.float64,
    ) -> Gaussians:  # fmt: skip
        """Equal components on a circle; neighbours share a cluster (None = one cluster each)."""
        clusters = components if clusters is None else clusters
        if not 1 <= clusters <= components:
            raise UsageError(
                f"gaussians: {clusters} clusters of {components} components; need 1 to all of them"
            )
        place = torch.arange(components, device="cpu")
        angle = place.to(dtype) * (2 * math.pi / components)
        means = radius * torch.stack((angle.cos(), angle.sin()), -1)
        equal = torch.full_like(angle, 1 / components)
        return cls(means, torch.full_like(angle, deviation), equal, place * clusters // components)

    @property
    def clusters(self) -> int:
        return int(self.cluster.max()) + 1

    def priors(self) -> Tensor:
        """The share of each cluster, [clusters]."""
        shares = self.weights / self.weights.sum()
        return self.weights.new_zeros(self.clusters).index_add(0, self.cluster, shares)

    def only(self, kept: Tensor) -> Gaussians:
        """The mixture of the clusters for which `kept` [clusters] holds, numbered anew."""
        here = kept[self.cluster]
        if not bool(here.any()):
            raise UsageError("gaussians: no cluster is kept (keep one)")
        numbers = kept.long().cumsum(0) - 1
        return Gaussians(
            self.means[here], self.deviations[here], self.weights[here],
            numbers[self.cluster[here]],
        )  # fmt: skip

    def draw(self, key: Key, count: int) -> tuple[Tensor, Tensor]:
        """Samples [count, dim] and the component of each [count]."""
        each = keyed.grid(key, count)
        edges = (self.weights / self.weights.sum()).cumsum(0)
        place = torch.searchsorted(edges, keyed.uniform(each, "component", dtype=edges.dtype))
        place = place.clamp_max(len(edges) - 1)
        noise = keyed.normal(keyed.grid(each, self.means.shape[1]), dtype=self.means.dtype)
        return self.means[place] + self.deviations[place].unsqueeze(-1) * noise, place

    def component(self, x: Tensor) -> Tensor:
        """The likeliest component of samples x [..., dim]: [...]."""
        return self._log_densities(x, torch.zeros_like(x[..., 0])).argmax(-1)

    def posterior(self, x: Tensor, t: Tensor) -> Tensor:
        """p_t(k | x): [..., clusters] of points x_t [..., dim] at times [...]."""
        return self._by_cluster(self._log_densities(x, t).softmax(-1))

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The marginal flow u_t(x): [..., dim]."""
        share = self._log_densities(x, t).softmax(-1)
        return (share.unsqueeze(-1) * self._component_velocity(x, t)).sum(-2)

    def cluster_velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The marginal flow of each cluster alone: [..., clusters, dim]."""
        logs, each = self._log_densities(x, t), self._component_velocity(x, t)
        found = []
        for k in range(self.clusters):
            own = self.cluster == k
            share = logs[..., own].softmax(-1)
            found.append((share.unsqueeze(-1) * each[..., own, :]).sum(-2))
        return torch.stack(found, -2)

    def _spread(self, t: Tensor) -> Tensor:
        """The variance of each component at times [...]: [..., m]."""
        t = t.unsqueeze(-1)
        return ((1 - t) * self.deviations).square() + t.square()

    def _offset(self, x: Tensor, t: Tensor) -> Tensor:
        """x_t minus the mean of each component: [..., m, dim]."""
        return x.unsqueeze(-2) - (1 - t)[..., None, None] * self.means

    def _log_densities(self, x: Tensor, t: Tensor) -> Tensor:
        check_times(t)
        spread, dim = self._spread(t), self.means.shape[1]
        square = self._offset(x, t).square().sum(-1)
        return self.weights.log() - square / (2 * spread) - (dim / 2) * spread.log()

    def _component_velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[e - x_0 | x_t, component]: [..., m, dim]."""
        spread, late = self._spread(t), t.unsqueeze(-1)
        gain = (late - (1 - late) * self.deviations.square()) / spread
        return gain.unsqueeze(-1) * self._offset(x, t) - self.means

    def _by_cluster(self, share: Tensor) -> Tensor:
        total = share.new_zeros(*share.shape[:-1], self.clusters)
        return total.index_add(-1, self.cluster, share)

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Gaussians:
        """The same mixture in another precision or place."""
        return replace(
            self, means=self.means.to(device, dtype), deviations=self.deviations.to(device, dtype),
            weights=self.weights.to(device, dtype), cluster=self.cluster.to(device),
        )  # fmt: skip
