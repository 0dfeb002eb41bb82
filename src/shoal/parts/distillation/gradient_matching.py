"""Gradient matching: virtual images that a model would learn from as it did from real ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vmap

from shoal.base.errors import UsageError
from shoal.parts.distillation.network import Network, network_of
from shoal.rounds.task import Task
from shoal.tensor.flat import FlatSpec
from shoal.tensor.types import Scalar, Vector


def pseudo_gradient(before: Vector, after: Vector, lr: float) -> Vector:
    """(before - after) / lr [..., dim]: the mean gradient that a round's steps amount to.

    The gradient itself after one plain step of rate `lr`; after several it is the sum of their
    gradients, and with momentum it has the direction at best.
    """
    if not lr > 0:
        raise UsageError(f"pseudo_gradient: lr={lr}; need a rate above 0 (that of the local steps)")
    return (before - after) / lr


def gradient_distance(spec: FlatSpec, first: Vector, second: Vector) -> Scalar:
    """Sum over all output rows of all weights of 1 - cosine; two gradients [dim].

    Parameters of one axis (biases) are left out. A row that is zero in both counts nothing (a unit
    that is dead), one that is zero in one of them counts 1.
    Source: Zhao et al. 2021 (arXiv 2006.05929).

    >>> spec = FlatSpec(("w",), ((2, 2),))
    >>> gradient_distance(spec, torch.tensor([3., 4., 0., 0.]), torch.tensor([4., -3., 0., 0.]))
    tensor(1.)
    """
    total = first.new_zeros(())
    one, other = spec.views(first), spec.views(second)
    for name, shape in zip(spec.names, spec.shapes, strict=True):
        if len(shape) < 2:
            continue
        a, b = one[name].reshape(shape[0], -1), other[name].reshape(shape[0], -1)
        size_a, size_b = a.square().sum(-1), b.square().sum(-1)
        both = (size_a > 0) & (size_b > 0)
        either = (size_a > 0) | (size_b > 0)
        # No small number in the divisor: rows are that small themselves. The root of 0 is kept out
        # because its slope is infinite.
        length_a = torch.where(both, size_a, 1.0).sqrt()
        length_b = torch.where(both, size_b, 1.0).sqrt()
        # Of rows brought to length 1: their product would leave the range of float32 before.
        cosine = (a / length_a.unsqueeze(-1) * (b / length_b.unsqueeze(-1))).sum(-1)
        total = total + torch.where(either, 1.0 - torch.where(both, cosine, 0.0), 0.0).sum()
    return total


def cross_entropy(network: Network, params: Vector, images: Tensor, labels: Tensor) -> Scalar:
    """Mean loss of the head's output; one row."""
    output = network.classify(params, network.features(params, images))
    return torch.nn.functional.cross_entropy(output, labels)


@dataclass(frozen=True)
class GradientMatching:
    """Gradient steps on pixels that turn their own gradient towards a given one.

    v <- momentum v + g, image <- image - lr v. Needs second derivatives.

    >>> GradientMatching(steps=10).momentum
    0.5
    """

    steps: int = 100
    lr: float = 1.0
    momentum: float = 0.5

    def __post_init__(self) -> None:
        if self.steps < 0 or not self.lr > 0 or not 0 <= self.momentum < 1:
            raise UsageError(
                f"GradientMatching: steps={self.steps}, lr={self.lr}, momentum={self.momentum}; "
                "need 0 or more steps, lr above 0, momentum in [0, 1)"
            )

    def __call__(
        self, network: Network, params: Vector, virtual: Tensor, labels: Tensor, target: Vector
    ) -> Tensor:
        """virtual [rows, m, *] after all steps; params, target [rows, dim]; labels [m]."""

        def loss(images: Tensor, params: Vector, target: Vector) -> Scalar:
            return matching_distance(network, params, images, labels, target)

        slope = vmap(grad(loss))
        velocity = torch.zeros_like(virtual)
        for _ in range(self.steps):
            velocity = self.momentum * velocity + slope(virtual, params, target)
            virtual = virtual - self.lr * velocity
        return virtual


def matching_distance(
    network: Network, params: Vector, images: Tensor, labels: Tensor, target: Vector
) -> Scalar:
    """`gradient_distance` of the images' own gradient at `params` to `target`; one row."""

    def error(params: Vector) -> Scalar:
        return cross_entropy(network, params, images, labels)

    return gradient_distance(network.spec, grad(error)(params), target)


def distill_global(
    task: Task, params: Vector, pseudo: Vector, virtual: Tensor, labels: Tensor, *,
    matching: GradientMatching | None = None,
) -> Tensor:  # fmt: skip
    """Virtual images [m, *] that give `params` [dim] the gradient `pseudo` [dim]; labels [m].

    >>> from shoal.parts.tasks.digits import Digits
    >>> task = Digits(peers=2, hidden=(16,))
    >>> params = task.init(torch.tensor(0))
    >>> batch = task.batch(task.shard(0), torch.tensor(1), 20)
    >>> wanted, steps = task.grad(params, batch), GradientMatching(steps=3)
    >>> distill_global(task, params, wanted, torch.rand(20, 1, 8, 8), batch.y, matching=steps).shape
    torch.Size([20, 1, 8, 8])
    """
    if virtual.shape[:1] != labels.shape:
        raise UsageError(
            f"distill_global: {virtual.shape[0]} images and {tuple(labels.shape)} labels; need one "
            "each"
        )
    matching = matching or GradientMatching()
    network = network_of(task)
    rows = (t.unsqueeze(0) for t in (params, virtual))
    own, images = rows
    return matching(network, own, images, labels, pseudo.unsqueeze(0))[0]
