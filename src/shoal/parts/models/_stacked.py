"""A module made of known layers, compiled once into a model over stacked parameters.

`compile_module` gives None for anything it does not know; the task then falls back to the
transformations of `torch.func`, which know every module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from shoal.parts.models._products import Convolution, Layer, Linear, Pass
from shoal.parts.models._scratch import scratch
from shoal.parts.models._layers import (
    Activation,
    AvgPool,
    Embedding,
    Flatten,
    MaxPool,
    Norm,
)
from shoal.parts.models._windows import Pair
from shoal.tensor.flat import FlatSpec

OutputGradient = Callable[[Tensor, slice], Tensor]
"""(output [rows, batch, *], which rows) -> its gradient of the same shape."""

CHUNK_BYTES = 3 << 20
"""Rows are worked on in groups whose values fit into a processor's cache; a constant."""

_KNOWN = {
    nn.AvgPool2d,
    nn.Conv2d,
    nn.Dropout,
    nn.Embedding,
    nn.Flatten,
    nn.GELU,
    nn.GroupNorm,
    nn.Identity,
    nn.LayerNorm,
    nn.LeakyReLU,
    nn.Linear,
    nn.MaxPool2d,
    nn.ReLU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
}
_MONOTONE = ("relu", "tanh", "sigmoid", "leaky_relu")


@dataclass(frozen=True)
class Stacked:
    """Layers for samples of one shape. `numbers` is how many values one sample leaves behind."""

    spec: FlatSpec
    layers: tuple[Layer, ...]
    numbers: int
    sequence_out: bool

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        """params [rows, dim], x [rows or 1, batch, *] -> output [rows, batch, *]."""
        with scratch() as memory:
            run = Pass(self.spec.views(params), memory)
            value, _ = self._record(run, x)
            return self._leave(value, x.shape[1]).clone(memory_format=torch.contiguous_format)

    def gradient(self, params: Tensor, x: Tensor, output_gradient: OutputGradient) -> Tensor:
        """Gradients [rows, dim] of samples x [rows, batch, *]."""
        result = torch.empty_like(params, memory_format=torch.contiguous_format)
        for rows in self._chunks(params, x):
            with scratch() as memory:
                views, grads = self.spec.views(params[rows]), self.spec.views(result[rows])
                run = Pass(views, memory, grads)
                value, tape = self._record(run, x[rows])
                dy = output_gradient(self._leave(value, x.shape[1]), rows)
                self._backward(run, tape, self._back_in(dy, value))
        return result

    def clipped(
        self, params: Tensor, x: Tensor, output_gradient: OutputGradient, clip: float
    ) -> Tensor:
        """Sums [rows, dim] of per-sample gradients, each scaled to norm at most `clip`.

        Two passes backward, the first of which only measures norms, so that no per-sample
        gradient is ever stored (Goodfellow 2015; Lee and Kifer 2021, "ghost clipping").
        """
        result = torch.empty_like(params, memory_format=torch.contiguous_format)
        for rows in self._chunks(params, x):
            with scratch() as memory:
                views = self.spec.views(params[rows])
                value, tape = self._record(Pass(views, memory), x[rows])
                dy = self._back_in(output_gradient(self._leave(value, x.shape[1]), rows), value)
                squares = dy.new_zeros((dy.shape[0], dy.shape[-1]))
                self._backward(Pass(views, memory, None, squares), tape, dy.clone())
                factor = clip / squares.sqrt().clamp_min(clip)
                factor = factor.view(factor.shape[0], *(1,) * (dy.dim() - 2), -1)
                run = Pass(views, memory, self.spec.views(result[rows]))
                self._backward(run, tape, dy * factor)
        return result

    def _record(self, run: Pass, x: Tensor) -> tuple[Tensor, list[object]]:
        value, tape = self._enter(run, x), []
        for layer in self.layers:
            value, saved = layer.forward(run, value)
            tape.append(saved)
        return value, tape

    def _backward(self, run: Pass, tape: list[object], dy: Tensor) -> None:
        first = next(i for i, layer in enumerate(self.layers) if getattr(layer, "weight", None))
        gradient: Tensor | None = dy
        for i in range(len(self.layers) - 1, first - 1, -1):
            assert gradient is not None
            gradient = self.layers[i].backward(run, tape[i], gradient, i > first)

    def _chunks(self, params: Tensor, x: Tensor) -> list[slice]:
        per_row = (self.numbers * _padded(x.shape[1]) + 3 * self.spec.dim) * params.element_size()
        size = max(1, CHUNK_BYTES // per_row)
        return [slice(i, i + size) for i in range(0, params.shape[0], size)]

    def _enter(self, run: Pass, x: Tensor) -> Tensor:
        rows, batch = x.shape[:2]
        like = x if not x.is_floating_point() else next(iter(run.params.values()))
        value = run.memory.empty((rows, math.prod(x.shape[2:]), _padded(batch)), like)
        value[..., :batch].copy_(x.reshape(rows, batch, -1).transpose(1, 2))
        value[..., batch:].zero_()
        return value.view(rows, *x.shape[2:], -1)

    def _leave(self, value: Tensor, batch: int) -> Tensor:
        value = value[..., :batch].movedim(-1, 1)
        return value.transpose(2, 3) if self.sequence_out else value

    def _back_in(self, dy: Tensor, value: Tensor) -> Tensor:
        dy = (dy.transpose(2, 3) if self.sequence_out else dy).movedim(1, -1)
        missing = value.shape[-1] - dy.shape[-1]
        return functional.pad(dy, (0, missing)) if missing else dy.contiguous()


def _padded(batch: int) -> int:
    # Matrix products over 16 or 24 columns are up to 1.6 times faster than over 15 or 23.
    return batch if batch < 5 else -(-batch // 8) * 8


@dataclass(frozen=True)
class _Build:
    """A compilation in progress: what was made, and the shape of a sample so far."""

    layers: tuple[Layer, ...]
    shape: tuple[int, ...]
    sequence: bool = False
    numbers: int = 0
    """values that the layers leave behind for one sample"""

    def add(self, layer: Layer, shape: tuple[int, ...], **change: bool) -> _Build:
        if isinstance(layer, Activation) and self.layers:
            last = self.layers[-1]
            free = isinstance(last, Convolution) and (not last.pool or bool(last.bias))
            layer = replace(layer, in_place=free or isinstance(last, Linear))
        numbers = self.numbers + 2 * math.prod(shape)
        return replace(
            self, layers=(*self.layers, layer), shape=shape, numbers=numbers, **change
        )


def compile_module(
    module: nn.Module, spec: FlatSpec, shape: tuple[int, ...], whole: bool
) -> Stacked | None:
    """The stacked model for samples of this shape (`whole` numbers or not), or None."""
    leaves = _leaves(module, "")
    if not all(type(leaf) in _KNOWN and not _hooked(leaf) for _, leaf in leaves):
        return None
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if tuple(names) != spec.names:
        return None
    if whole and not (leaves and type(leaves[0][1]) is nn.Embedding):
        return None
    build: _Build | None = _Build((), shape, numbers=math.prod(shape))
    i = 0
    while i < len(leaves):
        if isinstance(leaves[i][1], nn.Conv2d):
            build, used = _convolution(build, leaves[i:])
        else:
            build, used = _simple(build, *leaves[i]), 1
        if build is None:
            return None
        i += used
    if not any(getattr(layer, "weight", None) for layer in build.layers):
        return None
    return Stacked(spec, build.layers, build.numbers, build.sequence)


def _leaves(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    if type(module) is not nn.Sequential or _hooked(module):
        return [(prefix, module)]
    return [
        leaf
        for name, child in module.named_children()
        for leaf in _leaves(child, f"{prefix}{name}.")
    ]


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _activation(module: nn.Module) -> Activation | None:
    kind = type(module)
    if kind is nn.GELU:
        return Activation("gelu", module.approximate)
    if kind is nn.LeakyReLU:
        return Activation("leaky_relu", module.negative_slope) if module.negative_slope > 0 else None
    names = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu"}
    return Activation(names[kind]) if kind in names else None


def _window(module: nn.Module) -> Pair | None:
    """The window of a pooling layer whose windows neither overlap nor reach outside."""
    if type(module) not in (nn.MaxPool2d, nn.AvgPool2d):
        return None
    window = _pair(module.kernel_size)
    plain = _pair(module.stride) == window and _pair(module.padding) == (0, 0)
    plain = plain and not module.ceil_mode
    if isinstance(module, nn.MaxPool2d):
        plain = plain and _pair(module.dilation) == (1, 1) and not module.return_indices
    else:
        plain = plain and module.divisor_override is None
    return window if plain else None


def _convolution(
    build: _Build, leaves: list[tuple[str, nn.Module]]
) -> tuple[_Build | None, int]:
    prefix, conv = leaves[0]
    assert isinstance(conv, nn.Conv2d)
    if (
        len(build.shape) != 3
        or build.sequence
        or conv.groups != 1
        or conv.padding_mode != "zeros"
        or isinstance(conv.padding, str)
        or build.shape[0] != conv.in_channels
    ):
        return None, 0
    kernel, stride = _pair(conv.kernel_size), _pair(conv.stride)
    padding, dilation = _pair(conv.padding), _pair(conv.dilation)
    size = tuple(
        (build.shape[1 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    if min(size) < 1:
        return None, 0
    # Taking the maximum before a monotone activation gives the same value with less work.
    steps = [_activation(module) for _, module in leaves[1:2]]
    activation = steps[0] if steps and steps[0] and steps[0].kind in _MONOTONE else None
    place = 2 if activation else 1
    pool = None
    if len(leaves) > place and isinstance(leaves[place][1], nn.MaxPool2d):
        pool = _window(leaves[place][1])
    out = (size[0] // pool[0], size[1] // pool[1]) if pool else (size[0], size[1])
    if min(out) < 1:
        return None, 0
    first = not any(getattr(layer, "weight", None) for layer in build.layers)
    layer = Convolution(
        f"{prefix}weight",
        f"{prefix}bias" if conv.bias is not None else None,
        stride,
        padding,
        dilation,
        out,
        pool,
        first,
    )
    taps = build.shape[0] * kernel[0] * kernel[1]
    build = build.add(layer, (conv.out_channels, *out))
    build = replace(build, numbers=build.numbers + (taps + conv.out_channels) * math.prod(size))
    if pool and activation:
        return build.add(activation, build.shape), 3
    return build, 2 if pool else 1


def _simple(build: _Build, prefix: str, module: nn.Module) -> _Build | None:
    shape, images = build.shape, len(build.shape) == 3 and not build.sequence
    match module:
        case nn.Identity():
            return build
        case nn.Dropout() if module.p == 0:
            return build
        case nn.Linear():
            if (len(shape) != 1 and not build.sequence) or shape[-1] != module.in_features:
                return None
            layer = Linear(f"{prefix}weight", f"{prefix}bias" if module.bias is not None else None)
            return build.add(layer, (*shape[:-1], module.out_features))
        case nn.Flatten() if (module.start_dim, module.end_dim) == (1, -1):
            return build.add(Flatten(build.sequence), (math.prod(shape),), sequence=False)
        case nn.Embedding():
            plain = module.padding_idx is None and module.max_norm is None
            plain = plain and not module.sparse and not module.scale_grad_by_freq
            if build.layers or len(shape) != 1 or not plain:
                return None
            layer = Embedding(f"{prefix}weight")
            return build.add(layer, (*shape, module.embedding_dim), sequence=True)
        case nn.MaxPool2d() | nn.AvgPool2d():
            window = _window(module) if images else None
            out = window and (shape[1] // window[0], shape[2] // window[1])
            if not window or not out or min(out) < 1:
                return None
            pool = MaxPool(window) if isinstance(module, nn.MaxPool2d) else AvgPool(window)
            return build.add(pool, (shape[0], *out))
        case nn.LayerNorm() | nn.GroupNorm():
            norm = _norm(build, prefix, module)
            return norm and build.add(norm, shape)
    activation = _activation(module)
    return activation and build.add(activation, shape)


def _norm(build: _Build, prefix: str, module: nn.LayerNorm | nn.GroupNorm) -> Norm | None:
    shape = build.shape
    named = dict(module.named_parameters())
    weight = f"{prefix}weight" if "weight" in named else None
    bias = f"{prefix}bias" if "bias" in named else None
    if isinstance(module, nn.GroupNorm):
        if build.sequence or shape[0] != module.num_channels:
            return None
        return Norm(weight, bias, module.num_groups, shape[0], module.eps, False)
    over = tuple(module.normalized_shape)
    if build.sequence:
        return Norm(weight, bias, 1, shape[-1], module.eps, True) if over == shape[-1:] else None
    return Norm(weight, bias, 1, math.prod(shape), module.eps, False) if over == shape else None
