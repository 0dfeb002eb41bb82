"""Orders of units in which one network is most like another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.alignment.units import Axis, Units
from shoal.tensor.types import Index, Vector

_TIE = 1e-6
"""What the likeness of incoming weights counts beside a correlation: it settles ties alone."""


def correlations(a: Tensor, b: Tensor) -> Tensor:
    """Between units of two networks, [..., units, n] twice -> float64 [..., units, units].

    Units that never change have no correlation with any: 0.
    """
    return _standard(a) @ _standard(b).mT


def _standard(values: Tensor) -> Tensor:
    apart = values.to(torch.float64)
    apart = apart - apart.mean(-1, keepdim=True)
    size = apart.norm(dim=-1, keepdim=True)
    # Rounding alone makes a constant look like a signal.
    alive = size > 1e-9 * values.to(torch.float64).norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.where(alive, apart / torch.where(alive, size, 1.0), 0.0)


def assignment(score: Tensor) -> Index:
    """The permutation [units] with the largest sum of score[u, order[u]], ties by position.

    >>> assignment(torch.eye(3)).tolist()
    [0, 1, 2]
    """
    _, order = linear_sum_assignment(score.cpu().numpy(), maximize=True)
    return torch.as_tensor(order, device="cpu")


def activation_orders(
    units: Units, own: Vector, others: Vector, inputs: Tensor
) -> tuple[list[list[Index]], Tensor]:
    """For each of the others [k, dim] and each layer: which of its units goes to which place of
    `own` [dim], by the correlation of what they say to inputs [n, *features].

    Also the mean correlation of the pairs, float64 [k]. Two units that never change, in both
    networks, are told apart by their incoming weights. UsageError without inputs, or when a value
    is not finite.
    """
    if not len(inputs):
        raise UsageError("alignment: no inputs to compare units on (give some)")
    found = units.values(torch.cat((own.unsqueeze(0), others)), inputs)
    if not all(bool(each.isfinite().all()) for each in found):
        raise UsageError("alignment: a unit's value is not finite (is a model broken?)")
    orders: list[list[Index]] = [[] for _ in others]
    matched = torch.zeros(len(others), dtype=torch.float64, device="cpu")
    for place, values in enumerate(found):
        score = correlations(values[:1], values[1:]).cpu()
        mine = _incoming(units, place, own, None)
        for k, other in enumerate(others):
            theirs = _incoming(units, place, other, orders[k][-1] if place else None)
            order = assignment(score[k] + _TIE * (mine @ theirs.mT))
            orders[k].append(order)
            matched[k] += score[k].gather(1, order.unsqueeze(-1)).mean() / len(found)
    return orders, matched


def _incoming(units: Units, place: int, params: Vector, before: Index | None) -> Tensor:
    """The weights that make each unit of a layer, of length 1 each: float64 [units, numbers].

    before: the order of the units of the layer before, from which they come.
    """
    named = dict(units.spec.views(params))
    if before is not None:
        for axis in units.layers[place - 1].read:
            named[axis.name] = named[axis.name].index_select(
                axis.axis, axis.positions(before).to(params.device)
            )
    rows = _rows(units.layers[place].made, named)
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def _rows(axes: Sequence[Axis], named: Mapping[str, Tensor]) -> Tensor:
    """Every number that makes a unit, float64 [units, numbers], on the processor."""
    parts = [named[axis.name].movedim(axis.axis, 0).flatten(1) if named[axis.name].dim() > 1
             else named[axis.name].unsqueeze(-1) for axis in axes]  # fmt: skip
    return torch.cat(parts, -1).to("cpu", torch.float64)


def weight_orders(units: Units, own: Vector, other: Vector, sweeps: int = 50) -> list[Index]:
    """Orders of the units of `other` [dim] under which its weights are most like `own` [dim].

    Layer by layer, with the others' orders held fixed, until a sweep changes nothing: a local
    optimum, found without data.
    Source: Ainsworth et al. 2023, algorithm 1 (arXiv 2209.04836), in a fixed order of layers.
    """
    orders = [torch.arange(layer.units, device="cpu") for layer in units.layers]
    for _ in range(sweeps):
        changed = False
        for place, layer in enumerate(units.layers):
            # What this layer's units look like when all other layers are in order.
            rest = list(orders)
            rest[place] = torch.arange(layer.units, device="cpu")
            moved = units.permuted(other, rest)
            score = torch.zeros(layer.units, layer.units, dtype=torch.float64, device="cpu")
            for axis in (*layer.made, *layer.read):
                mine, theirs = (_along(units, axis, layer.units, v) for v in (own, moved))
                score += mine @ theirs.mT
            order = assignment(score)
            if not torch.equal(order, orders[place]):
                orders[place], changed = order, True
        if not changed:
            break
    return orders


def _along(units: Units, axis: Axis, count: int, params: Vector) -> Tensor:
    """A parameter with a row for each unit, float64 [units, numbers]."""
    tensor = units.spec.views(params)[axis.name].movedim(axis.axis, 0)
    return tensor.reshape(count, -1).to("cpu", torch.float64) if axis.block == 1 else (
        tensor.reshape(count, axis.block, *tensor.shape[1:]).flatten(1).to("cpu", torch.float64)
    )  # fmt: skip
