"""Layers over stacked parameters, forward and backward by hand.

Values lie `[rows, features, batch]`, `[rows, channels, height, width, batch]` (images) or
`[rows, features, positions, batch]` (sequences): the batch is innermost, so that every layer is a
product of a weight with a long matrix, and rows (peers) are a batch of such products. `rows` of an
input may be 1 when every row sees the same samples.

`forward` gives the value and what `backward` needs; `backward` writes the parameters' gradients
(unless `grads` is None), adds each sample's squared gradient norm to `squares` [rows, batch]
(unless it is None) and returns the input's gradient when `wanted`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shoal.parts.models._windows import (
    Pair,
    pad,
    patches,
    scatter_patches,
    window_max_backward,
    windows,
)

Views = Mapping[str, Tensor]


class Layer(Protocol):
    """One step of a stacked model."""

    def forward(self, params: Views, x: Tensor) -> tuple[Tensor, Any]: ...

    def backward(
        self,
        params: Views,
        saved: Any,
        dy: Tensor,
        grads: Views | None,
        squares: Tensor | None,
        wanted: bool,
    ) -> Tensor | None: ...


def product(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """`weight [rows, out, in] @ x [rows or 1, in, n]`, plus `bias [rows, out]`."""
    rows, out = weight.shape[:2]
    if x.shape[0] != rows:
        y = torch.mm(weight.reshape(rows * out, -1), x[0]).view(rows, out, x.shape[-1])
        return y if bias is None else y.add_(bias.unsqueeze(-1))
    if bias is None:
        return torch.bmm(weight, x)
    return torch.baddbmm(bias.unsqueeze(-1), weight, x)


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


def to_vector(dy: Tensor) -> Tensor:
    """All axes but rows and features joined: `[rows, features, n]`."""
    return dy.reshape(dy.shape[0], dy.shape[1], -1)


@dataclass(frozen=True)
class Linear:
    """`W x + b` on the feature axis of vectors or sequences."""

    weight: str
    bias: str | None

    def forward(self, params: Views, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = params[self.weight]
        y = product(weight, to_vector(x), params[self.bias] if self.bias else None)
        return y.view(weight.shape[0], weight.shape[1], *x.shape[2:]), x

    def backward(
        self,
        params: Views,
        saved: Tensor,
        dy: Tensor,
        grads: Views | None,
        squares: Tensor | None,
        wanted: bool,
    ) -> Tensor | None:
        flat, x = to_vector(dy), to_vector(saved)
        if grads is not None:
            grads[self.weight].copy_(torch.bmm(flat, x.transpose(1, 2)))
            if self.bias:
                torch.sum(flat, -1, out=grads[self.bias])
        if squares is not None:
            batch = dy.shape[-1]
            left = dy.reshape(*dy.shape[:2], -1, batch)
            squares += sample_squares(left, saved.reshape(*saved.shape[:2], -1, batch))
            if self.bias:
                squares += left.sum(2).square().sum(1)
        if not wanted:
            return None
        return torch.bmm(params[self.weight].transpose(1, 2), flat).view(saved.shape)


@dataclass(frozen=True)
class Convolution:
    """A two-dimensional convolution, with the maximum over `pool` windows when there is one.

    The bias is added after the maximum (adding is monotone, so nothing changes but the work), and
    positions that no window covers are never computed.
    """

    weight: str
    bias: str | None
    stride: Pair
    padding: Pair
    dilation: Pair
    out: Pair
    pool: Pair | None
    first: bool

    def forward(self, params: Views, x: Tensor) -> tuple[Tensor, Any]:
        weight = params[self.weight]
        rows, channels = weight.shape[:2]
        kernel: Pair = (weight.shape[-2], weight.shape[-1])
        image = pad(x, self.padding)
        pool = self.pool or (1, 1)
        batch = x.shape[-1]
        # Positions are listed window by window only where nobody has to send gradients back to
        # the image: scattering them is cheaper in image order.
        if self.first:
            view = patches(image, kernel, self.stride, self.dilation, self.out, pool)
        else:
            order = (self.out[0] * pool[0], self.out[1] * pool[1])
            view = patches(image, kernel, self.stride, self.dilation, order, (1, 1))
        columns = view.reshape(x.shape[0], math.prod(view.shape[1:4]), -1)
        late = self.pool is not None
        bias = params[self.bias] if self.bias else None
        flat = product(weight.reshape(rows, channels, -1), columns, None if late else bias)
        if not late:
            return flat.view(rows, channels, *self.out, batch), (columns, image.shape, None, None)
        y = self._windows(flat, batch)
        top = y.amax((2, 3))
        saved = (columns, image.shape, flat, top)
        return (top if bias is None else top + bias[:, :, None, None, None]), saved

    def _windows(self, flat: Tensor, batch: int) -> Tensor:
        rows, channels = flat.shape[:2]
        pool = self.pool or (1, 1)
        if self.first:
            return flat.view(rows, channels, *pool, *self.out, batch)
        return windows(
            flat.view(rows, channels, self.out[0] * pool[0], self.out[1] * pool[1], batch), pool
        )

    def backward(
        self,
        params: Views,
        saved: Any,
        dy: Tensor,
        grads: Views | None,
        squares: Tensor | None,
        wanted: bool,
    ) -> Tensor | None:
        columns, shape, flat, top = saved
        weight = params[self.weight]
        rows, channels = weight.shape[:2]
        batch = dy.shape[-1]
        if self.bias:
            if grads is not None:
                torch.sum(to_vector(dy), -1, out=grads[self.bias])
            if squares is not None:
                squares += dy.sum((2, 3)).square().sum(1)
        if self.pool:
            out = torch.empty_like(flat) if squares is not None else flat
            window_max_backward(
                self._windows(flat, batch), top, dy.contiguous(), self._windows(out, batch)
            )
            dy = out
        dy = dy.reshape(rows, channels, -1)
        if grads is not None:
            product_ = torch.bmm(dy, columns.transpose(1, 2))
            grads[self.weight].copy_(product_.view(weight.shape))
        if squares is not None:
            squares += sample_squares(
                dy.view(rows, channels, -1, batch), columns.view(*columns.shape[:2], -1, batch)
            )
        if not wanted:
            return None
        pool = self.pool or (1, 1)
        dy = dy.view(rows, channels, self.out[0] * pool[0], self.out[1] * pool[1], batch)
        dx = scatter_patches(weight, dy, tuple(shape[1:4]), self.stride, self.dilation)
        down, right = self.padding
        return dx[:, :, down : shape[2] - down, right : shape[3] - right]
