"""Flow matching on the 8x8 digits of scikit-learn, judged in the features of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from shoal.parts.flow.distance import frechet_distance
from shoal.parts.tasks._flow import Flow, FlowTable
from shoal.parts.tasks.digits import Digits
from shoal.rounds.task import Batch
from shoal.tensor import keyed
from shoal.tensor.types import Mask

PRINCIPAL = 20
"""Directions of largest variance in which clusters are found; they hold 89% of it."""

CLASSIFIER = (64, 32)
CLASSIFIER_STEPS = 300


@dataclass(frozen=True, eq=False, kw_only=True)
class FlowDigits(Flow):
    """1,438 digits as vectors of 64 numbers in [-1, 1]; see `Flow`.

    Generated digits are held against real ones by `digit_fd`: the Frechet distance in the 32
    features before the last layer of a classifier of digits (97% accurate; made once, the same for
    everybody). It is no FID: other features, other images.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"peers": 4, "hidden": (8,), "train_samples": 100},
        {"peers": 3, "hidden": (8,), "split": "classes"},
    )

    def __post_init__(self) -> None:
        self.prepare(_table(self.frequencies, self.device))

    def quality(self, samples: Tensor, present: Mask) -> Mapping[str, float]:
        made, real = (digit_features(part) for part in (samples, self.clean(present)))
        return {"digit_fd": frechet_distance(made, real)}


@lru_cache(maxsize=2)
def _table(frequencies: int, device: str) -> FlowTable:
    digits = Digits(peers=1, device=device)
    clean, held = (2 * part.flatten(1) - 1 for part in (digits.x, digits.test_x))
    x = clean.cpu().double().numpy()
    middle = x - x.mean(0)
    _, _, directions = np.linalg.svd(middle, full_matrices=False)
    features = middle @ directions[:PRINCIPAL].T
    return FlowTable.of(clean, held, digits.y.cpu().numpy(), features, frequencies)


def digit_features(images: Tensor) -> Tensor:
    """Features [n, 32] of images [n, 64] in [-1, 1]; what lies outside is cut off."""
    module, tensors = _classifier()
    shown = (images.cpu().float().clamp(-1, 1) + 1) / 2
    with torch.no_grad():
        return functional_call(module, tensors, (shown.view(-1, 1, 8, 8),))


@lru_cache(maxsize=1)
def _classifier() -> tuple[nn.Module, dict[str, Tensor]]:
    """The classifier without its last layer, and its parameters; always on the processor."""
    task = Digits(peers=1, hidden=CLASSIFIER)
    params = nn.Parameter(task.init(keyed.key_of(0, "digit features")))
    adam = torch.optim.Adam([params], lr=5e-3)
    batch = Batch(
        task.x, task.y, torch.ones(len(task.y), dtype=torch.bool, device=task.x.device)
    )  # fmt: skip
    for _ in range(CLASSIFIER_STEPS):
        params.grad = task.grad(params.detach(), batch)
        adam.step()
    body = task.module[:-1]
    views = task.spec.views(params.detach())
    return body, {name: views[name] for name, _ in body.named_parameters()}
