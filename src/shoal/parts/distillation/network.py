"""A task's model as a feature extractor and a linear head, for gradients that reach the pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shoal.base.errors import UsageError
from shoal.rounds.task import Task
from shoal.tensor.flat import FlatSpec
from shoal.tensor.keyed import fold, grid, normal
from shoal.tensor.types import Key, Vector


@dataclass(frozen=True, eq=False)
class Network:
    """An `nn.Sequential` whose last layer is linear; what comes before it are the features.

    The functions take one row, params [dim] and x [n, *], and work under `torch.func.vmap` and
    `grad`. Made by `network_of`.
    """

    body: nn.Sequential
    head: nn.Linear
    name: str
    spec: FlatSpec

    def features(self, params: Vector, x: Tensor) -> Tensor:
        """What the head gets: [n, width]."""
        views = self.spec.views(params)
        own = {n: t for n, t in views.items() if not n.startswith(f"{self.name}.")}
        # Not the leaf itself: counters of flops hook what enters a module, and cannot hook a leaf.
        found: Tensor = functional_call(self.body, own, (x.expand_as(x),))
        return found

    def classify(self, params: Vector, features: Tensor) -> Tensor:
        """The head's output: [n, classes]."""
        views = self.spec.views(params)
        return nn.functional.linear(
            features, views[f"{self.name}.weight"], views.get(f"{self.name}.bias")
        )

    def random(self, key: Key, dtype: torch.dtype = torch.float32) -> Vector:
        """Random parameters [..., dim], one row per key: weights N(0, 2 / inputs), biases 0.

        He et al. 2015, equation 10.
        """
        parts = []
        for name, shape in zip(self.spec.names, self.spec.shapes, strict=True):
            count = math.prod(shape)
            if len(shape) > 1:
                draws = normal(grid(fold(key, name), count), dtype=dtype)
                parts.append(draws * math.sqrt(2.0 / math.prod(shape[1:])))
            else:
                # Scales of normalisation layers are weights of one axis; they begin at 1.
                value = 0.0 if name.endswith("bias") else 1.0
                parts.append(torch.full((*key.shape, count), value, dtype=dtype, device=key.device))
        return torch.cat(parts, -1)


def network_of(task: Task) -> Network:
    """The network of a task; UsageError unless it is layers in a row that end in a linear one.

    >>> from torch import nn
    >>> from shoal.parts.tasks.digits import Digits
    >>> network_of(Digits(peers=2, hidden=(16,))).features(
    ...     torch.zeros(1210), torch.zeros(3, 1, 8, 8)
    ... ).shape
    torch.Size([3, 16])
    """
    module = getattr(task, "module", None)
    layers = list(module.named_children()) if isinstance(module, nn.Sequential) else []
    if len(layers) < 2 or not isinstance(layers[-1][1], nn.Linear):
        raise UsageError(
            f"distillation: the task's model is {type(module).__name__}; need an nn.Sequential "
            "with an nn.Linear at its end and layers before it (use an MLP or a CNN)"
        )
    assert isinstance(module, nn.Sequential)
    name, head = layers[-1]
    assert isinstance(head, nn.Linear)
    body = module[:-1]
    assert isinstance(body, nn.Sequential)
    return Network(body, head, name, task.spec)
