"""Layers over stacked parameters, forward and backward by hand: those that are matrix products.

Values lie `[rows, features, batch]`, `[rows, channels, height, width, batch]` (images) or
`[rows, features, positions, batch]` (sequences): the batch is innermost, so that every layer is a
product of a weight with a long matrix, and rows (peers) are a batch of such products. `rows` of an
input may be 1 when every row sees the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shoal.parts.models._scratch import Scratch
from shoal.parts.models._windows import (
    Pair,
    pad,
    patches,
    scatter_patches,
    window_max,
    window_max_backward,
    windows,
)

Views = Mapping[str, Tensor]


@dataclass
class Pass:
    """One way through the layers: parameters, memory, and where gradients go.

    Parameter gradients are written to `grads` unless it is None; each sample's squared gradient
    norm is added to `squares` [rows, batch] unless that is None. With `squares` the saved values
    stay whole, so that a second pass backward can follow.
    """

    params: Views
    memory: Scratch
    grads: Views | None = None
    squares: Tensor | None = None


class Layer(Protocol):
    """One step of a stacked model."""

    def forward(self, run: Pass, x: Tensor) -> tuple[Tensor, Any]:
        """The value, and what `backward` needs."""
        ...

    def backward(self, run: Pass, saved: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        """The input's gradient if `wanted`; `dy` may be overwritten."""
        ...


def product(run: Pass, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """`weight [rows, out, in] @ x [rows or 1, in, n]`, plus `bias [rows, out]`."""
    rows, out = weight.shape[:2]
    y = run.memory.empty((rows, out, x.shape[-1]), x)
    if x.shape[0] != rows:
        torch.mm(weight.reshape(rows * out, -1), x[0], out=y.view(rows * out, -1))
        return y if bias is None else y.add_(bias.unsqueeze(-1))
    if bias is None:
        return torch.bmm(weight, x, out=y)
    return torch.baddbmm(bias.unsqueeze(-1), weight, x, out=y)


def write_product(run: Pass, name: str, dy: Tensor, x: Tensor) -> None:
    """`dy @ x'` as the gradient of weight `name`; dy [rows, out, n], x [rows, in, n]."""
    assert run.grads is not None
    target = run.grads[name]
    flat = (dy.shape[0], dy.shape[1], x.shape[1])
    if target.is_contiguous():
        torch.bmm(dy, x.transpose(1, 2), out=target.view(flat))
        return
    # A product straight into rows that lie apart is far slower than a product and a copy.
    with run.memory.borrowed():
        y = torch.bmm(dy, x.transpose(1, 2), out=run.memory.empty(flat, dy))
        target.copy_(y.view(target.shape))


def sample_squares(dy: Tensor, x: Tensor) -> Tensor:
    """Squared norms `[rows, batch]` of each sample's weight gradient `sum_n dy_n x_n'`.

    dy: [rows, out, n, batch]; x: [rows, in, n, batch].
    """
    rows, out, count, batch = dy.shape
    if count == 1:
        return dy.square().sum((1, 2)) * x.square().sum((1, 2))
    left = dy.permute(0, 3, 1, 2).reshape(rows * batch, out, count)
    right = x.permute(0, 3, 2, 1).reshape(rows * batch, count, x.shape[1])
    return torch.bmm(left, right).square().sum((1, 2)).view(rows, batch)


def joined(dy: Tensor) -> Tensor:
    """All axes but rows and features as one: `[rows, features, n]`."""
    return dy.reshape(dy.shape[0], dy.shape[1], -1)


@dataclass(frozen=True)
class Linear:
    """`W x + b` on the feature axis of vectors or sequences."""

    weight: str
    bias: str | None

    def forward(self, run: Pass, x: Tensor) -> tuple[Tensor, Any]:
        weight = run.params[self.weight]
        y = product(run, weight, joined(x), run.params[self.bias] if self.bias else None)
        return y.view(weight.shape[0], weight.shape[1], *x.shape[2:]), x

    def backward(self, run: Pass, saved: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        flat, x = joined(dy), joined(saved)
        if run.grads is not None:
            write_product(run, self.weight, flat, x)
            if self.bias:
                torch.sum(flat, -1, out=run.grads[self.bias])
        if run.squares is not None:
            batch = dy.shape[-1]
            left = dy.reshape(*dy.shape[:2], -1, batch)
            run.squares += sample_squares(left, saved.reshape(*saved.shape[:2], -1, batch))
            if self.bias:
                run.squares += left.sum(2).square().sum(1)
        if not wanted:
            return None
        dx = run.memory.empty(x.shape, x)
        torch.bmm(run.params[self.weight].transpose(1, 2), flat, out=dx)
        return dx.view(saved.shape)


@dataclass(frozen=True)
class Convolution:
    """A two-dimensional convolution, with the maximum over `pool` windows when there is one.

    The bias is added after the maximum (adding is monotone, so nothing changes but the work), and
    positions that no window covers are never computed. `out`: height and width of the value.
    """

    weight: str
    bias: str | None
    stride: Pair
    padding: Pair
    dilation: Pair
    out: Pair
    pool: Pair | None
    first: bool

    def forward(self, run: Pass, x: Tensor) -> tuple[Tensor, Any]:
        weight = run.params[self.weight]
        rows, channels = weight.shape[:2]
        image = pad(x, self.padding)
        columns = self._columns(run, image, (weight.shape[-2], weight.shape[-1]))
        bias = run.params[self.bias] if self.bias else None
        late = self.pool is not None
        flat = product(run, weight.reshape(rows, channels, -1), columns, None if late else bias)
        if not late:
            y = flat.view(rows, channels, *self.out, x.shape[-1])
            return y, (columns, image.shape, None, None)
        top = window_max(self._windows(flat, x.shape[-1]), run.memory)
        saved = (columns, image.shape, flat, top)
        if bias is None:
            return top, saved
        y = run.memory.empty(top.shape, top)
        return torch.add(top, bias[:, :, None, None, None], out=y), saved

    def _columns(self, run: Pass, image: Tensor, kernel: Pair) -> Tensor:
        """Every position's patch: `[rows, channels * kh * kw, positions * batch]`."""
        pool = self.pool or (1, 1)
        if self.first:
            view = patches(image, kernel, self.stride, self.dilation, self.out, pool)
        else:
            # Image order: nothing else lets gradients be sent back to the image in long runs.
            order = (self.out[0] * pool[0], self.out[1] * pool[1])
            view = patches(image, kernel, self.stride, self.dilation, order, (1, 1))
        columns = run.memory.empty(view.shape, view).copy_(view)
        return columns.view(image.shape[0], math.prod(view.shape[1:4]), -1)

    def _windows(self, flat: Tensor, batch: int) -> Tensor:
        rows, channels = flat.shape[:2]
        pool = self.pool or (1, 1)
        if self.first:
            return flat.view(rows, channels, *pool, *self.out, batch)
        order = (self.out[0] * pool[0], self.out[1] * pool[1])
        return windows(flat.view(rows, channels, *order, batch), pool)

    def backward(self, run: Pass, saved: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        columns, shape, flat, top = saved
        weight = run.params[self.weight]
        rows, channels = weight.shape[:2]
        batch = dy.shape[-1]
        if self.bias:
            if run.grads is not None:
                torch.sum(joined(dy), -1, out=run.grads[self.bias])
            if run.squares is not None:
                run.squares += dy.sum((2, 3)).square().sum(1)
        if self.pool:
            out = flat if run.squares is None else run.memory.empty(flat.shape, flat)
            window_max_backward(
                self._windows(flat, batch),
                top,
                dy.contiguous(),
                self._windows(out, batch),
                run.memory,
            )
            dy = out
        dy = dy.reshape(rows, channels, -1)
        if run.grads is not None:
            write_product(run, self.weight, dy, columns)
        if run.squares is not None:
            run.squares += sample_squares(
                dy.view(rows, channels, -1, batch), columns.view(*columns.shape[:2], -1, batch)
            )
        if not wanted:
            return None
        pool = self.pool or (1, 1)
        dy = dy.view(rows, channels, self.out[0] * pool[0], self.out[1] * pool[1], batch)
        inner = (shape[1], shape[2], shape[3])
        dx = scatter_patches(weight, dy, inner, self.stride, self.dilation, run.memory)
        down, right = self.padding
        return dx[:, :, down : shape[2] - down, right : shape[3] - right]
