"""Training with canaries behind coins, and what an attacker who sees every step makes of it.

The attacker knows the data but for the canaries' coins, the settings that really run, and which of
the other records were drawn; privacy holds against such a one, too. From each step it subtracts
what the others did (the same step without noise and canaries), and compares what is left with the
canary's own gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.privacy.tree_noise import TreeSums
from shoal.parts.strategy.private_steps import PrivateSteps, State
from shoal.parts.tasks.base import ModuleTask, task_of
from shoal.rounds.strategy import Step
from shoal.rounds.task import Batch, Shard
from shoal.tensor import keyed
from shoal.tensor.types import Key, Mask, Vector

FLOOR = 0.01
"""Noise below this is taken for as much: without noise nothing is uncertain."""

BRIGHT = 10.0
"""The feature of a canary over the largest of any sample: what it does is not lost among others."""


@dataclass(frozen=True)
class Scores:
    """What the attacker made of each canary, and the coins. steps: from all steps (white box);
    loss: from the last model alone (black box), none in one run; accuracy: of the last models."""

    steps: NDArray[np.float64]
    included: NDArray[np.bool_]
    loss: NDArray[np.float64]
    accuracy: float


@dataclass(frozen=True)
class Canaries:
    """others int64 [n]: the records that are there anyway; canaries int64 [m], with labels
    y [m]: positions in the task's data."""

    task: ModuleTask
    others: Tensor
    canaries: Tensor
    y: Tensor

    @staticmethod
    def of(task: ModuleTask, records: int, canaries: int) -> Canaries:
        """The first records of peer 0, and canaries from the other peers, with wrong labels."""
        if task.classes is None or task.peers < 2:
            raise UsageError(
                f"privacy-audit: {task.peers} peers; need a classification task and the data of "
                "another peer for canaries (set peers = 2)"
            )
        own = task.shard(0)
        rest = [task.shard(peer) for peer in range(1, task.peers)]
        pool = torch.cat([shard.index[: int(shard.size)] for shard in rest])
        if int(own.size) < records or len(pool) < canaries:
            raise UsageError(
                f"privacy-audit: {records} records and {canaries} canaries; peer 0 has "
                f"{int(own.size)} samples and the others {len(pool)} (take fewer)"
            )
        chosen = pool[:canaries]
        return Canaries(task, own.index[:records], chosen, (task.y[chosen] + 1) % task.classes)

    @staticmethod
    def bright(task: ModuleTask, records: int, canaries: int) -> Canaries:
        """Canaries of one bright feature each, with every label in turn: made so that their
        gradients hardly overlap, which those of real samples do."""
        plain = Canaries.of(task, records, 1)
        features = task.x[:1].numel()
        if not task.x.is_floating_point() or canaries > features * (task.classes or 0):
            raise UsageError(
                f"privacy-audit: {canaries} canaries; need samples of real numbers, and no more "
                "canaries than they have features, times the classes (take fewer)"
            )
        number = torch.arange(canaries, device=task.x.device)
        x = torch.zeros(canaries, features, dtype=task.x.dtype, device=task.x.device)
        x[number, number % features] = BRIGHT * task.x.abs().max()
        y = (number % features + number // features) % (task.classes or 1)
        data = torch.cat((task.x, x.view(-1, *task.x.shape[1:]))), torch.cat((task.y, y))
        own = Shard(plain.others.unsqueeze(0), torch.full_like(plain.others[:1], records))
        wide = task_of(
            task.module, "cross_entropy", data, (task.test_x, task.test_y), own,
            classes=task.classes, batching=task.batching,
        )  # fmt: skip
        return Canaries(wide, plain.others, len(task.x) + number, y)

    def shard(self, included: Mask) -> Shard:
        """[rows, m] coins -> the others and each row's canaries behind them."""
        rows, n = len(included), len(self.others)
        order = torch.where(included, 0, 1).argsort(dim=-1, stable=True)
        index = torch.cat((self.others.expand(rows, n), self.canaries[order]), 1)
        labels = torch.cat((self.task.y[self.others].expand(rows, n), self.y[order]), 1)
        return Shard(index, n + included.sum(-1), labels)

    def gradients(self, params: Vector, which: slice, clip: float) -> Tensor:
        """Clipped gradients of canaries at params [rows, dim]: a row each, or all at one row."""
        x, y = self.task.x[self.canaries[which]], self.y[which]
        mask = torch.ones(len(y), 1, dtype=torch.bool, device=y.device)
        batch = Batch(x.unsqueeze(1), y.unsqueeze(1), mask)
        rows = max(len(params), len(y))
        return self.task.clipped_grad_sum(params.expand(rows, -1), batch, clip)


def many_runs(world: Canaries, real: PrivateSteps, rounds: int, runs: int, key: Key) -> Scores:
    """`runs` runs at once, each with the first canary or without: the score is the exact
    logarithm of the likelihood ratio of all that was shown."""
    task, spread = world.task, _spread(real)
    one = replace(world, canaries=world.canaries[:1], y=world.y[:1])
    keys = keyed.grid(keyed.fold(key, "runs"), runs)
    included = keyed.uniform(keys, "coin") < 0.5
    shard = one.shard(included.unsqueeze(-1))
    state = real.init(task.init(keyed.fold(key, "model")).expand(runs, -1).clone())
    score = torch.zeros(runs, dtype=torch.float64, device=keys.device)
    watched = _Tree(real) if real.mechanism == "tree" else None
    for round in range(rounds):
        own = one.gradients(state.params, slice(0, 1), real.clip).double()
        left, state = _step(task, real, state, shard, len(one.others), round, keys)
        length = own.norm(dim=-1).clamp_min(1e-12)
        if watched is not None:
            score += watched.after(round, left, own, length)
        else:
            seen = (left * own).sum(-1)
            gain = (seen - length**2 / 2) / spread**2
            score += _log_ratio(gain, _share(real, len(one.others), round))
    x, y = task.x[one.canaries], one.y
    batch = Batch(x, y, torch.ones(1, dtype=torch.bool, device=y.device))
    loss = -task.loss(state.params, batch).double()
    accuracy = task.evaluate(state.params[:16])["accuracy"].double().mean()
    return Scores(score.cpu().numpy(), included.cpu().numpy(), loss.cpu().numpy(), float(accuracy))


def one_run(world: Canaries, real: PrivateSteps, rounds: int, key: Key) -> Scores:
    """One run with all canaries, each by its own coin: what explains the steps best, by ridge
    regression on the canaries' gradients (the mean of the coins, if these were Gaussian)."""
    task, spread, m = world.task, _spread(real), len(world.canaries)
    if real.draws == "parts" and real.sampling < 1:
        raise UsageError("privacy-audit: one run with many canaries needs records that are drawn")
    included = keyed.uniform(keyed.grid(keyed.fold(key, "canaries"), m)) < 0.5
    shard = world.shard(included.unsqueeze(0))
    keys = keyed.fold(key, "run").unsqueeze(0)
    state = real.init(task.init(keyed.fold(key, "model")).unsqueeze(0))
    gram = 4.0 * torch.eye(m, dtype=torch.float64, device=keys.device)
    seen = torch.full((m,), 2.0, dtype=torch.float64, device=keys.device)
    for round in range(rounds):
        own = world.gradients(state.params, slice(0, m), real.clip).double() * real.sampling
        left, state = _step(task, real, state, shard, len(world.others), round, keys)
        gram += own @ own.T / spread**2
        seen += own @ left[0] / spread**2
    score = torch.linalg.solve(gram, seen)
    accuracy = task.evaluate(state.params)["accuracy"].double().mean()
    return Scores(score.cpu().numpy(), included.cpu().numpy(), np.empty(0), float(accuracy))


def _spread(real: PrivateSteps) -> float:
    return max(real.noise * real.clip, FLOOR)


def _share(real: PrivateSteps, place: int, round: int) -> float:
    """The chance that a step uses the record at a place."""
    if real.draws == "poisson":
        return real.sampling
    return float(place % real.parts == round % real.parts)


def _log_ratio(gain: Tensor, share: float) -> Tensor:
    """log of (1 - share) + share e^gain."""
    if share in (0.0, 1.0):
        return gain * share
    return torch.logaddexp(torch.full_like(gain, math.log1p(-share)), math.log(share) + gain)


def _step(
    task: ModuleTask, real: PrivateSteps, state: State, shard: Shard, others: int, round: int,
    keys: Key,
) -> tuple[Tensor, State]:  # fmt: skip
    """What canaries and noise added to the sum of gradients [rows, dim], and the state after."""
    step = Step(round, task, shard, keyed.fold(keys, "round", round), shard.size > 0)
    after, _ = real.local(state, step)
    alone = replace(step, shard=replace(shard, size=torch.full_like(shard.size, others)))
    sums = state.sums
    bare = sums if sums is None else TreeSums(torch.zeros_like(sums.nodes), sums.count)
    quiet, _ = replace(real, noise=0.0).local(replace(state, sums=bare), alone)
    records = real.records
    assert records is not None
    left = (quiet.params - after.params).double() * (real.sampling * records / real.lr)
    return left, after


class _Tree:
    """The nodes over the first term of a tree, each a Gaussian release of the canary's gradient.

    Node number l is what all terms up to 2^l added; its noise is its own."""

    def __init__(self, real: PrivateSteps) -> None:
        self._leaves, self._spread = real.parts, _spread(real)
        self._sum: Tensor | None = None
        self._own = self._length = torch.zeros((), device="cpu")

    def after(self, round: int, left: Tensor, own: Tensor, length: Tensor) -> Tensor:
        """What this round adds to the logarithm of the likelihood ratio."""
        place = round % self._leaves
        if place == 0 or self._sum is None:
            # The canary is in the first part, so that its gradient is that of now.
            self._sum, self._own, self._length = torch.zeros_like(left), own, length
        self._sum = self._sum + left
        terms = place + 1
        if terms & (terms - 1):
            return torch.zeros_like(length)
        seen = (self._sum * self._own).sum(-1)
        return (seen - self._length**2 / 2) / self._spread**2
