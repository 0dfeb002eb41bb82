"""One-dimensional k-means on sorted values, with prefix sums instead of distances."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.tensor.types import Index


def midpoints(centroids: Tensor) -> Tensor:
    """Upper ends [..., clusters - 1] of all clusters but the last; a value on one belongs below."""
    return centroids[..., :-1] / 2 + centroids[..., 1:] / 2


def assign(values: Tensor, centroids: Tensor) -> Index:
    """The nearest of ascending centroids [..., clusters] for each value [..., n]; ties go down."""
    return torch.searchsorted(midpoints(centroids).contiguous(), values.contiguous())


def lloyd(
    values: Tensor, zeros: int, clusters: int, iterations: int, start: str = "linspace"
) -> Tensor:
    """Ascending centroids [..., clusters] of the values [..., k] together with `zeros` zeros.

    values: float64, ascending, k >= 1. start: "linspace" from minimum to maximum, zeros included,
    or "quantile" of the values. An empty cluster keeps its centroid; inertia never increases.
    An iteration costs O(clusters log k) instead of O(clusters k).
    Source: Lloyd 1982, on the order statistics.

    >>> x = torch.tensor([-3., -3., 0., 0., 0., 2., 2.], dtype=torch.float64)
    >>> lloyd(x, 0, 3, 4).tolist()
    [-3.0, 0.0, 2.0]
    """
    low, high = values[..., :1], values[..., -1:]
    if zeros:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    prefix = torch.nn.functional.pad(values.cumsum(-1), (1, 0))
    centroids = _start(values, low, high, clusters, start)
    edge = torch.zeros_like(low)
    everything = torch.full_like(low, values.shape[-1] + zeros)
    for _ in range(iterations):
        bounds = midpoints(centroids)
        below = torch.searchsorted(values.contiguous(), bounds.contiguous(), right=True)
        counts = below + zeros * (bounds >= 0)
        counts = torch.cat((edge, counts.to(values.dtype), everything), -1).diff(dim=-1)
        sums = torch.cat((edge, prefix.gather(-1, below), prefix[..., -1:]), -1).diff(dim=-1)
        means = sums / counts.clamp(min=1)
        # Rounding of the prefix sums must not carry a mean out of its own cluster.
        means = torch.maximum(means, torch.cat((low, bounds), -1))
        means = torch.minimum(means, torch.cat((bounds, high), -1))
        centroids = torch.where(counts > 0, means, centroids)
    return centroids


def _start(values: Tensor, low: Tensor, high: Tensor, clusters: int, start: str) -> Tensor:
    place = torch.arange(clusters, device=values.device, dtype=values.dtype)
    if start == "quantile":
        count = values.shape[-1]
        index = ((place + 0.5) / clusters * count).long().clamp(max=count - 1)
        return values[..., index]
    share = place / (clusters - 1)
    # Written as a weighted mean because high - low may overflow, and exact at both ends.
    return low * (1 - share) + high * share
