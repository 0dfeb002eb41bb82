"""How often a targeted attack gets what it wants, and the accuracy on everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.rounds.attack import Aim
from shoal.rounds.task import Task
from shoal.tensor.types import Vector

SAMPLES = 256
"""Test samples per call, which bounds memory."""


@dataclass(frozen=True)
class AttackSuccess:
    """`attack_success` and `untouched_accuracy` of each peer's own model on the test set.

    attack_success: the share of test samples of the attacked class (of all classes but the target
    when it is any class) that are taken for the target once the trigger, if there is one, is in
    them. untouched_accuracy: accuracy on the samples of all other classes, without the trigger (on
    all samples when any class is attacked): what the attack leaves alone, so that a method cannot
    gain by what it does to the attacked class. The aim comes from the scenario's attack, which must
    be a targeted one (it offers `aim`); without Byzantine peers the same numbers say what happens
    by itself.

    >>> AttackSuccess(Aim(target=1, source=7)).of_peers
    True
    """

    aim: Aim | None = None

    of_peers: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"aim": Aim(target=1, source=0)}, {"aim": Aim(target=1, trigger=torch.neg)},
    )  # fmt: skip

    def bind(self, attack: object) -> AttackSuccess:
        """The measure for the attack in force."""
        aim = getattr(attack, "aim", None)
        if aim is None:
            raise UsageError(
                f"attack_success: attack {type(attack).__name__} has no target class (name a "
                "targeted one, such as class_flip, or leave the measure out)"
            )
        return replace(self, aim=aim())

    def __call__(self, task: Task, params: Vector) -> Mapping[str, Tensor]:
        aim = self.aim
        outputs = getattr(task, "outputs", None)
        if aim is None:
            raise UsageError("attack_success: no aim (set the scenario's attack, or give an aim)")
        if outputs is None or getattr(task, "classes", None) is None:
            raise UsageError(
                f"attack_success: {type(task).__name__} does not classify (need a task with "
                "`classes` and `outputs`)"
            )
        x, y = task.test_x, task.test_y  # type: ignore[attr-defined]
        victims = y != aim.target if aim.source is None else y == aim.source
        others = torch.ones_like(victims) if aim.source is None else ~victims
        hits, right = params.new_zeros((2, *params.shape[:-1]), dtype=torch.float64)
        for start in range(0, len(y), SAMPLES):
            part = slice(start, start + SAMPLES)
            plain = _taken_for(outputs(params, x[part]))
            right = right + ((plain == y[part]) & others[part]).sum(-1)
            shown = plain
            if aim.trigger is not None:
                shown = _taken_for(outputs(params, aim.trigger(x[part])))
            hits = hits + ((shown == aim.target) & victims[part]).sum(-1)
        return {
            "attack_success": hits / victims.sum().clamp(min=1),
            "untouched_accuracy": right / others.sum().clamp(min=1),
        }


def _taken_for(output: Tensor) -> Tensor:
    """The class of each output [..., classes]; -1 where it is NaN."""
    best, place = output.max(-1)
    return torch.where(best.isnan(), -1, place)
