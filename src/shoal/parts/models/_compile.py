"""A module made of known layers, compiled once into a model over stacked parameters.

`compile_module` gives None for anything it does not know; the task then falls back to the
transformations of `torch.func`, which know every module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import nn

from shoal.parts.models._layers import (
    Activation,
    AvgPool,
    Embedding,
    Flatten,
    MaxPool,
    Norm,
)
from shoal.parts.models._products import Convolution, Linear
from shoal.parts.models._program import Layer
from shoal.parts.models._stacked import Stacked
from shoal.parts.models._windows import Pair
from shoal.parts.models.mlp import XavierLinear
from shoal.tensor.flat import FlatSpec

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
    XavierLinear,
}
_BY_VALUE = ("relu", "tanh", "sigmoid")
_MONOTONE = ("relu", "tanh", "sigmoid", "leaky_relu")


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
            free = isinstance(last, (Convolution, Linear)) and layer.kind in _BY_VALUE
            layer = replace(layer, in_place=free)
        numbers = self.numbers + 2 * math.prod(shape)
        return replace(self, layers=(*self.layers, layer), shape=shape, numbers=numbers, **change)


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
        return (
            Activation("leaky_relu", module.negative_slope) if module.negative_slope > 0 else None
        )
    names = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu"}
    return Activation(names[kind]) if kind in names else None


def _pool(module: nn.MaxPool2d | nn.AvgPool2d, size: Pair) -> MaxPool | AvgPool | None:
    """The pooling of images of this size; None for the settings that hardly anybody uses."""
    window, stride = _pair(module.kernel_size), _pair(module.stride)
    padding = _pair(module.padding)
    out = tuple((size[i] + 2 * padding[i] - window[i]) // stride[i] + 1 for i in (0, 1))
    if module.ceil_mode or min(out) < 1:
        return None
    if isinstance(module, nn.AvgPool2d):
        if module.divisor_override is not None:
            return None
        return AvgPool(window, stride, padding, (out[0], out[1]), module.count_include_pad)
    if _pair(module.dilation) != (1, 1) or module.return_indices:
        return None
    return MaxPool(window, stride, padding, (out[0], out[1]))


def _convolution(build: _Build, leaves: list[tuple[str, nn.Module]]) -> tuple[_Build | None, int]:
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
        found = _pool(leaves[place][1], size)
        if found and found.window == found.stride and found.padding == (0, 0):
            pool, size = found.window, found.out
    layer = Convolution(
        f"{prefix}weight",
        f"{prefix}bias" if conv.bias is not None else None,
        kernel,
        stride,
        padding,
        dilation,
        (conv.out_channels, size[0], size[1]),
        pool,
    )
    build = build.add(layer, (conv.out_channels, *size))
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
            bias = f"{prefix}bias" if module.bias is not None else None
            layer = Linear(f"{prefix}weight", bias, module.out_features)
            return build.add(layer, (*shape[:-1], module.out_features))
        case nn.Flatten() if (module.start_dim, module.end_dim) == (1, -1):
            return build.add(Flatten(build.sequence), (math.prod(shape),), sequence=False)
        case nn.Embedding():
            plain = module.padding_idx is None and module.max_norm is None
            plain = plain and not module.sparse and not module.scale_grad_by_freq
            if build.layers or len(shape) != 1 or not plain:
                return None
            layer = Embedding(f"{prefix}weight", module.embedding_dim)
            return build.add(layer, (*shape, module.embedding_dim), sequence=True)
        case nn.MaxPool2d() | nn.AvgPool2d():
            pool = _pool(module, shape[1:]) if images else None
            return pool and build.add(pool, (shape[0], *pool.out))
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
