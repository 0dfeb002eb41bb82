"""One peer of MoDeST: what it sends, what it remembers, and what it does when it hears something.

The numbers of the algorithm: a model labelled k is what round k begins with; `Trained` carries one
into the average for that label, `Averaged` is the average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shoal.base.errors import WireError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Cost, Envelope, Peer
from shoal.kernel.tasks import TaskGroup, TaskHandle
from shoal.lab.statistics import median
from shoal.parts.optimise.sgd import SGD
from shoal.parts.overlay.live_sample import LiveSample
from shoal.parts.overlay.presence import Presence
from shoal.rounds.local import descend
from shoal.rounds.strategy import Step
from shoal.rounds.task import Shard, Task
from shoal.tensor.types import Key, Vector
from shoal.wire.message import Packed, message

if TYPE_CHECKING:
    from shoal.systems.training.modest import Bound

FEWEST_MODELS = 3
"""What an aggregator whose time is up must have (a liveness floor of the public code)."""
_REMEMBERED = 21
_LONGEST_PAUSE = 4.0
_TICK_S = 1e-6
_MOST_ROUNDS = 1 << 29


@message(tag=("round",))
class Trained:
    """A participant's model, to the aggregators of the sample that begins `round`."""

    round: int
    payload: Packed
    view: Packed


@message(tag=("round",))
class Averaged:
    """The model with which `round` begins. gathered_s: what its aggregator waited for models;
    answered_s: for pongs, see `Presence.answered`.

    again: sent by the restart rule; whoever has trained in this round sends its result again.
    """

    round: int
    params: Tensor
    gathered_s: float
    answered_s: float
    again: bool
    view: Packed


@message
class Ack:
    """To contributors: their models for `round` went in (done), or look for another aggregator."""

    round: int
    done: bool


@message
class Finished:
    """The last round is over."""

    rounds: int


@message
class Progress:
    """What a peer must remember through a crash."""

    counter: int
    round: int
    trained: int
    averaged: int


def train(
    params: Vector, shard: Shard, key: Key, task: Task, optimizer: SGD, steps: int | None,
    epochs: int | None, batch_size: int,
) -> Vector:  # fmt: skip
    """Local training of one round: params [..., dim]."""
    step = Step(0, task, shard, key, torch.ones_like(shard.size, dtype=torch.bool))
    start = optimizer.init(params)
    return descend(
        task, optimizer, params, start, step, steps=steps, epochs=epochs, batch_size=batch_size
    )[0]


def average(models: Tensor, center: Vector, rule: Any) -> Vector:
    """models [..., k, dim] -> [..., dim] by the workload's aggregator."""
    return rule(
        models, mask=torch.ones(models.shape[:-1], dtype=torch.bool, device=models.device),
        center=center,
    )  # fmt: skip


@dataclass
class _Buffer:
    """What an aggregator has for one label: contributor -> model [dim]."""

    began_s: float
    models: dict[PeerId, Vector] = field(default_factory=dict)
    timer: TaskHandle | None = None


class Node:
    """One peer in one incarnation."""

    group: TaskGroup

    def __init__(self, bound: Bound, peer: Peer) -> None:
        self.bound = bound
        self.settings = settings = bound.settings
        self.workload = workload = bound.workload
        self.peer = peer
        self.size, self.few = bound.sample_size, bound.aggregators
        self.shard = workload.task.shard(peer.id)
        self.codec = workload.transform.init(bound.initial)
        self.rounds = _MOST_ROUNDS if workload.rounds is None else workload.rounds
        self.end_s = self.rounds * settings.aggregation_timeout_s
        if workload.seconds is not None:
            self.end_s = min(self.end_s, workload.seconds)
        self.known = Presence(
            peer, peer.roster[: bound.founders], sampler=LiveSample(settings.ping_timeout_s),
            inactivity_rounds=settings.inactivity_rounds, rounds=self.rounds, end_s=self.end_s,
            ping_patience=settings.ping_patience,
        )  # fmt: skip
        # The round last trained in, and the label last averaged.
        self.trained, self.averaged = -1, -1
        self.model = bound.initial
        self.result: tuple[int, Any, Vector] | None = None
        self.tried: set[int] = set()
        self.buffers: dict[int, _Buffer] = {}
        self.at_work: TaskHandle | None = None
        self.gathered_s: list[float] = []

    # Life.

    async def live(self, stop: Callable[[], None]) -> None:
        """Everything that a peer does; `stop` is called when the run is over."""
        async with self.peer.tasks() as group:
            self.group, self.stop = group, stop
            first = await self._remember()
            for loop in (
                self.known.answer_pings, self.known.take_changes, self._take_models,
                self._take_averages, self._take_acks, self._watch, self._until_finished,
            ):  # fmt: skip
                group.start(loop())
            on_time = self.peer.now() <= self.settings.ping_timeout_s
            if first and on_time and self.known.founder:
                # Nobody is pinged: the first sample is what everybody reads off the first view.
                if self.peer.id in self.known.order(0)[: self.size]:
                    self._accept(0, self.bound.initial, again=False)
            else:
                self.known.counter += 1
                await self._commit()
                await self.known.advertise(True, self.settings.adverts * self.size)

    async def _remember(self) -> bool:
        """Take up what an earlier incarnation committed; whether there was none."""
        progress = self.peer.store.get("progress")
        if progress is None:
            self.peer.record("fresh", 1)
            await self._commit()
            return True
        self.known.counter, self.known.round = progress.counter, progress.round
        self.trained, self.averaged = progress.trained, progress.averaged
        stored = self.peer.store.get("model")
        if stored is not None:
            self.model = self.workload.there(stored)
        return False

    async def _commit(self, **more: Any) -> None:
        progress = Progress(self.known.counter, self.known.round, self.trained, self.averaged)
        await self.peer.store.commit({"progress": progress, **more})

    async def _until_finished(self) -> None:
        await self.peer.recv(Finished, deadline=self.end_s)
        self.stop()

    async def say_goodbye(self) -> None:
        """Leaving: contributors must look for another aggregator, and the others learn of it."""
        for label, buffer in self.buffers.items():
            await self._tell(buffer, Ack(label, False))
        self.known.counter += 1
        await self._commit()
        await self.known.advertise(False, self.settings.adverts * self.size)

    # Participants.

    async def _take_averages(self) -> None:
        while (envelope := await self.peer.recv(Averaged, deadline=self.end_s)) is not None:
            told = envelope.message
            if not (0 <= told.round < self.rounds and self._fits(told.params)):
                continue
            if not self.known.read(told.view):
                continue
            if 0 <= told.gathered_s < math.inf and not told.again:
                self._gathered(told.gathered_s)
                self.known.answered(told.answered_s)
            self._accept(told.round, self.workload.there(told.params), told.again)

    def _fits(self, params: Tensor) -> bool:
        like = self.bound.initial
        return params.shape == like.shape and params.dtype == like.dtype

    def _accept(self, round: int, params: Vector, again: bool) -> None:
        """The first model of a round that is not over wins."""
        if again and self.trained == round and self.result and self.result[0] == round + 1:
            self.tried.clear()
            self.group.start(self._hand_in(self.few))
        if round <= self.trained or round < self.known.round:
            return
        self.known.learn(round)
        self.trained, self.model = round, params
        if self.at_work is not None:
            self.at_work.cancel()
        peer = self.peer
        peer.enter_round(round)
        peer.record("training", round)
        if (round + 1) % self.workload.report_every == 0:
            peer.record("params", params)
        self.at_work = self.group.start(self._train(round, params))

    async def _train(self, round: int, params: Vector) -> None:
        peer, workload, settings = self.peer, self.workload, self.settings
        await self._commit(model=params)
        trained = await peer.compute(
            train, params, self.shard, workload.there(peer.key("round", round)),
            static=(workload.task, *settings.training), cost=self.bound.cost,
        )  # fmt: skip
        payload, self.codec = workload.transform.encode(
            trained, self.codec, workload.there(peer.key("encode", round))
        )
        self.result = (round + 1, payload, workload.transform.decode(payload))
        self.tried.clear()
        await self._hand_in(self.few)

    async def _hand_in(self, count: int) -> None:
        """Send the trained model to the first live aggregators that were not tried yet."""
        assert self.result is not None
        label, payload, vector = self.result
        found = await self.known.sample(label, count, self.tried)
        if self.result[0] != label:
            return
        self.tried.update(found.live)
        trained = Trained(label, Packed(payload), Packed(self.known.view))
        self._count_view(found.live)
        for target in found.live:
            if target == self.peer.id:
                self._contribute(label, target, vector)
            else:
                await self.peer.send(target, trained)

    def _count_view(self, targets: Sequence[PeerId]) -> None:
        """Views travel inside models; their bytes are told apart here."""
        others = len(targets) - (self.peer.id in targets)
        self.peer.record("view_bytes", others * self.known.view.byte_count())

    async def _take_acks(self) -> None:
        while (envelope := await self.peer.recv(Ack, deadline=self.end_s)) is not None:
            ack = envelope.message
            result = self.result
            if not ack.done and result and result[0] == ack.round and envelope.source in self.tried:
                self.group.start(self._hand_in(1))

    # Aggregators.

    async def _take_models(self) -> None:
        while (envelope := await self.peer.recv(Trained, deadline=self.end_s)) is not None:
            vector = self._open(envelope)
            label = envelope.message.round
            if vector is None or not 1 <= label <= self.rounds:
                continue
            if not self.known.read(envelope.message.view):
                continue
            self.known.learn(label - 1)
            self.known.active(envelope.source, label - 1)
            self._contribute(label, envelope.source, vector)

    def _open(self, envelope: Envelope[Trained]) -> Vector | None:
        """A contributor's model; None when it was damaged on its way."""
        transform, content = self.workload.transform, envelope.message.payload.content
        try:
            if isinstance(content, bytes | bytearray | memoryview):
                content = self.workload.there(transform.unpack(content))
            vector = transform.decode(content)  # type: ignore[arg-type]
        except WireError:
            return None
        return vector if self._fits(vector) else None

    def _contribute(self, label: int, source: PeerId, vector: Vector) -> None:
        if label <= self.averaged or label < self.known.round:
            return
        buffer = self.buffers.get(label)
        if buffer is None:
            buffer = self.buffers[label] = _Buffer(self.peer.now())
            buffer.timer = self.group.start(self._time_out(label, buffer))
        buffer.models.setdefault(source, vector)
        if len(buffer.models) >= self.settings.enough:
            self._conclude(label, buffer)

    def _gathered(self, seconds: float) -> None:
        self.gathered_s.append(seconds)
        del self.gathered_s[:-_REMEMBERED]

    async def _time_out(self, label: int, buffer: _Buffer) -> None:
        settings = self.settings
        wait_s = settings.aggregation_timeout_s
        if settings.aggregation_patience and self.gathered_s:
            usual_s = max(median(self.gathered_s), self.known.ping_timeout_s)
            wait_s = min(wait_s, settings.aggregation_patience * usual_s)
        await self.peer.sleep_until(buffer.began_s + wait_s)
        buffer.timer = None
        if label < self.known.round:
            self._drop(label)
        elif len(buffer.models) >= min(FEWEST_MODELS, settings.enough):
            self.peer.record("timed_out", label)
            self._conclude(label, buffer)
        else:
            self._drop(label)
            await self._tell(buffer, Ack(label, False))

    def _drop(self, label: int) -> None:
        buffer = self.buffers.pop(label)
        if buffer.timer is not None:
            buffer.timer.cancel()

    async def _tell(self, buffer: _Buffer, ack: Ack) -> None:
        for source in buffer.models:
            if source != self.peer.id:
                await self.peer.send(source, ack)

    def _conclude(self, label: int, buffer: _Buffer) -> None:
        for older in [each for each in self.buffers if each <= label]:
            self._drop(older)
        self.averaged = label
        self.group.start(self._average(label, buffer))

    async def _average(self, label: int, buffer: _Buffer) -> None:
        """Average, find the sample that goes on with it, and hand it over."""
        peer = self.peer
        gathered_s = peer.now() - buffer.began_s
        await self._commit()
        sources = sorted(buffer.models)
        models = torch.stack([buffer.models[source] for source in sources])
        # Two numbers in, one out, per parameter and model: bound by memory.
        cost = Cost(bytes=float(models.nbytes))
        params = await peer.compute(
            average, models, self.model, static=(self.workload.aggregator,), cost=cost
        )
        peer.record("averaged", label, sources=" ".join(map(str, sources)))
        if label >= self.rounds:
            await self._finish(params)
            return
        self.known.learn(label)
        found = await self.known.sample(label, self.size)
        if self.known.round > label:
            return
        self._gathered(gathered_s)
        self.known.answered(found.answered_s)
        self._count_view(found.live)
        averaged = Averaged(
            label, params, gathered_s, found.answered_s, False, Packed(self.known.view)
        )
        for target in found.live:
            if target != peer.id:
                await peer.send(target, averaged)
        await self._tell(buffer, Ack(label, True))
        if peer.id in found.live:
            self._accept(label, params, again=False)

    async def _finish(self, params: Vector) -> None:
        """The last average is the outcome; tell everybody that it is over."""
        self.peer.enter_round(self.rounds)
        self.peer.record("params", params)
        for other in self.peer.roster:
            if other != self.peer.id:
                await self.peer.send(other, Finished(self.rounds))
        self.stop()

    # When nothing happens.

    async def _watch(self) -> None:
        """After a silence say that one is there, and see whether the round needs a restart.

        The pause doubles while nothing is heard: a halted run must not be drowned in adverts.
        """
        pause, heard_s = 1.0, self.known.heard_s
        since_s = heard_s
        # A clock of nanoseconds may show slightly less than the moment slept for.
        while self.end_s - self.peer.now() > _TICK_S:
            if self.known.heard_s != heard_s:
                pause, heard_s = 1.0, self.known.heard_s
                since_s = heard_s
            wake_s = min(since_s + pause * self._idle_s(), self.end_s)
            if wake_s - self.peer.now() > _TICK_S:
                await self.peer.sleep_until(wake_s)
                continue
            pause, since_s = min(2.0 * pause, _LONGEST_PAUSE), wake_s
            await self.known.advertise(True, self.size)
            if self.settings.restart:
                await self._restart()

    def _idle_s(self) -> float:
        settings = self.settings
        if not self.known.round_s:
            return settings.aggregation_timeout_s
        rounds = min(settings.idle_rounds, settings.inactivity_rounds / 2)
        return max(rounds * median(self.known.round_s), settings.ping_timeout_s)

    async def _restart(self) -> None:
        """If this peer is the first live candidate of the latest round: begin that round again."""
        round = self.known.round
        first = await self.known.sample(round, 1)
        if self.known.round > round or first.live != (self.peer.id,):
            return
        found = await self.known.sample(round, self.size)
        if self.known.round > round:
            return
        self.peer.record("restarted", round)
        self._count_view(found.live)
        averaged = Averaged(round, self.model, 0.0, math.inf, True, Packed(self.known.view))
        for target in found.live:
            if target != self.peer.id:
                await self.peer.send(target, averaged)
        if self.peer.id in found.live:
            self._accept(round, self.model, again=True)
