"""Asynchronous push gossip learning: no rounds, no waiting.

Each peer keeps a model and its age (how many updates went into it). Once per period, on its own
clock, it pushes them to one neighbour drawn by key. Whoever receives a model merges it with its own
by age and makes local steps from there. Nobody waits for anybody, so a slow, lost or dead peer
costs nothing but its own contribution.

Ormandi et al. 2013, algorithms 1 and 4 (create model by merge, then update; arXiv 1109.1396).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shoal.base.errors import Leaving, UsageError
from shoal.kernel.peer import Cost, Peer
from shoal.lab.card import System
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import descend
from shoal.rounds.strategy import Step
from shoal.rounds.task import Shard, Task
from shoal.rounds.workload import Workload
from shoal.tensor import keyed
from shoal.tensor.flops import count_flops
from shoal.tensor.types import Key, Vector
from shoal.wire.message import Packed, message
from shoal.world.record import Run


@message(checked=True)
class Push:
    """A model and how many updates it has seen. due_s: the date of its turn on its sender's
    clock. Checked, since a damaged model would spoil all that it meets."""

    payload: Packed
    age: float
    due_s: float


def update(
    params: Vector, age: Tensor, other: Vector, other_age: Tensor, shard: Shard, key: Key,
    task: Task, optimizer: SGD, steps: int, batch_size: int,
) -> tuple[Vector, Tensor]:  # fmt: skip
    """Merge by age, then local steps: (params [..., dim], age [...]).

    A model that makes the result other than finite (a broken or hostile sender) is passed over.
    """
    total = (age + other_age).clamp(min=1.0)
    share = (other_age / total).unsqueeze(-1).to(params.dtype)
    merged = params + share * (other - params)
    step = Step(0, task, shard, key, torch.ones_like(age, dtype=torch.bool))
    trained, _ = descend(
        task, optimizer, merged, optimizer.init(merged), step, steps=steps, batch_size=batch_size
    )
    sound = trained.isfinite().all(-1)
    grown = torch.maximum(age, other_age) + steps
    return torch.where(sound.unsqueeze(-1), trained, params), torch.where(sound, grown, age)


@dataclass(frozen=True)
class Gossip:
    """Push gossip: a period in seconds (0 = four times a median update), local steps per merge.

    A run of `rounds` lasts that many periods.
    """

    period_s: float = 0.0
    steps: int = 5
    batch_size: int = 32
    lr: float = 0.1
    workload: Workload | None = None

    def __post_init__(self) -> None:
        if self.period_s < 0 or self.steps < 1:
            raise UsageError(
                f"gossip: period_s={self.period_s}, steps={self.steps}; need a period >= 0 and at "
                "least one step"
            )

    def bind(self, workload: Workload) -> Gossip:
        return replace(self, workload=workload)

    async def run(self, peer: Peer) -> None:
        assert self.workload is not None
        own = _Own(self, self.workload, peer)
        try:
            async with peer.tasks() as group:
                pushing = group.start(self._push(peer, own))
                await self._merge(peer, own)
                pushing.cancel()
        except Leaving:
            return

    async def _push(self, peer: Peer, own: _Own) -> None:
        """Once per period: tell one neighbour."""
        # A random phase keeps periods from marching in step; it is a draw, so it is repeatable.
        start = peer.now() + own.period_s * peer.uniform("phase")
        turn = 0
        while True:
            await peer.sleep_until(start + turn * own.period_s)
            # Whose clock jumps leaves out the turns that it has missed: the same model, pushed to
            # the same peer again, would count twice.
            turn = max(turn, int((peer.now() - start) / own.period_s))
            period = int(peer.now() / own.period_s)
            peer.enter_round(period)
            neighbors = peer.neighbors
            if neighbors:
                to = peer.choice(neighbors, "push", period)
                packed = Packed(own.encode(peer, period))
                told = Push(packed, float(own.age), start + turn * own.period_s)
                await peer.send(to, told)
            if own.reports(period):
                peer.record("params", own.params)
            turn += 1

    async def _merge(self, peer: Peer, own: _Own) -> None:
        """Until the end: merge what arrives, and learn on from there."""
        merges = 0
        while peer.now() < own.end_s:
            heard = await peer.recv(Push, deadline=own.end_s)
            if heard is None:
                break
            push = heard.message
            other = own.decode(push.payload)
            other_age = torch.tensor(push.age, dtype=torch.float64)
            before = float(own.age)
            own.params, own.age = await peer.compute(
                update, own.params, own.age, other, own.workload.there(other_age), own.shard,
                own.workload.there(peer.key("merge", merges)), static=own.static, cost=own.cost,
            )  # fmt: skip
            merges += 1
            peer.record(
                "merged", float(own.age), before=repr(before), told=repr(push.age),
                source=str(int(heard.source)), due_s=repr(push.due_s),
            )  # fmt: skip
            await peer.store.commit({"params": own.params, "age": own.age})
        peer.record("params", own.params)


class _Own:
    """What one peer keeps."""

    def __init__(self, gossip: Gossip, workload: Workload, peer: Peer) -> None:
        task = workload.task
        self.workload = workload
        self.shard = task.shard(peer.id)
        stored = peer.store.get("params")
        self.params = workload.initial if stored is None else workload.there(stored)
        age = peer.store.get("age")
        self.age = torch.zeros((), dtype=torch.float64, device=self.params.device)
        if age is not None:
            self.age = workload.there(age)
        self.static: tuple[Any, ...] = (task, SGD(gossip.lr), gossip.steps, gossip.batch_size)
        self.codec = workload.transform.init(self.params)
        self.cost = _cost(gossip, workload)
        # Without a period of its own, a push is as frequent as a machine of 0.1 GFLOP/s can learn.
        self.period_s = gossip.period_s or 4.0 * max(self.cost.flops / 1e8, 0.05)
        self.end_s = float("inf")
        if workload.rounds is not None:
            self.end_s = workload.rounds * self.period_s
        if workload.seconds is not None:
            self.end_s = min(self.end_s, workload.seconds)

    def reports(self, period: int) -> bool:
        return (period + 1) % self.workload.report_every == 0

    def encode(self, peer: Peer, period: int) -> Any:
        payload, self.codec = self.workload.transform.encode(
            self.params, self.codec, self.workload.there(peer.key("encode", period))
        )
        return payload

    def decode(self, packed: Packed) -> Vector:
        transform, content = self.workload.transform, packed.content
        if isinstance(content, bytes | bytearray | memoryview):
            content = self.workload.there(transform.unpack(content))
        return transform.decode(content)  # type: ignore[arg-type]


_costs: dict[Any, Cost] = {}


def _cost(gossip: Gossip, workload: Workload) -> Cost:
    """What one update takes, counted once per workload at one peer's shapes."""
    cost = _costs.get(workload)
    if cost is None:
        _costs.clear()
        params = workload.initial
        age = torch.ones((), dtype=torch.float64, device=params.device)
        key = keyed.key_of(workload.seed, "cost", device=params.device)
        static = (workload.task, SGD(gossip.lr), gossip.steps, gossip.batch_size)
        shard = workload.task.shard(0)
        cost = Cost(flops=count_flops(update, params, age, params, age, shard, key, *static))
        _costs[workload] = cost
    return cost


def pushes_count_once(run: Run) -> str | None:
    """No push is merged twice, by one peer or by two."""
    merged: set[tuple[str, str]] = set()
    for row in run.series("merged"):
        labels = dict(row.labels)
        push = labels["source"], labels["due_s"]
        if push in merged:
            return f"the push of peer {push[0]} due at {push[1]} s was merged twice"
        merged.add(push)
    return None


def ages_add_up(run: Run) -> str | None:
    """A merge makes a model older than both by the same number of updates, or leaves it alone;
    and nobody is told an age that its sender never had."""
    oldest: dict[int, float] = {}
    steps: set[float] = set()
    for row in run.series("merged"):
        labels = dict(row.labels)
        before, told, source = float(labels["before"]), float(labels["told"]), int(labels["source"])
        if told > oldest.get(source, 0.0) or before > oldest.get(row.peer, 0.0):
            return f"peer {row.peer} merged ages {before:g} and {told:g} of {source}: never reached"
        if row.value != before:
            steps.add(row.value - max(before, told))
        oldest[row.peer] = max(oldest.get(row.peer, 0.0), row.value)
    if len(steps) > 1 or any(step <= 0 for step in steps):
        return f"merges added {sorted(steps)} updates"
    return None


INVARIANTS = (pushes_count_once, ages_add_up)
"""What every run keeps, whatever its faults: for fault fuzzing."""

SYSTEM = System(
    name="gossip",
    kind="program",
    title="Asynchronous push gossip: merge by age, learn on",
    make=Gossip,
    scenario="baselines.digits_home",
)
