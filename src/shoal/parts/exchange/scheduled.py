"""A communication schedule: how much peers exchange changes from round to round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.rounds.exchange import Hop
from shoal.tensor import keyed
from shoal.tensor.types import Index, Mask

SCHEDULES = ("fixed", "merge", "window", "linear", "cosine")


@dataclass(frozen=True)
class Scheduled:
    """Random matchings, `rate` neighbours per peer on average, and a dense phase at some time.

    rate below 1: each peer is active with this probability, and active peers are paired at random
    (an odd one stays alone) and average. rate of 1 or more: a peer averages with so many others,
    all different, with equal weights (of an odd number of peers one stays alone in each matching);
    what is left of a whole number is a chance of one more. peers - 1: the exact mean of all. Every
    matrix is symmetric and doubly stochastic, so the mean of the peers stays where it is.

    schedule: `fixed`, always `rate`; `merge`, from the share `at` of the rounds on (1 = in the last
    round alone) `dense`; `window`, `dense` from `at` for the share `width`, else `rate`; `linear`
    and `cosine`, from `rate` in the first round to `dense` in the last. dense: None = peers - 1.
    rounds: of the run, which the lab fills in. Which pairs meet depends on the seed, the round and
    that round's rate alone, so two schedules differ in those rounds in which their rates do.
    Assumes that rounds are kept: a peer that skips the dense phase is not in the mean.
    Source: Zhu et al. 2025, sections 3 and 4 (arXiv 2507.06542).

    >>> Scheduled.sparse_then_merge(peers=4, rounds=10).rates()[-2:]
    (0.2, 3.0)
    >>> Scheduled(4, 10, rate=2).messages()
    80
    """

    peers: int
    rounds: int
    rate: float = 0.2
    schedule: str = "fixed"
    at: float = 1.0
    width: float = 0.05
    dense: float | None = None

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"peers": 6, "rounds": 4, "rate": 0.5},
        {"peers": 5, "rounds": 4, "rate": 1.5, "schedule": "merge"},
        {"peers": 6, "rounds": 4, "rate": 0.0, "schedule": "window", "at": 0.5, "width": 0.25},
        {"peers": 7, "rounds": 4, "rate": 0.3, "schedule": "cosine"},
        {"peers": 1, "rounds": 2, "rate": 0.0},
    )

    def __post_init__(self) -> None:
        if self.peers < 1 or self.rounds < 1:
            raise UsageError(
                f"Scheduled: peers={self.peers}, rounds={self.rounds}; need at least 1 of each"
            )
        if self.schedule not in SCHEDULES:
            raise UsageError(
                f"Scheduled: schedule={self.schedule!r}; need one of {', '.join(SCHEDULES)}"
            )
        for name in ("rate", "dense"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= self.peers - 1:
                raise UsageError(
                    f"Scheduled: {name}={value} of {self.peers} peers; need 0 (nobody) to "
                    f"{self.peers - 1} (everybody else)"
                )
        if not (0.0 <= self.at <= 1.0 and 0.0 < self.width <= 1.0):
            raise UsageError(
                f"Scheduled: at={self.at}, width={self.width}; need a moment from 0 to 1 and a "
                "width above 0, up to 1 (shares of the rounds)"
            )

    @classmethod
    def sparse_then_merge(
        cls, peers: int, rounds: int, rate: float = 0.2, merge_at: float = 1.0
    ) -> Scheduled:
        """Sparse gossip, then the mean of all: in the last round, or from a share of the rounds."""
        return cls(peers, rounds, rate, "merge", merge_at)

    @classmethod
    def window(
        cls, peers: int, rounds: int, start: float, width: float = 0.05, rate: float = 0.2
    ) -> Scheduled:
        """Sparse gossip, and the mean of all in each round of a window."""
        return cls(peers, rounds, rate, "window", start, width)

    @property
    def hub(self) -> None:
        """Nobody: all peers aggregate."""
        return None

    def rate_of(self, round: int) -> float:
        """How many neighbours a peer has in a round, on average."""
        dense = float(self.peers - 1 if self.dense is None else self.dense)
        late = min(1.0, round / max(1, self.rounds - 1))
        match self.schedule:
            case "merge":
                start = min(self.rounds - 1, math.ceil(self.at * self.rounds - 1e-9))
                return dense if round >= start else self.rate
            case "window":
                count = max(1, math.floor(self.width * self.rounds + 1e-9))
                start = min(self.rounds - count, math.floor(self.at * self.rounds + 1e-9))
                return dense if start <= round < start + count else self.rate
            case "linear":
                return self.rate + (dense - self.rate) * late
            case "cosine":
                return self.rate + (dense - self.rate) * (0.5 - 0.5 * math.cos(math.pi * late))
        return self.rate

    def rates(self) -> tuple[float, ...]:
        """`rate_of` every round."""
        return tuple(self.rate_of(round) for round in range(self.rounds))

    def messages(self, seed: int = 0) -> int:
        """How many vectors are sent in the whole run; times a model's bytes is what it costs."""
        return sum(
            int((hop.sources >= 0).sum()) for r in range(self.rounds) for hop in self.hops(r, seed)
        )

    def active(self, round: int, seed: int) -> Mask:
        """bool [peers]: everybody works."""
        return torch.ones(self.peers, dtype=torch.bool, device="cpu")

    def hops(self, round: int, seed: int) -> tuple[Hop, ...]:
        """One wave; shared, must not be written."""
        return _hops(self.peers, self.rate_of(round), round, seed)


@lru_cache(maxsize=64)
def _hops(peers: int, rate: float, round: int, seed: int) -> tuple[Hop, ...]:
    if rate >= peers - 1:
        return _everybody(peers)
    whole = math.floor(rate)
    key = keyed.key_of(seed, "matching", round)
    others = [_matching(peers, key, number) for number in range(whole)]
    if rate > whole:
        others.append(_some(peers, key, rate - whole, whole))
    sources = torch.full((peers, 0), -1, dtype=torch.int64, device="cpu")
    if others:
        sources = torch.stack(others, -1)
    # Equal weights among those who meet: as many for both ends of a pair only if all matchings
    # are whole, so each pair weighs 1 / (1 + the larger number of neighbours) (Metropolis).
    count = (sources >= 0).sum(-1)
    larger = torch.maximum(count.unsqueeze(-1), count[sources.clamp_min(0)])
    weights = torch.where(sources >= 0, 1.0 / (1.0 + larger.double()), 0.0)
    return (Hop(sources, weights, 1.0 - weights.sum(-1)),)


@lru_cache(maxsize=8)
def _everybody(peers: int) -> tuple[Hop, ...]:
    """The exact mean of all; with an odd number of peers no set of matchings is it."""
    receivers = torch.arange(peers, device="cpu").unsqueeze(-1)
    places = torch.arange(peers - 1, device="cpu")
    sources = places + (places >= receivers)
    weights = torch.full(sources.shape, 1.0 / peers, dtype=torch.float64, device="cpu")
    return (Hop(sources, weights, 1.0 - weights.sum(-1)),)


def _matching(peers: int, key: Tensor, number: int) -> Index:
    """The partner of each peer in one of disjoint matchings, -1 for one that stays alone.

    The round-robin tournament: with an even number of seats, seat s meets (number - s) modulo
    seats - 1, and the last seat whoever would meet itself. Peers sit in an order drawn by key.
    """
    seats = peers + peers % 2
    order = keyed.uniform(key, torch.arange(peers, device="cpu")).argsort(stable=True)
    at = torch.empty_like(order).scatter_(0, order, torch.arange(peers, device="cpu"))
    turns = seats - 1
    if turns == 0:
        return torch.full_like(at, -1)
    # Which of the tournament's turns are played is drawn as well.
    drawn = keyed.uniform(key, "turn", torch.arange(turns, device="cpu")).argsort(stable=True)
    turn = int(drawn[number])
    other = (turn - at) % turns
    half = torch.where(at == other, seats - 1, other)
    # The last seat meets the one whose opponent would be itself: 2 s = turn modulo turns.
    alone = (turn * (seats // 2)) % turns
    half = torch.where(at == seats - 1, alone, half)
    partner = torch.full((seats,), -1, dtype=torch.int64, device="cpu")
    partner[:peers] = order
    return partner[half]


def _some(peers: int, key: Tensor, chance: float, number: int) -> Index:
    """A matching of some: of the active ones alone, or one more turn with pairs left out."""
    every = torch.arange(peers, device="cpu")
    if number:
        whole = _matching(peers, key, number)
        pair = torch.minimum(every, whole)
        kept = keyed.uniform(key, "kept", pair) < chance
        return torch.where(kept & (whole >= 0), whole, -1)
    active = (keyed.uniform(key, "active", every) < chance).nonzero().squeeze(-1)
    seated = active[keyed.uniform(key, "seat", active).argsort(stable=True)]
    pairs = seated[: len(seated) // 2 * 2].view(-1, 2)
    partner = torch.full_like(every, -1)
    partner[pairs[:, 0]], partner[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
    return partner
