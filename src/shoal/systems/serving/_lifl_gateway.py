"""A gateway of LIFL: it owns its node's shared memory and has the node's aggregators add in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.base.errors import PeerError, UsageError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Envelope, Peer
from shoal.kernel.tasks import TaskGroup
from shoal.parts.serving.aggregation_tree import Addend, Step
from shoal.parts.serving.shared_object_store import SharedObjectStore, UpdateRefused
from shoal.parts.serving.weighted_sum import check_weight
from shoal.systems.serving._lifl_aggregator import spend
from shoal.systems.serving._lifl_pool import Pool, Worker
from shoal.systems.serving._lifl_turn import Turn
from shoal.systems.serving._lifl_wire import (
    CLOSED,
    LATER,
    REFUSED,
    STORED,
    Add,
    Added,
    Got,
    Over,
    Partial,
    Plan,
    Planned,
    Result,
    Taken,
    Update,
)

if TYPE_CHECKING:
    from shoal.systems.serving._lifl_bound import Bound


class Gateway:
    """One gateway in one incarnation."""

    group: TaskGroup

    def __init__(self, bound: Bound, peer: Peer) -> None:
        self.bound = bound
        self.settings, self.costs = bound.settings, bound.costs
        self.peer = peer
        self.store = SharedObjectStore(bound.numbers, bound.slots, bound.dtype)
        aggregators = bound.layout.aggregators(peer.id)
        self.pool = Pool(self.settings, peer, aggregators)
        # What aggregators write into must not wait for what clients send.
        self.spare = len(aggregators) + bound.layout.nodes
        self.turn: Turn | None = None
        self.before = (0.0, 0.0)
        """arrivals per second and seconds per addition of the last turn"""
        self.on_the_way: set[bytes] = set()
        """slots of updates that are taken in, and of sums that were given up in an addition"""
        self.cpu_s = 0.0
        self.transfers = 0
        self._number = 0

    async def live(self) -> None:
        peer = self.peer
        async with peer.tasks() as group:
            self.group = self.pool.group = group
            if self.settings.always_on:
                self.pool.start(len(self.pool.workers), self.pump)
            peer.serve(Plan, self._plan)
            peer.serve(Update, self._update)
            peer.serve(Partial, self._partial)
            peer.serve(Over, self._over)
            await peer.sleep_until(self.bound.end_s)

    def close(self) -> None:
        """What it cost, and the memory back to the system."""
        self._drop()
        peer, pool = self.peer, self.pool
        pool.end()
        peer.record("reserved_s", pool.reserved_s)
        peer.record("cold_starts", pool.cold_starts)
        peer.record("work_s", self.cpu_s)
        peer.record("transfers", self.transfers)
        # Slots of aggregators that have not answered since may still be written into.
        lost = sum(len(worker.slots) for worker in pool.workers)
        peer.record("slots_left", self.store.used - lost - len(self.on_the_way))
        self.store.close()

    # What others ask.

    async def _plan(self, envelope: Envelope[Plan]) -> Planned:
        plan = envelope.message
        if self.turn is None or self.turn.plan != plan:
            self._drop()
            settings = self.settings
            if not settings.always_on:
                self.pool.stop()
            turn = self.turn = Turn(plan, settings.fan_in, settings.eager, settings.merge)
            self.peer.enter_round(plan.round)
            self.pool.warm = plan.warm
            if settings.planning:
                self.pool.start(plan.warm - self.pool.alive, self.pump)
            self.group.start(self._collect(turn))
        return Planned(*self.before)

    async def _collect(self, turn: Turn) -> None:
        """Who has not sent by now is not waited for."""
        await self.peer.sleep_until(self.peer.now() + self.settings.collect_s)
        if self.turn is turn and not turn.tree.closed:
            turn.tree.close()
            self.pump()

    async def _update(self, envelope: Envelope[Update]) -> Taken:
        update, client = envelope.message, int(envelope.source)
        turn = self.turn
        if turn is None or turn.number != (update.round, update.attempt):
            # The plan may still be on its way to this node.
            late = turn is not None and turn.number > (update.round, update.attempt)
            return Taken(CLOSED if late else LATER)
        if client in turn.clients:
            return Taken(STORED)
        if turn.tree.closed or not self.bound.layout.is_client(client):
            return Taken(CLOSED)
        if self.store.free <= self.spare:
            return Taken(LATER)
        try:
            check_weight(update.weight)
            key = self.store.put(update.vector)
        except UpdateRefused:
            self.peer.record("refused", client)
            return Taken(REFUSED)
        turn.clients.add(client)
        now = self.peer.now()
        turn.span(now, now)
        await self._take_in(key)
        if self.turn is not turn or turn.tree.closed:
            self.store.release(key)
            turn.clients.discard(client)
            return Taken(CLOSED)
        turn.tree.arrived(Addend(key, update.weight, update.weight, frozenset((client,))))
        self.pump()
        return Taken(STORED)

    async def _partial(self, envelope: Envelope[Partial]) -> Got:
        partial, turn = envelope.message, self.turn
        if turn is None or turn.number != (partial.round, partial.attempt) or not turn.plan.nodes:
            raise PeerError(f"not at round {partial.round}")
        if envelope.source in turn.partials:
            return Got()
        ids = frozenset(partial.ids)
        if ids and not self.store.free:
            raise PeerError("no room now")
        key = self.store.put(partial.vector) if ids else b""
        turn.partials.add(envelope.source)
        turn.span(partial.first_s, partial.last_s)
        await self._take_in(key)
        if self.turn is not turn:
            if key:
                self.store.release(key)
            raise PeerError(f"round {partial.round} is over")
        try:
            turn.tree.merge(Addend(key, partial.factor, partial.weight, ids))
        except UsageError as error:
            # An update that reached two nodes: this attempt cannot be right any more.
            if key:
                self.store.release(key)
            raise PeerError(str(error)) from None
        self.pump()
        return Got()

    async def _over(self, envelope: Envelope[Over]) -> None:
        over = envelope.message
        if self.turn and self.turn.number <= (over.round, over.attempt):
            self._drop()
            self._rest()

    async def _take_in(self, key: bytes) -> None:
        """What putting it into shared memory takes."""
        if key:
            self.on_the_way.add(key)
        await self._spend(self.costs.put_s, self.costs.put_cpu_s)
        self.on_the_way.discard(key)

    # The node's aggregators.

    def pump(self) -> None:
        """Give additions to whoever is free, start more where that helps, deliver what is ready."""
        turn = self.turn
        if turn is None:
            return
        self._free(turn)
        self.pool.settle()
        for worker in self.pool.free():
            step = self._step(turn, worker)
            if step is not None:
                worker.asked = True
                self.group.start(self._add(turn, worker, step))
        tree, pool = turn.tree, self.pool
        pool.grow(tree.wanted if self.settings.reuse else tree.openable, self.pump)
        if tree.result is not None and not turn.delivered:
            turn.delivered = True
            self.group.start(self._deliver(turn, tree.result))

    def _step(self, turn: Turn, worker: Worker) -> Step | None:
        tree, pool = turn.tree, self.pool
        if not self.store.free:
            return None
        if self.settings.reuse:
            return tree.step(self.store.reserve)
        # A sandbox for one sum: it waits with it, so that something must be left for leaves.
        if worker.job is not None:
            return tree.step(self.store.reserve, worker.job)
        step = tree.step(self.store.reserve, begin=True, upper=pool.unbound > 3)
        worker.job = None if step is None else step.job
        return step

    async def _add(self, turn: Turn, worker: Worker, step: Step) -> None:
        peer, job = self.peer, step.job
        self._number += 1
        add = Add(self._number, job.out, step.addend.key, step.addend.factor, step.first)
        asked_s = peer.now()
        patience_s = self.settings.patience_s + 4 * self.costs.add_s
        done = await self._ask(worker, add, asked_s + patience_s)
        self.cpu_s += self.costs.add_cpu_s
        worker.asked = False
        self.on_the_way.discard(job.out)
        if done:
            if self.turn is turn:
                turn.leaf_s.append(peer.now() - asked_s)
                turn.tree.added(job)
            else:
                self.store.release(job.out)
        else:
            # It may still write into that slot, until it answers something else.
            worker.slots.append(job.out)
            self.pool.lose(worker)
            if self.turn is turn:
                peer.record("redone", len(job.given), job=job.name)
                turn.tree.failed(job)
            self.group.start(self._revive(worker))
        self._free(turn)
        self.pool.settle()
        self.pump()

    async def _ask(self, worker: Worker, add: Add, until_s: float) -> bool:
        try:
            answer = await self.peer.request(worker.peer, add, deadline=until_s)
        except PeerError:
            return False
        return isinstance(answer, Added) and answer.number == add.number

    async def _revive(self, worker: Worker) -> None:
        """Ask until it answers; then nothing older will be written any more."""
        while True:
            self._number += 1
            add = Add(self._number, worker.slots[0], b"", 0.0, False)
            if await self._ask(worker, add, self.peer.now() + self.settings.patience_s):
                break
            await self.peer.sleep_until(self.peer.now() + self.settings.patience_s)
        for key in worker.slots:
            self.store.release(key)
        worker.slots.clear()
        self.pool.found(worker, self.pump)
        self.pump()

    # The node's sum.

    async def _deliver(self, turn: Turn, result: Addend) -> None:
        """Until it is there, or the round is over."""
        peer, plan = self.peer, turn.plan
        ids = tuple(sorted(result.ids))
        if self.turn is not turn:
            return
        self._rest()
        if plan.nodes:
            share = result.factor / result.weight if result.weight > 0 else 0.0
            vector = self._taken(result, share)
            message = Result(
                plan.round, plan.attempt, result.weight, ids, vector, turn.first_s, turn.last_s
            )  # fmt: skip
            pause_s = self.settings.patience_s
            while self.turn is turn:
                await peer.send(PeerId(0), message)
                await peer.sleep_until(peer.now() + pause_s)
                pause_s *= 2
            return
        vector = self._taken(result, 1.0)
        message = Partial(
            plan.round, plan.attempt, result.factor, result.weight, ids, vector, turn.first_s,
            turn.last_s,
        )  # fmt: skip
        self.transfers += 1
        await self._spend(self.costs.send_s, self.costs.send_cpu_s)
        while self.turn is turn:
            until_s = peer.now() + self.settings.patience_s + 4 * self.costs.put_s
            try:
                got = await peer.request(PeerId(plan.top), message, deadline=until_s)
                if isinstance(got, Got):
                    return
            except PeerError:
                await peer.sleep_until(peer.now() + self.settings.patience_s / 4)

    def _taken(self, result: Addend, factor: float) -> Tensor:
        """The numbers of a sum, times a factor, in memory of their own."""
        if not result.ids:
            return torch.zeros(0, dtype=getattr(torch, self.bound.dtype), device="cpu")
        return self.store.get(result.key) * factor

    # Books.

    async def _spend(self, seconds: float, cpu_s: float) -> None:
        self.cpu_s += cpu_s
        await spend(self.peer, seconds)

    def _free(self, turn: Turn) -> None:
        if self.turn is turn:
            for key in turn.tree.freed():
                self.store.release(key)

    def _rest(self) -> None:
        """Scale to zero."""
        if not self.settings.always_on:
            self.pool.stop()
        self.peer.record("alive", self.pool.idle)

    def _drop(self) -> None:
        """Forget the turn; its slots are free, but for those that are being written into."""
        turn, self.turn = self.turn, None
        if turn is None:
            return
        count = len(turn.clients)
        each_s = sum(turn.leaf_s) / len(turn.leaf_s) if turn.leaf_s else 0.0
        # A clock that was set back in between tells nothing.
        if count and each_s > 0:
            self.before = count / max(turn.last_s - turn.first_s, each_s), each_s
        for job in turn.tree.jobs:
            if job.busy:
                self.on_the_way.add(job.out)
            else:
                self.store.release(job.out)
        for key in turn.tree.held():
            self.store.release(key)
        self.pool.unbind()
