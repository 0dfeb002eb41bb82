"""Training in step on a collective: one state, equal bit for bit at every peer of the group.

A step is: work on own data, average the gradients in a ring, and let every peer apply the same
average to the same state with the same optimiser. With an AdamW gradient per step this is data
parallel training; with the displacement of many inner steps as the gradient, and Nesterov momentum
as the optimiser, DiLoCo (Douillard et al. 2023, arXiv 2311.08105).

Asynchronous: the ring of one step turns while everybody works on the next, and its average is
applied one step late. Peers who were let in after a ring had started get its result with the next
agreement on the state: PCCL (arXiv 2505.14065), sections on DiLoCo and its asynchronous form.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.base.limits import check_positive
from shoal.kernel.tasks import TaskHandle
from shoal.parts.collective._errors import SyncFailed, TooFewPeers
from shoal.parts.collective.communicator import Communicator
from shoal.parts.collective.quantised import Quantised
from shoal.parts.collective.shared_state import SharedState, digest
from shoal.rounds.local import Optimizer
from shoal.tensor import tree

_STEPS = "steps"
_HEADS = 1
"""The tag of the ring that counts heads; gradients have tag 0."""


class Common:
    """What all peers of a group hold in common: parameters, the optimiser's state, steps made.

    params [dim]: the initial parameters, the same everywhere; they are copied. The optimiser's
    state is part of it, since a newcomer with momentum of its own would lead the others apart.

    >>> from shoal.parts import find
    >>> common = Common(torch.ones(2), find("optimise", "sgd")(lr=0.5))
    >>> common.apply(torch.tensor([1.0, 0.0]))
    >>> common.params, common.steps
    (tensor([0.5000, 1.0000]), 1)
    """

    def __init__(self, params: Tensor, optimizer: Optimizer) -> None:
        params = params.detach().to("cpu", copy=True).contiguous()
        self._optimizer = optimizer
        leaves, self._structure = tree.flatten((params, optimizer.init(params)))
        tensors = {f"state/{place}": leaf.contiguous() for place, leaf in enumerate(leaves)}
        tensors[_STEPS] = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.shared = SharedState(tensors)

    @property
    def steps(self) -> int:
        """Steps that have been applied."""
        return int(self.shared.tensors[_STEPS])

    @property
    def params(self) -> Tensor:
        """The parameters [dim], on the CPU; they change in place."""
        return self.shared.tensors["state/0"]

    def apply(self, gradient: Tensor) -> None:
        """One step of the optimiser along a gradient [dim] that all peers have in common."""
        before = self._leaves()
        params, state = tree.unflatten(self._structure, before)
        after, _ = tree.flatten(self._optimizer.step(params, gradient, state))
        for old, new in zip(before, after, strict=True):
            old.copy_(new)
        self.shared.tensors[_STEPS] += 1
        self.shared.revision += 1

    def digest(self) -> int:
        """48 bits that are equal where the whole state is: a number that a float holds exactly."""
        whole = b"".join(digest(self.shared.tensors[name]) for name in sorted(self.shared.tensors))
        both = digest(torch.frombuffer(bytearray(whole), dtype=torch.uint8))
        return int.from_bytes(both[:6], "big")

    def items(self) -> dict[str, Any]:
        """For the durable store; `load` is the inverse."""
        kept: dict[str, Any] = {name: t.clone() for name, t in self.shared.tensors.items()}
        return {**kept, "revision": self.shared.revision.to_bytes(8, "little")}

    def load(self, stored: Callable[[str], Any]) -> None:
        """Take what an earlier life committed; nothing if there is nothing."""
        revision = stored("revision")
        if revision is None:
            return
        for name, tensor in self.shared.tensors.items():
            tensor.copy_(stored(name))
        self.shared.revision = int.from_bytes(revision, "little")

    def _leaves(self) -> list[Tensor]:
        tensors: Mapping[str, Tensor] = self.shared.tensors
        return [tensors[f"state/{place}"] for place in range(len(tensors) - 1)]


Work = Callable[[Tensor, int], Awaitable[Tensor]]
"""(parameters [dim], step) -> this peer's gradient [dim], contiguous on the CPU and its own."""

Applied = Callable[[Tensor, Tensor], Awaitable[None]]
"""(average [dim], ballots [ballots]) of the step that this peer has just applied."""


@dataclass(frozen=True)
class InStep:
    """Takes a group through `steps` common steps; peers may come and go at any moment.

    least: how many must be there for the first step; later two are enough. With fewer everybody
    waits for others, `patience_s` at most, and looks every `pause_s`. asynchronous: the ring of a
    step turns during the work of the next; eager: that work goes on from where the peer's own
    gradient alone leads (parameters minus gradient, so this is for displacements), not from
    parameters that know nothing of it (Kale et al. 2025, arXiv 2502.12996). quantise: one byte per
    number in the ring. ballots: so many numbers travel with the gradient, of which a peer sets the
    one with its id to 1; their average says whose gradient is in the sum how often (without
    `quantise` only).

    Raises what the communicator raises when this peer has lost the group (Evicted, MasterLost,
    RevisionViolation, Diverged: connect anew and call `run` again with the same state), and
    TooFewPeers after `patience_s`.

    Assumes that its group is the only one of the master: which joint call comes next follows from
    what happens to this group, and others would not know of it.

    >>> InStep(steps=100).asynchronous
    False
    """

    steps: int
    least: int = 2
    asynchronous: bool = False
    eager: bool = False
    quantise: Quantised | None = None
    ballots: int = 0
    patience_s: float = 30.0
    pause_s: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.least < 2:
            raise UsageError(
                f"in step: steps={self.steps}, least={self.least}; need at least 1 step and 2 peers"
            )
        if self.ballots < 0 or (self.ballots and self.quantise is not None):
            raise UsageError(
                f"in step: ballots={self.ballots} with quantise={self.quantise}; need 0 or more, "
                "and exact numbers (set quantise=None)"
            )
        check_positive("in step", self, "patience_s", "pause_s")

    async def run(self, group: Communicator, common: Common, work: Work, applied: Applied) -> None:
        """From the call that lets this peer in until `steps` steps are made."""
        await _Course(self, group, common, work, applied).run()


@dataclass
class _Course:
    """One call of `InStep.run`. Whatever decides which joint call comes next is known to all.

    running: the ring that this peer has begun; average: a finished one that it has not applied;
    own: what this peer gave to either. due: whether at the next boundary some peers apply an
    average. Newcomers have none, so they receive the state instead.
    """

    settings: InStep
    group: Communicator
    common: Common
    work: Work
    applied: Applied
    running: TaskHandle | None = None
    average: Tensor | None = None
    own: Tensor | None = None
    due: bool = False
    agreed: int = -1
    """the last revision that was agreed on in this call"""

    async def run(self) -> None:
        async with self.group.peer.tasks() as self.tasks:
            await self.course()

    async def course(self) -> None:
        await self.assemble()
        await self.agree()
        turn = self.late_turn if self.settings.asynchronous else self.turn
        while self.common.steps < self.settings.steps:
            if not await turn():
                # Alone: nobody else has a part in what this peer still waits for.
                self.running, self.average, self.own, self.due = None, None, None, False
                await self.assemble()
                await self.agree()
        if await self.group.are_peers_pending():
            # They find the run at its end, and take the result home.
            with suppress(TooFewPeers):
                await self.assemble()
                await self.agree()

    async def turn(self) -> bool:
        """A step in which everybody waits for the ring; False when nobody else is left."""
        if not await self.reduce(await self.gradient()):
            return False
        await self.apply()
        if await self.group.are_peers_pending():
            await self.assemble()
        await self.agree()
        return True

    async def late_turn(self) -> bool:
        """Work while the last ring turns, apply its average, begin the next ring."""
        last = self.due and self.common.steps + 1 >= self.settings.steps
        gradient = None if last else await self.gradient()
        if self.running is not None:
            running, self.running = self.running, None
            if not await running.join():
                return False
        if self.due:
            mine = self.average is not None
            await self.apply()
            # Who came in meanwhile gets what was computed before.
            await self.agree(behind=not mine)
            self.due = False
        if gradient is None or self.common.steps >= self.settings.steps:
            return True
        if self.settings.eager:
            self.own = gradient[: len(self.common.params)].clone()
        if await self.group.are_peers_pending():
            if not await self.reduce(gradient):
                return False
            await self.assemble()
            await self.agree()
        else:
            self.running = self.tasks.start(self.reduce(gradient), isolate=True)
            self.due = True
        return True

    async def gradient(self) -> Tensor:
        """This peer's contribution: gradient and ballot."""
        start = self.common.params.clone()
        if self.own is not None:
            start -= self.own
        found = await self.work(start, self.common.steps)
        if not self.settings.ballots:
            return found
        ballot = torch.zeros(self.settings.ballots, dtype=found.dtype, device=found.device)
        ballot[self.group.peer.id] = 1.0
        return torch.cat((found, ballot))

    async def reduce(self, gradient: Tensor) -> bool:
        """Wait for a ring of whoever is left; False when nobody is."""
        try:
            await self.group.all_reduce_with_retry(gradient, "avg", quantise=self.settings.quantise)
        except TooFewPeers:
            return False
        self.average = gradient
        return True

    async def apply(self) -> None:
        average, self.average, self.own = self.average, None, None
        if average is not None:
            dim = len(average) - self.settings.ballots
            self.common.apply(average[:dim])
            await self.applied(average[:dim], average[dim:])

    async def assemble(self) -> None:
        """Let in who waits, and wait until there are enough. Everybody learns what is due."""
        group, peer = self.group, self.group.peer
        until_s = peer.now() + self.settings.patience_s
        while True:
            await group.update_topology()
            holds = self.average is not None
            heads = torch.tensor([1, self.common.steps, holds], dtype=torch.int64, device="cpu")
            # Votes of peers, not their own views of the group, which may differ for a moment.
            with suppress(TooFewPeers):
                await group.all_reduce_with_retry(heads, tag=_HEADS)
            count, begun, due = heads.tolist()
            self.due = due > 0
            if count >= (2 if begun else self.settings.least):
                return
            if peer.now() >= until_s:
                raise TooFewPeers(
                    f"in step: {count} peers after {self.settings.patience_s} s (start others, or "
                    "raise patience_s)"
                )
            await peer.sleep_until(peer.now() + self.settings.pause_s)

    async def agree(self, behind: bool = False) -> None:
        """One state for all. behind: others may know it better, so this peer has no vote."""
        shared = self.common.shared
        while True:
            # Every agreement is a revision, whether or not something was applied since the last.
            again = shared.revision == self.agreed and not behind
            shared.revision += again
            try:
                await self.group.sync_shared_state(shared)
            except SyncFailed:
                shared.revision -= again
                await self.assemble()
            except BaseException:
                shared.revision -= again
                raise
            else:
                self.agreed = shared.revision
                return
