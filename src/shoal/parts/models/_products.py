"""Stacked layers that are matrix products: linear and convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.parts.models._program import TILE_BYTES, Action, Pass, Program, Value, joined
from shoal.parts.models._windows import Pair, channels_last, patches, taps

aten = torch.ops.aten


def product(weight: Tensor, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`weight [rows, out, in] @ x [rows or 1, in, n]`, plus `bias [rows, out]`."""
    rows = weight.shape[0]
    if x.shape[0] != rows:
        flat = out.view(rows * out.shape[1], -1)
        torch.mm(weight.reshape(flat.shape[0], -1), x[0], out=flat)
        if bias is not None:
            out.add_(bias.unsqueeze(-1))
    elif bias is None:
        torch.bmm(weight, x, out=out)
    else:
        torch.baddbmm(bias.unsqueeze(-1), weight, x, out=out)


def add_each(each: Tensor, dy: Tensor, x: Tensor) -> None:
    """Add to every sample's weight gradient `[rows * batch, out, in]`.

    dy: [rows, out, n, batch]; x: [rows, in, n, batch].
    """
    rows, out, _, batch = dy.shape
    left = dy.permute(0, 3, 1, 2).reshape(rows * batch, out, -1)
    right = x.permute(0, 3, 2, 1).reshape(rows * batch, -1, x.shape[1])
    each.baddbmm_(left, right)


def sample_squares(dy: Tensor, x: Tensor) -> Tensor:
    """Squared norms `[rows, batch]` of each sample's weight gradient `sum_n dy_n x_n'`."""
    rows, out, count, batch = dy.shape
    if count == 1:
        return dy.square().sum((1, 2)) * x.square().sum((1, 2))
    each = dy.new_zeros((rows * batch, out, x.shape[1]))
    add_each(each, dy, x)
    return each.square().sum((1, 2)).view(rows, batch)


@dataclass(frozen=True)
class Linear:
    """`W x + b` on the feature axis of vectors or sequences."""

    weight: str
    bias: str | None
    features: int

    def bind(self, program: Program, x: Value) -> Value:
        value = program.value((program.rows, self.features, *x.data.shape[2:]))
        inside, outside = joined(x.data), joined(value.data)

        def forward(run: Pass) -> None:
            bias = run.params[self.bias] if self.bias else None
            product(run.params[self.weight], inside, bias, outside)

        program.then(forward, self._backward(program, x, value) if value.grad is not None else None)
        return value

    def _backward(self, program: Program, x: Value, value: Value) -> Action:
        assert value.grad is not None
        dy, turned = joined(value.grad), joined(x.data).transpose(1, 2)
        dx = None if x.grad is None else joined(x.grad)
        shape = (program.rows, self.features, x.data.shape[1])
        # A product straight into rows that lie apart is far slower than a product and a copy.
        buffer = program.shared("weight", shape)

        def backward(run: Pass) -> None:
            if dx is not None:
                torch.bmm(run.params[self.weight].transpose(1, 2), dy, out=dx)
            if run.results is not None:
                if run.lying_close and run.rate is not None:
                    run.results[self.weight].baddbmm_(dy, turned, alpha=-run.rate)
                else:
                    run.give(self.weight, torch.bmm(dy, turned, out=buffer))
                if self.bias:
                    run.give(self.bias, dy.sum(-1))
            if run.squares is not None:
                self._measure(run.squares, x.data, value.grad)

        return backward

    def _measure(self, squares: Tensor, x: Tensor, dy: Tensor) -> None:
        split = (-1, squares.shape[-1])
        dy = dy.view(*dy.shape[:2], *split)
        squares += sample_squares(dy, x.view(*x.shape[:2], *split))
        if self.bias:
            squares += dy.sum(2).square().sum(1)


@dataclass(frozen=True)
class Convolution:
    """A two-dimensional convolution, with the maximum over `pool` windows when there is one.

    The bias is added after the maximum (adding is monotone, so nothing changes but the work), and
    positions that no window covers are never computed. Lines are worked on in groups whose
    patches stay in the cache; patches are made again on the way back, which costs less than
    reading them from main memory. `out`: channels, height and width of the value.
    """

    weight: str
    bias: str | None
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    out: tuple[int, int, int]
    pool: Pair | None

    def bind(self, program: Program, x: Value) -> Value:
        value = program.value((program.rows, *self.out, program.batch))
        image = self._padded(program, x)
        groups = [
            _Group(self, program, image, value, lines) for lines in self._groups(program, image)
        ]
        # Adding the bias to every group's part would be as much work in smaller pieces.
        whole = value.data

        def forward(run: Pass) -> None:
            weight = run.params[self.weight]
            matrix = weight.view(weight.shape[0], weight.shape[1], -1)
            for group in groups:
                group.forward(matrix)
            if self.bias:
                whole.add_(run.params[self.bias][:, :, None, None, None])

        program.then(forward, self._backward(program, image, value, groups))
        if x.grad is not None and image is not x:
            self._unpad(program, x, image)
        return value

    def _backward(
        self, program: Program, image: Value, value: Value, groups: list[_Group]
    ) -> Action | None:
        if value.grad is None:
            return None
        channels, (high, wide) = image.data.shape[1], self.kernel
        dy, dx = value.grad, image.grad
        matrix = program.empty((program.rows, self.out[0], channels * high * wide))
        turned = program.empty((program.rows, high, channels, wide, self.out[0]))

        def backward(run: Pass) -> None:
            weight = run.params[self.weight]
            if dx is not None:
                dx.zero_()
                turned.copy_(weight.permute(0, 3, 2, 4, 1))
            each = None
            if run.squares is not None:
                each = matrix.new_zeros((program.rows * program.batch, *matrix.shape[1:]))
            matrix.zero_()
            for group in groups:
                group.backward(matrix, turned, each)
            if run.results is not None:
                run.give(self.weight, matrix)
                if self.bias:
                    run.give(self.bias, joined(dy).sum(-1))
            if run.squares is not None and each is not None:
                run.squares += each.square().sum((1, 2)).view(run.squares.shape)
                if self.bias:
                    run.squares += dy.sum((2, 3)).square().sum(1)

        return backward

    def _padded(self, program: Program, x: Value) -> Value:
        down, right = self.padding
        if (down, right) == (0, 0):
            return x
        rows, channels, height, width, batch = x.data.shape
        shape = (rows, channels, height + 2 * down, width + 2 * right, batch)
        data = program.empty(shape).zero_()
        middle = data[:, :, down : down + height, right : right + width]

        def run(_: object) -> None:
            middle.copy_(x.data)

        program.then(run)
        return Value(data, None if x.grad is None else program.empty(shape))

    def _unpad(self, program: Program, x: Value, image: Value) -> None:
        assert x.grad is not None
        assert image.grad is not None
        down, right = self.padding
        height, width = x.grad.shape[2:4]
        target, middle = x.grad, image.grad[:, :, down : down + height, right : right + width]

        def after(run: Pass) -> None:
            target.copy_(middle)

        # It belongs behind this layer's own way back, which stands first in the list.
        program.backward.insert(1, after)

    def _groups(self, program: Program, image: Value) -> list[slice]:
        """Lines of the value, in groups whose patches and products are at most `TILE_BYTES`."""
        pool = self.pool or (1, 1)
        line = pool[0] * pool[1] * self.out[2] * program.batch * program.like.element_size()
        taken = image.data.shape[1] * math.prod(self.kernel) + self.out[0]
        size = max(1, TILE_BYTES // (program.rows * taken * line))
        # Groups of equal height are better than full ones and a rest.
        size = -(-self.out[1] // -(-self.out[1] // size))
        return [slice(i, min(i + size, self.out[1])) for i in range(0, self.out[1], size)]


class _Group:
    """Some lines of a convolution's value, from patches to maxima and back."""

    def __init__(
        self, layer: Convolution, program: Program, image: Value, value: Value, lines: slice
    ) -> None:
        pool = layer.pool or (1, 1)
        rows, batch, data = program.rows, program.batch, image.data
        self.window = layer.pool
        top = lines.start * pool[0] * layer.stride[0]
        size = ((lines.stop - lines.start) * pool[0], layer.out[2] * pool[1])
        shape = (layer.kernel, layer.stride, layer.dilation, size)
        self.view = patches(data[:, :, top:], *shape)
        self.columns = program.shared("columns", self.view.shape)
        taken = data.shape[1] * math.prod(layer.kernel)
        self.matrix = self.columns.view(data.shape[0], taken, -1)
        self.turned = self.matrix.transpose(1, 2)
        full = program.shared("full", (rows, layer.out[0], *size, batch))
        self.full, self.flat = channels_last(full), joined(full)
        self.positions = full.view(rows, layer.out[0], -1, batch)
        self.data = value.data[:, :, lines]
        part = program.shared("part", self.data.shape)
        self.part = part if layer.pool else full
        self.pooled = channels_last(part)
        place = program.empty(self.data.shape, torch.int64) if layer.pool else None
        self.place = None if place is None else channels_last(place)
        self.grad = None if value.grad is None else value.grad[:, :, lines]
        self.sent: list[tuple[Tensor, list[tuple[Tensor, Tensor]]]] = []
        if image.grad is not None:
            self._send(layer, program, taps(image.grad[:, :, top:], *shape), size)

    def _send(
        self, layer: Convolution, program: Program, meets: list[list[Tensor]], size: Pair
    ) -> None:
        """Prepare the image's gradient: one product for each row of the kernel.

        That keeps each product small enough to be still in the cache when it is added; the
        product with all rows would go through main memory.
        """
        channels, wide = meets[0][0].shape[1], layer.kernel[1]
        shape = (program.rows, channels, wide, *size, program.batch)
        sent = program.shared("sent", shape)
        flat = sent.view(program.rows, channels * wide, -1)
        for line in meets:
            self.sent.append((flat, [(meet, sent[:, :, j]) for j, meet in enumerate(line)]))

    def forward(self, weight: Tensor) -> None:
        self.columns.copy_(self.view)
        product(weight, self.matrix, None, self.flat)
        if self.place is not None:
            aten.max_pool2d_with_indices.out(
                self.full, self.window, out=self.pooled, indices=self.place
            )
        self.data.copy_(self.part)

    def backward(self, matrix: Tensor, turned: Tensor, each: Tensor | None) -> None:
        self.part.copy_(self.grad)
        if self.place is not None:
            # The values themselves are not looked at, only their shape: any tensor does.
            aten.max_pool2d_with_indices_backward.grad_input(
                self.pooled,
                self.full,
                self.window,
                self.window,
                (0, 0),
                (1, 1),
                False,
                self.place,
                grad_input=self.full,
            )
        self.columns.copy_(self.view)
        matrix.baddbmm_(self.flat, self.turned)
        if each is not None:
            batch = self.positions.shape[-1]
            columns = self.matrix.view(*self.matrix.shape[:2], -1, batch)
            add_each(each, self.positions, columns)
        for i, (flat, pairs) in enumerate(self.sent):
            torch.bmm(turned[:, i].view(*flat.shape[:2], -1), self.flat, out=flat)
            for meet, part in pairs:
                meet.add_(part)
