"""Normal noise that every machine can make again from its key, and steps along a lot of it.

A direction of as many numbers as a model has parameters is one 64-bit key. It is made piece by
piece where it is needed, so that a step along a thousand directions holds a piece of one of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.tensor import keyed
from shoal.tensor.types import Key, Scalar, Vector

PIECE = 1 << 16
"""Positions at a time: few enough for a piece's 64-bit numbers to stay in the cache."""

KEPT_BYTES = 16 << 20
"""Of noise that was made last and may be wanted again; a constant, whatever memory is free."""


def noise(key: Key, count: int, start: int = 0, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers at positions start to start + count: keys [...] -> [..., count].

    Position j of a key is the same number on every machine, whichever part is asked for and in
    whichever order. Assumes that log1p and cos agree after rounding to `dtype`; processors of
    different kinds may differ there in about one number of 10^8, which is what comparing digests
    of weights is for.

    >>> whole = noise(keyed.key_of(1), 8)
    >>> torch.equal(whole[3:], noise(keyed.key_of(1), 5, start=3))
    True
    """
    if count <= PIECE:
        positions = torch.arange(start, start + count, device=key.device)
        return keyed.normal(key.unsqueeze(-1), positions, dtype=dtype)
    whole = torch.empty((*key.shape, count), dtype=dtype, device=key.device)
    for first in range(0, count, PIECE):
        width = min(PIECE, count - first)
        whole[..., first : first + width] = noise(key, width, start + first, dtype=dtype)
    return whole


def noise_rows(
    keys: Sequence[int], count: int, start: int = 0, *, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """`noise` of several keys, [keys, count]; short rows that were made last are not made again.

    Machines that are simulated together step along the same directions, so each is made once for
    all of them. Not to be written into.

    >>> torch.equal(noise_rows([5, 6], 4)[1], noise(torch.tensor(6), 4))
    True
    """
    if start or count > PIECE:
        return noise(_keys(keys, device), count, start, dtype=dtype)
    return _recent.rows(keys, count, dtype, torch.device(device))


def _keys(keys: Sequence[int], device: torch.device | str) -> Key:
    return torch.tensor(keys, dtype=torch.int64, device="cpu").to(device)


class _Recent:
    """What was made last, by key. Compute threads share it."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def rows(
        self, keys: Sequence[int], count: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        with self._lock:
            found = {key: self._rows.get((key, count, dtype, device)) for key in keys}
        missing = [key for key, row in found.items() if row is None]
        if missing:
            made = noise(_keys(missing, device), count, dtype=dtype)
            found.update(zip(missing, made, strict=True))
            with self._lock:
                self._keep(missing, made)
            if len(missing) == len(keys):
                return made
        chosen = [found[key] for key in keys]
        if len(chosen) == 1:
            return chosen[0].unsqueeze(0)  # type: ignore[union-attr]
        return torch.stack(chosen)  # type: ignore[arg-type]

    def _keep(self, keys: Sequence[int], made: Tensor) -> None:
        for key, row in zip(keys, made, strict=True):
            place = (key, row.shape[0], row.dtype, row.device)
            if place not in self._rows:
                self._rows[place] = row
                self._bytes += row.nbytes
        while self._bytes > KEPT_BYTES:
            self._bytes -= self._rows.pop(next(iter(self._rows))).nbytes


_recent = _Recent()


def descend_along(params: Vector, keys: Key, scales: Scalar) -> Vector:
    """`params` minus the sum over j of scales[..., j] * noise(keys[..., j]), in the order of j.

    params [..., dim], keys int64 [..., k], scales [..., k]. Every product and every difference is
    rounded by itself, in the given order, so that machines which take the same steps hold the same
    bits, however many rows are stacked and however the steps are cut into calls. Memory beside the
    result: a few pieces of `PIECE` positions.

    >>> start, keys = torch.zeros(5), torch.tensor([3, 4])
    >>> scales = torch.tensor([0.5, -1.0])
    >>> once = descend_along(start, keys, scales)
    >>> twice = descend_along(descend_along(start, keys[:1], scales[:1]), keys[1:], scales[1:])
    >>> torch.equal(once, twice)
    True
    """
    lead, dim, count = params.shape[:-1], params.shape[-1], keys.shape[-1]
    if scales.shape[-1] != count:
        raise UsageError(
            f"descend_along: {count} keys and {scales.shape[-1]} scales; need one scale for each"
        )
    if not count:
        return params.clone()
    rows = params.reshape(-1, dim)
    words = keys.expand(*lead, count).reshape(-1, count).tolist()
    factors = scales.to(params.dtype).expand(*lead, count).reshape(-1, count, 1)
    shared = all(row == words[0] for row in words[1:])
    if shared and len(words) > 1 and _alike(rows) and _alike(factors):
        # Machines that are simulated together hold the same bits and take the same step.
        once = descend_along(rows[0], keys.reshape(-1, count)[0], factors[0, :, 0])
        return once.repeat(len(words), 1).view(*lead, dim)
    out = torch.empty_like(rows)
    for start in range(0, dim, PIECE):
        part = slice(start, min(start + PIECE, dim))
        # A copy of its own: pieces of stacked rows are apart in memory, and are gone over k times.
        piece = rows[:, part].clone()
        for step in _products(piece, words[:1] if shared else words, factors, start):
            # Not `sub(alpha=...)`: it may fuse, and differently at the end of a row.
            piece -= step
        out[:, part] = piece
    return out.view(*lead, dim)


def _products(
    piece: Tensor, words: list[list[int]], factors: Tensor, start: int
) -> Iterator[Tensor]:
    """factors[:, j] * noise of words[:, j] at a piece's positions, for each j."""
    width, count = piece.shape[-1], len(words[0])
    settings: Any = {"dtype": piece.dtype, "device": piece.device}
    if len(words) > 1:
        for j in range(count):
            yield factors[:, j] * noise_rows([row[j] for row in words], width, start, **settings)
        return
    # As many directions at a time as make up a piece: for short ones a call costs more than work.
    most = max(1, PIECE // width)
    for first in range(0, count, most):
        some = slice(first, first + most)
        directions = noise_rows(words[0][some], width, start, **settings)
        if len(factors) == 1:
            yield from (factors[0, some] * directions).unbind()
        else:
            for factor, direction in zip(factors[:, some].unbind(1), directions, strict=True):
                yield factor * direction


def _alike(rows: Tensor) -> bool:
    """Whether all rows are equal; not looked at on a device, where a look is a wait."""
    return rows.is_cpu and bool((rows == rows[:1]).all())


def walk_in_place(tensors: Sequence[Tensor], keys: Sequence[int], scales: Sequence[float]) -> None:
    """`descend_along` written into weights that lie in several contiguous tensors of one dtype.

    Together they are one vector: the first number of a tensor comes after the last of the one
    before it, and the result is that of `descend_along` on the concatenation, bit for bit. Holds a
    piece of one direction and nothing else.

    >>> first, second = torch.zeros(2), torch.zeros(3)
    >>> walk_in_place([first, second], [7], [1.0])
    >>> torch.equal(torch.cat((first, second)), -noise(torch.tensor(7), 5))
    True
    """
    if len(keys) != len(scales):
        raise UsageError(f"walk_in_place: {len(keys)} keys and {len(scales)} scales; need as many")
    offset = 0
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise UsageError("walk_in_place: a tensor is not contiguous (make it so first)")
        factors = torch.tensor(scales, dtype=tensor.dtype, device=tensor.device)
        for piece in tensor.detach().view(-1).split(PIECE):
            for key, factor in zip(keys, factors, strict=True):
                own = torch.tensor(key, dtype=torch.int64, device=tensor.device)
                piece -= factor * noise(own, len(piece), offset, dtype=tensor.dtype)
            offset += len(piece)
