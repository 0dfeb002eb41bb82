"""Bit planes, integer packing and entropy codes against plain references."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import DecodeError
from shoal.parts.transform._bits import (
    Reader,
    join,
    pack_integers,
    packed_bytes,
    unpack_integers,
    width_of,
)
from shoal.parts.transform._entropy import (
    code_tree,
    gaps_of,
    huffman_bits,
    huffman_lengths,
    huffman_planes,
    huffman_symbols,
    rice_bits,
    rice_gaps,
    rice_planes,
)


def plain_packing(values: list[int], width: int) -> bytes:
    number = sum(value << (width * place) for place, value in enumerate(values))
    return number.to_bytes((len(values) * width + 7) // 8, "little")


@given(width=st.integers(1, 40), data=st.data())
def test_integers_are_packed_like_one_long_number(width: int, data) -> None:
    values = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=40))
    packed = pack_integers(np.array(values, np.int64), width)
    assert packed == plain_packing(values, width)
    assert len(packed) == packed_bytes(len(values), width)
    octets = np.frombuffer(packed, np.uint8)
    assert unpack_integers(octets, width, len(values), "test").tolist() == values


def test_width_is_the_ceiling_of_the_logarithm() -> None:
    for count in range(1, 3000):
        assert width_of(count) == math.ceil(math.log2(count))


def test_reader_refuses_too_many_bits_left_over_bytes_and_dirty_padding() -> None:
    octets = np.frombuffer(b"\x0b\x00", np.uint8)
    with pytest.raises(DecodeError, match="17 bits wanted"):
        Reader(octets, "test").take(17)
    reader = Reader(octets, "test")
    reader.take(3)
    with pytest.raises(DecodeError, match="padding"):
        reader.close()
    reader.take(1)
    assert reader.close() == 1
    with pytest.raises(DecodeError, match="left over"):
        reader.finish()


def plain_huffman_bits(counts: list[int]) -> int:
    heap = [count for count in counts if count]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


counts_of = st.lists(st.integers(0, 50), min_size=2, max_size=16).filter(any)


@given(counts=counts_of)
def test_huffman_sizes_lengths_and_round_trip(counts: list[int]) -> None:
    bits = plain_huffman_bits(counts)
    assert int(huffman_bits(torch.tensor(counts))) == bits
    lengths = huffman_lengths(counts)
    rng = np.random.default_rng(sum(counts))
    symbols = rng.permutation(np.repeat(np.arange(len(counts), dtype=np.uint8), counts))
    node = code_tree(lengths)
    planes = huffman_planes(symbols, node)
    assert sum(map(len, planes)) == bits
    # The planes hold exactly the bits of the ordinary code, only in another order.
    words = {symbol: format(code, f"0{length}b") for symbol, code, length in node}
    if len(node) > 1:
        ordinary = "".join(words[int(symbol)] for symbol in symbols)
        assert sum(int(plane.sum()) for plane in planes) == ordinary.count("1")
        assert not any(a != b and words[b].startswith(words[a]) for a in words for b in words)
    data = join(planes) if planes else b""
    reader = Reader(np.frombuffer(data, np.uint8), "test")
    assert (huffman_symbols(reader, len(symbols), node) == symbols).all()
    reader.finish()


def test_huffman_of_the_specification_and_of_stacks() -> None:
    assert huffman_lengths([8, 1, 1]) == [1, 2, 2]
    assert huffman_bits(torch.tensor([[8, 1, 1], [0, 9, 0], [5, 5, 0]])).tolist() == [12, 0, 10]
    # Fibonacci counts give the deepest tree: 16 symbols, 15 bits.
    fibonacci = [1, 1]
    while len(fibonacci) < 16:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    assert max(huffman_lengths(fibonacci)) == 15
    for lengths in ([1, 1, 1], [1, 2], [0, 0], [2], [1, 2, 3]):
        with pytest.raises(DecodeError, match="prefix-free"):
            code_tree(lengths)


@given(
    n=st.integers(1, 200),
    rows=st.integers(1, 4),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_gaps_and_rice_codes(n: int, rows: int, share: float, seed: int) -> None:
    present = torch.from_numpy(np.random.default_rng(seed).random((rows, n)) < share)
    row, gaps = gaps_of(present)
    counts = present.sum(1)
    parameters, bits = rice_bits(gaps, row, counts)
    for place in range(rows):
        positions = np.flatnonzero(present[place].numpy())
        mine = gaps[row == place].numpy()
        assert (np.cumsum(mine + 1) - 1).tolist() == positions.tolist()
        every = [sum((g >> r) + 1 + r for g in mine.tolist()) for r in range(12)]
        assert int(bits[place]) == min(every), "not the best parameter"
        parameter = int(parameters[place])
        assert every[parameter] == min(every)
        remainders, unary = rice_planes(mine, parameter)
        assert len(remainders) + len(unary) == min(every)
        reader = Reader(np.frombuffer(join([remainders, unary]), np.uint8), "test")
        assert rice_gaps(reader, parameter, len(mine), len(unary)).tolist() == mine.tolist()


def test_gaps_of_the_specification() -> None:
    present = torch.zeros(2, 12, dtype=torch.bool)
    present[1, [3, 10]] = True
    row, gaps = gaps_of(present)
    assert (row.tolist(), gaps.tolist()) == ([1, 1], [3, 6])
    assert [part.tolist() for part in gaps_of(torch.zeros(2, 0, dtype=torch.bool))] == [[], []]


def test_rice_refuses_a_plane_with_other_gaps() -> None:
    for bits in ([1, 1, 0], [0, 1], [1, 1, 1]):
        reader = Reader(np.packbits(np.array(bits, np.uint8), bitorder="little"), "test")
        with pytest.raises(DecodeError, match="unary"):
            rice_gaps(reader, 0, 2, len(bits))
