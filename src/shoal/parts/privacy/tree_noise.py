"""Noise on running sums that grows with the logarithm of their length: the binary tree.

Of every running sum of `leaves` terms each is to be shown with noise. The terms are leaves of a
binary tree, each node of which has noise of its own; a running sum is made of at most
log2(leaves) + 1 nodes, so that is how many noises it carries, and a term that changes moves as few
nodes. Without any sampling, and whatever the order of the terms.

Only nodes that complete a running sum are ever made, one with each term, and they replace those
below them. So the state is one noise for each level.

Dwork, Naor, Pitassi and Rothblum 2010; Chan, Shi and Song 2011; for training Kairouz et al. 2021
(DP-FTRL, arXiv 2103.00039), with trees that begin anew (their appendix D).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.privacy.accountant import Neighbours
from shoal.parts.privacy.secret_keys import Secrets, check_secrets, draw_keys
from shoal.tensor.keyed import fold, normal
from shoal.tensor.types import Key, Vector


@dataclass(frozen=True)
class TreeSums:
    """nodes [..., levels, dim]: the noises in the running sum, 0 = no node at this level;
    count int64 [...]: terms so far in this tree."""

    nodes: Tensor
    count: Tensor


@dataclass(frozen=True)
class TreeNoise:
    """N(0, deviation^2) at each node of trees of `leaves` terms, which follow one another.

    secrets: of the draws, see `parts.privacy.secret_keys`.

    >>> tree = TreeNoise(4)
    >>> tree.levels
    3
    >>> sums = tree.init(torch.zeros(2, 10))
    >>> sums, step = tree.after(sums, torch.tensor([1, 2]))
    >>> step.shape, sums.count.tolist()
    (torch.Size([2, 10]), [1, 1])
    """

    leaves: int
    deviation: float = 1.0
    secrets: Secrets = "run"

    def __post_init__(self) -> None:
        if self.leaves < 1:
            raise UsageError(f"TreeNoise: leaves={self.leaves}; need at least one term")
        if not 0 <= self.deviation < math.inf:
            raise UsageError(f"TreeNoise: deviation={self.deviation}; need a finite number >= 0")
        check_secrets("TreeNoise", self.secrets)

    @property
    def levels(self) -> int:
        """Nodes over a term, itself included: 1 + floor(log2(leaves))."""
        return tree_levels(self.leaves)

    def init(self, like: Vector) -> TreeSums:
        """Before the first term of vectors [..., dim]."""
        nodes = like.new_zeros((*like.shape[:-1], self.levels, like.shape[-1]))
        return TreeSums(nodes, torch.zeros_like(like[..., 0], dtype=torch.int64))

    def after(self, sums: TreeSums, key: Key) -> tuple[TreeSums, Vector]:
        """One more term: what the noise of the running sum changes by, [..., dim].

        key [...]: another one for each term. After `leaves` terms a new tree begins; the noise of
        the last running sum of the old one stays in what was shown.
        """
        full = sums.count == self.leaves
        count = torch.where(full, 0, sums.count) + 1
        old = torch.where(full[..., None, None], 0.0, sums.nodes)
        # Term number `count` completes the node whose level is the number of zeros at its end.
        level = _trailing_zeros(count, self.levels).unsqueeze(-1)
        levels = torch.arange(self.levels, device=count.device)
        keys = draw_keys(fold(key, "tree"), old.shape[-1], self.secrets)
        draws = normal(keys, dtype=old.dtype) * self.deviation
        fresh = torch.where((levels == level).unsqueeze(-1), draws.unsqueeze(-2), old)
        nodes = torch.where((levels < level).unsqueeze(-1), 0.0, fresh)
        return TreeSums(nodes, count), nodes.sum(-2) - old.sum(-2)


def tree_levels(leaves: int) -> int:
    """How many nodes that are ever shown one term is in, at most.

    >>> [tree_levels(leaves) for leaves in (1, 2, 3, 4, 7, 8)]
    [1, 2, 2, 3, 3, 4]
    """
    return leaves.bit_length()


def _trailing_zeros(count: Tensor, levels: int) -> Tensor:
    powers = 2 ** torch.arange(1, levels + 1, device=count.device)
    return (count.unsqueeze(-1) % powers == 0).sum(-1)


@dataclass(frozen=True)
class TreeRelease:
    """All running sums of one tree, as the ledger counts them.

    noise: a node's standard deviation over what one record moves its term by. A record is in one
    term of the tree: if it comes back in the next tree, count that tree too. Nothing is gained from
    sampling, and nothing is assumed of the order. Neighbours: a record is there or its place is
    empty; no other record comes into another term because of it.

    >>> TreeRelease(2.0, leaves=7).renyi(4.0)
    1.5
    """

    noise: float
    leaves: int

    neighbours: ClassVar[Neighbours] = "removed"

    def __post_init__(self) -> None:
        if not 0 <= self.noise < math.inf or self.leaves < 1:
            raise UsageError(
                f"TreeRelease: noise={self.noise}, leaves={self.leaves}; need finite noise of 0 or "
                "more and at least one term"
            )

    def renyi(self, alpha: float) -> float:
        """alpha levels / (2 noise^2): each of the nodes that a term is in is a Gaussian release."""
        if self.noise == 0:
            return math.inf
        return alpha * tree_levels(self.leaves) / (2 * self.noise**2)
