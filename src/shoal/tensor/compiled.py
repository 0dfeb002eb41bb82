"""Loops over the coordinates of one large stack [k, dim], compiled.

What torch does in a pass over memory for each step happens here for a few coordinates at a time,
which stay in a core's first cache. `stack` calls these for large stacks only: loading the compiler
takes a while.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

_LANES = 128
_WIDTH = 256
_TILE = 4
_STRIP = 2048


@njit(cache=True, nogil=True)
def _ordered(x: Any, index: Any, steps: Any, places: Any, share: Any, out: Any) -> None:
    count, dim = len(index), x.shape[1]
    values = np.zeros((count + 2, _LANES), x.dtype)
    total = np.zeros(_LANES, x.dtype)
    for start in range(0, dim, _LANES):
        width = min(_LANES, dim - start)
        for i in range(count):
            row = x[index[i]]
            for lane in range(width):
                values[i, lane] = row[start + lane]
        for step in range(len(steps)):
            low, high, least, most = steps[step]
            for lane in range(_LANES):
                a, b = values[low, lane], values[high, lane]
                values[least, lane] = a if a < b else b
                values[most, lane] = b if a < b else a
        total[:] = 0
        for i in range(len(places)):
            row, factor = values[places[i]], share[i]
            for lane in range(_LANES):
                total[lane] += row[lane] * factor
        for lane in range(width):
            out[start + lane] = total[lane]


Steps = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Moves [c, 4]: from two slots the smaller number to a third one and the larger to a fourth; and
the slot in which each place ends. A number never goes back to where it came from: that would be a
store under a condition, which is slow."""


def ordered_mean(
    x: NDArray[Any], index: NDArray[np.int64], steps: Steps,
    places: NDArray[np.int64], share: NDArray[Any], out: NDArray[Any],
) -> None:  # fmt: skip
    """Into `out` [dim] the sum over places of share times the value there, ascending, among the
    rows of x [k, dim] that `index` names; steps: what puts so many rows in order."""
    moves, slot = steps
    _ordered(x, index, moves, slot[places], share, out)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _products(part: Any, out: Any) -> None:
    for i in range(0, part.shape[0], 2):
        a0, a1 = part[i], part[i + 1]
        for j in range(0, i + 2, _TILE):
            b0, b1, b2, b3 = part[j], part[j + 1], part[j + 2], part[j + 3]
            s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = 0.0
            for lane in range(_WIDTH):
                u, v = a0[lane], a1[lane]
                p, q, r, s = b0[lane], b1[lane], b2[lane], b3[lane]
                s00 += u * p
                s01 += u * q
                s02 += u * r
                s03 += u * s
                s10 += v * p
                s11 += v * q
                s12 += v * r
                s13 += v * s
            out[i, j] += s00
            out[i, j + 1] += s01
            out[i, j + 2] += s02
            out[i, j + 3] += s03
            out[i + 1, j] += s10
            out[i + 1, j + 1] += s11
            out[i + 1, j + 2] += s12
            out[i + 1, j + 3] += s13


@njit(cache=True, nogil=True)
def _gram(x: Any, pivot: Any, beside: Any, out: Any) -> None:
    count, dim = x.shape
    part = np.zeros((out.shape[0], _WIDTH), np.float64)
    for start in range(0, dim, _WIDTH):
        width = min(_WIDTH, dim - start)
        if width < _WIDTH:
            part[:] = 0.0
        for i in range(count):
            row, near = x[i], part[i]
            for lane in range(width):
                near[lane] = np.float64(row[start + lane]) - np.float64(pivot[start + lane])
        for i in range(len(beside)):
            row, near = beside[i], part[count + i]
            for lane in range(width):
                near[lane] = np.float64(row[start + lane]) - np.float64(pivot[start + lane])
        _products(part, out)


def gram(
    x: NDArray[Any], pivot: NDArray[Any], beside: NDArray[Any] | None = None
) -> NDArray[np.float64]:
    """Inner products in float64 of the rows of x [k, dim] less `pivot` [dim]: [k, k], or one more
    for a vector `beside` them."""
    more = x[:0] if beside is None else beside[None]
    count = len(x) + len(more)
    size = -(-count // _TILE) * _TILE
    out = np.zeros((size, size))
    _gram(x, pivot, more, out)
    low = np.tril(out[:count, :count])
    return low + np.tril(low, -1).T


@lru_cache(maxsize=256)
def steps_of(network: tuple[tuple[int, int, bool, bool], ...], count: int) -> Steps:
    """Comparators of `count` rows as moves between so many slots and two more."""
    slot, spare, moves = list(range(count)), [count, count + 1], []
    for low, high, _, _ in network:
        before = [slot[low], slot[high]]
        moves.append([*before, *spare])
        (slot[low], slot[high]), spare = spare, before
    return np.array(moves, np.int64).reshape(-1, 4), np.array(slot, np.int64)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _squares(x: Any, point: Any, out: Any) -> None:
    for start in range(0, x.shape[1], _WIDTH):
        end = min(start + _WIDTH, x.shape[1])
        for i in range(x.shape[0]):
            row, total = x[i], 0.0
            for lane in range(start, end):
                apart = np.float64(row[lane]) - np.float64(point[lane])
                total += apart * apart
            out[i] += total


def squares(x: NDArray[Any], point: NDArray[Any]) -> NDArray[np.float64]:
    """Squared distances [k] in float64 of the rows of x [k, dim] to `point` [dim]."""
    out = np.zeros(len(x))
    _squares(x, point, out)
    return out


@njit(cache=True, nogil=True)
def _means(x: Any, member: Any, share: Any, out: Any) -> None:
    for i in range(member.shape[0]):
        for start in range(0, x.shape[1], _STRIP):
            end = min(start + _STRIP, x.shape[1])
            made = out[i]
            if member[i, 0] < 0:
                made[start:end] = 0.0
            for j in range(member.shape[1]):
                if member[i, j] < 0:
                    continue
                row, factor = x[member[i, j]], share[i]
                if j == 0:
                    for lane in range(start, end):
                        made[lane] = row[lane] * factor
                else:
                    for lane in range(start, end):
                        made[lane] += row[lane] * factor


def means(
    x: NDArray[Any], member: NDArray[np.int64], share: NDArray[Any], out: NDArray[Any]
) -> None:
    """Into `out` [b, dim] share [b] times the sum of the rows of x [k, dim] that member [b, s]
    names; -1 = none. At least one column."""
    _means(x, member, share, out)
