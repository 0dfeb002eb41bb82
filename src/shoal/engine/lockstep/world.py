"""One seed's clocks: who works in a round, what reaches whom, when everybody is done."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.engine.lockstep.timeline import Timeline
from shoal.engine.lockstep.traffic import Arrivals, Slots, Wires, arrivals
from shoal.kernel.peer import Cost
from shoal.rounds.adapter import Model, Update
from shoal.rounds.adversary import FALLBACK
from shoal.rounds.attack import Knowledge
from shoal.rounds.exchange import Hop
from shoal.rounds.measure import Measure
from shoal.rounds.method import Method, Wave
from shoal.tensor import keyed
from shoal.wire.message import message_key
from shoal.world.network import Network
from shoal.world.record import Row, Run


class World:
    """Peers 0..n-1 of one seed; in the stacked tensors their rows begin at `offset`.

    clock [peers]: when each peer is free to go on. on [peers]: works in this round.
    """

    def __init__(
        self, method: Method, network: Network, measure: Measure | None, offset: int
    ) -> None:
        if network.peers != method.peers:
            raise UsageError(
                f"the network has {network.peers} peers and the method {method.peers} "
                "(give both the same number)"
            )
        self.method = method
        self.network = network
        self.measure = measure
        self.offset = offset
        self.rows = slice(offset, offset + method.peers)
        self.run = Run(engine="lockstep", seed=method.seed, peers=method.peers)
        self.timeline = Timeline(network.faults, method.peers, method.exchange.hub)
        self.peers = torch.arange(method.peers)
        self.key = keyed.key_of(method.seed, "peer")
        self.ended_s = 0.0
        self.bytes_sent = torch.zeros(method.peers, dtype=torch.int64, device="cpu")
        self.bytes_received = torch.zeros_like(self.bytes_sent)
        self.clock = self.timeline.birth.clone()
        self.next_round = torch.where(self.clock == 0, 0, -1)
        self.on = torch.zeros_like(self.peers, dtype=torch.bool)
        self.listens = self.on
        self.done = self.on
        self.led = False
        self.sent_s = self.received_s = self.clock
        self.stored = torch.full_like(self.peers, -1)
        self.reset: list[tuple[int, bool]] = []
        """peers that begin a new life, and whether their store was kept"""
        self.margin = math.inf
        """the nearest that any arrival came to its deadline, as a part of a round"""
        self.behind = 0
        """how many times a peer came back with a round before it that the others had left; it goes
        on with them here, and repeats that round alone in the other engines"""
        self._wires = Wires.of(network)
        self._slots: dict[int, tuple[Hop, Tensor, Slots]] = {}
        self._asked: tuple[Tensor, Slots] | None = None
        self._spans: dict[Cost, Tensor] = {}
        """how long a cost takes every peer without faults"""
        self._round = 0

    # Lives.

    def _renew(self) -> None:
        """Peers whose clock passed their death leave; those that are born again join in."""
        timeline = self.timeline
        if not timeline.faults:
            return
        for peer in (self.clock >= timeline.death).nonzero().flatten().tolist():
            if not math.isfinite(float(self.clock[peer])):
                continue
            kept = bool(timeline.kept[peer])
            self.ended_s = max(self.ended_s, float(timeline.death[peer]))
            if timeline.next_life(peer):
                self.reset.append((peer, kept))
                stored = int(self.stored[peer]) if kept else -1
                self._born(peer, stored)
            else:
                # Dead; a birth that is tied to a round may still become known.
                self.next_round[peer] = -2
        for peer in (self.next_round == -2).nonzero().flatten().tolist():
            kept = bool(timeline.kept[peer])
            if timeline.next_life(peer):
                self.reset.append((peer, kept))
                self._born(peer, int(self.stored[peer]) if kept else -1)
        # A crash at a round may keep a peer from a life that was foreseen.
        self.next_round[(self.next_round >= 0) & torch.isinf(timeline.birth)] = -1
        fresh = (self.next_round == -1) & torch.isfinite(timeline.birth)
        for peer in fresh.nonzero().flatten().tolist():
            self._born(peer, -1)

    def _born(self, peer: int, stored: int) -> None:
        birth = float(self.timeline.birth[peer])
        self.clock[peer] = birth
        schedule = int(birth / self.method.round_s)
        first = max(stored + 1, schedule, self.timeline.first_round(peer))
        self.behind += first < self._round
        self.next_round[peer] = first

    def _alive(self) -> Tensor:
        inside = (self.clock >= self.timeline.birth) & (self.clock < self.timeline.death)
        return (self.next_round >= 0) & inside

    def earliest_s(self) -> float:
        """When the first of the living peers is free to go on; infinity when nobody lives."""
        clock = self.clock[self._alive()]
        return float(clock.min()) if len(clock) else (0.0 if self._round == 0 else math.inf)

    def end(self) -> None:
        """After the last round: who comes back now has rounds before it that are over."""
        self._round = self.method.rounds
        ended_s = self.ended_s
        self._renew()
        self.ended_s = ended_s

    # A round, in the order in which the engine calls.

    def begin(self, round: int) -> None:
        """Who works; with a hub, who would if it hears from the hub."""
        self._round = round
        self._renew()
        present = self._alive() & (self.next_round <= round)
        self.on = present & self.method.active(round)
        self.listens = self.on
        hub = self.method.exchange.hub
        if hub is None:
            self._enter(round, self.clock[self.on])
        else:
            self.listens = self.on.clone()
            self.listens[hub] = present[hub]

    def _enter(self, round: int, times_s: Tensor) -> None:
        if round in self.timeline.rounds() and len(times_s):
            self.timeline.enter(round, float(times_s.min()))

    def lead(self, round: int, size_bytes: int) -> None:
        """The hub's parameters go out; who gets them in time works."""
        hub = self.method.exchange.hub
        assert hub is not None
        awaited = self.on.clone()
        awaited[hub] = False
        deadline = self.method.deadline(round)
        there = bool(self.listens[hub])
        asked = self.method.active(round).clone()
        asked[hub] = False
        receivers = asked.nonzero().squeeze(-1)
        if there:
            self._enter(round, self.clock[hub].unsqueeze(0))
        came = torch.full_like(self.clock, math.inf)
        if there and len(receivers):
            slots = self._from_hub(asked, receivers, hub)
            start = torch.full_like(self.clock, math.inf)
            start[hub] = self.clock[hub]
            size = torch.full_like(self.peers, size_bytes)
            arrive = self._send(slots, start, size, message_key(Model.code, (round,)), Model)
            came[receivers] = arrive.squeeze(-1)
        in_time = came <= self.clock.clamp(min=deadline)
        waiting = awaited & ~in_time
        self.clock = torch.where(awaited & in_time, torch.maximum(self.clock, came), self.clock)
        self.clock = torch.where(waiting, self.clock.clamp(min=deadline), self.clock)
        self.on = (awaited & in_time & (self.clock < self.timeline.death)) | (
            self.on & (self.peers == hub) & there
        )
        self.received_s = self.clock.clone()

    def _from_hub(self, asked: Tensor, receivers: Tensor, hub: int) -> Slots:
        """The hub's messages, kept while the same clients are asked."""
        if self._asked is None or not torch.equal(self._asked[0], asked):
            hop = Hop(torch.full_like(receivers, hub).unsqueeze(-1), receivers=receivers)
            self._asked = (asked, Slots.of(hop, torch.ones_like(asked), hub))
        return self._asked[1]

    def work(self) -> None:
        """Local work: when each payload is ready; infinity for peers that do not send."""
        cost = self.method.work_cost
        self.run.flops += cost.flops * int(self.on.sum())
        self.clock = torch.where(self.on, self.clock + self._seconds(cost), self.clock)
        self.sent_s = self._ready(self.on)

    def _ready(self, who: Tensor) -> Tensor:
        return torch.where(who & (self.clock < self.timeline.death), self.clock, math.inf)

    def _seconds(self, cost: Cost) -> Tensor:
        seconds = self._spans.get(cost)
        if seconds is None:
            seconds = self._spans[cost] = self.network.device.seconds(self.peers, cost)
        return seconds * self.timeline.slowness(self.clock) if self.timeline.faults else seconds

    def report(self, round: int, numbers: Mapping[str, Tensor]) -> None:
        """The strategy's own numbers [stacked rows] of the peers that ended this round."""
        for name, value in numbers.items():
            rows = zip(
                value[self.rows].tolist(), self.clock.tolist(), self.done.tolist(), strict=True
            )
            self.run.rows.extend(
                Row(name, number, time_s, round, peer)
                for peer, (number, time_s, done) in enumerate(rows) if done
            )  # fmt: skip

    def sides(self) -> tuple[Tensor, Tensor]:
        """(honest, byzantine) peers whose vectors exist in this hop."""
        sends = torch.isfinite(self.sent_s)
        bad = torch.zeros_like(sends)
        bad[list(self.method.byzantine)] = True
        return (sends & ~bad).nonzero().flatten(), (sends & bad).nonzero().flatten()

    def slots(self, hop: int, wave: Wave) -> Slots:
        """The wave as tensors, kept while it stays the same."""
        active = self.method.active(self._round)
        kept = self._slots.get(hop)
        if kept is None or not kept[0].same(wave.hop) or not torch.equal(kept[1], active):
            made = Slots.of(wave.hop, active, self.method.exchange.hub)
            kept = self._slots[hop] = (wave.hop, active, made)
        return kept[2]

    def exchange(self, hop: int, hops: int, slots: Slots, size_bytes: Tensor) -> Tensor:
        """Deliver a wave: bool [receivers, k + 1], own row first, of what each one uses."""
        round, method = self._round, self.method
        deadline = method.deadline(round, hop, hops)
        sent_s = self._attack_times(round, hop, hops)
        combine_s = self._seconds(method.combine_cost(slots.source.shape[-1]))
        key = message_key(Update.code, (round, hop))
        if hop == hops - 1 and round + 1 in self.timeline.rounds():
            # A moment tied to the next round is when the first peer gets there; nothing that it
            # changes can make that peer any faster or slower.
            trial = self._arrive(slots, sent_s, size_bytes, key, Update)
            _, done = self._finish(slots, trial.arrive, deadline, combine_s)
            self._enter(round + 1, done[torch.isfinite(done)])
        arrive = self._send(slots, sent_s, size_bytes, key, Update)
        used, done = self._finish(slots, arrive, deadline, combine_s)
        self.clock[slots.receiver] = torch.where(
            torch.isfinite(done), done, self.clock[slots.receiver]
        )
        if hop == hops - 1 and round == method.rounds - 1:
            self._leave(slots, arrive, done, size_bytes)
        self.sent_s = self._ready(self.on)
        self._count(combine_s, done)
        own = self.on[slots.receiver]
        return torch.cat((own.unsqueeze(-1), used), -1)

    def _leave(self, slots: Slots, arrive: Tensor, done: Tensor, size_bytes: Tensor) -> None:
        """Nobody is there to take what reaches a peer that has finished its last round."""
        every, run = self.method.checkpoint_every, self.run
        store_s = self.network.device.store_s if every and self.method.rounds % every == 0 else 0.0
        late = torch.isfinite(arrive) & (arrive > (done + store_s).unsqueeze(-1))
        if not bool(late.any()):
            return
        # What is under way when the last peer has finished never gets anywhere.
        end_s = max(self.ended_s, float(self.clock[self.on | self.listens].max()) + store_s)
        flying = int((late & (arrive > end_s)).sum())
        dead = int(late.sum()) - flying
        run.messages_delivered -= dead + flying
        run.messages_in_flight += flying
        if dead:
            run.dropped["dead"] = run.dropped.get("dead", 0) + dead
        size = torch.where(late, size_bytes[slots.source], 0).sum(-1)
        self.bytes_received.index_add_(0, slots.receiver, -size)

    def _count(self, combine_s: Tensor, done: Tensor) -> None:
        cost = self.method.combine_cost(1).flops / 2.0
        self.run.flops += cost * float(torch.isfinite(done).sum())

    def _attack_times(self, round: int, hop: int, hops: int) -> Tensor:
        """An omniscient attack waits for the last honest vector, or nearly for the deadline."""
        method = self.method
        if (
            not method.byzantine
            or method.attack is None
            or method.attack.knowledge is Knowledge.OWN
        ):
            return self.sent_s
        sends = torch.isfinite(self.sent_s)
        if torch.equal(sends, method.active(round)):
            moment = float(self.sent_s[sends].max())
        else:
            moment = method.deadline(round, hop, hops) - FALLBACK * method.round_s / hops
        bad = torch.tensor(method.byzantine)
        sent_s = self.sent_s.clone()
        sent_s[bad] = torch.where(sends[bad], sent_s[bad].clamp(min=moment), math.inf)
        self.clock[bad] = torch.where(sends[bad], sent_s[bad], self.clock[bad])
        return sent_s

    def _arrive(
        self, slots: Slots, sent_s: Tensor, size_bytes: Tensor, key: int, kind: type
    ) -> Arrivals:
        return arrivals(self._wires, self.timeline, slots, sent_s, size_bytes, key, kind)

    def _send(
        self, slots: Slots, sent_s: Tensor, size_bytes: Tensor, key: int, kind: type
    ) -> Tensor:
        """Arrival times [receivers, k]; counts bytes and losses."""
        made = self._arrive(slots, sent_s, size_bytes, key, kind)
        self._wires.up_free = made.up_free
        if made.queued is not None:
            self._wires.queued[kind] = made.queued
        run = self.run
        count = torch.where(torch.isfinite(sent_s), slots.fan_out, 0)
        total = count * size_bytes
        self.bytes_sent += total
        reached = torch.isfinite(made.arrive)
        size = torch.where(reached, size_bytes[slots.source], 0).sum(-1)
        self.bytes_received.index_add_(0, slots.receiver, size)
        run.messages_sent += int(count.sum())
        run.messages_delivered += int(reached.sum())
        name = kind.__name__
        run.bytes_by_kind[name] = run.bytes_by_kind.get(name, 0) + int(total.sum())
        for reason, number in made.dropped.items():
            if number:
                run.dropped[reason] = run.dropped.get(reason, 0) + number
        return made.arrive

    def _finish(
        self, slots: Slots, arrive: Tensor, deadline: float, combine_s: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(what each receiver uses [receivers, k], when it has combined it [receivers])."""
        clock = self.clock[slots.receiver]
        listens = self.listens[slots.receiver]
        cutoff = clock.clamp(min=deadline)
        used = slots.expected & (arrive <= cutoff.unsqueeze(-1)) & listens.unsqueeze(-1)
        complete = (used == slots.expected).all(-1)
        near = torch.where(slots.expected, (arrive - cutoff.unsqueeze(-1)).abs(), math.inf)
        if near.numel():
            self.margin = min(self.margin, float(near.min()) / self.method.round_s)
        latest = torch.where(used, arrive, 0.0)
        latest = latest.amax(-1) if latest.shape[-1] else torch.zeros_like(clock)
        until = torch.where(complete, torch.maximum(clock, latest), cutoff)
        done = until + combine_s[slots.receiver]
        return used, torch.where(listens, done, math.inf)

    def mark(self) -> None:
        """Note the bytes sent so far, for curves over bytes."""
        self.run.rows.append(
            Row("bytes_sent", float(self.bytes_sent.sum()), self.ended_s, self._round)
        )

    def conclude(self) -> Tensor:
        """bool [peers]: who got through the round alive; they keep what they computed."""
        # Who enters the next round first may die of that, with this round behind it.
        self.done = done = self.on & (self.clock <= self.timeline.death)
        hub = self.method.exchange.hub
        if hub is not None:
            self.led = bool(self.listens[hub] & (self.clock[hub] <= self.timeline.death[hub]))
        every = self.method.checkpoint_every
        if every and (self._round + 1) % every == 0:
            store_s = self.network.device.store_s
            self.clock = torch.where(done, self.clock + store_s, self.clock)
            self.stored = torch.where(done, self._round, self.stored)
        times = self.clock[done]
        if len(times):
            self.ended_s = max(self.ended_s, float(times.max()))
        if hub is not None:
            self.ended_s = max(self.ended_s, float(self.clock[torch.isfinite(self.clock)].max()))
        return done
