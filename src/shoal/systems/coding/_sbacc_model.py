"""The model that is applied: trained by whoever asks, on all the data that it has."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from shoal.parts.optimise.adamw import AdamW
from shoal.parts.tasks.base import ModuleTask
from shoal.rounds.local import descend
from shoal.rounds.strategy import Step
from shoal.tensor import keyed
from shoal.tensor.types import Vector

LR = 3e-3
BATCH = 64


def trained(task: ModuleTask, seed: int, steps: int) -> Vector:
    """Parameters [dim] after so many AdamW steps on the data of peer 0."""
    start = task.init(keyed.key_of(seed, "init"))
    shard = task.shard(0)
    rule = AdamW(LR)
    step = Step(
        0, task, shard, keyed.key_of(seed, "training", device=start.device),
        torch.ones_like(shard.size, dtype=torch.bool),
    )  # fmt: skip
    return descend(task, rule, start, rule.init(start), step, steps=steps, batch_size=BATCH)[0]


def test_set(task: ModuleTask) -> tuple[Tensor, Tensor]:
    """Test samples and their classes."""
    parts: Any = task
    return parts.test_x, parts.test_y


def module_of(task: ModuleTask, params: Vector) -> nn.Module:
    """The task's module with these parameters, for inference."""
    whole: Any = task
    module: nn.Module = copy.deepcopy(whole.module)
    module.load_state_dict(
        {name: value.clone() for name, value in task.spec.views(params).items()}, strict=False
    )
    return module.eval().requires_grad_(False)
