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


class XavierLinear(nn.Linear):
    """A linear layer that begins with Xavier's uniform weights and biases of zero.

    Signals keep their size in linear layers as many as you like (Glorot and Bengio 2010, equation
    16); PyTorch's own rule, U(+-1/sqrt(fan_in)), makes them a third as strong in every layer.
    """

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


@dataclass(frozen=True)
class MLP:
    """Linear layers with an activation between them; `hidden=()` is a linear model.

    Samples of any shape are flattened first. initialise: "layer" PyTorch's rule for linear layers,
    "xavier" uniform weights of Xavier and no biases.

    >>> sum(p.numel() for p in MLP(hidden=(128,)).build((64,), 10).parameters())
    9610
    """

    hidden: tuple[int, ...] = (64,)
    activation: str = "relu"
    bias: bool = True
    initialise: str = "layer"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if any(width < 1 for width in self.hidden):
            raise UsageError(f"mlp: hidden={self.hidden}; widths must be at least 1 (drop it)")
        if self.activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise UsageError(f"mlp: activation={self.activation!r}; use one of {known}")
        if self.initialise not in ("layer", "xavier"):
            raise UsageError(f"mlp: initialise={self.initialise!r}; use 'layer' or 'xavier'")

    def build(self, features: tuple[int, ...], outputs: int) -> nn.Module:
        widths = (math.prod(features), *self.hidden, outputs)
        linear = XavierLinear if self.initialise == "xavier" else nn.Linear
        layers: list[nn.Module] = [nn.Flatten()] if len(features) > 1 else []
        for before, after in itertools.pairwise(widths):
            layers += [linear(before, after, bias=self.bias), _ACTIVATIONS[self.activation]()]
        return nn.Sequential(*layers[:-1])
