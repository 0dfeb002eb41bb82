"""A pass through stacked layers, laid out once: every buffer and every view is made beforehand.

Small models are all overhead: a fresh buffer costs a page fault per 4 KB, and a view costs as much
as a small product. So layers are bound once to a number of rows and samples, and a pass only runs
the arithmetic that is left.

Values lie `[rows, features, batch]`, `[rows, channels, height, width, batch]` (images) or
`[rows, features, positions, batch]` (sequences): the batch is innermost, so that every layer is a
product of a weight with a long matrix, and rows (peers) are a batch of such products. `rows` of an
input may be 1 when every row sees the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Views = Mapping[str, Tensor]

TILE_BYTES = 1 << 20
"""Large intermediate values are made in pieces of this size; a constant."""


@dataclass
class Pass:
    """What one pass works on. Parameters and what becomes of them are views `[rows, *shape]`.

    Unless `results` is None it takes the gradients or, with a `rate`, the parameters after a step
    against them; it may then be the parameters themselves. Each sample's squared gradient norm is
    added to `squares` [rows, batch] unless that is None. lying_close: each parameter is a tensor
    of its own, in which a product may end.
    """

    params: Views
    results: Views | None = None
    squares: Tensor | None = None
    rate: float | None = None
    lying_close: bool = False

    def give(self, name: str, gradient: Tensor) -> None:
        """Take in a parameter's gradient [rows, *]. The parameter may be another one after it."""
        if self.results is None:
            return
        target = self.results[name]
        gradient = gradient.view(target.shape)
        if self.rate is None:
            target.copy_(gradient)
        else:
            torch.add(self.params[name], gradient, alpha=-self.rate, out=target)


Action = Callable[[Pass], None]


class Layer(Protocol):
    """One step of a stacked model."""

    def bind(self, program: Program, x: Value) -> Value:
        """Make the buffers for this input, and add what to do forward and backward."""
        ...


@dataclass
class Value:
    """A buffer and, in training, the buffer of its gradient (None where nobody asks for it)."""

    data: Tensor
    grad: Tensor | None = None


class Program:
    """Buffers and actions for `rows` rows of `batch` samples."""

    def __init__(self, rows: int, batch: int, like: Tensor, training: bool) -> None:
        self.rows = rows
        self.batch = batch
        self.like = like
        self.training = training
        self.forward: list[Action] = []
        self.backward: list[Action] = []
        self.size_bytes = 0
        self._shared: dict[str, Tensor] = {}

    def empty(
        self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A buffer of this program."""
        buffer = self.like.new_empty(shape, dtype=dtype or self.like.dtype)
        self.size_bytes += buffer.numel() * buffer.element_size()
        return buffer

    def shared(self, slot: str, shape: tuple[int, ...]) -> Tensor:
        """A buffer whose content is void after the action; one slot serves all layers."""
        count = math.prod(shape)
        buffer = self._shared.get(slot)
        if buffer is None or buffer.numel() < count:
            least = TILE_BYTES // self.like.element_size()
            buffer = self._shared[slot] = self.empty((max(count, least),))
        return buffer[:count].view(shape)

    def value(self, shape: tuple[int, ...]) -> Value:
        """A layer's output; in training with a gradient."""
        return Value(self.empty(shape), self.empty(shape) if self.training else None)

    def then(self, forward: Action, backward: Action | None = None) -> None:
        """Add a layer's actions; on the way back the last one comes first."""
        self.forward.append(forward)
        if self.training and backward is not None:
            self.backward.insert(0, backward)


def joined(x: Tensor) -> Tensor:
    """All axes but rows and features as one: `[rows, features, n]`."""
    return x.view(x.shape[0], x.shape[1], -1)
