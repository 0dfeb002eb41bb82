"""A sample of live peers that everybody with the same view draws alike, without a coordinator.

Candidates stand in the order of a hash of (peer, round); the first ones that answer a ping are the
sample. Whoever asks, with nearly the same view, gets nearly the same answer: "mostly consistent"
sampling (De Vos et al. 2023, MoDeST, arXiv 2302.13837, algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.base.errors import UsageError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.tensor import keyed
from shoal.wire.message import message


@message(tag=("number", "wave"))
class Ping:
    """Are you there? Tells the asker's estimate of the round and its membership counter."""

    number: int
    wave: int
    round: int
    counter: int


@message(tag=("number", "wave"))
class Pong:
    """Yes; with the same about whoever answers."""

    number: int
    wave: int
    round: int
    counter: int


def hash_order(ids: NDArray[np.int64], *words: int | str) -> NDArray[np.int64]:
    """`ids` [k] in the order of their keyed hashes: uniform, and the same in every process.

    Equal hashes, one pair in 2^64, stand in the order of the ids. The result may be shared and
    must not be written. The hash mixes well but is no secret: who can choose an id freely can
    choose its place.

    >>> hash_order(np.arange(6), "sample", 3).tolist()
    [2, 0, 1, 3, 4, 5]
    """
    return _ordered(ids.tobytes(), words)


@lru_cache(maxsize=64)
def _ordered(ids: bytes, words: tuple[int | str, ...]) -> NDArray[np.int64]:
    # In a simulation many peers ask for the same order at nearly the same time.
    known = np.frombuffer(ids, np.int64)
    draws = keyed.fold(keyed.key_of(0, "hash order", *words), torch.tensor(known, device="cpu"))
    order = known[torch.argsort(draws, stable=True).numpy()]
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class Answers:
    """live: the sample in hash order; pongs: who answered what; waves: how often it was asked;
    waited_s: how long that took; answered_s: the slowest answer of the first wave, inf if one is
    missing."""

    live: tuple[PeerId, ...]
    pongs: Mapping[PeerId, Pong]
    waves: int
    waited_s: float
    answered_s: float


@dataclass(frozen=True)
class LiveSample:
    """Pings candidates in order and in parallel until enough of them have answered.

    timeout_s: how long an answer may take; most: pings under way at once. The first wave asks as
    many as are wanted; m misses are replaced by 2m pings, then 4m, and so on up to `most`, so that
    finding the living among many dead takes a number of timeouts that grows with the logarithm of
    their number. The asker counts as live without being asked. Breaks where answers take longer
    than timeout_s: then different askers get different samples.
    """

    timeout_s: float = 5.0
    most: int = 32

    def __post_init__(self) -> None:
        if not self.timeout_s > 0 or self.most < 1:
            raise UsageError(
                f"LiveSample: timeout_s={self.timeout_s}, most={self.most}; need a positive time "
                "and at least one ping at once"
            )

    async def __call__(
        self, peer: Peer, order: Sequence[int], count: int, *, number: int, round: int,
        counter: int, timeout_s: float | None = None,
    ) -> Answers:  # fmt: skip
        """The first `count` live peers of `order`; fewer when it has no more.

        number: this peer's own number for the search, never used again; timeout_s: in place of
        the setting. Somebody has to answer: see `answer`.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        start_s, answered_s = peer.now(), 0.0
        found: set[int] = set()
        pongs: dict[PeerId, Pong] = {}
        asked = wave = 0
        while len(found) < count and asked < len(order):
            missing = count - len(found)
            part = order[asked : asked + max(missing, min(missing << wave, self.most))]
            asked += len(part)
            others = [PeerId(int(p)) for p in part if p != peer.id]
            for other in others:
                await peer.send(other, Ping(number, wave, round, counter))
            heard: Mapping[PeerId, Pong] = await peer.gather(
                Pong, tag=(number, wave), expect=others, deadline=peer.now() + timeout_s
            )
            if not wave:
                complete = len(heard) == len(others)
                answered_s = peer.now() - start_s if complete else math.inf
            pongs.update(heard)
            found.update(heard)
            if len(others) < len(part):
                found.add(peer.id)
            wave += 1
        live = [PeerId(int(p)) for p in order[:asked] if p in found]
        return Answers(tuple(live[:count]), pongs, wave, peer.now() - start_s, answered_s)


async def answer(peer: Peer, to: PeerId, ping: Ping, *, round: int, counter: int) -> None:
    """Answer a ping."""
    await peer.send(to, Pong(ping.number, ping.wave, round, counter))


def without(order: Sequence[int], excluded: Collection[int]) -> list[int]:
    """An order without some peers."""
    return [int(p) for p in order if int(p) not in excluded]
