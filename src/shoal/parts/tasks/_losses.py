"""Losses per sample, with the gradient of a weighted sum of them in closed form where there is one.

Outputs lie `[n, *]` and targets `[n, *]`; n runs over samples of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from shoal.base.errors import UsageError

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(output [batch, *], y [batch, *]) -> a mean over the batch, or one number per sample."""


class Loss(Protocol):
    """A loss as tasks use it."""

    def each(self, output: Tensor, y: Tensor) -> Tensor:
        """One loss per sample: [n]."""
        ...

    def gradient(self, output: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Gradient of `(weight * each(output, y)).sum()` by output.

        Samples may lie along several axes, `[..., *]` with a weight `[...]`; outputs in any order
        of memory, in which the gradient will lie too.
        """
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of logits whose classes are the last axis, in nats; mean over positions.

    y: class numbers `[n, *]`, or probabilities of the shape of the output.

    >>> CrossEntropy().each(torch.zeros(1, 2), torch.tensor([1]))
    tensor([0.6931])
    """

    def each(self, output: Tensor, y: Tensor) -> Tensor:
        logs = torch.log_softmax(output, -1)
        if y.is_floating_point():
            losses = -(logs * y).sum(-1)
        else:
            losses = -logs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        return losses.reshape(losses.shape[0], -1).mean(-1)

    def gradient(self, output: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        positions = max(1, math.prod(output.shape[weight.dim() : -1]))
        share = _beside(weight if positions == 1 else weight / positions, output)
        soft = _softmax(output)
        if y.is_floating_point():
            return (soft * y.sum(-1, keepdim=True)).sub_(y).mul_(share)
        target = y.unsqueeze(-1)
        return soft.mul_(share).scatter_add_(-1, target, share.neg().expand(target.shape))


def _softmax(output: Tensor) -> Tensor:
    if not 0 < output.shape[-1] <= 32:
        return torch.softmax(output, -1)
    # torch goes row by row, which for ten classes takes five times as long as these four calls.
    soft = (output - output.amax(-1, keepdim=True)).exp_()
    return soft.div_(soft.sum(-1, keepdim=True))


@dataclass(frozen=True)
class SquaredError:
    """Mean over a sample's outputs of the squared error; y is float, of as many numbers.

    >>> SquaredError().each(torch.tensor([[3.0]]), torch.tensor([1.0]))
    tensor([4.])
    """

    def each(self, output: Tensor, y: Tensor) -> Tensor:
        return (output - y.view_as(output)).square().reshape(output.shape[0], -1).mean(-1)

    def gradient(self, output: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        share = weight * (2.0 / max(1, math.prod(output.shape[weight.dim() :])))
        return (output - y.view_as(output)).mul_(_beside(share, output))


def _beside(weight: Tensor, output: Tensor) -> Tensor:
    """A sample's weight, to be multiplied with all of its outputs."""
    return weight.view(*weight.shape, *(1,) * (output.dim() - weight.dim()))


@dataclass(frozen=True)
class OwnLoss:
    """A user's function, called with one sample at a time (vectorised) as a batch of one."""

    function: LossFunction

    def each(self, output: Tensor, y: Tensor) -> Tensor:
        def single(one: Tensor, target: Tensor) -> Tensor:
            return self.function(one.unsqueeze(0), target.unsqueeze(0)).mean()

        return torch.func.vmap(single, randomness="error")(output, y)

    def gradient(self, output: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        lead = weight.dim()
        flat = output.detach().reshape(-1, *output.shape[lead:])
        with torch.enable_grad():
            leaf = flat.clone().requires_grad_()
            each = self.each(leaf, y.reshape(-1, *y.shape[lead:]))
            found = torch.autograd.grad((each * weight.reshape(-1)).sum(), leaf)[0]
        return found.view(output.shape)


_NAMED = {
    "cross_entropy": CrossEntropy(),
    "mse": SquaredError(),
    functional.cross_entropy: CrossEntropy(),
    functional.mse_loss: SquaredError(),
}


def loss_of(loss: str | LossFunction | torch.nn.Module) -> Loss:
    """The loss with this name, or of this function; torch's own two are recognised."""
    if isinstance(loss, torch.nn.CrossEntropyLoss) and _default(loss, torch.nn.CrossEntropyLoss()):
        return CrossEntropy()
    if isinstance(loss, torch.nn.MSELoss):
        return SquaredError()
    if loss in _NAMED:
        return _NAMED[loss]
    if not callable(loss):
        raise UsageError(f"task: no loss named {loss!r}; use cross_entropy, mse or a function")
    return OwnLoss(loss)


def _default(loss: torch.nn.CrossEntropyLoss, plain: torch.nn.CrossEntropyLoss) -> bool:
    names = ("ignore_index", "label_smoothing", "weight")
    return all(
        getattr(loss, name) is getattr(plain, name) or getattr(loss, name) == getattr(plain, name)
        for name in names
    )
