"""Huffman and Golomb-Rice codes: exact sizes for stacks of rows, bit planes for one row.

Both codes are stored plane by plane rather than symbol by symbol: the bits, and hence the length,
are those of the ordinary code, and decoding needs no loop over entries.
"""

from __future__ import annotations

import heapq

import numpy as np
import torch
from torch import Tensor

from shoal.base.errors import DecodeError
from shoal.parts.transform._bits import Bits, Reader, from_bits, to_bits

_ABSENT = 1 << 62
Node = list[tuple[int, int, int]]
"""The (symbol, code, length) triples below a node of the code tree."""


def first_minimum(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Minimum along `dim` and its lowest index (`torch.min` leaves the choice among ties open)."""
    least = values.amin(dim, keepdim=True)
    index = (values > least).to(torch.int64).cumprod(dim).sum(dim)
    return least.squeeze(dim), index


def huffman_bits(counts: Tensor) -> Tensor:
    """Length [...] of a Huffman code for symbol counts int64 [..., symbols]; 0 for one symbol.

    The sum of the weights of all merges equals the sum of count times code length.

    >>> huffman_bits(torch.tensor([8, 1, 1])).item()
    12
    """
    weights = torch.where(counts > 0, counts, _ABSENT)
    total = torch.zeros_like(counts[..., 0])
    for _ in range(counts.shape[-1] - 1):
        weights = weights.sort(-1).values
        left, right = weights[..., 0], weights[..., 1]
        real = right < _ABSENT
        total = total + torch.where(real, left + right, 0)
        merged = torch.where(real, left + right, left)
        weights = torch.cat((merged.unsqueeze(-1), weights[..., 2:]), -1)
    return total


def huffman_lengths(counts: list[int]) -> list[int]:
    """Code length of each symbol, 0 = absent; a single symbol has length 1 and costs no bits."""
    lengths = [0] * len(counts)
    heap = [(count, symbol, [symbol]) for symbol, count in enumerate(counts) if count]
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        left, right = heapq.heappop(heap), heapq.heappop(heap)
        members = left[2] + right[2]
        for symbol in members:
            lengths[symbol] += 1
        heapq.heappush(heap, (left[0] + right[0], min(left[1], right[1]), members))
    return lengths


def code_tree(lengths: list[int]) -> Node:
    """The canonical code of these lengths; DecodeError unless it is complete and prefix-free."""
    order = sorted((length, symbol) for symbol, length in enumerate(lengths) if length)
    space = sum(2.0**-length for length, _ in order)
    if not order or (len(order) > 1 and space != 1) or (len(order) == 1 and order[0][0] != 1):
        raise DecodeError(f"huffman: code lengths {lengths} form no complete prefix-free code")
    node: Node = []
    code = 0
    for place, (length, symbol) in enumerate(order):
        if place:
            code = (code + 1) << (length - order[place - 1][0])
        node.append((symbol, code, length))
    return node


def _children(node: Node, depth: int) -> tuple[Node, Node]:
    left = [leaf for leaf in node if not leaf[1] >> (leaf[2] - 1 - depth) & 1]
    right = [leaf for leaf in node if leaf[1] >> (leaf[2] - 1 - depth) & 1]
    return left, right


def huffman_planes(symbols: np.ndarray, node: Node, depth: int = 0) -> list[Bits]:
    """The code bits of uint8 symbols [n], regrouped by node of the code tree (preorder).

    Source of the layout: the Huffman-shaped wavelet tree, Grossi, Gupta and Vitter 2003.
    """
    if len(node) == 1:
        return []
    left, right = _children(node, depth)
    table = np.zeros(256, np.uint8)
    table[[leaf[0] for leaf in right]] = 1
    bits = table[symbols]
    planes = [bits]
    if len(left) > 1:
        planes += huffman_planes(symbols[bits == 0], left, depth + 1)
    if len(right) > 1:
        planes += huffman_planes(symbols[bits == 1], right, depth + 1)
    return planes


def huffman_symbols(reader: Reader, count: int, node: Node, depth: int = 0) -> np.ndarray:
    """Inverse of `huffman_planes`: uint8 [count]."""
    if len(node) == 1:
        return np.full(count, node[0][0], np.uint8)
    left, right = _children(node, depth)
    mask = reader.take(count).view(bool)
    ones = int(np.count_nonzero(mask))
    symbols = np.empty(count, np.uint8)
    symbols[~mask] = huffman_symbols(reader, count - ones, left, depth + 1)
    symbols[mask] = huffman_symbols(reader, ones, right, depth + 1)
    return symbols


def gaps_of(present: Tensor) -> tuple[Tensor, Tensor]:
    """For bool [rows, n]: the row of each True entry, and how many False precede it since the last.

    >>> present = torch.zeros(1, 12, dtype=torch.bool)
    >>> present[0, [3, 10]] = True
    >>> gaps_of(present)[1]
    tensor([3, 6])
    """
    row, column = present.nonzero().unbind(1)
    before = torch.nn.functional.pad(column[:-1], (1, 0), value=-1)
    if len(row):
        fresh = torch.nn.functional.pad(row[1:] != row[:-1], (1, 0), value=True)
        before = torch.where(fresh, -1, before)
    else:
        before = column
    return row, column - before - 1


def rice_bits(gaps: Tensor, row: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Best Golomb-Rice parameter and length in bits, int64 [rows] each.

    gaps, row: as of `gaps_of`; counts: int64 [rows] gaps of each row. A gap g costs
    (g >> r) + 1 + r bits. The optimum never exceeds ceil(log2(mean gap)), so few r are tried.
    Source: Golomb 1966; Rice 1979.
    """
    totals = torch.zeros_like(counts).index_add_(0, row, gaps)
    largest_mean = float((totals / counts.clamp(min=1)).amax()) if len(counts) else 0.0
    trials = []
    for parameter in range(max(int(np.ceil(largest_mean)) - 1, 0).bit_length() + 1):
        unary = torch.zeros_like(counts).index_add_(0, row, gaps >> parameter)
        trials.append(unary + counts * (1 + parameter))
    length, parameter = first_minimum(torch.stack(trials), 0)
    return parameter, length


def rice_planes(gaps: np.ndarray, parameter: int) -> list[Bits]:
    """Remainders of `parameter` bits, then quotients in unary (zeros closed by a one)."""
    ends = np.cumsum((gaps >> parameter) + 1)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    unary[ends - 1] = 1
    return [to_bits(gaps & ((1 << parameter) - 1), parameter), unary]


def rice_gaps(reader: Reader, parameter: int, count: int, unary_bits: int) -> np.ndarray:
    """Inverse of `rice_planes`: int64 [count]."""
    remainder = from_bits(reader.take(count * parameter), parameter, count).astype(np.int64)
    ends = np.flatnonzero(reader.take(unary_bits))
    if (
        len(ends) != count
        or (count == 0) != (unary_bits == 0)
        or (count and ends[-1] != unary_bits - 1)
    ):
        raise DecodeError(f"gap: unary plane holds {len(ends)} gaps, not {count}")
    quotient = np.diff(ends, prepend=-1) - 1
    return (quotient << parameter) | remainder
