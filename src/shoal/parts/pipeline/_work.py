"""What a part of the model computes: pure functions, which a peer and a trainer share.

x, h: activations [batch, length, width]; tokens, targets: [batch, length]; params: [dim] of a part.
Forward passes that are to be followed by a backward pass keep their graph (`Traced`) where both
happen in one place; a peer, whose calls keep nothing, makes the forward pass again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from shoal.parts.pipeline.base import StageState
from shoal.parts.pipeline.staged_model import StagedModel
from shoal.rounds.local import Optimizer
from shoal.tensor.flat import FlatSpec
from shoal.tensor.types import Vector


class Traced(NamedTuple):
    """A forward pass with its graph; inputs: of which gradients are wanted."""

    output: Tensor
    inputs: tuple[Tensor, ...]


Leaves = dict[str, Tensor]
"""A part's tensors as what gradients are wanted of; microbatches may share them."""


def leaves(params: Vector, spec: FlatSpec) -> Leaves:
    """The tensors that lie in a part's vector."""
    return {name: view.detach().requires_grad_() for name, view in spec.views(params).items()}


def traced_stage(tensors: Leaves, x: Tensor, model: StagedModel) -> Traced:
    """A stage's forward pass."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return Traced(model.pass_through(tensors, x), (x, *tensors.values()))


def pulled(traced: Traced, gradient: Tensor) -> tuple[Tensor, Vector]:
    """A stage's backward pass: gradients for its input and its parameters [dim]."""
    found = torch.autograd.grad(traced.output, traced.inputs, gradient)
    return found[0], _flat(found[1:])


def traced_embedding(tensors: Leaves, tokens: Tensor, model: StagedModel) -> Traced:
    """Part 0's forward pass at the beginning."""
    with torch.enable_grad():
        return Traced(model.embed(tensors, tokens), tuple(tensors.values()))


def pulled_embedding(traced: Traced, gradient: Tensor) -> Vector:
    """Part 0's backward pass at the beginning: its gradient [dim]."""
    return _flat(
        torch.autograd.grad(traced.output, traced.inputs, gradient, materialize_grads=True)
    )


def concluded(
    tensors: Leaves, h: Tensor, targets: Tensor, model: StagedModel
) -> tuple[Tensor, Tensor, Vector]:
    """Part 0's work at the end: mean loss [], gradients for h and for its parameters [dim]."""
    h = h.detach().requires_grad_()
    with torch.enable_grad():
        loss = _loss(model.predict(tensors, h), targets)
    found = torch.autograd.grad(loss, (h, *tensors.values()), materialize_grads=True)
    return loss.detach(), found[0], _flat(found[1:])


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def _flat(tensors: Sequence[Tensor]) -> Vector:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


# What peers call: no graph goes in or comes out.


def embedded(params: Vector, tokens: Tensor, model: StagedModel) -> Tensor:
    """The activations with which a microbatch begins."""
    with torch.no_grad():
        return model.embed(model.spec(0).views(params), tokens)


def forwarded(params: Vector, x: Tensor, model: StagedModel) -> Tensor:
    """A stage's activations."""
    with torch.no_grad():
        return model.pass_through(model.spec(1).views(params), x)


def judged(params: Vector, h: Tensor, targets: Tensor, model: StagedModel) -> Tensor:
    """Mean loss []."""
    with torch.no_grad():
        return _loss(model.predict(model.spec(0).views(params), h), targets)


def backward(
    params: Vector, x: Tensor, gradient: Tensor, model: StagedModel
) -> tuple[Tensor, Vector]:
    """A stage's backward pass, the forward pass made again."""
    return pulled(traced_stage(leaves(params, model.spec(1)), x, model), gradient)


def backward_embedding(
    params: Vector, tokens: Tensor, gradient: Tensor, model: StagedModel
) -> Vector:
    """Part 0's backward pass at the beginning, the forward pass made again."""
    traced = traced_embedding(leaves(params, model.spec(0)), tokens, model)
    return pulled_embedding(traced, gradient)


def finished(
    params: Vector, h: Tensor, targets: Tensor, model: StagedModel
) -> tuple[Tensor, Tensor, Vector]:
    """Part 0's work at the end, see `concluded`."""
    return concluded(leaves(params, model.spec(0)), h, targets, model)


def updated(
    params: Vector, state: Any, gradients: tuple[Vector, ...], optimizer: Optimizer, scale: float,
    clip: float,
) -> tuple[Vector, Any, Tensor]:  # fmt: skip
    """One step on the mean of the microbatches' gradients, in their order.

    Returns parameters, optimiser state and the mean's squared norm [], before it was clipped.
    """
    mean = gradients[0]
    for gradient in gradients[1:]:
        mean = mean + gradient
    mean = mean / len(gradients)
    square = mean.double().square().sum()
    if clip < float("inf"):
        mean = mean * (clip / square.sqrt().clamp_min(clip)).to(mean.dtype)
    params, state = optimizer.step(params, mean, state, scale)
    return params, state, square


def after(
    before: StageState, gradients: Sequence[Vector], optimizer: Optimizer, clip: float
) -> StageState:
    """A part's next state."""
    params, state, square = updated(
        before.params, before.optimizer, tuple(gradients), optimizer, before.scale, clip
    )
    return StageState(params, state, before.scale, float(square))
