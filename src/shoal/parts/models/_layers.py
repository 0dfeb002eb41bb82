"""Stacked layers that are no products: pooling, activations, normalisation, embedding, shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.parts.models._program import Pass, Program, Value
from shoal.parts.models._windows import Pair, channels_last

aten = torch.ops.aten

# Keeps a gradient where its second argument is above zero; far faster than a boolean mask.
where_positive = aten.threshold_backward.grad_input


@dataclass(frozen=True)
class MaxPool:
    """The maximum of each window, with torch's padding, stride and order among equals."""

    window: Pair
    stride: Pair
    padding: Pair
    out: Pair

    def bind(self, program: Program, x: Value) -> Value:
        rows, channels = x.data.shape[:2]
        value = program.value((rows, channels, *self.out, program.batch))
        place = channels_last(program.empty(value.data.shape, torch.int64))
        inside, outside = channels_last(x.data), channels_last(value.data)
        settings = (self.window, self.stride, self.padding)

        def forward(run: Pass) -> None:
            aten.max_pool2d_with_indices.out(inside, *settings, out=outside, indices=place)

        if value.grad is None or x.grad is None:
            program.then(forward)
            return value
        dy, dx = channels_last(value.grad), channels_last(x.grad)

        def backward(run: Pass) -> None:
            aten.max_pool2d_with_indices_backward.grad_input(
                dy, inside, *settings, (1, 1), False, place, grad_input=dx
            )

        program.then(forward, backward)
        return value


@dataclass(frozen=True)
class AvgPool:
    """The mean of each window, padding counted or not as torch does."""

    window: Pair
    stride: Pair
    padding: Pair
    out: Pair
    count_padding: bool

    def bind(self, program: Program, x: Value) -> Value:
        value = program.value((*x.data.shape[:2], *self.out, program.batch))
        inside, outside = channels_last(x.data), channels_last(value.data)
        settings = (self.window, self.stride, self.padding, False, self.count_padding, None)

        def forward(run: Pass) -> None:
            aten.avg_pool2d.out(inside, *settings, out=outside)

        if value.grad is None or x.grad is None:
            program.then(forward)
            return value
        dy, dx = channels_last(value.grad), channels_last(x.grad)

        def backward(run: Pass) -> None:
            aten.avg_pool2d_backward.grad_input(dy, inside, *settings, grad_input=dx)

        program.then(forward, backward)
        return value


@dataclass(frozen=True)
class Activation:
    """An elementwise function. `setting` is the slope of `leaky_relu`, the kind of `gelu`.

    Where the function's own value gives its slope, value and gradient overwrite the input's; then
    no layer that needs its output again may come before (`in_place`).
    """

    kind: str
    setting: float | str = 0.0
    in_place: bool = False

    def bind(self, program: Program, x: Value) -> Value:
        value = x if self.in_place else program.value(x.data.shape)
        data, inside = value.data, x.data

        def forward(run: Pass) -> None:
            self._forward(inside, data)

        if value.grad is None or x.grad is None:
            program.then(forward)
            return value
        dy, dx = value.grad, x.grad

        def backward(run: Pass) -> None:
            self._backward(dy, inside, data, dx)

        program.then(forward, backward)
        return value

    def _forward(self, x: Tensor, out: Tensor) -> None:
        match self.kind:
            case "relu":
                torch.clamp_min(x, 0, out=out)
            case "tanh":
                torch.tanh(x, out=out)
            case "sigmoid":
                torch.sigmoid(x, out=out)
            case "gelu":
                aten.gelu.out(x, approximate=str(self.setting), out=out)
            case "silu":
                aten.silu.out(x, out=out)
            case _:
                aten.leaky_relu.out(x, float(self.setting), out=out)

    def _backward(self, dy: Tensor, x: Tensor, y: Tensor, dx: Tensor) -> None:
        match self.kind:
            case "relu":
                where_positive(dy, y, 0, grad_input=dx)
            case "tanh":
                aten.tanh_backward.grad_input(dy, y, grad_input=dx)
            case "sigmoid":
                aten.sigmoid_backward.grad_input(dy, y, grad_input=dx)
            case "gelu":
                kind = str(self.setting)
                aten.gelu_backward.grad_input(dy, x, approximate=kind, grad_input=dx)
            case "silu":
                aten.silu_backward.grad_input(dy, x, grad_input=dx)
            case _:
                slope = float(self.setting)
                aten.leaky_relu_backward.grad_input(dy, x, slope, False, grad_input=dx)


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

    def bind(self, program: Program, x: Value) -> Value:
        rows = program.rows if self.weight or self.bias else x.data.shape[0]
        value = program.value((rows, *x.data.shape[1:]))
        width = program.batch * (x.data.shape[2] if self.sequence else 1)
        inside = x.data.view(x.data.shape[0], self.groups, -1, width)
        outside = value.data.view(rows, self.entries, -1, width)
        kept: dict[str, Tensor] = {}

        def forward(run: Pass) -> None:
            variance, mean = torch.var_mean(inside, 2, correction=0, keepdim=True)
            kept["inverse"] = torch.rsqrt(variance + self.eps)
            kept["unit"] = unit = (inside - mean) * kept["inverse"]
            y = unit.view(x.data.shape[0], self.entries, -1, width)
            if self.weight:
                y = y * run.params[self.weight].reshape(rows, self.entries, 1, 1)
            if self.bias:
                y = y + run.params[self.bias].reshape(rows, self.entries, 1, 1)
            outside.copy_(y)

        if value.grad is None:
            program.then(forward)
            return value
        dy, dx = value.grad, x.grad

        def backward(run: Pass) -> None:
            self._backward(run, dy, dx, kept["unit"], kept["inverse"])

        program.then(forward, backward)
        return value

    def _backward(
        self, run: Pass, dy: Tensor, dx: Tensor | None, unit: Tensor, inverse: Tensor
    ) -> None:
        rows, width = dy.shape[0], unit.shape[-1]
        g = dy.view(rows, self.entries, -1, width)
        scaled = g * unit.view(rows, self.entries, -1, width)
        if dx is not None:
            h = g
            if self.weight:
                h = g * run.params[self.weight].reshape(rows, self.entries, 1, 1)
            h = h.reshape(rows, self.groups, -1, width)
            tilt = (h * unit).mean(2, keepdim=True)
            centred = (h - h.mean(2, keepdim=True) - unit * tilt) * inverse
            dx.copy_(centred.view(dx.shape))
        for name, value in ((self.weight, scaled), (self.bias, g)):
            if not name:
                continue
            if run.results is not None:
                run.give(name, value.sum((2, 3)))
            if run.squares is not None:
                # A sequence's positions belong to one sample: they add up before the square.
                each = value.reshape(rows, self.entries, -1, dy.shape[-1])
                run.squares += each.sum(2).square().sum(1)


@dataclass(frozen=True)
class Embedding:
    """Rows of a table by position: whole numbers `[rows, positions, batch]` to a sequence."""

    weight: str
    features: int

    def bind(self, program: Program, x: Value) -> Value:
        rows = program.rows
        value = program.value((rows, self.features, *x.data.shape[1:]))
        base = torch.arange(rows, device=x.data.device).unsqueeze(-1)
        tokens = x.data.view(x.data.shape[0], -1)
        outside = value.data.view(rows, self.features, -1).transpose(1, 2)
        dy = value.grad

        def forward(run: Pass) -> None:
            table = run.params[self.weight]
            index = (tokens + base * table.shape[1]).view(-1)
            flat = table.reshape(-1, self.features)
            outside.copy_(flat.index_select(0, index).view(outside.shape))

        def backward(run: Pass) -> None:
            assert dy is not None
            entries = run.params[self.weight].shape[1]
            if run.results is not None:
                index = (tokens + base * entries).view(-1)
                flat = dy.view(rows, self.features, -1).transpose(1, 2)
                table = flat.new_zeros((rows * entries, self.features))
                table.index_add_(0, index, flat.reshape(-1, self.features))
                run.give(self.weight, table.view(rows, entries, self.features))
            if run.squares is not None:
                self._measure(run.squares, x.data, dy)

        program.then(forward, backward)
        return value

    def _measure(self, squares: Tensor, x: Tensor, dy: Tensor) -> None:
        # Positions of one sample that name the same entry add up before the square.
        each = dy.permute(0, 3, 2, 1)
        names = x.permute(0, 2, 1)
        same = names.unsqueeze(-1) == names.unsqueeze(-2)
        squares += (torch.matmul(each, each.transpose(-1, -2)) * same).sum((2, 3))


@dataclass(frozen=True)
class Flatten:
    """All features of a sample as one vector, in the order in which the module has them."""

    sequence: bool

    def bind(self, program: Program, x: Value) -> Value:
        shape = (x.data.shape[0], -1, program.batch)
        if not self.sequence:
            grad = None if x.grad is None else x.grad.view(shape)
            return Value(x.data.view(shape), grad)
        rows, features, positions, batch = x.data.shape
        value = program.value((rows, positions * features, batch))

        def turned(tensor: Any) -> Tensor:
            return tensor.view(rows, positions, features, batch).transpose(1, 2)

        outside = turned(value.data)

        def forward(run: Pass) -> None:
            outside.copy_(x.data)

        if value.grad is None or x.grad is None:
            program.then(forward)
            return value
        dy, dx = turned(value.grad), x.grad

        def backward(run: Pass) -> None:
            dx.copy_(dy)

        program.then(forward, backward)
        return value
