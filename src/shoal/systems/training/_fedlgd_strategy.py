"""Local and global distillation as a strategy: what clients and the hub do in a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import grad, vmap

from shoal.base.errors import UsageError
from shoal.parts.distillation.augmentation import PLAIN, USUAL
from shoal.parts.distillation.contrast import contrastive_loss
from shoal.parts.distillation.distribution_matching import DistributionMatching, random_networks
from shoal.parts.distillation.gradient_matching import GradientMatching, pseudo_gradient
from shoal.parts.distillation.network import Network, network_of
from shoal.parts.distillation.virtual_data import Statistics, labels, real_images, statistics
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.rounds.task import Batch
from shoal.tensor import tree
from shoal.tensor.keyed import fold, grid, normal, uniform
from shoal.tensor.types import Key, Mask, Scalar, Vector


@dataclass(frozen=True)
class State:
    """params and, from before the local steps, start [..., dim]; own [..., classes * ipc, *], the
    virtual images that stay here; have bool [..., classes], which of them there are; anchors
    [..., classes * server_ipc, *], the global virtual images (a class of zeros is not there)."""

    params: Vector
    start: Vector
    own: Tensor
    have: Mask
    anchors: Tensor


@dataclass(frozen=True)
class FedLgd:
    """Clients learn from distilled images of their own and from the hub's, in place of real ones.

    Every `every`-th round, `max_updates` times, is a distillation round. In it each client moves
    its `ipc` virtual images per class so that their mean features match those of its real images
    (`start_steps` steps with random networks in round 0, later `update_steps` with the model that
    came down), and the hub moves its `server_ipc` images per class, the anchors, so that their
    gradient at the old model has the direction of the step that the round took (`match_steps`).
    In all other rounds the loss has `lam` times a supervised contrast between the features of the
    batch and of the anchors. Local steps: `epochs` passes of plain SGD over own images and anchors.

    psi="random": random networks in all distillation rounds. anchors="noise": anchors are a random
    pattern per class that never changes (with match_steps=0 the idea of VHL). start="real": virtual
    images begin as real ones. server_ipc=0: no anchors. prox: weight of FedProx's proximal term.
    One distillation round and no anchors is federated averaging on distilled data. classes, shape:
    of the task's images. A class that a client does not have stays out of its training.

    Needs a model of layers in a row that ends in a linear one, without batch statistics. Without a
    hub every peer has anchors of its own. A client that misses round 0 begins in its next
    distillation round, with update_steps. All parcels weigh the same.
    Source: Huang et al. 2024 (arXiv 2303.02278).

    >>> FedLgd(every=5, max_updates=3).selected(10), FedLgd(every=5, max_updates=3).selected(15)
    (True, False)
    """

    ipc: int = 5
    server_ipc: int = 5
    lam: float = 1.0
    every: int = 5
    max_updates: int = 10
    start_steps: int = 20
    update_steps: int = 30
    match_steps: int = 30
    lr: float = 0.1
    batch_size: int = 32
    epochs: int = 1
    image_lr: float = 1.0
    match_lr: float = 1.0
    temperature: float = 0.07
    real_batch: int = 512
    psi: Literal["global", "random"] = "global"
    anchors: Literal["matched", "noise"] = "matched"
    start: Literal["statistics", "real"] = "statistics"
    augment: bool = True
    prox: float = 0.0
    classes: int = 10
    shape: tuple[int, ...] = (1, 8, 8)

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"ipc": 1, "server_ipc": 1, "start_steps": 2, "update_steps": 2, "match_steps": 2},
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        counts = {
            "ipc": 1, "server_ipc": 0, "every": 1, "max_updates": 1, "start_steps": 0,
            "update_steps": 0, "match_steps": 0, "batch_size": 1, "epochs": 1, "real_batch": 1,
            "classes": 2,
        }  # fmt: skip
        for name, least in counts.items():
            if getattr(self, name) < least:
                raise UsageError(
                    f"FedLgd: {name}={getattr(self, name)}; need at least {least} (raise it)"
                )
        for name in ("lr", "image_lr", "match_lr", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(
                    f"FedLgd: {name}={getattr(self, name)}; need a finite number above 0"
                )
        if not (0 <= self.lam < math.inf and 0 <= self.prox < math.inf):
            raise UsageError(f"FedLgd: lam={self.lam}, prox={self.prox}; need 0 or more")
        choices = {
            "psi": ("global", "random"), "anchors": ("matched", "noise"),
            "start": ("statistics", "real"),
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(
                    f"FedLgd: {name}={getattr(self, name)!r}; need {' or '.join(known)}"
                )
        if len(self.shape) != 3:
            raise UsageError(
                f"FedLgd: shape={self.shape}; need (channels, height, width) of the images"
            )

    def selected(self, round: int) -> bool:
        """Whether images are distilled in this round."""
        return round % self.every == 0 and round // self.every < self.max_updates

    def init(self, params: Vector) -> State:
        lead = params.shape[:-1]
        own = params.new_zeros(*lead, self.classes * self.ipc, *self.shape)
        have = torch.zeros(*lead, self.classes, dtype=torch.bool, device=params.device)
        anchors = params.new_zeros(*lead, self.classes * self.server_ipc, *self.shape)
        return State(params, params, own, have, anchors)

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        network = self._network(step)
        lead = state.params.shape[:-1]
        flat, shard, key = _rows((state, step.shard, step.key), lead)
        extra: dict[str, Tensor] = {}
        if self.selected(step.round):
            real = self._real(step, shard, key, flat.params.dtype)
            flat, found = self._distilled(network, flat, real, key, step.round)
            if self.server_ipc:
                extra = {
                    "mean": found.mean, "deviation": found.deviation,
                    "there": found.there.to(found.mean.dtype),
                }  # fmt: skip
        params = self._trained(network, flat, key, not self.selected(step.round))
        after = replace(flat, params=params, start=flat.params)
        after, extra = _leads((after, extra), lead)
        return after, Parcel(after.params, extra=extra)

    def adopt(self, state: State, received: Vector, step: Step) -> State:
        anchors = step.given.get("images", state.anchors)
        return replace(state, params=received, start=received, anchors=anchors)

    def down(self, state: State) -> dict[str, Tensor]:
        return {"images": state.anchors} if self.server_ipc else {}

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        anchors = state.anchors
        if self.server_ipc and self.selected(step.round):
            lead = state.params.shape[:-1]
            parts = (state, step.key, heard.vector, dict(heard.extra))
            flat, key, vector, extra = _rows(parts, lead)
            anchors = self._begun(flat.anchors, extra, key)
            if self.anchors == "matched":
                target = pseudo_gradient(flat.start, vector, self.lr)
                matching = GradientMatching(self.match_steps, self.match_lr)
                targets = labels(self.classes, self.server_ipc, anchors.device)
                network = self._network(step)
                anchors = matching(network, flat.start, anchors, targets, target)
            anchors = _leads(anchors, lead)
        return replace(state, params=heard.vector, start=heard.vector, anchors=anchors)

    def params(self, state: State) -> Vector:
        return state.params

    def _network(self, step: Step) -> Network:
        """The task's network, once it is clear that its images are those of the settings."""
        shape = tuple(getattr(step.task, "x", torch.empty(0, device="cpu")).shape[1:])
        classes = getattr(step.task, "classes", None)
        if shape != self.shape or classes != self.classes:
            raise UsageError(
                f"FedLgd: the task has images {shape} of {classes} classes, the settings say "
                f"shape={self.shape}, classes={self.classes} (give the task's own)"
            )
        return network_of(step.task)

    def _real(self, step: Step, shard: Any, key: Key, dtype: torch.dtype) -> Batch:
        """Real images [rows, n, *]: all of a client's, or `real_batch` of them drawn by key."""
        for batch in step.task.epoch(shard, fold(key, "real"), self.real_batch):
            return replace(batch, x=batch.x.to(dtype))
        nothing = torch.zeros(*key.shape, 1, *self.shape, dtype=dtype, device=key.device)
        none = torch.zeros(*key.shape, 1, dtype=torch.int64, device=key.device)
        return Batch(nothing, none, none > 0)

    def _distilled(
        self, network: Network, state: State, real: Batch, key: Key, round: int
    ) -> tuple[State, Statistics]:
        """One distillation of own images, and the statistics of the real ones."""
        found = statistics(real, self.classes)
        if self.start == "real":
            fresh = real_images(real, self.classes, self.ipc, key)
        else:
            fresh = found.images(self.ipc, self.shape, fold(key, "own"))
        own = torch.where(_each(state.have, self.ipc, state.own), state.own, fresh)
        psi = random_networks(network, key, own.dtype)
        if round and self.psi == "global":
            psi = lambda number: state.params  # noqa: E731
        matching = DistributionMatching(
            self.update_steps if round else self.start_steps, self.image_lr,
            augmentation=USUAL if self.augment else PLAIN,
        )  # fmt: skip
        own = matching(network, own, real, self.classes, psi, fold(key, "match"))
        return replace(state, own=own, have=state.have | found.there), found

    def _begun(self, anchors: Tensor, extra: Mapping[str, Tensor], key: Key) -> Tensor:
        """Anchors, with a beginning for those classes that have none yet."""
        key = fold(key, "anchors")
        if self.anchors == "noise":
            pixels = math.prod(self.shape)
            shape = (len(key), self.classes, self.server_ipc, pixels)
            noise = normal(grid(key, math.prod(shape[1:])), dtype=anchors.dtype).view(shape)
            pattern = normal(grid(fold(key, "class"), self.classes * pixels), dtype=anchors.dtype)
            fresh = pattern.view(len(key), self.classes, 1, pixels) + 0.5 * noise
            fresh = fresh.reshape(anchors.shape)
        else:
            # Means over those clients that have the class.
            share = extra["there"]
            part = share.clamp_min(1e-9).unsqueeze(-1)
            mean, deviation = extra["mean"] / part, extra["deviation"] / part
            fresh = Statistics(mean, deviation, share > 0).images(self.server_ipc, self.shape, key)
        return torch.where(_each(self._ready(anchors), self.server_ipc, anchors), anchors, fresh)

    def _ready(self, anchors: Tensor) -> Mask:
        """Which classes have anchors: bool [rows, classes]."""
        return anchors.view(len(anchors), self.classes, -1).abs().amax(-1) > 0

    def _trained(self, network: Network, state: State, key: Key, contrast: bool) -> Vector:
        """Parameters [rows, dim] after the local steps."""
        device = state.params.device
        images = torch.cat((state.own, state.anchors), 1)
        own_y = labels(self.classes, self.ipc, device)
        anchor_y = labels(self.classes, self.server_ipc, device)
        targets = torch.cat((own_y, anchor_y))
        valid = state.have.repeat_interleave(self.ipc, -1)
        ready = valid[:, :0]
        if self.server_ipc:
            ready = self._ready(state.anchors).repeat_interleave(self.server_ipc, -1)
            valid = torch.cat((valid, ready), -1)
        contrast = contrast and self.lam > 0 and self.server_ipc > 0

        def loss(params: Vector, x: Tensor, y: Tensor, mask: Mask, start: Vector,
                 anchors: Tensor, ready: Mask) -> Scalar:  # fmt: skip
            seen = torch.cat((x, anchors)) if contrast else x
            features = network.features(params, seen)
            output = network.classify(params, features[: len(x)])
            each = torch.nn.functional.cross_entropy(output, y, reduction="none")
            total = (each * mask).sum() / mask.sum().clamp_min(1)
            if contrast:
                total = total + self.lam * contrastive_loss(
                    features, torch.cat((y, anchor_y)), torch.cat((mask, ready)), self.temperature
                )
            if self.prox:
                total = total + self.prox / 2 * (params - start).square().sum()
            # Without a sample there is no step.
            return total * mask.any()

        slope = vmap(grad(loss))
        params, count = state.params, images.shape[1]
        for epoch in range(self.epochs):
            draws = uniform(
                fold(key, "virtual", epoch).unsqueeze(-1), torch.arange(count, device=device)
            )
            order = torch.where(valid, draws, 2.0).argsort(dim=-1, stable=True)
            for first in range(0, count, self.batch_size):
                place = order[:, first : first + self.batch_size]
                index = place.view(*place.shape, 1, 1, 1).expand(*place.shape, *self.shape)
                found = slope(
                    params, images.gather(1, index), targets[place], valid.gather(1, place),
                    state.params, state.anchors, ready,
                )  # fmt: skip
                params = params - self.lr * found
        return params


def _each(classes: Mask, count: int, like: Tensor) -> Mask:
    """A mask of classes [rows, classes] for their images [rows, classes * count, *]."""
    mask = classes.repeat_interleave(count, -1)
    return mask.view(*mask.shape, *(1,) * (like.dim() - mask.dim()))


def _rows(parts: Any, lead: torch.Size) -> Any:
    """Leading axes joined, in every tensor of a tree; a scalar key is repeated."""
    count = math.prod(lead)

    def join(leaf: Tensor) -> Tensor:
        own = leaf.shape[len(lead) :]
        return leaf.expand((*lead, *own)).reshape((count, *own))

    return tree.map_tree(join, parts)


def _leads(parts: Any, lead: torch.Size) -> Any:
    """Inverse of `_rows`."""
    return tree.map_tree(lambda leaf: leaf.reshape((*lead, *leaf.shape[1:])), parts)
