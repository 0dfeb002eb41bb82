"""A pipeline in one process: the numbers of a pipeline of peers, without its messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.parts.pipeline import _work as work
from shoal.parts.pipeline.base import StageState
from shoal.parts.pipeline.plan import Plan
from shoal.tensor import keyed
from shoal.tensor.types import Key, Vector


@dataclass(frozen=True)
class Saved:
    """All that a trainer holds, between two iterations."""

    done: int
    parts: tuple[StageState, ...]


class Trainer:
    """Trains a plan's model, iteration by iteration.

    parts: the states of part 0 and of stages 1 to L; done: iterations that were applied. shadows:
    every part's state is held and computed a second time, as redundant computation does at the
    peer before it.

    Assumes one thread of arithmetic (`shoal.tensor.threads.one_thread`) for bits that are equal
    everywhere.
    """

    def __init__(self, plan: Plan, seed: int, *, shadows: bool = False) -> None:
        self.plan = plan
        self.seed = seed
        self.done = 0
        count = plan.stages + 1
        self.parts = [plan.begun(part, self._key(part, "init")) for part in range(count)]
        self.shadows = list(self.parts) if shadows else None

    def _key(self, part: int, *words: int | str) -> Key:
        """`peer.key(*words)` of the peer that would hold this part."""
        return keyed.key_of(self.seed, "peer", part, *words)

    def iterate(self) -> float:
        """One iteration of all microbatches; the mean training loss."""
        plan, parts = self.plan, self.parts
        model = plan.model
        tensors = [work.leaves(state.params, model.spec(part)) for part, state in enumerate(parts)]
        gradients: list[list[Vector]] = [[] for _ in parts]
        losses = []
        for micro in range(plan.schedule.micro):
            tokens, targets = plan.batch(self._key(0, "batch", self.done, micro))
            begin = work.traced_embedding(tensors[0], tokens, model)
            h, passed = begin.output.detach(), []
            for stage in plan.schedule.order(micro):
                traced = work.traced_stage(tensors[stage], h, model)
                passed.append((stage, traced))
                h = traced.output.detach()
            loss, gradient, own = work.concluded(tensors[0], h, targets, model)
            for stage, traced in reversed(passed):
                gradient, mine = work.pulled(traced, gradient)
                gradients[stage].append(mine)
            gradients[0].append(own + work.pulled_embedding(begin, gradient))
            losses.append(loss)
        self.parts = self._after(parts, gradients)
        if self.shadows is not None:
            self.shadows = self._after(self.shadows, gradients)
        self.done += 1
        return float(torch.stack(losses).mean())

    def _after(
        self, parts: Sequence[StageState], gradients: list[list[Vector]]
    ) -> list[StageState]:
        plan = self.plan
        return [
            work.after(state, mine, plan.optimizer, plan.clip)
            for state, mine in zip(parts, gradients, strict=True)
        ]

    def loss(self, parts: Sequence[StageState] | None = None) -> float:
        """The validation loss, stages in their normal order."""
        states = self.parts if parts is None else parts
        model, windows = self.plan.model, self.plan.text.validation
        outer = states[0].params
        h = work.embedded(outer, windows[:, :-1], model)
        for state in states[1:]:
            h = work.forwarded(state.params, h, model)
        return float(work.judged(outer, h, windows[:, 1:], model))

    def rebuilt(self, lost: Sequence[int], plan: Plan | None = None) -> list[StageState]:
        """All states after these parts were lost together and rebuilt.

        plan: whose rule of recovery is used, such as another one to compare. Raises
        `Unrecoverable` when the rule cannot do it.
        """
        plan = self.plan if plan is None else plan
        plan.recovery.check(lost, plan.stages)
        parts = list(self.parts)
        for part in lost:
            if part == 0:
                # The copies that stages 1 and L hold are of the same update.
                parts[0] = plan.restored(self.parts[0].params)
                continue
            given = {s: self.parts[s] for s in plan.recovery.sources(part, plan.stages)}
            parts[part] = plan.rebuilt(part, given, self._key(part, "again", self.done))
        return parts

    def lose(self, lost: Sequence[int]) -> None:
        """These parts fail and are rebuilt by the plan's rule; what was going on is dropped."""
        self.parts = self.rebuilt(lost)

    def take_over(self, lost: Sequence[int]) -> None:
        """These parts fail, and those who computed them redundantly go on with their states."""
        assert self.shadows is not None
        for part in lost:
            self.parts[part] = self.shadows[part]

    def save(self) -> Saved:
        """A checkpoint."""
        return Saved(self.done, tuple(self.parts))

    def restore(self, saved: Saved) -> None:
        """Roll all parts back."""
        self.done, self.parts = saved.done, list(saved.parts)
