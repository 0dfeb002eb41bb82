"""A stack of layers over flat parameters: outputs, gradients, clipped per-sample gradients."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.parts.models._program import Layer, Pass, Program, Value
from shoal.tensor.flat import FlatSpec

add_each = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]

OutputGradient = Callable[[Tensor, slice], Tensor]
"""(output [rows, batch, *], which rows) -> its gradient of the same shape."""

CHUNK_BYTES = 6 << 20
"""Rows are worked on in groups whose values fit into a processor's cache; a constant."""

KEPT_PROGRAMS = 4
"""Programs, one for each number of rows and samples, that a thread keeps for one model."""


@dataclass(frozen=True, eq=False)
class Stacked:
    """Layers for samples of one shape. `numbers` is how many values one sample leaves behind."""

    spec: FlatSpec
    layers: tuple[Layer, ...]
    numbers: int
    sequence_out: bool
    _programs: threading.local = field(default_factory=threading.local, repr=False)

    def __reduce__(self) -> tuple[object, ...]:
        # Bound programs are buffers of one thread; another process makes its own.
        return Stacked, (self.spec, self.layers, self.numbers, self.sequence_out)

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        """params [rows, dim], x [rows or 1, batch, *] -> output [rows, batch, *]."""
        bound = self._bound(params, x, params.shape[0], training=False)
        bound.enter(x)
        bound.run_forward(Pass(self._views(params)))
        return bound.output.clone(memory_format=torch.contiguous_format)

    def gradient(self, params: Tensor, x: Tensor, output_gradient: OutputGradient) -> Tensor:
        """Gradients [rows, dim] of samples x [rows, batch, *]."""
        result = torch.empty_like(params, memory_format=torch.contiguous_format)
        self._backward(params, x, output_gradient, result, None)
        return result

    def descended(
        self, params: Tensor, x: Tensor, output_gradient: OutputGradient, rate: float, donate: bool
    ) -> Tensor:
        """params - rate * gradient: [rows, dim], in the place of `params` when it is donated.

        A gradient of its own would be written to main memory and read again.
        """
        result = (
            params if donate else torch.empty_like(params, memory_format=torch.contiguous_format)
        )
        self._backward(params, x, output_gradient, result, rate)
        return result

    def walked(
        self, params: Tensor, x: Tensor, output_gradient: Callable[[Tensor, int, slice], Tensor],
        rate: float, drift: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """As many steps as x [steps, rows, batch, *] has, each along gradient plus drift.

        Some rows take all their steps before the next ones take their first, and on the way every
        parameter is a tensor of its own: both keep what is worked on in the cache.
        """
        result = torch.empty_like(params, memory_format=torch.contiguous_format)
        for rows in self._chunks(params, x[0]):
            bound = self._bound(params, x[0], rows.stop - rows.start, training=True)
            own = {name: view.clone() for name, view in self._views(params[rows]).items()}
            run = Pass(own, own, rate=rate, lying_close=True)
            mine = list(own.values())
            apart = None if drift is None else list(self._views(drift[rows]).values())
            for step in range(x.shape[0]):
                bound.enter(x[step, rows])
                bound.run_forward(run)
                bound.start_backward(output_gradient(bound.output, step, rows))
                bound.run_backward(run)
                if apart is not None:
                    add_each(mine, apart, alpha=-rate)
            for name, view in self._views(result[rows]).items():
                view.copy_(own[name])
        return result

    def _backward(
        self, params: Tensor, x: Tensor, output_gradient: OutputGradient, result: Tensor,
        rate: float | None,
    ) -> None:  # fmt: skip
        for rows in self._chunks(params, x):
            bound = self._bound(params, x, rows.stop - rows.start, training=True)
            bound.enter(x[rows])
            run = Pass(self._views(params[rows]), self._views(result[rows]), rate=rate)
            bound.run_forward(run)
            bound.start_backward(output_gradient(bound.output, rows))
            bound.run_backward(run)

    def clipped(
        self, params: Tensor, x: Tensor, output_gradient: OutputGradient, clip: float
    ) -> Tensor:
        """Sums [rows, dim] of per-sample gradients, each scaled to norm at most `clip`.

        Two passes backward, the first of which only measures norms, so that no per-sample
        gradient is ever stored (Goodfellow 2015; Lee and Kifer 2021, "ghost clipping").
        A sample whose norm is not finite adds nothing.
        """
        result = torch.empty_like(params, memory_format=torch.contiguous_format)
        for rows in self._chunks(params, x):
            count = rows.stop - rows.start
            bound = self._bound(params, x, count, training=True)
            bound.enter(x[rows])
            views = self._views(params[rows])
            bound.run_forward(Pass(views))
            dy = output_gradient(bound.output, rows)
            squares = params.new_zeros((count, bound.program.batch))
            bound.start_backward(dy)
            bound.run_backward(Pass(views, None, squares))
            squares = squares[:, : x.shape[1]]
            scaled = dy * _beside(clip / squares.sqrt().clamp_min(clip), dy)
            sound = squares.isfinite()
            # A look costs a wait on a device, but less than a pass for what hardly ever happens.
            if not bool(sound.all()):
                # 0 times what overflowed is NaN: another sample takes its place, and adds nothing.
                other = x[rows].take_along_dim(_beside(sound.int().argmax(-1, True), x), 1)
                bound.enter(torch.where(_beside(sound, x), x[rows], other))
                bound.run_forward(Pass(views))
                scaled = torch.where(_beside(sound, dy), scaled, 0.0)
            bound.start_backward(scaled)
            bound.run_backward(Pass(views, self._views(result[rows])))
            result[rows].masked_fill_(~sound.any(-1, keepdim=True), 0.0)
        return result

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        # One split costs half of what a slice for each parameter does.
        parts = flat.split_with_sizes(self.spec.sizes, -1)
        rows = flat.shape[0]
        return {
            name: part.view(rows, *shape)
            for name, part, shape in zip(self.spec.names, parts, self.spec.shapes, strict=True)
        }

    def _chunks(self, params: Tensor, x: Tensor) -> list[slice]:
        per_row = (self.numbers * padded(x.shape[1]) + 2 * self.spec.dim) * params.element_size()
        size, rows = max(1, CHUNK_BYTES // per_row), params.shape[0]
        # Equal chunks share one program.
        size = -(-rows // -(-rows // size)) if rows else 1
        return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]

    def _bound(self, params: Tensor, x: Tensor, rows: int, training: bool) -> _Bound:
        programs: OrderedDict[tuple[object, ...], _Bound] | None
        programs = getattr(self._programs, "kept", None)
        if programs is None:
            programs = self._programs.kept = OrderedDict()
        shared = x.shape[0] == 1 and rows > 1
        key = (rows, x.shape[1], shared, params.dtype, params.device, training)
        bound = programs.get(key)
        if bound is None:
            bound = programs[key] = _Bound(self, params, x, rows, shared, training)
            while len(programs) > KEPT_PROGRAMS:
                programs.popitem(last=False)
        programs.move_to_end(key)
        return bound


class _Bound:
    """The layers bound to a number of rows and samples."""

    def __init__(
        self, model: Stacked, like: Tensor, x: Tensor, rows: int, shared: bool, training: bool
    ) -> None:
        batch, features = x.shape[1], tuple(x.shape[2:])
        self.program = program = Program(rows, padded(batch), like, training)
        dtype = like.dtype if x.is_floating_point() else x.dtype
        first = program.empty((1 if shared else rows, *features, program.batch), dtype).zero_()
        self.input = first.view(first.shape[0], math.prod(features), -1)[..., :batch]
        value = Value(first)
        for layer in model.layers:
            value = layer.bind(program, value)
        self.output = _natural(value.data, batch, model.sequence_out)
        if training and value.grad is not None:
            value.grad.zero_()
            self.start = _natural(value.grad, batch, model.sequence_out)

    def enter(self, x: Tensor) -> None:
        """Samples [rows, batch, *]."""
        self.input.copy_(x.reshape(x.shape[0], x.shape[1], -1).transpose(1, 2))

    def start_backward(self, dy: Tensor) -> None:
        """The output's gradient [rows, batch, *]."""
        self.start.copy_(dy)

    def run_forward(self, run: Pass) -> None:
        for action in self.program.forward:
            action(run)

    def run_backward(self, run: Pass) -> None:
        for action in self.program.backward:
            action(run)


def _natural(value: Tensor, batch: int, sequence: bool) -> Tensor:
    """`[rows, batch, *]` in the module's own order of features."""
    value = value[..., :batch].movedim(-1, 1)
    return value.transpose(2, 3) if sequence else value


def _beside(each: Tensor, values: Tensor) -> Tensor:
    """Numbers of samples [rows, batch], shaped to broadcast over values [rows, batch, *]."""
    return each.view(*each.shape, *(1,) * (values.dim() - 2))


def padded(batch: int) -> int:
    # Matrix products over 16 or 24 columns are up to 1.6 times faster than over 15 or 23.
    return batch if batch < 5 else -(-batch // 8) * 8
