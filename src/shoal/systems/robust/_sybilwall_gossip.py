"""What a SybilWall node knows of others, what it passes on, and which hearsay it believes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.tensor import keyed
from shoal.tensor.stack import usable
from shoal.tensor.types import Mask, Stack


@dataclass(frozen=True)
class Table:
    """The part of a state that is about others."""

    history: Stack
    round: Tensor
    distance: Tensor
    via: Tensor
    seal: Tensor | None = None

    def written(
        self, at: Tensor, ok: Mask, history: Stack, round: Tensor, distance: Tensor, via: Tensor,
        seal: Tensor | None = None,
    ) -> Table:  # fmt: skip
        """Entries [..., k] put in their places; those that are not `ok` point at the own place,
        which stays empty."""
        if self.seal is not None and seal is not None:
            kept = torch.where(ok.unsqueeze(-1), seal, 0)
            seal = self.seal.scatter(-2, at.unsqueeze(-1).expand(seal.shape), kept)
        place = at.unsqueeze(-1).expand(history.shape)
        return Table(
            self.history.scatter(-2, place, torch.where(ok.unsqueeze(-1), history, 0.0)),
            self.round.scatter(-1, at, torch.where(ok, round, -1)),
            self.distance.scatter(-1, at, torch.where(ok, distance, 0)),
            self.via.scatter(-1, at, torch.where(ok, via, -1)),
            self.seal if seal is None else seal,
        )


def drawn(
    known: Mask, distance: Tensor, via: Tensor, to: Tensor, lam: float, key: Tensor
) -> Tensor:
    """Whose history goes to each receiver `to` [..., t]: int64 [..., t], -1 = there is none.

    known, distance, via: [..., peers]. With probability proportional to exp(-lam (distance - 1)).
    """
    ids = torch.arange(known.shape[-1], device=known.device)
    aim = to.unsqueeze(-1)
    allowed = known.unsqueeze(-2) & (ids != aim) & (via.unsqueeze(-2) != aim) & (aim >= 0)
    weight = torch.exp(-lam * (distance.to(torch.float64) - 1.0)).unsqueeze(-2)
    edge = torch.where(allowed, weight, 0.0).cumsum(-1)
    total = edge[..., -1:]
    draw = keyed.uniform(key.unsqueeze(-1), to).unsqueeze(-1)
    # Rounding must not take a draw to the very end, where nobody is.
    beyond = edge > (draw * total).clamp(max=1.0 * total * (1 - 1e-12))
    place = beyond.to(torch.int64).argmax(-1)
    return torch.where(total.squeeze(-1) > 0, place, -1)


def heard_of(
    table: Table, told: Mapping[str, Tensor], heard: Mask, who: Tensor, own: Tensor, now: int
) -> Table:
    """The table with what neighbours told: about, round, distance [..., k], history [..., k, *].

    Kept where nothing was known, or where it is newer and what is known is hearsay too. Of several
    about one peer the newest counts, then the nearest, then the first. Nobody tells of this peer
    itself, of the future, or of what it claims to be first-hand here.
    """
    history = told["history"]
    if history.shape[-1] != table.history.shape[-1]:
        raise UsageError(
            f"sybilwall: a history of {history.shape[-1]} numbers was received, and here they have "
            f"{table.history.shape[-1]} (give all peers the same model and layer)"
        )
    about, round, distance = told["about"], told["round"], told["distance"]
    peers = table.round.shape[-1]
    history, finite = usable(history, heard)
    ok = finite & (about >= 0) & (about < peers) & (about != own) & (distance > 1)
    ok &= (round >= 0) & (round <= now)
    at = torch.where(ok, about, own)
    near = table.distance.gather(-1, at)
    ok = ok & ((near == 0) | ((near > 1) & (round > table.round.gather(-1, at))))
    ok = ok & ~_outdone(about, round, distance, ok)
    at = torch.where(ok, about, own)
    return table.written(at, ok, history, round, distance, who, told.get("seal"))


def _outdone(about: Tensor, round: Tensor, distance: Tensor, ok: Mask) -> Mask:
    """Entries [..., k] for which there is a better one about the same peer."""
    order = torch.arange(about.shape[-1], device=about.device)
    mine, other = (lambda v: v.unsqueeze(-1)), (lambda v: v.unsqueeze(-2))
    same = (mine(about) == other(about)) & other(ok)
    newer = other(round) > mine(round)
    as_new = other(round) == mine(round)
    nearer = other(distance) < mine(distance)
    first = (other(distance) == mine(distance)) & (other(order) < mine(order))
    return (same & (newer | (as_new & (nearer | first)))).any(-1)


def rows_at(history: Stack, at: Tensor) -> Stack:
    """The histories [..., k, width] of some peers `at` [..., k]."""
    return history.gather(-2, at.unsqueeze(-1).expand(*at.shape, history.shape[-1]))
