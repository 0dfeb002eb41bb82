"""Keyed draws are the same numbers in Python and in torch."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base import keyed as plain
from shoal.tensor import keyed

WORDS = st.lists(st.integers(0, 2**40), min_size=1, max_size=4)


@given(seed=st.integers(0, 2**31), words=WORDS)
@settings(max_examples=100, deadline=None)
def test_fold_and_uniform_agree(seed: int, words: list[int]) -> None:
    key = keyed.key_of(seed, "draw")
    folded = keyed.fold(key, *words)
    assert int(folded) == plain.signed(plain.fold(plain.fold(0, seed, "draw"), *words))
    drawn = keyed.uniform(keyed.key_of(seed), *words)
    assert float(drawn) == plain.unit(plain.fold(plain.fold(0, seed), *words))


def test_a_stack_of_keys_draws_what_each_draws_alone() -> None:
    keys = torch.stack([keyed.key_of(seed, "peer") for seed in range(5)])
    stacked = keyed.uniform(keys.unsqueeze(-1), torch.arange(7))
    for row, key in enumerate(keys):
        assert torch.equal(stacked[row], keyed.uniform(key, torch.arange(7)))
    assert len(stacked.flatten().unique()) == 35
