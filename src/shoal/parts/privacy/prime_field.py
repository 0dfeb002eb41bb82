"""Arithmetic on arrays modulo the prime 2^61 - 1, compiled.

Elements are uint64 below `PRIME`. Signed whole numbers are held as elements: those above PRIME / 2
are negative. A product of two elements has 122 bits; as 2^61 is 1 here, its upper half is added to
its lower one and nothing is ever divided.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from shoal.base.errors import UsageError
from shoal.tensor.keyed import fold, grid
from shoal.tensor.types import Key

PRIME = (1 << 61) - 1
Elements = NDArray[np.uint64]
Operand = Elements | np.uint64

_P = np.uint64(PRIME)
_LOW32, _LOW29 = np.uint64(0xFFFFFFFF), np.uint64((1 << 29) - 1)
_32, _29, _61, _3 = np.uint64(32), np.uint64(29), np.uint64(61), np.uint64(3)


@njit(cache=True)
def _times(a: Any, b: Any) -> Any:
    a0, a1, b0, b1 = a & _LOW32, a >> _32, b & _LOW32, b >> _32
    middle, low = a1 * b0 + a0 * b1, a0 * b0
    # 2^64 = 8, and the middle's upper part is at 2^61.
    total = ((a1 * b1) << _3) + (middle >> _29) + ((middle & _LOW29) << _32)
    total += (low >> _61) + (low & _P)
    total = (total >> _61) + (total & _P)
    return total - _P if total >= _P else total


@njit(cache=True)
def _plus(a: Any, b: Any) -> Any:
    total = a + b
    return total - _P if total >= _P else total


@njit(cache=True)
def _products(a: Any, b: Any, out: Any) -> None:
    for i in range(a.size):
        out[i] = _times(a[i], b[i])


@njit(cache=True)
def _matrix_product(matrix: Any, values: Any, out: Any) -> None:
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            factor = matrix[i, j]
            for k in range(values.shape[1]):
                out[i, k] = _plus(out[i, k], _times(factor, values[j, k]))


@njit(cache=True)
def _inner(values: Any, weights: Any, out: Any) -> None:
    for i in range(values.shape[0]):
        total = np.uint64(0)
        for k in range(values.shape[1]):
            total = _plus(total, _times(values[i, k], weights[k]))
        out[i] = total


@njit(cache=True)
def _roots(squares: Any, root: Any, inverse: Any) -> None:
    # The prime is 3 modulo 4: the root of v is v^((p + 1) / 4) = v^(2^59).
    for i in range(squares.size):
        found = squares[i]
        for _ in range(59):
            found = _times(found, found)
        root[i] = found
    # One inversion for all (Montgomery): products up to each place, then back.
    running = np.uint64(1)
    for i in range(squares.size):
        inverse[i] = running
        running = _times(running, root[i])
    exponent, base, power = _P - np.uint64(2), running, np.uint64(1)
    while exponent > 0:
        if exponent & np.uint64(1):
            power = _times(power, base)
        base = _times(base, base)
        exponent >>= np.uint64(1)
    for i in range(squares.size - 1, -1, -1):
        inverse[i] = _times(inverse[i], power)
        power = _times(power, root[i])


def multiply(a: Operand, b: Operand) -> Elements:
    """Entry by entry; shapes broadcast.

    >>> int(multiply(np.uint64([PRIME - 1]), np.uint64([PRIME - 1]))[0])
    1
    """
    a, b = np.broadcast_arrays(a, b)
    out = np.empty(a.size, np.uint64)
    _products(np.ascontiguousarray(a).reshape(-1), np.ascontiguousarray(b).reshape(-1), out)
    return out.reshape(a.shape)


def add(a: Operand, b: Operand) -> Elements:
    """Entry by entry; shapes broadcast."""
    total = np.add(a, b)
    return np.where(total >= _P, total - _P, total)


def negative(a: Operand) -> Elements:
    """What a is to be added to for 0."""
    return np.where(a == 0, a, _P - a)


def matmul(matrix: Elements, values: Elements) -> Elements:
    """[m, k] times [k, *] -> [m, *]."""
    flat = np.ascontiguousarray(values).reshape(values.shape[0], -1)
    out = np.zeros((matrix.shape[0], flat.shape[1]), np.uint64)
    _matrix_product(np.ascontiguousarray(matrix), flat, out)
    return out.reshape(matrix.shape[0], *values.shape[1:])


def weighted_sum(values: Elements, weights: Elements) -> Elements:
    """sum_k values[..., k] weights[k] -> [...]."""
    flat = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
    out = np.zeros(flat.shape[0], np.uint64)
    _inner(flat, np.ascontiguousarray(weights), out)
    return out.reshape(values.shape[:-1])


def roots(squares: Elements) -> tuple[Elements, Elements]:
    """A root of each square other than 0, and its inverse; which of the two roots is fixed."""
    if (squares == 0).any():
        raise UsageError("roots: 0 has no inverse (draw again)")
    flat = np.ascontiguousarray(squares).reshape(-1)
    root, inverse = np.empty_like(flat), np.empty_like(flat)
    _roots(flat, root, inverse)
    return root.reshape(squares.shape), inverse.reshape(squares.shape)


def element(number: int) -> int:
    """A whole number of any sign as an element."""
    return number % PRIME


def inverse(number: int) -> int:
    """The element whose product with this one is 1."""
    return pow(number % PRIME, PRIME - 2, PRIME)


def encode(numbers: NDArray[np.int64]) -> Elements:
    """Signed whole numbers between -2^60 and 2^60 as elements."""
    # Not by their absolute values: that of the least int64 is itself.
    if numbers.size and max(int(numbers.max()), -int(numbers.min())) >= 1 << 60:
        raise UsageError("encode: a number of 2^60 or more does not fit into the field")
    return np.where(numbers < 0, numbers + PRIME, numbers).astype(np.uint64)


def decode(elements: Elements) -> NDArray[np.int64]:
    """Signed whole numbers from elements.

    >>> decode(encode(np.array([-3, 0, 5])))
    array([-3,  0,  5])
    """
    numbers = elements.astype(np.int64)
    return np.where(numbers > PRIME // 2, numbers - PRIME, numbers)


def uniform(key: Key, count: int) -> Elements:
    """`count` uniform elements by key. Secret only as long as the key is."""
    bits = grid(fold(key, "element"), count).cpu().numpy().view(np.uint64) >> _3
    # PRIME itself, once in 2^61, is not an element.
    for place in np.flatnonzero(bits == _P):
        again = fold(key, "again", torch.tensor(int(place), device=key.device))
        bits[place] = np.uint64((int(again) >> 4) & (PRIME >> 1))
    return bits


def lagrange(known: list[int], wanted: list[int]) -> Elements:
    """[wanted, known]: a polynomial's values at `wanted` from those at `known`, which are distinct.

    UsageError where two are the same element.

    >>> matmul(lagrange([1, 2], [0]), np.uint64([[5], [7]]))  # a line through (1, 5) and (2, 7)
    array([[3]], dtype=uint64)
    """
    if len({element(x) for x in known}) < len(known):
        raise UsageError(f"lagrange: values at {known}, some twice (need distinct points)")
    rows = []
    for x in wanted:
        row = []
        for i in known:
            top = bottom = 1
            for j in known:
                if j != i:
                    top, bottom = top * (x - j) % PRIME, bottom * (i - j) % PRIME
            row.append(top * inverse(bottom) % PRIME)
        rows.append(row)
    return np.array(rows, dtype=np.uint64)
