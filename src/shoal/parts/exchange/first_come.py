"""First come, first used: everybody sends to everybody and nobody waits for the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.rounds.exchange import Hop
from shoal.tensor import keyed
from shoal.tensor.types import Index, Mask


@dataclass(frozen=True)
class FirstCome:
    """A complete graph in which each receiver uses the first `peers - byzantine` vectors.

    The own vector is one of them. Messages of the `faulty` peers always come first, which is the
    worst order that an adversary can arrange; the others follow in an order drawn by key for each
    receiver, wave and round. A peer that may not wait for more, since `byzantine` others might
    never send, learns from n - f vectors of which f may be arbitrary. steps: waves per round; a
    later wave sends what the wave before combined. faulty: ids; with none of them everybody's
    messages come in random order. Breaks with 2*byzantine >= peers: the faulty then are a majority.
    Source: Farhadkhani et al. 2023, section 6 (arXiv 2209.10931).

    >>> hop, = FirstCome(7, byzantine=2, faulty=(5, 6)).hops(0, seed=1)
    >>> hop.sources[0].tolist(), hop.taken[0].sum().item(), hop.taken[0, 4:].tolist()
    ([1, 2, 3, 4, 5, 6], 4, [True, True])
    """

    peers: int
    byzantine: int = 0
    faulty: tuple[int, ...] = ()
    steps: int = 1

    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 7, "byzantine": 2, "faulty": (0, 5)},
        {"peers": 6, "byzantine": 2, "steps": 2},
        {"peers": 5},
        {"peers": 1},
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "faulty", tuple(sorted({int(peer) for peer in self.faulty})))
        if self.peers < 1:
            raise UsageError(f"FirstCome: peers={self.peers}; need at least 1 (raise it)")
        if not 0 <= 2 * self.byzantine < self.peers:
            raise UsageError(
                f"FirstCome: byzantine={self.byzantine} of {self.peers} peers; need 0 or more and "
                "fewer than half (lower byzantine, or add peers)"
            )
        if self.steps < 1:
            raise UsageError(f"FirstCome: steps={self.steps}; need at least 1 wave (raise it)")
        if self.faulty and not 0 <= self.faulty[0] <= self.faulty[-1] < self.peers:
            raise UsageError(
                f"FirstCome: faulty={self.faulty}; need ids from 0 to {self.peers - 1}"
            )

    @property
    def hub(self) -> None:
        """Nobody: all peers aggregate."""
        return None

    def active(self, round: int, seed: int) -> Mask:
        """bool [peers]: everybody works."""
        return _everybody(self.peers)

    def hops(self, round: int, seed: int) -> tuple[Hop, ...]:
        """`steps` waves; the tensors are shared between calls and must not be written."""
        # With nobody left out all rounds and seeds are alike: hand out one copy.
        return _hops(self, *((round, seed) if self.byzantine else (0, 0)))


@lru_cache(maxsize=8)
def _everybody(peers: int) -> Mask:
    return torch.ones(peers, dtype=torch.bool, device="cpu")


@lru_cache(maxsize=8)
def _others(peers: int) -> Index:
    """int64 [peers, peers - 1]: everybody but oneself, ascending."""
    receivers = torch.arange(peers, device="cpu").unsqueeze(-1)
    places = torch.arange(peers - 1, device="cpu")
    return places + (places >= receivers)


@lru_cache(maxsize=32)
def _hops(exchange: FirstCome, round: int, seed: int) -> tuple[Hop, ...]:
    sources = _others(exchange.peers)
    if not exchange.byzantine:
        return (Hop(sources),) * exchange.steps
    key = keyed.key_of(seed, "first_come", round)
    receivers = torch.arange(exchange.peers, device=key.device).unsqueeze(-1)
    waves = torch.arange(exchange.steps, device=key.device).view(-1, 1, 1)
    draws = keyed.uniform(key, waves, receivers, sources)
    first = torch.zeros(exchange.peers, dtype=torch.bool, device=key.device)
    first[list(exchange.faulty)] = True
    draws = torch.where(first[sources], draws - 1.0, draws)
    # In place of each message's place in the order of arrival: the last one that is waited for.
    count = exchange.peers - exchange.byzantine - 1
    order = draws.argsort(dim=-1, stable=True)[..., :count]
    taken = torch.zeros_like(draws, dtype=torch.bool).scatter_(-1, order, True)
    return tuple(Hop(sources, taken=wave) for wave in taken)
