"""When each message of a wave arrives: the formulas of `world` on all messages at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from shoal.engine.lockstep.timeline import Timeline
from shoal.rounds.exchange import Hop
from shoal.world.links import fifo_finish
from shoal.world.network import Network


@dataclass(frozen=True)
class Queued:
    """What a wave put on its receivers' downlinks: all [receivers, k] but `receiver`.

    A peer that is a round ahead sends before a slow one has finished the round, so waves overlap
    at a downlink. Whoever comes first is served first, whichever wave it belongs to.
    """

    receiver: Tensor
    first: Tensor
    """when the first byte got there, which is the order of service"""
    start: Tensor
    """when its service began"""
    service: Tensor
    passes: Tensor

    def of_receivers(self, receiver: Tensor, peers: int) -> Queued:
        """The same for these receivers; those that it does not know have nothing queued."""
        if receiver is self.receiver or torch.equal(receiver, self.receiver):
            return self
        place = torch.full((peers,), -1, device=receiver.device)
        place[self.receiver] = torch.arange(len(self.receiver), device=receiver.device)
        place = place[receiver]
        rows = place.clamp(min=0)
        known = (place >= 0).unsqueeze(-1)
        return Queued(
            receiver, self.first[rows], self.start[rows], self.service[rows],
            self.passes[rows] & known,
        )  # fmt: skip


@dataclass
class Wires:
    """Links of one seed's world, with the state of its queues. Peers are 0..n-1."""

    network: Network
    up_free: Tensor
    queued: dict[type, Queued] = field(default_factory=dict)
    """the latest wave of each kind of message"""
    _latency_s: dict[type, tuple[Slots, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, network: Network) -> Wires:
        free = torch.zeros(network.peers, dtype=torch.float64, device="cpu")
        return cls(network, free)

    # What links draw once for a run is asked for once: draws cost more than a wave's arithmetic.

    @cached_property
    def uplink(self) -> Tensor:
        """Bytes per second [peers]."""
        return self.network.links.uplink_of(torch.arange(self.network.peers))

    @cached_property
    def downlink(self) -> Tensor:
        """Bytes per second [peers]."""
        return self.network.links.downlink_of(torch.arange(self.network.peers))

    def latency_s(self, kind: type, slots: Slots) -> Tensor:
        """Of each link of a wave, [receivers, k]; kept while waves of a kind stay the same."""
        known = self._latency_s.get(kind)
        if known is None or known[0] is not slots:
            target = slots.receiver.unsqueeze(-1).expand_as(slots.source)
            found = self.network.links.latency_of_s(slots.source, target)
            known = self._latency_s[kind] = (slots, found)
        return known[1]


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

    @cached_property
    def targets(self) -> Tensor:
        """To whom each peer sends, in that order: [peers, most], padded with -1."""
        most = int(self.fan_out.max()) if len(self.fan_out) else 0
        table = torch.full((len(self.fan_out), max(1, most)), -1, device="cpu")
        receiver = self.receiver.unsqueeze(-1).expand_as(self.source)
        table[self.source[self.exists], self.rank[self.exists]] = receiver[self.exists]
        return table

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
    queued: Queued | None


def arrivals(
    wires: Wires, timeline: Timeline, slots: Slots, sent_s: Tensor, size_bytes: Tensor, key: int,
    kind: type,
) -> Arrivals:  # fmt: skip
    """Arrival times of a wave. sent_s [peers] (inf = did not send), size_bytes [peers]."""
    links, source = wires.network.links, slots.source
    if links.plain and not timeline.faults:
        # One latency for everybody and nothing that gets lost: no formula needs to be asked.
        latency_s = links.latency_of_s(0, 0)
        arrive = torch.where(slots.exists, sent_s[source] + latency_s, math.inf)
        return Arrivals(arrive, {}, wires.up_free, None)
    target = slots.receiver.unsqueeze(-1).expand_as(source)
    sends = slots.exists & torch.isfinite(sent_s)[source]
    begin = end = begin_s = torch.where(sends, sent_s[source], math.inf)
    up_free, queued = wires.up_free, None
    size = size_bytes[source].to(torch.float64)
    if links.sharing:
        service = size_bytes.to(torch.float64) / wires.uplink
        clear = torch.maximum(sent_s, up_free)
        begin = torch.where(sends, clear[source] + slots.rank * service[source], math.inf)
        end = begin + service[source]
        drained = clear + slots.fan_out * service
        up_free = torch.where(torch.isfinite(sent_s), drained, up_free)
    if links.windowed:
        # The way to a receiver is free again before the next wave, which waits for this one.
        end = torch.maximum(end, begin + size / links.path_of(source, target))
    delay = wires.latency_s(kind, slots) + links.jitter_of_s(source, target, key)
    blocked, extra, held = timeline.on_links(
        source, target, torch.where(sends, sent_s[source], -1.0)
    )
    lost = links.lost(source, target, key, extra) & ~blocked
    passes = sends & ~blocked & ~lost
    if links.sharing:
        taking = size / wires.downlink[slots.receiver].unsqueeze(-1)
        first = torch.maximum(torch.maximum(begin + delay, end + delay - taking), held)
        earlier = wires.queued.get(kind)
        arrive = _served(first, taking, passes, earlier, slots.receiver, len(sent_s))
        queued = Queued(slots.receiver, first, arrive - taking, taking, passes)
    else:
        arrive = torch.maximum(end + delay, held)
    arrive = torch.where(passes, arrive, math.inf)
    # A crash takes what is in flight from and to the peer with it.
    source_death = torch.where(timeline.hard, timeline.death, math.inf)[source]
    there = timeline.lives_through(target, begin_s, arrive)
    dead = passes & ((arrive >= source_death) | ~there)
    arrive = torch.where(dead, math.inf, arrive)
    dropped = {
        "partition": int((sends & blocked).sum()),
        "lost": int((sends & lost).sum()),
        "dead": int(dead.sum()),
    }
    return Arrivals(arrive, dropped, up_free, queued)


def _served(
    first: Tensor, service: Tensor, passes: Tensor, earlier: Queued | None, receiver: Tensor,
    peers: int,
) -> Tensor:  # fmt: skip
    """When each message of a wave [receivers, k] has passed its receiver's downlink.

    The wave before stands in the queue as it was served. That a message may delay one of an earlier
    wave is left out: it shifts a late arrival by a service time.
    """
    if earlier is None:
        return fifo_finish(first, service, passes)
    before = earlier.of_receivers(receiver, peers)
    finish = fifo_finish(
        torch.cat((before.first, first), -1), torch.cat((before.service, service), -1),
        torch.cat((before.passes, passes), -1), torch.cat((before.start, first), -1),
    )  # fmt: skip
    return finish[..., before.first.shape[-1] :]
