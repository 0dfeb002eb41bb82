"""The only place that knows parameter names and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shoal.base.errors import UsageError
from shoal.tensor.types import Vector


@dataclass(frozen=True)
class FlatSpec:
    """How named tensors lie in one vector `[..., dim]`, in the order given.

    >>> spec = FlatSpec(("w", "b"), ((2, 3), (3,)))
    >>> spec.dim
    9
    >>> spec.views(torch.zeros(5, 9))["w"].shape
    torch.Size([5, 2, 3])
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...] = field(init=False)
    offsets: tuple[int, ...] = field(init=False)
    dim: int = field(init=False)

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes):
            raise UsageError(
                f"FlatSpec: {len(self.names)} names for {len(self.shapes)} shapes; need one each"
            )
        if len(set(self.names)) != len(self.names):
            raise UsageError(f"FlatSpec: names repeat in {self.names} (rename one)")
        sizes = tuple(math.prod(shape) for shape in self.shapes)
        offsets = tuple(sum(sizes[:i]) for i in range(len(sizes)))
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "dim", sum(sizes))

    @classmethod
    def of(cls, module: nn.Module) -> FlatSpec:
        """The trainable parameters of a module, in `named_parameters` order (tied ones once)."""
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        return cls(tuple(n for n, _ in named), tuple(tuple(p.shape) for _, p in named))

    def flatten(self, tensors: Mapping[str, Tensor]) -> Vector:
        """Named tensors `[..., *shape]` as one vector `[..., dim]` (copies)."""
        missing = [name for name in self.names if name not in tensors]
        if missing:
            raise UsageError(f"FlatSpec.flatten: no tensor named {missing[0]!r} (give all names)")
        parts = []
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            tensor = tensors[name]
            lead = tensor.dim() - len(shape)
            if lead < 0 or tuple(tensor.shape[lead:]) != shape:
                raise UsageError(
                    f"FlatSpec.flatten: {name!r} has shape {tuple(tensor.shape)}; "
                    f"need [..., {', '.join(map(str, shape))}]"
                )
            parts.append(tensor.reshape(tensor.shape[:lead] + (size,)))
        return torch.cat(parts, -1)

    def views(self, flat: Vector) -> dict[str, Tensor]:
        """A vector `[..., dim]` as named tensors `[..., *shape]`, without a copy."""
        if flat.shape[-1] != self.dim:
            raise UsageError(
                f"FlatSpec.views: last axis is {flat.shape[-1]}; the specification has {self.dim}"
            )
        lead = flat.shape[:-1]
        return {
            name: flat[..., start : start + size].view(lead + shape)
            for name, shape, size, start in zip(
                self.names, self.shapes, self.sizes, self.offsets, strict=True
            )
        }
