"""Real digits as five kinds of cameras see them: every peer has another domain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.models.cnn import CNN
from shoal.parts.models.mlp import MLP
from shoal.parts.tasks._splits import shards_of
from shoal.parts.tasks.base import ModuleTask
from shoal.parts.tasks.digits import Digits
from shoal.tensor.types import Scalar, Vector

DOMAINS = ("plain", "inverted", "noisy", "turned", "faint")


@dataclass(frozen=True, eq=False, kw_only=True)
class DigitsDomains(ModuleTask):
    """8x8 digits in five domains; peer i has samples of domain i modulo 5, all classes alike.

    plain; inverted (1 - x); noisy (N(0, 0.3^2) added, then blurred); turned (by 25 degrees, moved
    by a pixel); faint (contrast 0.4 on a brightness that rises from left to right). No two peers
    have the same source image. samples_per_peer: of the 1,437 for training, 280 unless there are
    too few; the 355 for testing are the same for every seed, 71 of each domain. Metrics beside loss
    and accuracy: `worst_domain`, the lowest accuracy of a domain. model: "mlp" (`hidden`) or "cnn"
    (`channels` with group norm, then `hidden[0]`). Pixels go from -1 to 1.

    >>> task = DigitsDomains(peers=5, hidden=(16,))
    >>> int(task.shard(3).size), tuple(task.test_x.shape)
    (280, (355, 1, 8, 8))
    """

    peers: int
    seed: int = 0
    samples_per_peer: int | None = None
    model: str = "mlp"
    hidden: tuple[int, ...] = (128, 64)
    channels: tuple[int, ...] = (16, 32)
    batching: str = "auto"
    device: str = "cpu"

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"peers": 6, "hidden": (16,)},
        {"peers": 3, "model": "cnn", "channels": (4, 8), "hidden": (8,), "samples_per_peer": 20},
    )

    def __post_init__(self) -> None:
        if self.model not in ("mlp", "cnn"):
            raise UsageError(f"task: model={self.model!r}; need mlp or cnn")
        x, y, test_x, test_y = domains(self.device)
        sources = len(y) // len(DOMAINS)
        wanted = self.samples_per_peer or min(280, sources // max(1, self.peers))
        if self.peers < 1 or not 1 <= wanted * self.peers <= sources:
            raise UsageError(
                f"task: {self.peers} peers with {wanted} samples each; need at least 1 of each and "
                f"no more than {sources} together (lower samples_per_peer or peers)"
            )
        rng = np.random.default_rng(keyed.fold(0, self.seed, "domains"))
        labels = y[:sources].cpu().numpy()
        # Dealt out class by class, so that all peers have the same mix.
        order = rng.permutation(sources)
        order = order[np.argsort(labels[order], kind="stable")]
        dealt = [order[peer :: self.peers] for peer in range(self.peers)]
        parts = [
            np.sort(rng.permutation(own)[:wanted]) + sources * (peer % len(DOMAINS))
            for peer, own in enumerate(dealt)
        ]
        if self.model == "mlp":
            module = MLP(hidden=self.hidden).build((1, 8, 8), 10)
        else:
            module = CNN(channels=self.channels, hidden=self.hidden[0], group_norm=1).build(
                (1, 8, 8), 10
            )
        self.setup(
            module, "cross_entropy", (x, y), (test_x, test_y), shards_of(parts, self.device),
            classes=10, batching=self.batching,
        )  # fmt: skip

    def evaluate(self, params: Vector) -> dict[str, Scalar]:
        found = super().evaluate(params)
        rows, step = params.reshape(-1, self.spec.dim), self._evaluation_rows()
        x, y = self.test_x.to(params.dtype), self.test_y
        right = []
        for start in range(0, len(rows), step):
            with torch.no_grad():
                output = self.work.forward(rows[start : start + step], x.unsqueeze(0))
            right.append(output.argmax(-1) == y)
        # Test samples lie domain by domain.
        by_domain = torch.cat(right).to(params.dtype).view(len(rows), len(DOMAINS), -1).mean(-1)
        return found | {"worst_domain": by_domain.amin(-1).view(params.shape[:-1])}


@lru_cache(maxsize=2)
def domains(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, every source in every domain, domain by domain; test images, each in one."""
    plain = Digits(peers=1, hidden=(4,))
    train, test = plain.x[:, 0].numpy(), plain.test_x[:, 0].numpy()
    seen = np.stack([as_domain(name, train) for name in DOMAINS])
    each = len(test) // len(DOMAINS)
    order = np.random.default_rng(0).permutation(len(test))[: each * len(DOMAINS)]
    kept = order.reshape(len(DOMAINS), each)
    tested = np.stack(
        [as_domain(name, test[part]) for name, part in zip(DOMAINS, kept, strict=True)]
    )
    return (
        torch.as_tensor(2.0 * seen.reshape(-1, 1, 8, 8) - 1.0, dtype=torch.float32, device=device),
        plain.y.repeat(len(DOMAINS)).to(device),
        torch.as_tensor(
            2.0 * tested.reshape(-1, 1, 8, 8) - 1.0, dtype=torch.float32, device=device
        ),
        plain.test_y[torch.from_numpy(kept.reshape(-1))].to(device),
    )


def as_domain(name: str, images: np.ndarray) -> np.ndarray:
    """Images [n, height, width] in [0, 1] as a domain shows them; the same for equal images."""
    if name == "plain":
        return images
    if name == "inverted":
        return 1.0 - images
    if name == "noisy":
        noise = np.random.default_rng(1).normal(0.0, 0.3, images.shape)
        return ndimage.gaussian_filter(images + noise, (0.0, 0.5, 0.5))
    if name == "turned":
        turned = ndimage.rotate(images, 25.0, axes=(1, 2), reshape=False, order=1)
        return ndimage.shift(turned, (0.0, 1.0, 0.0), order=0)
    if name == "faint":
        return 0.4 * images + np.linspace(0.0, 0.6, images.shape[-1])
    raise UsageError(f"domain {name!r}; need one of {', '.join(DOMAINS)}")
