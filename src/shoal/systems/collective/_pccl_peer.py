"""One peer of a training group: its own work, its membership, and what it keeps and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.parts.collective._errors import CollectiveError, RevisionViolation, TooFewPeers
from shoal.parts.collective.communicator import Communicator
from shoal.parts.collective.training import Common
from shoal.rounds.local import Optimizer, descend
from shoal.rounds.strategy import Step
from shoal.rounds.task import Shard, Task
from shoal.tensor import keyed, tree
from shoal.tensor.types import Key, Vector

if TYPE_CHECKING:
    from shoal.systems.collective.pccl import Bound

PAUSE_S = 0.3


def inner_steps(
    params: Vector, state: Any, shard: Shard, key: Key, task: Task, optimizer: Optimizer,
    steps: int, batch_size: int,
) -> tuple[Vector, Any]:  # fmt: skip
    """The way of some optimiser's steps, backwards: (pseudo-gradient [..., dim], its state)."""
    step = Step(0, task, shard, key, torch.ones_like(key, dtype=torch.bool))
    after, state = descend(task, optimizer, params, state, step, steps=steps, batch_size=batch_size)
    return params - after, state


def one_gradient(params: Vector, shard: Shard, key: Key, task: Task, batch_size: int) -> Vector:
    """The gradient [..., dim] on one batch."""
    return task.grad(params, task.batch(shard, key, batch_size))


class Trainer:
    """What one peer keeps between its memberships."""

    def __init__(self, program: Bound, peer: Peer) -> None:
        settings, workload = program.settings, program.workload
        self.program = program
        self.settings = settings
        self.workload = workload
        self.peer = peer
        self.shard = workload.task.shard(peer.id)
        self.common = Common(workload.initial, program.outer)
        self.inner = program.inner.init(workload.initial)
        self.payload_bytes = 0
        self.begun_s = 0.0
        self.group: Communicator | None = None
        self.progress_s = peer.now()
        self.next_s = 0.0
        peer.record("members", 0.0, step="0")
        self._restore()

    async def live(self) -> None:
        """Be in the group until the steps are made; come back whenever the group is lost."""
        peer, settings = self.peer, self.settings
        while self.common.steps < self.program.in_step.steps:
            try:
                async with Communicator(
                    peer,
                    PeerId(0),
                    ring=self.program.ring,
                    heartbeat_s=settings.heartbeat_s,
                    master_timeout_s=settings.master_timeout_s,
                ) as group:
                    self.group = group
                    try:
                        await self.program.in_step.run(group, self.common, self.work, self.applied)
                    finally:
                        self.payload_bytes += group.payload_bytes
            except TooFewPeers:
                break
            except CollectiveError as error:
                peer.record("lost_group", 1.0, why=type(error).__name__)
                peer.record("members", 0.0, step=str(self.common.steps))
                if isinstance(error, RevisionViolation):
                    # What this peer has is of no use to them: it takes what they have.
                    self.common.shared.revision = 0
                if peer.now() - self.progress_s > settings.patience_s:
                    break
                await peer.sleep_until(peer.now() + PAUSE_S)
        peer.record("steps", self.common.steps)
        peer.record("payload_bytes", self.payload_bytes)
        peer.record("end_state", self.common.digest())
        peer.record("params", self.workload.there(self.common.params.clone()))

    async def work(self, params: Tensor, step: int) -> Tensor:
        """This peer's gradient: of one batch, or where its inner steps lead, backwards."""
        peer, program, workload = self.peer, self.program, self.workload
        peer.enter_round(step)
        if self.settings.pace_s:
            self.next_s = max(self.next_s + self.settings.pace_s, peer.now())
            await peer.sleep_until(self.next_s)
        here = workload.there(params)
        if program.inner_steps:
            key = workload.there(peer.key("round", step))
            gradient, self.inner = await peer.compute(
                inner_steps, here, self.inner, self.shard, key,
                static=(workload.task, program.inner, program.inner_steps,
                        self.settings.batch_size),
                cost=program.cost,
            )  # fmt: skip
        else:
            # The batches of DiLoCo's inner steps, one after the other.
            outer, place = divmod(step, self.settings.steps)
            key = workload.there(keyed.fold(peer.key("round", outer), place))
            gradient = await peer.compute(
                one_gradient, here, self.shard, key,
                static=(workload.task, self.settings.batch_size), cost=program.cost,
            )  # fmt: skip
        # The ring writes into it.
        return gradient.to("cpu", copy=True).contiguous()

    async def applied(self, average: Tensor, ballots: Tensor) -> None:
        """A step was made: tell, and keep."""
        peer, steps, group = self.peer, self.common.steps, self.group
        assert group is not None
        self.progress_s = peer.now()
        labels = {"step": str(steps), "operation": str(group.committed)}
        peer.record("state", self.common.digest(), **labels)
        peer.record("members", group.world_size, **labels)
        if len(ballots):
            self._count(ballots, labels)
        if steps % self.workload.report_every == 0:
            peer.record("params", self.workload.there(self.common.params.clone()))
        if self.settings.keep:
            leaves, _ = tree.flatten(self.inner)
            inner = {f"inner/{place}": leaf for place, leaf in enumerate(leaves)}
            await peer.store.commit({**self.common.items(), **inner})

    def _count(self, ballots: Tensor, labels: dict[str, str]) -> None:
        """Who is in the average, and how far anybody is from being in it exactly once."""
        held = (ballots > 0).tolist()
        share = 1.0 / max(1, sum(held))
        wrong = max(abs(float(b) - share * h) for b, h in zip(ballots, held, strict=True))
        self.peer.record("voters", sum(1 << p for p, h in enumerate(held) if h), **labels)
        self.peer.record("miscounted", 0.0 if wrong < 1e-6 else wrong, **labels)

    def _restore(self) -> None:
        store = self.peer.store
        if not self.settings.keep or store.get("revision") is None:
            return
        self.common.load(store.get)
        leaves, structure = tree.flatten(self.inner)
        kept = [self.workload.there(store.get(f"inner/{i}")) for i in range(len(leaves))]
        self.inner = tree.unflatten(structure, kept)
