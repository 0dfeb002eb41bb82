"""Keyed draws on tensors are the draws of Python numbers, bit for bit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.base import keyed as plain
from shoal.tensor import keyed

integers = st.integers(-(1 << 63), (1 << 63) - 1)
words = st.lists(integers | st.text(max_size=6), max_size=5)


@given(integers, words)
def test_keys_and_draws_equal_those_of_python(seed: int, parts: list[int | str]) -> None:
    key = keyed.key_of(seed, *parts)
    state = plain.fold(0, seed, *parts)
    assert key.item() == plain.signed(state)
    assert keyed.uniform(key).item() == plain.unit(state)
    # Two libraries' logarithm and cosine differ in their last bits.
    draw = keyed.normal(key, dtype=torch.float64).item()
    assert abs(draw - plain.normal(seed, *parts)) < 1e-12


@given(integers, st.lists(integers, min_size=1, max_size=6), st.lists(integers, min_size=1))
def test_tensor_words_broadcast_over_tensor_keys(
    seed: int, left: list[int], right: list[int]
) -> None:
    folded = keyed.fold(
        keyed.key_of(seed), torch.tensor(left).unsqueeze(-1), "x", torch.tensor(right)
    )
    assert folded.shape == (len(left), len(right))
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            assert folded[i, j].item() == plain.signed(plain.fold(0, seed, a, "x", b))


@given(integers, st.integers(1, 8))
def test_a_grid_numbers_each_key(seed: int, count: int) -> None:
    keys = keyed.fold(keyed.key_of(seed), torch.arange(3))
    grid = keyed.grid(keys, count)
    assert grid.shape == (3, count)
    assert torch.equal(grid[1], keyed.fold(keys[1], torch.arange(count)))


@given(st.integers(1 << 63, (1 << 64) - 1))
def test_unsigned_words_are_their_signed_twins(word: int) -> None:
    assert keyed.key_of(0, word).item() == keyed.key_of(0, plain.signed(word)).item()
    key = keyed.key_of(5)
    assert keyed.fold(key, word).item() == plain.signed(plain.fold(0, 5, word))


def test_types_are_what_was_asked_for() -> None:
    key = keyed.key_of(1)
    assert key.dtype == torch.int64
    assert key.shape == ()
    assert keyed.uniform(key).dtype == torch.float64
    assert keyed.uniform(key, dtype=torch.float32).dtype == torch.float32
    assert keyed.normal(key).dtype == torch.float32
