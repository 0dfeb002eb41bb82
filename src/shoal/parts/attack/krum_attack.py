"""The attack on Krum: as far back as Krum still believes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.parts.aggregate.krum import scores_of
from shoal.parts.attack.base import clean_data, honest_mean, repeated
from shoal.rounds.attack import Knowledge, View
from shoal.tensor.distances import distances_to, squared_distances
from shoal.tensor.types import Key, Mask, Stack

_HALVINGS = 24
"""How often the strength is halved before the attackers give up hiding."""


@dataclass(frozen=True)
class KrumAttack:
    """Everybody sends mean - t * s, with the largest t of a halving search that Krum would choose.

    s are the signs of the honest mean, the direction in which they have gone: exact for updates,
    and for parameters the change since zero, as an attack here remembers nothing of earlier rounds.
    For the same reason it starts at the mean, where the source starts at the model received.
    The search begins at a bound that Krum cannot be beyond, and asks Krum itself, as run on the
    honest and the Byzantine vectors with as many Byzantine ones expected as there are, whatever
    rule is in force. All Byzantine vectors are the same one, which makes them each other's
    neighbours. Source: Fang et al. 2020, section 4.2 (arXiv 1911.11815).

    >>> from shoal.tensor.keyed import key_of
    >>> honest = torch.tensor([[1.0], [1.1], [1.2], [0.9], [1.4]])
    >>> sent = KrumAttack()(View(honest, honest[:2], round=0), key_of(0))
    >>> bool(sent[0] < honest.mean()), torch.equal(sent[0], sent[1])
    (True, True)
    """

    knowledge: ClassVar[Knowledge] = Knowledge.ALL
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def __call__(self, view: View, key: Key) -> Stack:
        mean, x, rows = honest_mean(view)
        sign = torch.where(mean > 0, 1.0, -1.0).to(mean.dtype)
        liars, dim = view.own.shape[-2:]
        square = squared_distances(x, rows)
        start = self._start(square, rows, distances_to(x, rows, mean), liars, dim)
        # |x - mean + t s|^2 for every t at once: three numbers for each honest row.
        apart = (x - mean.unsqueeze(-2)).to(torch.float64)
        flat, along = apart.square().sum(-1), (apart * sign.unsqueeze(-2)).sum(-1)
        strength, found = start, torch.zeros_like(start, dtype=torch.bool)
        for halving in range(_HALVINGS):
            t = (start * 0.5**halving).unsqueeze(-1)
            chosen = self._chosen(square, rows, flat + 2 * t * along + t * t * dim, liars)
            strength = torch.where(found, strength, t.squeeze(-1))
            found = found | chosen
        return repeated(mean - strength.to(mean.dtype).unsqueeze(-1) * sign, view)

    def _start(self, square: Tensor, rows: Mask, apart: Tensor, liars: int, dim: int) -> Tensor:
        """The bound on the strength, float64 [...]."""
        count = rows.sum(-1) + liars
        total = scores_of(square, rows, count, liars).nan_to_num(nan=torch.inf)
        room = (count - 2 * liars - 1).clamp_min(1).to(torch.float64)
        least = total.amin(-1).nan_to_num(posinf=0.0)
        far = apart.nan_to_num(nan=0.0, posinf=0.0).amax(-1)
        return (least / (room * dim)).sqrt() + far / math.sqrt(dim)

    def _chosen(self, square: Tensor, rows: Mask, to_liar: Tensor, liars: int) -> Mask:
        """Whether Krum would take the Byzantine vector, bool [...]."""
        side = to_liar.unsqueeze(-1).expand(*to_liar.shape, liars)
        corner = square.new_zeros(*square.shape[:-2], liars, liars)
        whole = torch.cat((torch.cat((square, side), -1), torch.cat((side.mT, corner), -1)), -2)
        here = torch.cat((rows, rows.new_ones(*rows.shape[:-1], liars)), -1)
        found = scores_of(whole, here, here.sum(-1), liars).nan_to_num(nan=torch.inf)
        honest = found.shape[-1] - liars
        return found[..., honest:].amin(-1) < found[..., :honest].amin(-1)

    poison = clean_data
