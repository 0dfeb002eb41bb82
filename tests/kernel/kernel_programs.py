"""Messages, and a way to give each peer a coroutine function of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.engine.event.simulation import simulate
from shoal.wire.message import message
from shoal.world.device import Device
from shoal.world.faults import Fault
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run

LATE_S = 1e6
"""A deadline that only a broken kernel reaches."""


@message(tag=("round",))
class Note:
    round: int


@message
class Ask:
    number: int


@message
class Answer:
    number: int


@message(tag=("round",))
class Model:
    round: int
    params: Tensor


@dataclass(frozen=True)
class By:
    """Another coroutine function for each peer."""

    runs: tuple[Callable[[Any], Awaitable[None]], ...]

    async def run(self, peer: Any) -> None:
        await self.runs[peer.id](peer)


def event(
    *runs: Callable[[Any], Awaitable[None]], links: Links | None = None,
    faults: tuple[Fault, ...] = (), device: Device | None = None, **more: Any,
) -> Run:  # fmt: skip
    """One peer per coroutine function; links without latency unless given."""
    network = Network(
        len(runs), links=links or Links(latency_s=0.0), device=device or Device(), faults=faults
    )
    return simulate(By(runs), network, **more)


async def idle(peer: Any) -> None:
    """A peer that is there and does nothing."""


def mix(own: Tensor, others: Tensor) -> Tensor:
    """A step towards the mean: own [..., dim], others [..., k, dim]."""
    return torch.tanh(0.5 * own + 0.5 * others.sum(-2) / others.shape[-2])


@dataclass(frozen=True)
class Gossip:
    """Averaging with whoever was heard by the end of the round, at each peer's own pace."""

    rounds: int = 5
    dim: int = 33

    async def run(self, peer: Any) -> None:
        params = torch.randn(self.dim, generator=peer.generator("init"))
        for round in range(self.rounds):
            peer.enter_round(round)
            for neighbor in peer.neighbors:
                await peer.send(neighbor, Model(round, params))
            heard = await peer.gather(
                Model, tag=(round,), expect=peer.neighbors, deadline=peer.now() + 0.5
            )
            if heard:
                others = torch.stack([each.params for each in heard.values()])
                params = await peer.compute(mix, params, others)
            peer.record("params", params)
