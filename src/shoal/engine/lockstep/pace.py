"""How long a round takes when nothing goes wrong."""

from __future__ import annotations

from dataclasses import replace

import torch

from shoal.engine.lockstep.world import World
from shoal.rounds.adapter import Model
from shoal.rounds.method import Method, down
from shoal.tensor import keyed
from shoal.wire.codec import size_of
from shoal.world.network import Network

MARGIN = 1.5
"""Deadlines stay this factor above the slowest calm round, so that none is near an arrival."""

_ENDLESS_S = 1e8


def round_seconds(method: Method, network: Network) -> float:
    """A length for rounds: `MARGIN` times the slowest peer's first round without faults or loss.

    Jitter is random, so its tail is added: six means are exceeded once in 400 messages.
    """
    links = replace(network.links, loss=0.0)
    calm = replace(network, faults=(), links=links)
    world = World(replace(method, round_s=_ENDLESS_S, byzantine=(), attack=None), calm, None, 0)
    initial = method.initial
    payload, _ = method.transform.encode(
        initial, method.transform.init(initial),
        keyed.key_of(method.seed, "pace", device=initial.device),
    )  # fmt: skip
    frame = torch.full_like(world.peers, int(payload.size_bytes()) + 128)
    world.begin(0)
    if method.exchange.hub is not None:
        given = down(method.strategy.init(initial), method)
        world.lead(0, size_of(Model(0, initial, given)))
    world.work()
    waves = method.waves(0)
    for hop, wave in enumerate(waves):
        world.exchange(hop, len(waves), world.slots(hop, wave), frame)
    slowest = float(world.clock[torch.isfinite(world.clock)].max())
    jitter = getattr(links, "jitter_s", 0.0) * 6.0 * (len(waves) + 1)
    return max(1e-3, MARGIN * (slowest + jitter))
