"""Fully connected networks."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from torch import nn

from shoal.base.errors import UsageError

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class MLP:
    """Linear layers with an activation between them; `hidden=()` is a linear model.

    Samples of any shape are flattened first.

    >>> sum(p.numel() for p in MLP(hidden=(128,)).build((64,), 10).parameters())
    9610
    """

    hidden: tuple[int, ...] = (64,)
    activation: str = "relu"
    bias: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if any(width < 1 for width in self.hidden):
            raise UsageError(f"mlp: hidden={self.hidden}; widths must be at least 1 (drop it)")
        if self.activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise UsageError(f"mlp: activation={self.activation!r}; use one of {known}")

    def build(self, features: tuple[int, ...], outputs: int) -> nn.Module:
        widths = (math.prod(features), *self.hidden, outputs)
        layers: list[nn.Module] = [nn.Flatten()] if len(features) > 1 else []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after, bias=self.bias), _ACTIVATIONS[self.activation]()]
        return nn.Sequential(*layers[:-1])
