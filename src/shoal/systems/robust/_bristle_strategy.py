"""Bristle as a strategy: SGD on the output layer, and a merge of what came class by class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.optimise.sgd import SGD
from shoal.parts.screening.class_merge import ClassMerge, OwnTests, familiar
from shoal.rounds.local import descend
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.rounds.task import Batch
from shoal.tensor.flat import FlatSpec
from shoal.tensor.types import Index, Mask, Stack, Vector


@dataclass(frozen=True)
class State:
    """params [..., dim]. Of the last round, [...]: how many messages were tested, how many of those
    got a weight, and how many were refused because they are about other features."""

    params: Vector
    tested: Tensor
    trusted: Tensor
    refused: Tensor


@dataclass(frozen=True)
class Bristle:
    """`steps` of SGD, then the own parameters merged with those received, class by class.

    alpha, k and classes: see `ClassMerge`. The task must be a classification whose network ends in
    a linear layer; each peer needs samples of its own to test on (`task.own_tests`), and it is
    familiar with the classes that it has such samples of. With features frozen below (the task
    `transfer_digits`) the output layer is all there is. Parameters below an output layer that are
    trained too belong to no class and are merged as foreign ones, which is not in the paper.
    A message is the vector, the classes of its sender (with "count" how many) and the fingerprint
    of the features; one with another fingerprint counts as not received.
    Breaks where peers' own tests are so few that F1 is noise.

    >>> Bristle(lr=1.0).merge.quotas
    (4, 5, 2)
    """

    lr: float = 0.5
    steps: int = 1
    batch_size: int = 20
    alpha: float = 0.4
    k: int = 10
    classes: str = "announced"

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"batch_size": 8}, {"steps": 2, "batch_size": 4, "alpha": 0.0, "k": 2},
        {"batch_size": 8, "classes": "count"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"Bristle: steps={self.steps}; need at least 1")
        # Settings are checked where they are used.
        _ = self.merge

    @property
    def merge(self) -> ClassMerge:
        return ClassMerge(self.alpha, self.k, self.classes)

    def init(self, params: Vector) -> State:
        none = params.new_zeros(params.shape[:-1], dtype=torch.float64)
        return State(params, none, none, none)

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        sgd = SGD(self.lr)
        params, _ = descend(
            step.task, sgd, state.params, sgd.init(state.params), step, steps=self.steps,
            batch_size=self.batch_size,
        )  # fmt: skip
        tests = _tests(step)
        own = familiar(tests.y, tests.mask, _classes(step.task)).to(torch.float32)
        told = own.sum(-1) if self.classes == "count" else own
        about = torch.full_like(state.tested, float(_fingerprint(step.task)))
        extra = {"classes": told, "features": about}
        return replace(state, params=params), Parcel(params, extra=extra)

    def combine(
        self, state: State, rows: Stack, mask: Mask, share: Tensor, extra: Mapping[str, Tensor],
        step: Step,
    ) -> Heard:  # fmt: skip
        task, held = step.task, _tests(step)
        classes = _classes(task)
        # Means of several waves are rounded; fingerprints are whole numbers below 2^48.
        alike = (extra["features"] - float(_fingerprint(task))).abs() < 0.5
        lead = step.key.dim()
        images = held.x.unsqueeze(lead)

        def outputs(models: Stack) -> Tensor:
            found: Tensor = task.outputs(models, images)  # type: ignore[attr-defined]
            return found

        tests = OwnTests(outputs, held.y, held.mask, classes)
        vector, found, place = self.merge.integrate(
            rows[..., 0, :], rows[..., 1:, :], (mask & alike)[..., 1:], extra["classes"][..., 1:, :]
            if self.classes == "announced" else extra["classes"][..., 1:], tests,
            columns(task.spec, classes).to(rows.device, non_blocking=True), step.key,
        )  # fmt: skip
        some = (found.weights > 0).any(-1) | (found.foreign > 0)
        numbers = {
            "tested": (place >= 0).sum(-1), "trusted": (some & (place >= 0)).sum(-1),
            "refused": (mask & ~alike).sum(-1),
        }  # fmt: skip
        return Heard(vector, mask.sum(-1), {n: v.to(torch.float64) for n, v in numbers.items()})

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        return replace(state, params=heard.vector, **heard.extra)

    def params(self, state: State) -> Vector:
        return state.params

    def report(self, state: State, spec: FlatSpec) -> dict[str, Tensor]:
        return {name: getattr(state, name) for name in ("tested", "trusted", "refused")}


def _tests(step: Step) -> Batch:
    """The own test samples of all rows."""
    if not hasattr(step.task, "held"):
        raise UsageError(
            f"Bristle: {type(step.task).__name__} has no samples that peers keep for testing (use "
            "a classification task, with own_tests)"
        )
    found: Batch = step.task.held(step.shard)  # type: ignore[attr-defined]
    return found


def _classes(task: Any) -> int:
    classes = getattr(task, "classes", None)
    if classes is None:
        raise UsageError(
            f"Bristle: {type(task).__name__} has no `classes`; need a classification task"
        )
    return int(classes)


def _fingerprint(task: Any) -> int:
    """Which features a model is about; 0 where it brings its own."""
    return getattr(task, "fingerprint", 0)


@lru_cache(maxsize=8)
def columns(spec: FlatSpec, classes: int) -> Index:
    """The class that each parameter belongs to: int64 [dim], -1 below the output layer.

    >>> columns(FlatSpec(("weight", "bias"), ((2, 3), (2,))), 2).tolist()
    [0, 0, 0, 1, 1, 1, 0, 1]
    """
    last = spec.shapes[-2:]
    if len(last) < 2 or len(last[0]) != 2 or last[0][0] != classes or last[1] != (classes,):
        raise UsageError(
            f"Bristle: the network ends in parameters of shapes {last}; need a linear layer with "
            f"{classes} outputs, [{classes}, features] and [{classes}]"
        )
    kinds = torch.arange(classes, device="cpu")
    below = torch.full((spec.offsets[-2],), -1, dtype=torch.int64, device="cpu")
    return torch.cat((below, kinds.repeat_interleave(last[0][1]), kinds))
