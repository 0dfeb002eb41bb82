"""Runs of private momentum with a canary behind a coin, and an attacker who sees every release.

The hub is trusted and adds the noise; what it shows is the noisy sum of all clients' momenta. The
attacker knows all of them but for the canary's part in one, and takes them out: one client is left.
It compares that with what the canary's gradients would have added up to, drawn or not: with
sampling = 1 the score is the exact logarithm of the likelihood ratio, else it takes their mean.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from shoal.parts.strategy.private_momentum import PrivateMomentum
from shoal.rounds.strategy import Step
from shoal.rounds.task import Batch
from shoal.systems.privacy._audit_training import FLOOR, Canaries, Scores
from shoal.tensor import keyed
from shoal.tensor.types import Key


def momentum_of(
    noise: float, sampling: float, beta: float, records: int, lr: float
) -> PrivateMomentum:
    """DP-BREM of one client, whose noise is `noise` times what one record moves; no clip around
    the last sum, which brings no two of its releases further apart."""
    return PrivateMomentum(
        lr=lr, sampling=sampling, momentum=beta, noise=noise / (sampling * records),
        client_clip=math.inf, records=records,
    )  # fmt: skip


def momentum_runs(
    world: Canaries, real: PrivateMomentum, rounds: int, runs: int, key: Key
) -> Scores:
    """`runs` runs at once, each with the first canary or without."""
    task, records = world.task, real.records
    assert records is not None
    one = replace(world, canaries=world.canaries[:1], y=world.y[:1])
    keys = keyed.grid(keyed.fold(key, "runs"), runs)
    included = keyed.uniform(keys, "coin") < 0.5
    shard = one.shard(included.unsqueeze(-1))
    others = replace(shard, size=torch.full_like(shard.size, len(one.others)))
    state = real.init(task.init(keyed.fold(key, "model")).expand(runs, -1).clone())
    bare, part = state.momentum, torch.zeros_like(state.params, dtype=torch.float64)
    score = torch.zeros(runs, dtype=torch.float64, device=keys.device)
    here = torch.ones(runs, 1, dtype=torch.bool, device=keys.device)
    spread = max(real.deviation, FLOOR / records)
    for round in range(rounds):
        step = Step(round, task, shard, keyed.fold(keys, "round", round), shard.size > 0)
        own = one.gradients(state.params, slice(0, 1), real.record_clip).double() / records
        part = real.momentum * part + (1 - real.momentum) * own
        work, parcel = real.local(state, step)
        alone, known = real.local(replace(state, momentum=bare), replace(step, shard=others))
        hub = replace(step, key=keyed.fold(keys, "hub", round))
        heard = real.combine(work, parcel.vector.unsqueeze(-2), here, here.float(), {}, hub)
        left = (heard.vector - known.vector).double()
        score += ((left * part).sum(-1) - part.square().sum(-1) / 2) / spread**2
        state, bare = real.apply(work, heard, hub), alone.momentum
    batch = Batch(task.x[one.canaries], one.y, here[0])
    loss = -task.loss(state.params, batch).double()
    accuracy = task.evaluate(state.params[:16])["accuracy"].double().mean()
    return Scores(score.cpu().numpy(), included.cpu().numpy(), loss.cpu().numpy(), float(accuracy))
