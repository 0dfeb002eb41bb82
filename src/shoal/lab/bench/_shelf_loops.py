"""Methods of the training shelf as loops written by hand, for stacked networks of linear layers.

Each loop knows its method, its network and its data, and has no messages, no clocks and no peers
that fail. Nothing but arithmetic is in here: what is drawn at random (samples, neighbours,
participants, noise) comes from a `Chance`, so that with the same draws a loop must end where our
runs end. Parameters are lists of tensors [peers, *shape], weight and bias of each layer in turn.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Tensors = list[Tensor]

where_positive = torch.ops.aten.threshold_backward.grad_input
add_each = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]


class Chance(Protocol):
    """What is left to chance. Samples are positions in the training data.

    Peers have `size` [peers] samples each, those of `index` [peers, most].
    """

    index: Tensor
    size: Tensor

    def batch(self, round: int, step: int, rows: Tensor | None = None) -> Tensor:
        """Samples [rows, batch] drawn with replacement."""
        ...

    def epoch(self, round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample once: (samples [peers, batch], which of them count, bool)."""
        ...

    def probes(self, round: int) -> Tensor:
        """Samples [peers, probes] on which units are compared."""
        ...

    def graph(self, round: int) -> Tensor:
        """Mixing weights [peers, peers]."""
        ...

    def clients(self, round: int) -> tuple[Tensor, Tensor]:
        """(anchors, miners): peers that take part."""
        ...

    def noise(self, iteration: int) -> Tensor:
        """A direction [machines, dim] for each machine."""
        ...

    def rest_s(self, worker: int, number: int) -> float: ...

    def steps(self, worker: int, number: int) -> int: ...

    def work(self, worker: int, number: int, step: int) -> Tensor:
        """Samples [1, batch] of one step of a worker."""
        ...


def outputs(tensors: Tensors, x: Tensor) -> Tensors:
    """What every layer says to x [peers, batch, features]: [peers, units, batch] each, x first."""
    said = [x.flatten(2).transpose(1, 2)]
    for place in range(0, len(tensors), 2):
        out = torch.baddbmm(tensors[place + 1].unsqueeze(-1), tensors[place], said[-1])
        said.append(out if place + 2 == len(tensors) else out.clamp_min_(0))
    return said


def losses(tensors: Tensors, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy [peers] of samples x [peers, batch, *], y [peers, batch]."""
    out = outputs(tensors, x)[-1]
    right = out.gather(1, y.unsqueeze(1)).squeeze(1)
    return (out.logsumexp(1) - right).mean(1)


def backward(
    tensors: Tensors, x: Tensor, y: Tensor, counts: Tensor | None, lr: float | None
) -> Tensors:
    """Gradients of the mean cross-entropy of the samples that count; with `lr` a step instead.

    A step is taken by the product that makes the gradient, and nothing is returned.
    """
    said = outputs(tensors, x)
    d = said[-1]
    # A softmax of torch over ten classes is five times slower than its four parts.
    d.sub_(d.amax(1, keepdim=True)).exp_().div_(d.sum(1, keepdim=True))
    d.scatter_add_(1, y.unsqueeze(1), d.new_full((), -1.0).expand(len(y), 1, y.shape[1]))
    if counts is None:
        d.mul_(1 / y.shape[1])
    else:
        d.mul_((counts / counts.sum(1, keepdim=True).clamp_min(1)).unsqueeze(1))
    found: Tensors = []
    for place in range(len(tensors) - 2, -1, -2):
        weight, bias, before = tensors[place], tensors[place + 1], said[place // 2]
        back = torch.bmm(weight.transpose(1, 2), d) if place else d
        if lr is None:
            found = [torch.bmm(d, before.transpose(1, 2)), d.sum(2), *found]
        else:
            weight.baddbmm_(d, before.transpose(1, 2), alpha=-lr)
            bias.add_(d.sum(2), alpha=-lr)
        if place:
            d = where_positive(back, before, 0, grad_input=back)
    return found


class Loop:
    """Data, chance and the peers' parameters; x [samples, *], y [samples]."""

    def __init__(
        self, begin: Tensor, shapes: tuple[tuple[int, ...], ...], x: Tensor, y: Tensor,
        chance: Chance,
    ) -> None:  # fmt: skip
        """begin [peers, dim]: where the peers begin, tensor after tensor as in `shapes`."""
        self.shapes, self.x, self.y, self.chance = shapes, x, y, chance
        self.tensors = self.split(begin)
        self.done = 0

    def split(self, flat: Tensor) -> Tensors:
        """Vectors [rows, dim] as tensors [rows, *shape] of their own."""
        parts = flat.split([math.prod(shape) for shape in self.shapes], 1)
        pairs = zip(parts, self.shapes, strict=True)
        return [part.reshape(len(flat), *shape).clone() for part, shape in pairs]

    def samples(self, index: Tensor) -> tuple[Tensor, Tensor]:
        flat = index.reshape(-1)
        x = self.x.index_select(0, flat).view(*index.shape, *self.x.shape[1:])
        return x, self.y.index_select(0, flat).view(index.shape)

    def round(self) -> None:
        self.once(self.done)
        self.done += 1

    def once(self, round: int) -> None:
        raise NotImplementedError

    def params(self) -> Tensor:
        """The peers' parameters [peers, dim], or the hub's [1, dim]."""
        return torch.cat([tensor.flatten(1) for tensor in self.tensors], 1)


class Scaffold(Loop):
    """SCAFFOLD with all clients; the tensors are the hub's."""

    lr, steps = 0.1, 10

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        peers = len(self.chance.size)
        self.own = [t.new_zeros(peers, *t.shape[1:]) for t in self.tensors]
        self.shared = [torch.zeros_like(t) for t in self.tensors]

    def once(self, round: int) -> None:
        pairs = zip(self.shared, self.own, strict=True)
        drift = [shared - own for shared, own in pairs]
        peers = len(drift[0])
        values = [t.expand(peers, *t.shape[1:]).contiguous() for t in self.tensors]
        for step in range(self.steps):
            backward(values, *self.samples(self.chance.batch(round, step)), None, self.lr)
            add_each(values, drift, alpha=-self.lr)
        for value, hub, own, shared, change in zip(
            values, self.tensors, self.own, self.shared, drift, strict=True
        ):
            moved = value.sub_(hub)
            # The variate's change: what it went, over the steps, without the correction.
            change.neg_().add_(moved, alpha=-1 / (self.steps * self.lr)).sub_(own)
            own.add_(change)
            hub.add_(moved.mean(0, keepdim=True))
            shared.add_(change.mean(0, keepdim=True))


class VarianceCorrected(Loop):
    """Two steps, then a weighted mean of the neighbours with the mean variance of each tensor."""

    lr, steps = 0.1, 2

    def once(self, round: int) -> None:
        for step in range(self.steps):
            backward(self.tensors, *self.samples(self.chance.batch(round, step)), None, self.lr)
        graph = self.chance.graph(round)
        for tensor in self.tensors:
            rows = tensor.flatten(1)
            mean, goal = graph @ rows, graph @ _apart(rows)[0]
            has, apart, middle = _apart(mean)
            fit = (has > 1e-30) & (goal > 1e-30)
            scale = torch.where(fit, (goal / has).sqrt(), 1.0).unsqueeze(1)
            torch.addcmul(middle, apart, scale, out=rows)


def _apart(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(variance [peers], rows minus their mean, mean [peers, 1]); `Tensor.var` takes longer."""
    middle = rows.mean(1, keepdim=True)
    apart = rows - middle
    return torch.linalg.vector_norm(apart, dim=1).square() / (rows.shape[1] - 1), apart, middle


class Dimat(Loop):
    """An epoch, then the mean of all models with their hidden units in each peer's own order."""

    lr = 0.05

    def once(self, round: int) -> None:
        for index, counts in self.chance.epoch(round):
            backward(self.tensors, *self.samples(index), counts, self.lr)
        peers = len(self.tensors[0])
        probes, _ = self.samples(self.chance.probes(round))
        merged: list[Tensors] = []
        for own in range(peers):
            said = outputs(self.tensors, probes[own].expand(peers, *probes.shape[1:]))
            likeness = [_correlation(values, own) for values in said[1:-1]]
            total = [t[own].clone() for t in self.tensors]
            for other in range(peers):
                if other != own:
                    ordered = self._ordered([layer[other] for layer in likeness], own, other)
                    add_each(total, ordered)
            merged.append([t / peers for t in total])
        self.tensors = [torch.stack(copies) for copies in zip(*merged, strict=True)]

    def _ordered(self, likeness: Tensors, own: int, other: int) -> Tensors:
        mine = [t[own] for t in self.tensors]
        theirs = [t[other] for t in self.tensors]
        for layer, score in enumerate(likeness):
            weight, bias = 2 * layer, 2 * layer + 1
            rows = [
                torch.cat((t[weight], t[bias].unsqueeze(1)), 1).double() for t in (mine, theirs)
            ]
            rows = [r / r.norm(dim=1, keepdim=True).clamp_min(1e-12) for r in rows]
            # Units that never change are told apart by their weights.
            score = score + 1e-6 * (rows[0] @ rows[1].T)
            order = torch.from_numpy(linear_sum_assignment(score.numpy(), maximize=True)[1])
            theirs[weight], theirs[bias] = theirs[weight][order], theirs[bias][order]
            theirs[weight + 2] = theirs[weight + 2][:, order]
        return theirs


def _correlation(values: Tensor, own: int) -> Tensor:
    """values [peers, units, n] -> float64 [peers, units of `own`, units]."""
    whole = values.double()
    apart = whole - whole.mean(2, keepdim=True)
    length = apart.norm(dim=2, keepdim=True)
    alive = length > 1e-9 * whole.norm(dim=2, keepdim=True).clamp_min(1e-12)
    unit = torch.where(alive, apart / torch.where(alive, length, 1.0), 0.0)
    return unit[own] @ unit.transpose(1, 2)


class FedAMD(Loop):
    """Anchors measure gradients, miners follow their mean; the tensors are the hub's."""

    lr, steps = 0.1, 10

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        clients = len(self.chance.size)
        self.own = [t.new_zeros(clients, *t.shape[1:]) for t in self.tensors]
        self.mean = [torch.zeros_like(t) for t in self.tensors]

    def once(self, round: int) -> None:
        anchors, miners = self.chance.clients(round)
        moved = self._mined(round, miners) if len(miners) else None
        if len(anchors):
            found = self._measured(anchors)
            for own, mean, gradient in zip(self.own, self.mean, found, strict=True):
                change = gradient - own[anchors]
                own[anchors] = gradient
                mean.add_(change.sum(0, keepdim=True), alpha=1 / len(own))
        if moved is not None:
            add_each(self.tensors, moved, alpha=-1.0)

    def _everywhere(self, tensors: Tensors, count: int) -> Tensors:
        return [t.expand(count, *t.shape[1:]).contiguous() for t in tensors]

    def _measured(self, anchors: Tensor) -> Tensors:
        size = self.chance.size[anchors]
        index = self.chance.index[anchors][:, : int(size.max())]
        counts = torch.arange(index.shape[1]) < size.unsqueeze(1)
        hub = self._everywhere(self.tensors, len(anchors))
        return backward(hub, *self.samples(index), counts, None)

    def _mined(self, round: int, miners: Tensor) -> Tensors:
        count = len(miners)
        direction = self._everywhere(self.mean, count)
        # Before and after the last step, for one call on both.
        both = self._everywhere(self.tensors, 2 * count)
        add_each([t[count:] for t in both], direction, alpha=-self.lr)
        for step in range(1, self.steps):
            x, y = self.samples(self.chance.batch(round, step, miners))
            found = backward(both, torch.cat((x, x)), torch.cat((y, y)), None, None)
            for way, gradient, value in zip(direction, found, both, strict=True):
                way.add_(gradient[count:]).sub_(gradient[:count])
                value[:count] = value[count:]
                value[count:].sub_(way, alpha=self.lr)
        pairs = zip(self.tensors, both, strict=True)
        return [(hub - value[count:]).mean(0, keepdim=True) for hub, value in pairs]


class OneByte(Loop):
    """Just One Byte: all machines hold the same model, tensors [1, *shape], and one loop has it."""

    lr, eps, lowest = 6e-3, 1e-3, -74

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self.flat = self.params()[0]

    def once(self, round: int) -> None:
        directions = self.chance.noise(round)
        machines = len(directions)
        shift = self.eps * directions
        x, y = self.samples(self.chance.batch(round, 0))
        both = torch.cat((self.flat + shift, self.flat - shift))
        found = losses(self._views(both), torch.cat((x, x)), torch.cat((y, y))).double()
        slopes = self._rounded((found[:machines] - found[machines:]) / (2 * self.eps))
        self.flat = self.flat - (slopes * (self.lr / machines)).float() @ directions

    def _views(self, flat: Tensor) -> Tensors:
        parts = flat.split([math.prod(shape) for shape in self.shapes], 1)
        return [p.view(len(flat), *s) for p, s in zip(parts, self.shapes, strict=True)]

    def _rounded(self, slopes: Tensor) -> Tensor:
        """As a byte holds them: the sign, and the logarithm in steps of 1/16."""
        numbers = slopes.numpy()
        with np.errstate(divide="ignore"):
            step = np.round(16 * np.log(np.abs(numbers)))
        step = np.clip(step, self.lowest, self.lowest + 126)
        return torch.from_numpy(np.where(numbers == 0, 0.0, np.sign(numbers) * np.exp(step / 16)))

    def params(self) -> Tensor:
        return self.flat.unsqueeze(0) if self.done else super().params()


class Anarchic(Loop):
    """AFA-CS by a queue of requests and returns; a round is a version, tensors [1, *shape]."""

    lr, server_lr, buffer, latency_s, step_s = 0.05, 5.0, 5, 0.01, 1.0

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        workers = len(self.chance.size)
        self.memory = [t.new_zeros(workers, *t.shape[1:]) for t in self.tensors]
        self.total = [torch.zeros_like(t) for t in self.tensors]
        self.fresh = {worker for worker in range(workers) if self.chance.size[worker] > 0}
        self.members = len(self.fresh)
        self.returned: list[tuple[int, int, Tensors]] = []
        self.queue: list[tuple[float, int, int, Tensors | None]] = [
            (self.chance.rest_s(worker, 0) + self.latency_s, worker, 1, None)
            for worker in sorted(self.fresh)
        ]
        heapq.heapify(self.queue)

    def once(self, round: int) -> None:
        while True:
            at_s, worker, number, work = heapq.heappop(self.queue)
            if work is None:
                self._ask(at_s, worker, number)
                continue
            rest_s = self.chance.rest_s(worker, number) + 2 * self.latency_s
            heapq.heappush(self.queue, (at_s + rest_s, worker, number + 1, None))
            self.returned.append((worker, number, work))
            self.fresh.discard(worker)
            if not self.fresh and (not round or len(self.returned) >= self.buffer):
                break
        for worker, _, work in sorted(self.returned, key=lambda each: each[:2]):
            for kept, total, gradient in zip(self.memory, self.total, work, strict=True):
                total.add_(gradient - kept[worker])
                kept[worker] = gradient[0]
        self.returned = []
        add_each(self.tensors, self.total, alpha=-self.server_lr * self.lr / self.members)

    def _ask(self, at_s: float, worker: int, number: int) -> None:
        """A worker pulls the model; what it will return is known at once."""
        steps = self.chance.steps(worker, number)
        values = [t.clone() for t in self.tensors]
        total: Tensors | None = None
        for step in range(steps):
            x, y = self.samples(self.chance.work(worker, number, step))
            found = backward(values, x, y, None, None)
            add_each(values, found, alpha=-self.lr)
            if total is None:
                total = found
            else:
                add_each(total, found)
        assert total is not None
        back_s = at_s + 2 * self.latency_s + steps * self.step_s
        work = [t / steps for t in total]
        heapq.heappush(self.queue, (back_s, worker, number, work))
