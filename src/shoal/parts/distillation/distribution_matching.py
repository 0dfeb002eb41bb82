"""Distribution matching: virtual images whose mean features are those of the real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vmap

from shoal.base.errors import UsageError
from shoal.parts.distillation.augmentation import USUAL, Augmentation
from shoal.parts.distillation.network import Network, network_of
from shoal.parts.distillation.virtual_data import labels, members, real_images, statistics
from shoal.rounds.task import Batch, Task
from shoal.tensor.keyed import fold
from shoal.tensor.types import Key, Mask, Scalar, Vector

Extractor = Callable[[int], Vector]
"""Step -> parameters [rows, dim] whose features are matched in it."""


def matching_loss(
    network: Network, params: Vector, virtual: Tensor, means: Tensor, there: Mask
) -> Scalar:
    """Sum over classes of the squared distance between mean features; one row.

    virtual [classes * ipc, *]; means [classes, width] of the real images; there bool [classes]:
    classes without real images do not count.
    Source: Zhao and Bilen 2023 (arXiv 2110.04181).
    """
    found = network.features(params, virtual)
    own = found.view(means.shape[0], -1, found.shape[-1]).mean(1)
    return (own - means).square().sum(-1).mul(there).sum()


def class_means(network: Network, params: Vector, x: Tensor, own: Tensor) -> Tensor:
    """Mean features of each class [rows, classes, width]; own is from `members`."""
    return own @ vmap(network.features)(params, x)


@dataclass(frozen=True)
class DistributionMatching:
    """Gradient steps on pixels with momentum: v <- momentum v + g, image <- image - lr v.

    Both sides of a step see the same random view. The sum over classes is the loss, so lr does not
    depend on their number.

    >>> DistributionMatching(steps=10).lr
    1.0
    """

    steps: int = 100
    lr: float = 1.0
    momentum: float = 0.5
    augmentation: Augmentation = USUAL

    def __post_init__(self) -> None:
        if self.steps < 0 or not self.lr > 0 or not 0 <= self.momentum < 1:
            raise UsageError(
                f"DistributionMatching: steps={self.steps}, lr={self.lr}, "
                f"momentum={self.momentum}; need 0 or more steps, lr above 0, momentum in [0, 1)"
            )

    def __call__(
        self, network: Network, virtual: Tensor, real: Batch, classes: int, psi: Extractor, key: Key
    ) -> Tensor:
        """virtual [rows, classes * ipc, *] after all steps; real x [rows, n, *]; key [rows]."""
        own, there = members(real.y, real.mask, classes, virtual.dtype)
        # What is masked may hold anything, and weighs nothing: but nan times nothing is nan.
        hidden = ~real.mask.view(*real.mask.shape, *(1,) * (real.x.dim() - real.mask.dim()))
        x = real.x.to(virtual.dtype).masked_fill(hidden, 0.0)

        def loss(images: Tensor, params: Vector, means: Tensor, there: Mask) -> Scalar:
            return matching_loss(network, params, images, means, there)

        slope = vmap(grad(loss))
        velocity = torch.zeros_like(virtual)
        for number in range(self.steps):
            params = psi(number)
            view = self.augmentation.draw(fold(key, "view", number), virtual)
            means = class_means(network, params, view.of(x), own)
            # The view is linear: its transpose brings the gradient back to the pixels.
            seen = slope(view.of(virtual), params, means, there)
            velocity = self.momentum * velocity + view.back(seen)
            virtual = virtual - self.lr * velocity
        return virtual


def distill_local(
    task: Task, real: Batch, ipc: int, key: Key, extractor: Vector | None = None, *,
    classes: int = 10, matching: DistributionMatching | None = None, start: str = "statistics",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A client's virtual images [classes * ipc, *] and their labels, from its real ones.

    real: x [n, channels, height, width] and y [n]. extractor: parameters [dim] whose features are
    matched; without it every step has a random network of the task's shape. start: "statistics"
    (noise with the classes' mean and deviation) or "real". The images of a class that is missing
    stay zero and must be masked.

    >>> from shoal.parts.tasks.digits import Digits
    >>> task = Digits(peers=2, hidden=(16,))
    >>> real = task.batch(task.shard(0), torch.tensor(1), 64)
    >>> few = DistributionMatching(steps=3)
    >>> images, targets = distill_local(task, real, 2, torch.tensor(2), matching=few)
    >>> images.shape, targets.tolist()[:4]
    (torch.Size([20, 1, 8, 8]), [0, 0, 1, 1])
    """
    if ipc < 1 or start not in ("statistics", "real"):
        raise UsageError(
            f"distill_local: ipc={ipc}, start={start!r}; need at least 1 image per class, and "
            "statistics or real"
        )
    if real.x.dim() != 4 or real.y.shape != real.x.shape[:1]:
        raise UsageError(
            f"distill_local: images {tuple(real.x.shape)}, labels {tuple(real.y.shape)}; need "
            "[n, channels, height, width] and [n]"
        )
    network, matching = network_of(task), matching or DistributionMatching()
    rows = Batch(real.x.unsqueeze(0), real.y.unsqueeze(0), real.mask.unsqueeze(0))
    keys = key.unsqueeze(0)
    if start == "real":
        images = real_images(rows, classes, ipc, keys)
    else:
        images = statistics(rows, classes).images(ipc, tuple(real.x.shape[1:]), fold(keys, "start"))
    psi = random_networks(network, keys, images.dtype)
    if extractor is not None:
        fixed = extractor.unsqueeze(0)
        psi = lambda number: fixed  # noqa: E731
    found = matching(network, images, rows, classes, psi, fold(keys, "match"))
    return found[0], labels(classes, ipc, found.device)


def random_networks(network: Network, key: Key, dtype: torch.dtype) -> Extractor:
    """Another random network in every step."""
    return lambda number: network.random(fold(key, "psi", number), dtype)
