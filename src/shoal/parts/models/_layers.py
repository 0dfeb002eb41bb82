"""Stacked layers that are no products: pooling, activations, normalisation, embedding, shape.

Layouts and the contract of a layer are in `_products`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.parts.models._products import Pass, joined
from shoal.parts.models._windows import (
    Pair,
    where_positive,
    window_max,
    window_max_backward,
    windows,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class MaxPool:
    """The maximum of each window; windows do not overlap."""

    window: Pair

    def forward(self, run: Pass, x: Tensor) -> tuple[Tensor, Any]:
        x = x.contiguous()
        top = window_max(windows(x, self.window), run.memory)
        return top, (x, top)

    def backward(self, run: Pass, saved: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        if not wanted:
            return None
        x, top = saved
        dx = torch.zeros_like(x)
        window_max_backward(
            windows(x, self.window), top, dy.contiguous(), windows(dx, self.window), run.memory
        )
        return dx


@dataclass(frozen=True)
class AvgPool:
    """The mean of each window; windows do not overlap."""

    window: Pair

    def forward(self, run: Pass, x: Tensor) -> tuple[Tensor, Any]:
        return windows(x.contiguous(), self.window).mean((2, 3)), x.shape

    def backward(self, run: Pass, saved: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        if not wanted:
            return None
        dx = dy.new_zeros((dy.shape[0], *saved[1:]))
        share = dy / (self.window[0] * self.window[1])
        windows(dx, self.window).copy_(share[:, :, None, None])
        return dx


@dataclass(frozen=True)
class Activation:
    """An elementwise function. `setting` is the slope of `leaky_relu`, the kind of `gelu`."""

    kind: str
    setting: float | str = 0.0
    in_place: bool = False
    """the layer before does not need its output again"""

    def forward(self, run: Pass, x: Tensor) -> tuple[Tensor, Any]:
        if self.kind == "gelu":
            return aten.gelu(x, approximate=str(self.setting)), x
        if self.kind == "silu":
            return aten.silu(x), x
        if self.kind == "leaky_relu":
            return aten.leaky_relu(x, float(self.setting)), x
        y = x if self.in_place else run.memory.empty(x.shape, x)
        if self.kind == "relu":
            torch.clamp_min(x, 0, out=y)
        elif self.kind == "tanh":
            torch.tanh(x, out=y)
        else:
            torch.sigmoid(x, out=y)
        return y, y

    def backward(self, run: Pass, saved: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        if not wanted:
            return None
        match self.kind:
            case "relu":
                return where_positive(dy, saved, 0, grad_input=dy)
            case "tanh":
                return aten.tanh_backward(dy, saved)
            case "sigmoid":
                return aten.sigmoid_backward(dy, saved)
            case "gelu":
                return aten.gelu_backward(dy, saved, approximate=str(self.setting))
            case "silu":
                return aten.silu_backward(dy, saved)
            case _:
                return aten.leaky_relu_backward(dy, saved, float(self.setting), False)


@dataclass(frozen=True)
class Norm:
    """Layer or group normalisation: `groups` of features are centred and scaled per sample.

    The features of one sample are `entries * span`, one weight and bias for each entry; with
    `sequence` every position is normalised by itself.
    """

    weight: str | None
    bias: str | None
    groups: int
    entries: int
    eps: float
    sequence: bool

    def forward(self, run: Pass, x: Tensor) -> tuple[Tensor, Any]:
        rows, batch = x.shape[0], x.shape[-1]
        width = batch * x.shape[2] if self.sequence else batch
        grouped = x.reshape(rows, self.groups, -1, width)
        variance, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
        inverse = torch.rsqrt(variance + self.eps)
        unit = (grouped - mean) * inverse
        y = unit.view(rows, self.entries, -1, width)
        if self.weight:
            y = y * run.params[self.weight].reshape(-1, self.entries, 1, 1)
        if self.bias:
            y = y + run.params[self.bias].reshape(-1, self.entries, 1, 1)
        return y.view(y.shape[0], *x.shape[1:]), (unit, inverse, x.shape)

    def backward(self, run: Pass, saved: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        unit, inverse, shape = saved
        rows, width = dy.shape[0], unit.shape[-1]
        g = dy.reshape(rows, self.entries, -1, width)
        for name, value in (
            (self.weight, g * unit.view(unit.shape[0], self.entries, -1, width)),
            (self.bias, g),
        ):
            if not name:
                continue
            if run.grads is not None:
                run.grads[name].copy_(value.sum((2, 3)).view(run.grads[name].shape))
            if run.squares is not None:
                # A sequence's positions belong to one sample: they add up before the square.
                each = value.reshape(rows, self.entries, -1, dy.shape[-1])
                run.squares += each.sum(2).square().sum(1)
        if not wanted:
            return None
        if self.weight:
            g = g * run.params[self.weight].reshape(rows, self.entries, 1, 1)
        g = g.reshape(rows, self.groups, -1, width)
        tilt = (g * unit).mean(2, keepdim=True)
        dx = (g - g.mean(2, keepdim=True) - unit * tilt) * inverse
        return dx.view(rows, *shape[1:])


@dataclass(frozen=True)
class Embedding:
    """Rows of a table by position: whole numbers `[rows, positions, batch]` to a sequence."""

    weight: str

    def forward(self, run: Pass, x: Tensor) -> tuple[Tensor, Any]:
        table = run.params[self.weight]
        rows, entries, features = table.shape
        flat = x.reshape(x.shape[0], -1).expand(rows, -1)
        base = torch.arange(rows, device=x.device).unsqueeze(-1) * entries
        index = (flat + base).reshape(-1)
        y = table.reshape(rows * entries, features).index_select(0, index)
        y = y.view(rows, -1, features).transpose(1, 2).contiguous()
        return y.view(rows, features, *x.shape[1:]), (index, x)

    def backward(self, run: Pass, saved: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        index, x = saved
        rows, entries, features = run.params[self.weight].shape
        flat = joined(dy).transpose(1, 2).reshape(-1, features)
        if run.grads is not None:
            table = flat.new_zeros((rows * entries, features)).index_add_(0, index, flat)
            run.grads[self.weight].copy_(table.view(rows, entries, features))
        if run.squares is not None:
            # Positions of one sample that name the same entry add up before the square.
            each = dy.permute(0, 3, 2, 1)
            same = x.permute(0, 2, 1).unsqueeze(-1) == x.permute(0, 2, 1).unsqueeze(-2)
            run.squares += (torch.matmul(each, each.transpose(-1, -2)) * same).sum((2, 3))
        return None


@dataclass(frozen=True)
class Flatten:
    """All features of a sample as one vector, in the order in which the module has them."""

    sequence: bool

    def forward(self, run: Pass, x: Tensor) -> tuple[Tensor, Any]:
        shape = x.shape
        if self.sequence:
            x = x.transpose(1, 2)
        return x.reshape(shape[0], -1, shape[-1]), shape

    def backward(self, run: Pass, saved: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        if not wanted:
            return None
        if not self.sequence:
            return dy.view(dy.shape[0], *saved[1:])
        _, features, positions, batch = saved
        return dy.view(dy.shape[0], positions, features, batch).transpose(1, 2)
