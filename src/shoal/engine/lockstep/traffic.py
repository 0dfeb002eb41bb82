"""When each message of a wave arrives: the formulas of `world` on all messages at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.engine.lockstep.timeline import Timeline
from shoal.rounds.exchange import Hop
from shoal.world.links import fifo_finish
from shoal.world.network import Network


@dataclass
class Wires:
    """Links of one seed's world, with the state of its queues. Peers are 0..n-1."""

    network: Network
    up_free: Tensor
    down_free: Tensor

    @classmethod
    def of(cls, network: Network) -> Wires:
        free = torch.zeros(network.peers, dtype=torch.float64, device="cpu")
        return cls(network, free, free.clone())


@dataclass(frozen=True)
class Slots:
    """The messages of a wave by receiver: all [receivers, k] but `receiver` and `fan_out`."""

    receiver: Tensor
    """[receivers]"""
    source: Tensor
    """padded with 0"""
    exists: Tensor
    expected: Tensor
    rank: Tensor
    """the place of this receiver in its source's sending order"""
    fan_out: Tensor
    """[peers]: how many messages each peer sends"""

    @classmethod
    def of(cls, hop: Hop, active: Tensor, hub: int | None) -> Slots:
        peers = len(active)
        receiver = torch.arange(peers) if hop.receivers is None else hop.receivers
        listens = active[receiver] | (receiver == (-1 if hub is None else hub))
        source = hop.sources.clamp(min=0)
        exists = (hop.sources >= 0) & active[source] & listens.unsqueeze(-1)
        expected = exists if hop.taken is None else exists & hop.taken
        # Messages leave in ascending order of receiver, as the adapter sends them.
        sender = source[exists]
        order = torch.argsort(sender, stable=True)
        fan_out = torch.bincount(sender, minlength=peers)
        first = torch.cumsum(fan_out, 0) - fan_out
        place = torch.empty_like(sender)
        place[order] = torch.arange(len(sender)) - first[sender[order]]
        rank = torch.zeros_like(source)
        rank[exists] = place
        return cls(receiver, source, exists, expected, rank, fan_out)


@dataclass(frozen=True)
class Arrivals:
    """arrive [receivers, k], infinity for what never does; what got lost, by reason."""

    arrive: Tensor
    dropped: dict[str, int]
    up_free: Tensor
    down_free: Tensor


def arrivals(
    wires: Wires, timeline: Timeline, slots: Slots, sent_s: Tensor, size_bytes: Tensor, key: int
) -> Arrivals:
    """Arrival times of a wave. sent_s [peers] (inf = did not send), size_bytes [peers]."""
    links, source = wires.network.links, slots.source
    if links.plain and not timeline.faults:
        # One latency for everybody and nothing that gets lost: no formula needs to be asked.
        latency_s = links.latency_of_s(0, 0)
        arrive = torch.where(slots.exists, sent_s[source] + latency_s, math.inf)
        return Arrivals(arrive, {}, wires.up_free, wires.down_free)
    target = slots.receiver.unsqueeze(-1).expand_as(source)
    sends = slots.exists & torch.isfinite(sent_s)[source]
    begin = end = torch.where(sends, sent_s[source], math.inf)
    up_free, down_free = wires.up_free, wires.down_free
    size = size_bytes[source].to(torch.float64)
    if links.sharing:
        peers = torch.arange(len(sent_s))
        service = size_bytes.to(torch.float64) / links.uplink_of(peers)
        clear = torch.maximum(sent_s, up_free)
        begin = torch.where(sends, clear[source] + slots.rank * service[source], math.inf)
        end = begin + service[source]
        drained = clear + slots.fan_out * service
        up_free = torch.where(torch.isfinite(sent_s), drained, up_free)
    delay = links.latency_of_s(source, target) + links.jitter_of_s(source, target, key)
    blocked, extra, held = timeline.on_links(
        source, target, torch.where(sends, sent_s[source], -1.0)
    )
    lost = links.lost(source, target, key, extra) & ~blocked
    passes = sends & ~blocked & ~lost
    # What its receiver was not alive for when it left reaches no one.
    passes &= (sent_s[source] >= timeline.birth[target]) & torch.isfinite(timeline.birth[target])
    if links.sharing:
        taking = size / links.downlink_of(target)
        first = torch.maximum(torch.maximum(begin + delay, end + delay - taking), held)
        # The queue may still be busy with the wave before.
        first = torch.maximum(first, down_free[slots.receiver].unsqueeze(-1))
        arrive = fifo_finish(first, taking, passes)
        last = (
            torch.where(passes, arrive, 0.0).sum(-1)
            if not passes.shape[-1]
            else torch.where(passes, arrive, 0.0).amax(-1)
        )
        down_free = down_free.index_put((slots.receiver,), last.maximum(down_free[slots.receiver]))
    else:
        arrive = torch.maximum(end + delay, held)
    arrive = torch.where(passes, arrive, math.inf)
    # A crash takes what is in flight from and to the peer with it.
    source_death = torch.where(timeline.hard, timeline.death, math.inf)[source]
    dead = passes & ((arrive >= source_death) | (arrive >= timeline.death[target]))
    arrive = torch.where(dead, math.inf, arrive)
    born = sends & ~blocked & ~lost & ~passes
    dropped = {
        "partition": int((sends & blocked).sum()),
        "lost": int((sends & lost).sum()),
        "dead": int(dead.sum()) + int(born.sum()),
    }
    return Arrivals(arrive, dropped, up_free, down_free)
