"""How gradients of many rows are computed: stacked by hand, vmap, or one peer after the other.

All of them take `params [rows, dim]`, `x [rows, batch, *]`, `y [rows, batch, *]` and a weight for
each sample `[rows, batch]`, and give the gradient `[rows, dim]` of the weighted sum of losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from shoal.parts.models.base import OutputGradient, Stacked
from shoal.parts.tasks._losses import Loss
from shoal.tensor.flat import FlatSpec

CHUNK_BYTES = 64 << 20
"""What one vectorised call may hold besides its parameters; a constant, whatever memory is free."""

METHODS = ("auto", "stacked", "vmap", "peer", "channels_last")


class Work(Protocol):
    """One way to compute. `x` and `y` of `forward` may have one row for all."""

    def forward(self, params: Tensor, x: Tensor) -> Tensor: ...

    def gradient(
        self, params: Tensor, x: Tensor, y: Tensor, weight: Tensor, loss: Loss
    ) -> Tensor: ...

    def descended(
        self, params: Tensor, x: Tensor, y: Tensor, weight: Tensor, loss: Loss, rate: float,
        donate: bool,
    ) -> Tensor: ...  # fmt: skip

    def walked(
        self,
        params: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        loss: Loss,
        rate: float,
        drift: Tensor | None,
    ) -> Tensor:
        """Several steps: x, y and weight have an axis of steps in front."""
        ...  # fmt: skip

    def clipped(
        self, params: Tensor, x: Tensor, y: Tensor, weight: Tensor, loss: Loss, clip: float
    ) -> Tensor: ...


@dataclass(frozen=True)
class StackedWork:
    """Layers as products of stacked matrices, with hand-derived gradients."""

    model: Stacked

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        return self.model.forward(params, x)

    def gradient(self, params: Tensor, x: Tensor, y: Tensor, weight: Tensor, loss: Loss) -> Tensor:
        return self.model.gradient(params, x, _of_output(y, weight, loss))

    def descended(
        self, params: Tensor, x: Tensor, y: Tensor, weight: Tensor, loss: Loss, rate: float,
        donate: bool,
    ) -> Tensor:  # fmt: skip
        return self.model.descended(params, x, _of_output(y, weight, loss), rate, donate)

    def walked(
        self, params: Tensor, x: Tensor, y: Tensor, weight: Tensor, loss: Loss, rate: float,
        drift: Tensor | None,
    ) -> Tensor:  # fmt: skip
        def gradient(output: Tensor, step: int, rows: slice) -> Tensor:
            return loss.gradient(output, y[step, rows], weight[step, rows])

        return self.model.walked(params, x, gradient, rate, drift)

    def clipped(
        self, params: Tensor, x: Tensor, y: Tensor, weight: Tensor, loss: Loss, clip: float
    ) -> Tensor:
        return self.model.clipped(params, x, _of_output(y, weight, loss), clip)


def _of_output(y: Tensor, weight: Tensor, loss: Loss) -> OutputGradient:
    def gradient(output: Tensor, rows: slice) -> Tensor:
        return loss.gradient(output, y[rows], weight[rows])

    return gradient


@dataclass(frozen=True)
class ModuleWork:
    """A module called through `torch.func`, vectorised over rows or one row at a time."""

    module: nn.Module
    spec: FlatSpec
    vectorised: bool
    channels_last: bool = False
    numbers: int = 0
    """values that one sample leaves behind, for the size of a chunk"""

    def call(self, params: Tensor, x: Tensor) -> Tensor:
        """One row: params [dim], x [batch, *]."""
        tensors: dict[str, Tensor] = dict(self.constants(params.dtype))
        tensors.update(self.spec.views(params))
        return functional_call(self.module, tensors, (x,))

    def constants(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Frozen parameters and buffers in the dtype at hand."""
        frozen = {n: p for n, p in self.module.named_parameters() if not p.requires_grad}
        fixed = {**frozen, **dict(self.module.named_buffers())}
        return {
            name: value.detach().to(dtype) if value.is_floating_point() else value
            for name, value in fixed.items()
        }

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        shared = x.shape[0] != params.shape[0]
        if not self.vectorised:
            outputs = [self.call(row, x[0 if shared else i]) for i, row in enumerate(params)]
            return torch.stack(outputs)
        size = self._rows(params, x.shape[1])
        if shared:
            call = vmap(self.call, in_dims=(0, None), chunk_size=size, randomness="error")
            return call(params, x[0])
        return vmap(self.call, chunk_size=size, randomness="error")(params, x)

    def gradient(self, params: Tensor, x: Tensor, y: Tensor, weight: Tensor, loss: Loss) -> Tensor:
        if not self.vectorised:
            rows = zip(params, x, y, weight, strict=True)
            return torch.stack([self._one(*row, loss) for row in rows])

        def total(p: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
            return (loss.each(self.call(p, x), y) * weight).sum()

        size = self._rows(params, x.shape[1])
        return vmap(grad(total), chunk_size=size, randomness="error")(params, x, y, weight)

    def descended(
        self, params: Tensor, x: Tensor, y: Tensor, weight: Tensor, loss: Loss, rate: float,
        donate: bool,
    ) -> Tensor:  # fmt: skip
        found = self.gradient(params, x, y, weight, loss)
        return params.sub_(found, alpha=rate) if donate else torch.sub(params, found, alpha=rate)

    def walked(
        self, params: Tensor, x: Tensor, y: Tensor, weight: Tensor, loss: Loss, rate: float,
        drift: Tensor | None,
    ) -> Tensor:  # fmt: skip
        for step, batch in enumerate(zip(x, y, weight, strict=True)):
            params = self.descended(params, *batch, loss, rate, step > 0)
            if drift is not None:
                params.sub_(drift, alpha=rate)
        return params

    def _one(self, params: Tensor, x: Tensor, y: Tensor, weight: Tensor, loss: Loss) -> Tensor:
        if self.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        tensors = self.spec.views(params.detach())
        if self.channels_last:
            tensors = {
                name: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
                for name, t in tensors.items()
            }
        with torch.enable_grad():
            # Leaves of their own: the backward of a slice would fill a whole vector with zeros.
            leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
            fixed = dict(self.constants(params.dtype))
            output = functional_call(self.module, {**fixed, **leaves}, (x,))
            start = loss.gradient(output.detach(), y, weight)
            found = torch.autograd.grad(
                output, list(leaves.values()), start, materialize_grads=True
            )
        return self.spec.flatten(dict(zip(leaves, found, strict=True)))

    def clipped(
        self, params: Tensor, x: Tensor, y: Tensor, weight: Tensor, loss: Loss, clip: float
    ) -> Tensor:
        fixed = dict(self.constants(params.dtype))

        def single(tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            output = functional_call(self.module, {**fixed, **tensors}, (x.unsqueeze(0),))
            return loss.each(output, y.unsqueeze(0)).sum()

        each = vmap(grad(single), in_dims=(None, 0, 0), randomness="error")
        total = torch.zeros_like(params)
        per_sample = (4 * self.spec.dim + self.numbers) * params.element_size()
        rows = max(1, CHUNK_BYTES // (per_sample * max(1, x.shape[1])))
        samples = max(1, CHUNK_BYTES // per_sample) if rows == 1 else max(1, x.shape[1])
        for i in range(0, params.shape[0], rows):
            tensors = self.spec.views(params[i : i + rows])
            for j in range(0, x.shape[1], samples):
                part = (slice(i, i + rows), slice(j, j + samples))
                if len(params[i : i + rows]) == 1:
                    # One model for all samples makes larger products than one for each.
                    alone = {name: tensor[0] for name, tensor in tensors.items()}
                    found = each(alone, x[part][0], y[part][0])
                    found = {name: gradient.unsqueeze(0) for name, gradient in found.items()}
                else:
                    found = vmap(each, randomness="error")(tensors, x[part], y[part])
                gradients = [found[name].flatten(2) for name in self.spec.names]
                total[i : i + rows] += _clipped_sum(gradients, weight[part], clip)
        return total

    def _rows(self, params: Tensor, batch: int) -> int:
        per_row = (4 * self.spec.dim + batch * self.numbers) * params.element_size()
        return max(1, CHUNK_BYTES // per_row)


def _clipped_sum(gradients: list[Tensor], weight: Tensor, clip: float) -> Tensor:
    """Sums [rows, dim] over samples of gradients [rows, batch, size], a tensor each, each sample's
    scaled to norm at most `clip` over all tensors."""
    norms = torch.stack([torch.linalg.vector_norm(each, dim=-1) for each in gradients])
    norm = torch.linalg.vector_norm(norms, dim=0)
    factor, sound = weight * clip / norm.clamp_min(clip), norm.isfinite()
    if not (sound.is_cpu and bool(sound.all())):
        # One sample without a finite gradient must not show in a sum that is to hide it.
        factor = torch.where(sound, factor, 0.0)
        gradients = [torch.where(sound.unsqueeze(-1), each, 0.0) for each in gradients]
    return torch.cat([(factor.unsqueeze(-2) @ each).squeeze(-2) for each in gradients], -1)
