"""A task from any `torch.nn.Module`, a loss, and tensors of samples.

Samples live once in the task; a shard is a row of positions. Everything takes leading axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from shoal.base.errors import UsageError
from shoal.parts.models.base import compile_module
from shoal.parts.tasks._losses import CrossEntropy, LossFunction, loss_of
from shoal.parts.tasks._modules import checked, draw, probe
from shoal.parts.tasks._work import METHODS, ModuleWork, StackedWork, Work
from shoal.rounds.task import Batch, Shard, Task
from shoal.tensor import keyed
from shoal.tensor.flat import FlatSpec
from shoal.tensor.flops import count_flops
from shoal.tensor.types import Index, Key, Mask, Scalar, Vector

__all__ = ["ModuleTask", "task_of"]

EVALUATION_SAMPLES = 256
"""Test samples per call; with the row limits of `_work` and `_stacked` it bounds memory."""

HEAVY_FLOPS = 50e6
"""A call above this keeps a core busy by itself: batching rows would only cost memory."""


_NO_AXES = torch.Size(())


class ModuleTask:
    """A learning problem over a module's flat parameters.

    Hashable by identity. Made by `task_of`; data sets derive their settings class from it and
    call `setup`.
    """

    spec: FlatSpec
    peers: int
    classes: int | None

    def setup(
        self,
        module: nn.Module,
        loss: str | LossFunction | nn.Module,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        split: Shard,
        *,
        classes: int | None = None,
        batching: str = "auto",
    ) -> None:
        """Check everything and take it in; `train` and `test` are (x [n, *], y [n, *])."""
        if batching not in METHODS:
            raise UsageError(f"task: batching={batching!r}; use one of {', '.join(METHODS)}")
        _check_samples(train, test, split)
        x, y = (part.to(split.index.device).contiguous() for part in train)
        module = checked(module).to(x.device)
        spec = FlatSpec.of(module)
        dtype = next(p for p in module.parameters() if p.requires_grad).dtype
        output = probe(module, x[:2].to(dtype) if x.is_floating_point() else x[:2])
        found = loss_of(loss)
        if isinstance(found, CrossEntropy):
            if not y.is_floating_point():
                classes = _check_classes(output, (y, test[1]), classes)
            elif y.shape[1:] != output.shape[1:]:
                raise UsageError(
                    f"task: targets are {str(y.dtype).removeprefix('torch.')} of shape "
                    f"{tuple(y.shape)}; cross_entropy needs whole numbers (y.long()), or a share "
                    f"of each class, {(y.shape[0], *output.shape[1:])}"
                )
        values = {
            "spec": spec,
            "peers": int(split.size.shape[0]),
            "classes": classes,
            "batching": batching,
            "loss_rule": found,
            "module": module,
            "shares": split,
            "x": x,
            "y": y.to(dtype) if y.is_floating_point() else y,
            "test_x": test[0].to(x.device).contiguous(),
            "test_y": test[1].to(x.device, y.dtype),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "work", self._choose())

    def _choose(self) -> Work:
        features = tuple(self.x.shape[1:])
        stacked = compile_module(self.module, self.spec, features, not self.x.is_floating_point())
        method = self.batching
        if method == "stacked" and stacked is None:
            raise UsageError(
                "task: batching='stacked' needs an nn.Sequential of known layers (Linear, Conv2d, "
                "MaxPool2d, AvgPool2d, LayerNorm, GroupNorm, Embedding, Flatten, activations); "
                "use 'vmap'"
            )
        if stacked is not None and method in ("auto", "stacked"):
            return StackedWork(stacked)
        if method == "auto":
            method = self._rule()
        return ModuleWork(
            self.module,
            self.spec,
            vectorised=method == "vmap",
            channels_last=method == "channels_last",
            numbers=max(64, int(self.x[:1].numel() * 32)),
        )

    def _rule(self) -> str:
        """The fixed rule: convolutions and heavy calls one row at a time, all else as one."""
        if any(isinstance(m, nn.modules.conv._ConvNd) for m in self.module.modules()):
            return "channels_last"
        dtype = next(self.module.parameters()).dtype
        sample = self.x[:1].to(dtype) if self.x.is_floating_point() else self.x[:1]
        with torch.no_grad():
            flops = count_flops(self.module, sample)
        return "peer" if 32 * 3 * flops > HEAVY_FLOPS else "vmap"

    @property
    def sample_bytes(self) -> int:
        """What one sample of a batch takes."""
        return self.x[:1].numel() * self.x.element_size()

    @property
    def method(self) -> str:
        """How gradients are computed here: stacked, vmap, peer or channels_last."""
        if isinstance(self.work, StackedWork):
            return "stacked"
        if self.work.vectorised:
            return "vmap"
        return "channels_last" if self.work.channels_last else "peer"

    def init(self, key: Key) -> Vector:
        return draw(self.module, self.spec, key).to(self.x.device)

    def shard(self, peer: int | Index) -> Shard:
        split = self.shares
        labels = None if split.labels is None else split.labels[peer]
        until = None if split.until is None else split.until[peer]
        held = None if split.held is None else split.held[peer]
        return Shard(split.index[peer], split.size[peer], labels, until, held)

    def joined(self, tasks: Sequence[Task]) -> ModuleTask:
        for task in tasks:
            if not isinstance(task, ModuleTask) or not self._shares_with(task):
                raise UsageError(
                    "task: seeds that run together must share samples, model and loss (run them "
                    "one by one)"
                )
        # A subclass keeps its own rules for batches; its settings stay those of this task.
        out = object.__new__(type(self))
        vars(out).update(vars(self))
        shares = [task.shares for task in tasks if isinstance(task, ModuleTask)]
        most = max(share.index.shape[-1] for share in shares)
        index = torch.cat([_wider(share.index, most) for share in shares])
        labels = None
        if self.shares.labels is not None:
            labels = torch.cat([_wider(s.labels, most) for s in shares if s.labels is not None])
        size = torch.cat([share.size for share in shares])
        until = None
        if self.shares.until is not None:
            until = torch.cat([share.until for share in shares if share.until is not None])
        held = None
        if self.shares.held is not None:
            kept = [share.held for share in shares if share.held is not None]
            most = max(part.shape[-1] for part in kept)
            held = torch.cat([_wider(part, most, -1) for part in kept])
        vars(out).update(shares=Shard(index, size, labels, until, held), peers=int(size.shape[0]))
        return out

    def _shares_with(self, other: ModuleTask) -> bool:
        """Whether both have the very same tables, and models of one shape."""
        same = all(getattr(self, n) is getattr(other, n) for n in ("x", "y", "test_x", "test_y"))
        noisy = (self.shares.labels is None) == (other.shares.labels is None)
        noisy &= (self.shares.until is None) == (other.shares.until is None)
        noisy &= (self.shares.held is None) == (other.shares.held is None)
        models = self.spec == other.spec and str(self.module) == str(other.module)
        return same and noisy and models and self.loss_rule == other.loss_rule

    def batch(self, shard: Shard, key: Key, size: int) -> Batch:
        draws = keyed.uniform(keyed.fold(key, "batch").unsqueeze(-1), _range(size, key))
        place = (draws * shard.size.unsqueeze(-1)).long()
        # A draw just below 1 may round up to the size itself.
        place = torch.minimum(place, (shard.size.unsqueeze(-1) - 1).clamp_min(0))
        return self._take(shard, place, (shard.size > 0).unsqueeze(-1).expand(place.shape))

    def epoch(self, shard: Shard, key: Key, size: int) -> Iterator[Batch]:
        most = shard.index.shape[-1]
        draws = keyed.uniform(keyed.fold(key, "epoch").unsqueeze(-1), _range(most, key))
        own = _range(most, key) < shard.size.unsqueeze(-1)
        # Padding goes last, so that the order does not depend on how long other shards are.
        order = torch.where(own, draws, 2.0).argsort(dim=-1, stable=True)
        own = own.expand(order.shape)
        for start in range(0, int(shard.size.max()) if shard.size.numel() else 0, size):
            part = slice(start, start + size)
            yield self._take(shard, order[..., part], own[..., part])

    def _take(self, shard: Shard, place: Index, mask: Mask) -> Batch:
        index = shard.index.expand(*place.shape[:-1], -1).gather(-1, place)
        flat = index.reshape(-1)
        if shard.inputs is None:
            x = self.x.index_select(0, flat).view(*index.shape, *self.x.shape[1:])
        else:
            x = _gather_rows(shard.inputs, place)
        if shard.labels is None:
            y = self.y.index_select(0, flat).view(*index.shape, *self.y.shape[1:])
        else:
            y = _gather_rows(shard.labels, place)
        return Batch(x, y, mask)

    def held(self, shard: Shard) -> Batch:
        """The samples that peers keep for testing, with true labels; masked where there is none."""
        if shard.held is None:
            raise UsageError(
                f"{type(self).__name__}: its peers keep no samples for testing (set own_tests, or "
                "give the split `held`)"
            )
        flat = shard.held.clamp_min(0).reshape(-1)
        x = self.x.index_select(0, flat).view(*shard.held.shape, *self.x.shape[1:])
        y = self.y.index_select(0, flat).view(*shard.held.shape, *self.y.shape[1:])
        return Batch(x, y, shard.held >= 0)

    def outputs(self, params: Vector, x: Tensor) -> Tensor:
        """What models [..., dim] say to samples [..., batch, *features]: [..., batch, *]."""
        features = self.x.dim() - 1
        other = x.shape[: x.dim() - features - 1]
        lead = torch.Size(np.broadcast_shapes(params.shape[:-1], other))
        rows = params.expand(*lead, -1).reshape(-1, self.spec.dim)
        batch = x.shape[len(other) :]
        x = x.expand(*lead, *batch).reshape(-1, *batch)
        with torch.no_grad():
            found = self.work.forward(rows, x.to(rows.dtype) if x.is_floating_point() else x)
        return found.view(*lead, *found.shape[1:])

    def loss(self, params: Vector, batch: Batch) -> Scalar:
        lead, params, x, y, mask = self._rows(params, batch)
        output = self.work.forward(params, x)
        each = self._each(output, y)
        count = mask.sum(-1).clamp_min(1)
        return (torch.where(mask, each, 0.0).sum(-1) / count).view(lead)

    def grad(self, params: Vector, batch: Batch) -> Vector:
        lead, params, x, y, mask = self._rows(params, batch)
        weight = mask.to(params.dtype) / mask.sum(-1, keepdim=True).clamp_min(1)
        with torch.no_grad():
            found = self.work.gradient(params, x, y, weight, self.loss_rule)
        return found.view(*lead, self.spec.dim)

    def descended(
        self, params: Vector, batch: Batch, rate: float, *, donate: bool = False
    ) -> Vector:
        own = params
        lead, params, x, y, mask = self._rows(params, batch)
        # What is broadcast, or was copied to be flat, is not the caller's to give away.
        donate = donate and params.data_ptr() == own.data_ptr() and params.is_contiguous()
        weight = mask.to(params.dtype) / mask.sum(-1, keepdim=True).clamp_min(1)
        with torch.no_grad():
            found = self.work.descended(params, x, y, weight, self.loss_rule, rate, donate)
        return found.view(*lead, self.spec.dim)

    def walked(
        self, params: Vector, batches: Batch, rate: float, drift: Vector | None = None
    ) -> Vector:
        lead, params, x, y, mask = self._rows(params, batches, batches.mask.shape[:1])
        weight = mask.to(params.dtype) / mask.sum(-1, keepdim=True).clamp_min(1)
        if drift is not None:
            drift = drift.expand(*lead, -1).reshape(-1, self.spec.dim)
            here = mask[0].any(-1)
            if not (here.is_cpu and bool(here.all())):
                drift = torch.where(here.unsqueeze(-1), drift, 0.0)
        with torch.no_grad():
            found = self.work.walked(params, x, y, weight, self.loss_rule, rate, drift)
        return found.view(*lead, self.spec.dim)

    def clipped_grad_sum(self, params: Vector, batch: Batch, clip: float) -> Vector:
        if not clip > 0:
            raise UsageError(f"clipped_grad_sum: clip={clip}; need a norm above 0")
        lead, params, x, y, mask = self._rows(params, batch)
        with torch.no_grad():
            found = self.work.clipped(params, x, y, mask.to(params.dtype), self.loss_rule, clip)
        return found.view(*lead, self.spec.dim)

    def evaluate(self, params: Vector) -> dict[str, Scalar]:
        lead, dtype = params.shape[:-1], params.dtype
        rows = params.reshape(-1, self.spec.dim)
        counts = rows.new_zeros((2, rows.shape[0]), dtype=torch.float64)
        total = self.test_x.shape[0]
        for start in range(0, total, EVALUATION_SAMPLES):
            x = self.test_x[start : start + EVALUATION_SAMPLES].unsqueeze(0)
            y = self.test_y[start : start + EVALUATION_SAMPLES].unsqueeze(0)
            x = x.to(dtype) if x.is_floating_point() else x
            y = y.to(dtype) if y.is_floating_point() else y
            for first in range(0, rows.shape[0], self._evaluation_rows()):
                part = slice(first, first + self._evaluation_rows())
                with torch.no_grad():
                    output = self.work.forward(rows[part], x)
                    targets = y.expand(output.shape[0], *y.shape[1:])
                    counts[0, part] += self._each(output, targets).sum(-1)
                    if self.classes is not None:
                        counts[1, part] += _right(output, targets)
        names = ("loss", "accuracy") if self.classes is not None else ("loss",)
        return {
            name: (count / total).to(dtype).view(lead)
            for name, count in zip(names, counts, strict=False)
        }

    def _evaluation_rows(self) -> int:
        if isinstance(self.work, StackedWork):
            numbers = self.work.model.numbers
        else:
            numbers = max(64, int(self.x[:1].numel() * 32))
        return max(1, (16 << 20) // (numbers * EVALUATION_SAMPLES * 4))

    def _each(self, output: Tensor, y: Tensor) -> Tensor:
        """Losses [rows, batch] of outputs [rows, batch, *]."""
        flat = self.loss_rule.each(
            output.reshape(-1, *output.shape[2:]), y.reshape(-1, *y.shape[2:])
        )
        return flat.view(output.shape[:2])

    def _rows(
        self, params: Vector, batch: Batch, front: torch.Size = _NO_AXES
    ) -> tuple[torch.Size, Vector, Tensor, Tensor, Mask]:
        """Leading axes joined: params [rows, dim], x and y [rows, batch, *], mask [rows, batch].

        Axes in `front` of those, which the batch alone has, stay what they are.
        """
        lead, other = params.shape[:-1], batch.mask.shape[len(front) : -1]
        if lead != other:
            # Not always: torch works this out in Python, for longer than a small product takes.
            lead = torch.Size(np.broadcast_shapes(lead, other))
        size = batch.mask.shape[-1]
        params = params.expand(*lead, -1).reshape(-1, self.spec.dim)
        mask = batch.mask.expand(*front, *lead, size).reshape(*front, -1, size)
        x = _join(batch.x, batch.mask, front, lead)
        y = _join(batch.y, batch.mask, front, lead)
        if not (mask.is_cpu and bool(mask.all())):
            # On a device a look would cost a wait in every step, and a copy costs less. A masked
            # sample's numbers are arbitrary: not even a NaN of it may enter a product.
            x = x.masked_fill(~mask.view(*mask.shape, *(1,) * (x.dim() - mask.dim())), 0)
            y = y.masked_fill(~mask.view(*mask.shape, *(1,) * (y.dim() - mask.dim())), 0)
        x = x.to(params.dtype) if x.is_floating_point() else x
        return lead, params, x, y.to(params.dtype) if y.is_floating_point() else y, mask

    def __repr__(self) -> str:
        return f"{type(self).__name__}(peers={self.peers}, dim={self.spec.dim})"


def task_of(
    module: nn.Module,
    loss: str | LossFunction | nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    split: Shard,
    *,
    classes: int | None = None,
    batching: str = "auto",
) -> ModuleTask:
    """A task from a user's own module, loss and tensors.

    train, test: (x [n, *], y [n, *]); split: each peer's positions in `train`, such as
    `shoal.parts.tasks.shards_of` makes; loss: "cross_entropy" (classes are the last axis of
    the output), "mse", or a function (output, y) -> mean or one loss per sample.

    >>> x = torch.randn(6, 3)
    >>> split = Shard(torch.arange(6).view(2, 3), torch.tensor([3, 3]))
    >>> task = task_of(nn.Linear(3, 1), "mse", (x, x.sum(1)), (x, x.sum(1)), split)
    >>> task.peers, task.spec.dim
    (2, 4)
    """
    task = ModuleTask()
    task.setup(module, loss, train, test, split, classes=classes, batching=batching)
    return task


def _check_samples(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], split: Shard) -> None:
    for name, (x, y) in (("train", train), ("test", test)):
        for what, value in (("samples", x), ("targets", y)):
            if not isinstance(value, Tensor):
                raise UsageError(
                    f"task: {name} has {what} of type {type(value).__name__}; need tensors "
                    "(torch.as_tensor makes them from arrays)"
                )
        if x.shape[:1] != y.shape[:1] or x.shape[0] == 0:
            raise UsageError(
                f"task: {name} has {x.shape[0]} samples and {y.shape[0]} targets; need as many, "
                "and at least one"
            )
        for what, value in (("samples", x), ("targets", y)):
            bad = ~value.flatten(1).isfinite().all(1) if value.dim() > 1 else ~value.isfinite()
            if bool(bad.any()):
                raise UsageError(
                    f"task: {int(bad.sum())} of {len(bad)} {name} {what} hold NaN or infinity, the "
                    f"first is number {int(bad.nonzero()[0])} (mend them, or leave them out)"
                )
    if train[0].shape[1:] != test[0].shape[1:]:
        raise UsageError(
            f"task: training samples are {tuple(train[0].shape[1:])}, test samples "
            f"{tuple(test[0].shape[1:])}; need one shape"
        )
    index, size, held = split.index, split.size, split.held
    if index.dim() != 2 or size.shape != index.shape[:1]:
        raise UsageError("task: a split is an index [peers, most] and a size [peers]")
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= train[0].shape[0]):
        raise UsageError(
            f"task: the split names sample {int(index.max())} of {train[0].shape[0]} "
            "(pad with 0, and index the training samples)"
        )
    if held is not None and (
        held.shape[:-1] != size.shape
        or (held.numel() and not -1 <= int(held.min()) <= int(held.max()) < train[0].shape[0])
    ):
        raise UsageError(
            f"task: samples held for testing are {tuple(held.shape)} positions; need [peers, kept] "
            f"of the {train[0].shape[0]} training samples, padded with -1"
        )


def _check_classes(output: Tensor, targets: tuple[Tensor, ...], classes: int | None) -> int:
    width = output.shape[-1]
    if classes is not None and classes > width:
        raise UsageError(f"task: {classes} classes, but the module has {width} outputs (widen it)")
    for y in targets:
        if int(y.min()) < 0 or int(y.max()) >= width:
            raise UsageError(
                f"task: labels reach from {int(y.min())} to {int(y.max())}; the module's last "
                f"axis allows 0 to {width - 1} (widen the output, or renumber)"
            )
    return classes if classes is not None else width


def _wider(table: Tensor, most: int, padding: int = 0) -> Tensor:
    """[peers, most, *], padded."""
    lack = most - table.shape[1]
    if not lack:
        return table
    empty = table.new_full((table.shape[0], lack, *table.shape[2:]), padding)
    return torch.cat((table, empty), 1)


def _range(count: int, key: Key) -> Tensor:
    return torch.arange(count, device=key.device)


def _gather_rows(labels: Tensor, place: Index) -> Tensor:
    """Labels, or samples, [..., most, *] at some places of each shard."""
    extra = labels.dim() - place.dim()
    index = place.view(*place.shape, *(1,) * extra)
    index = index.expand(*place.shape, *labels.shape[place.dim() :])
    labels = labels.expand(*place.shape[:-1], *labels.shape[place.dim() - 1 :])
    return labels.gather(place.dim() - 1, index)


def _join(value: Tensor, mask: Mask, front: torch.Size, lead: torch.Size) -> Tensor:
    rest = value.shape[mask.dim() - 1 :]
    return value.expand(*front, *lead, *rest).reshape(*front, -1, *rest)


def _right(output: Tensor, y: Tensor) -> Tensor:
    """How many predictions of each row [rows] are right, as a mean over a sample's positions."""
    if y.is_floating_point():
        y = y.argmax(-1)
    best, place = output.max(-1)
    # NaN compares as largest: a model that has diverged must not score by its first class.
    hit = (place == y) & ~best.isnan()
    return hit.reshape(*hit.shape[:2], -1).double().mean(-1).sum(-1)
