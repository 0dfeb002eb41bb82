"""Renyi differential privacy of mechanisms with finitely many codes, computed exactly.

A mechanism turns an entry x in [-clip, clip] into a code at random (see `shoal.parts.transform.rqm`
and `.pbm`). Two data sets are neighbours if one client's entry differs; the other clients' entries
are the same. The observer sees one client's code (clients = 1, local privacy), or the sum of the
codes of `clients` clients and nothing else, which takes secure aggregation
(`shoal.parts.privacy.modular_sum`); then all others' randomness protects each of them.

Everything is for one entry of one message. Entries and rounds add up: a model of `dims` entries
that is sent in `rounds` rounds spends dims * rounds times as much.

Mironov 2017 (arXiv 1702.07476): definition, composition, conversion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from shoal.base.errors import UsageError

ORDERS = tuple(1.0 + 10.0 ** (step / 16) for step in range(-96, 49))
"""From 1 + 1e-6 to 1001, over which `epsilon` takes the least."""


Neighbours = Literal["removed", "replaced"]
"""What may differ between two data sets: a record is missing, or another one is in its place."""


class Mechanism(Protocol):
    """`log_pmf(x [...])` [..., codes]: logarithms of the chances of each code of entries x."""

    @property
    def clip(self) -> float: ...

    def log_pmf(self, x: Tensor) -> Tensor: ...


def renyi_divergence(log_p: Tensor, log_q: Tensor, alpha: float) -> float:
    """D_alpha(P || Q) of two laws on the same codes, given by logarithms [codes]; alpha >= 1.

    alpha = 1 is the divergence of Kullback and Leibler, alpha = inf the largest log ratio. A code
    that Q never gives and P does makes it infinite.

    >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    >>> renyi_divergence(p, q, 2.0), round(renyi_divergence(q, p, 2.0), 4)
    (inf, 0.6931)
    """
    if not alpha >= 1:
        raise UsageError(f"renyi_divergence: alpha={alpha}; need an order of at least 1 (raise it)")
    there = log_p > -math.inf
    log_p, log_q = log_p[there].double(), log_q[there].double()
    ratio = log_p - log_q
    if alpha == math.inf:
        return float(ratio.max())
    if alpha == 1:
        return float((log_p.exp() * ratio).sum())
    # P^alpha Q^(1 - alpha), with logarithms: powers of small chances leave the range of floats.
    return max(0.0, float(torch.logsumexp(log_p + (alpha - 1) * ratio, -1)) / (alpha - 1))


def log_convolve(a: Tensor, b: Tensor) -> Tensor:
    """Logarithms of the law of a sum from those of its summands: [n], [m] -> [n + m - 1].

    >>> coin = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    >>> log_convolve(coin, coin).exp()
    tensor([0.2500, 0.5000, 0.2500], dtype=torch.float64)
    """
    if len(a) > len(b):
        a, b = b, a
    table = b.new_full((len(a), len(a) + len(b) - 1), -math.inf)
    for shift, weight in enumerate(a):
        table[shift, shift : shift + len(b)] = weight + b
    return torch.logsumexp(table, 0)


def log_power(law: Tensor, count: int) -> Tensor:
    """The law of a sum of `count` independent draws, in logarithms; count = 0 is surely 0."""
    total = law.new_zeros(1)
    for _ in range(count):
        total = log_convolve(law, total)
    return total


@dataclass(frozen=True)
class Accountant:
    """What a mechanism spends per entry and message, at the worst of all inputs that are tried.

    clients: how many codes the observer sees the sum of. points: how many values are tried for the
    two entries that are told apart, evenly from -clip to clip; 2 are the extremes. The other
    clients are tried at +clip, at -clip, and half and half. That the extremes are the worst is no
    theorem for every mechanism: raise `points` to see.

    >>> from shoal.parts.transform.rqm import Rqm
    >>> alone, among = Accountant(Rqm()), Accountant(Rqm(), clients=10)
    >>> round(alone.renyi(2.0), 2), round(among.renyi(2.0), 2)
    (5.06, 1.85)
    """

    mechanism: Mechanism
    clients: int = 1
    points: int = 2

    neighbours: ClassVar[Neighbours] = "replaced"

    def __post_init__(self) -> None:
        if self.clients < 1 or self.points < 2:
            raise UsageError(
                f"Accountant: clients={self.clients}, points={self.points}; need at least 1 client "
                "and the 2 extremes"
            )

    @cached_property
    def _laws(self) -> tuple[tuple[Tensor, ...], ...]:
        """For each choice of the others' entries: the observed laws for all values tried."""
        clip, others = self.mechanism.clip, self.clients - 1
        tried = torch.linspace(-clip, clip, self.points, dtype=torch.float64, device="cpu")
        own = self.mechanism.log_pmf(tried)
        lowest, highest = own[0], own[-1]
        out = []
        for high in sorted({0, others // 2, others}):
            rest = log_convolve(log_power(highest, high), log_power(lowest, others - high))
            out.append(tuple(log_convolve(law, rest) for law in own))
        return tuple(out)

    def renyi(self, alpha: float) -> float:
        """The largest D_alpha between what two values of one entry make the observer see."""
        return max(
            renyi_divergence(first, second, alpha)
            for laws in self._laws
            for i, first in enumerate(laws)
            for j, second in enumerate(laws)
            if i != j
        )

    def curve(self, orders: Sequence[float] = ORDERS) -> tuple[float, ...]:
        """`renyi` at each order."""
        return tuple(self.renyi(alpha) for alpha in orders)

    def epsilon(
        self, delta: float, rounds: int = 1, dims: int = 1, *, tight: bool = False,
        orders: Sequence[float] = ORDERS,
    ) -> float:  # fmt: skip
        """epsilon of (epsilon, delta)-privacy of `dims` entries sent in `rounds` rounds.

        Assumes that every client takes part in every round: nothing is gained here from sampling.
        tight: see `to_epsilon`.
        """
        if rounds < 1 or dims < 1:
            raise UsageError(f"epsilon: rounds={rounds}, dims={dims}; need at least 1 of each")
        spent = [rounds * dims * each for each in self.curve(orders)]
        return to_epsilon(orders, spent, delta, tight=tight)


def to_epsilon(
    orders: Sequence[float], spent: Sequence[float], delta: float, *, tight: bool = False
) -> float:
    """The least epsilon such that (alpha, D_alpha) at any of the orders gives (epsilon, delta).

    D + log(1 / delta) / (alpha - 1) (Mironov 2017, proposition 3), or with `tight` less by
    log(alpha) / (alpha - 1) - log(1 - 1 / alpha) (Canonne, Kamath and Steinke 2020, proposition
    12, arXiv 2004.00010).

    >>> round(to_epsilon([2.0], [0.5], 0.1), 3), round(to_epsilon([2.0], [0.5], 0.1, tight=True), 3)
    (2.803, 1.416)
    """
    if not 0 < delta < 1:
        raise UsageError(f"delta={delta}; need a chance above 0 and below 1")
    least = math.inf
    for alpha, divergence in zip(orders, spent, strict=True):
        if not 1 < alpha < math.inf:
            raise UsageError(f"orders: {alpha}; need finite orders above 1")
        found = divergence - math.log(delta) / (alpha - 1)
        if tight:
            found += math.log1p(-1 / alpha) - math.log(alpha) / (alpha - 1)
        least = min(least, found)
    return max(0.0, least)


def gaussian_renyi(alpha: float, clip: float, noise: float, clients: int = 1) -> float:
    """D_alpha of `clip_entries`: the sum of entries in [-clip, clip], each with N(0, noise^2).

    Neighbours differ by one client's entry, replaced: it moves by 2 clip at most.
    """
    return math.inf if noise == 0 else alpha * (2 * clip) ** 2 / (2 * clients * noise**2)
