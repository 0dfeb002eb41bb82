"""Noise of a binary tree: against nodes written out, its variance, and dp-accounting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.privacy.ledger import ORDERS, Ledger
from shoal.parts.privacy.tree_noise import TreeNoise, TreeRelease, TreeSums, tree_levels
from shoal.tensor.keyed import fold, grid, key_of, normal
from shoal.testing.pretend_device import check_device

DIM = 3


def running(tree: TreeNoise, terms: int, key: torch.Tensor) -> list[torch.Tensor]:
    """The noise of every running sum, trees one after the other."""
    sums, total, out = tree.init(torch.zeros(*key.shape, DIM)), torch.zeros(*key.shape, DIM), []
    for term in range(terms):
        sums, step = tree.after(sums, fold(key, term))
        total = total + step
        out.append(total)
    return out


def nodes_of(terms: int) -> list[tuple[int, int]]:
    """(first, length) of the nodes that make up the first so many terms."""
    found, start = [], 0
    for level in reversed(range(terms.bit_length())):
        if terms >> level & 1:
            found.append((start, 1 << level))
            start += 1 << level
    return found


@given(leaves=st.integers(1, 20), trees=st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_running_sums_carry_the_noises_of_their_nodes(leaves: int, trees: int) -> None:
    """A node's noise is drawn with the term that completes it."""
    key = key_of(4)
    found = running(TreeNoise(leaves, 2.0), leaves * trees, key)
    before = torch.zeros(DIM)
    for number, total in enumerate(found):
        tree, terms = number // leaves, number % leaves + 1
        expected = before.clone()
        for first, length in nodes_of(terms):
            last = tree * leaves + first + length - 1
            expected += 2.0 * normal(grid(fold(fold(key, last), "tree"), DIM))
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
        if terms == leaves:
            before = total


def test_a_term_is_in_no_more_nodes_than_are_counted() -> None:
    for leaves in range(1, 70):
        shown = {node for terms in range(1, leaves + 1) for node in nodes_of(terms)}
        most = max(
            sum(first <= term < first + length for first, length in shown) for term in range(leaves)
        )
        assert most == tree_levels(leaves) == TreeNoise(leaves).levels


def test_noise_grows_with_the_logarithm() -> None:
    keys = grid(key_of(9), 4000)
    found = running(TreeNoise(16, 1.0), 16, keys)
    for terms in (1, 3, 7, 8, 15, 16):
        variance = float(found[terms - 1].double().var())
        assert variance == pytest.approx(bin(terms).count("1"), rel=0.05)


def test_rows_that_are_elsewhere_in_their_trees() -> None:
    """Each row has its own count: a peer that missed rounds goes on where it was."""
    tree, keys = TreeNoise(4, 1.0), grid(key_of(2), 3)
    alone = [running(tree, 6, key) for key in keys]
    sums = tree.init(torch.zeros(3, DIM))
    totals, taken = torch.zeros(3, DIM), [0, 0, 0]
    for round in range(12):
        here = torch.tensor([True, round % 2 == 0, round >= 6])
        term = torch.tensor(taken)
        after, step = tree.after(sums, fold(keys, term))
        pick = here[:, None]
        totals = torch.where(pick, totals + step, totals)
        sums = TreeSums(
            torch.where(pick[..., None], after.nodes, sums.nodes),
            torch.where(here, after.count, sums.count),
        )
        taken = [n + bool(h) for n, h in zip(taken, here, strict=True)]
        for row in range(3):
            if 0 < taken[row] <= 6:
                torch.testing.assert_close(totals[row], alone[row][taken[row] - 1])


@pytest.mark.parametrize("leaves", [1, 2, 7, 8, 100])
def test_accountant_is_that_of_dp_accounting(leaves: int) -> None:
    dp, rdp = pytest.importorskip("dp_accounting"), pytest.importorskip("dp_accounting.rdp")
    for noise in (1.0, 5.0, 20.0):
        theirs = rdp.RdpAccountant(ORDERS, dp.NeighboringRelation.REPLACE_SPECIAL)
        theirs.compose(dp.SingleEpochTreeAggregationDpEvent(noise, leaves), 3)
        ours = Ledger().after(TreeRelease(noise, leaves), 3).epsilon(1e-5)
        reference = theirs.get_epsilon(1e-5)
        assert ours == pytest.approx(reference, rel=1e-9, abs=1e-6)


def test_a_release_is_monotone_and_infinite_without_noise() -> None:
    curve = [TreeRelease(3.0, leaves).renyi(2.0) for leaves in range(1, 40)]
    assert curve == sorted(curve)
    assert TreeRelease(2.0, 5).renyi(2.0) > TreeRelease(2.5, 5).renyi(2.0)
    assert TreeRelease(0.0, 5).renyi(2.0) == math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TreeNoise(0), "leaves=0; need at least one term"),
        (lambda: TreeNoise(3, -1.0), "deviation=-1.0"),
        (lambda: TreeNoise(3, math.inf), "deviation=inf"),
    ],
)
def test_errors_name_the_argument(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_the_same_noise_on_a_device_without_a_wait() -> None:
    def steps(like: torch.Tensor, key: torch.Tensor) -> tuple[TreeSums, torch.Tensor]:
        tree, out = TreeNoise(3, 2.0), []
        sums = tree.init(like)
        for term in range(5):
            sums, step = tree.after(sums, fold(key, term))
            out.append(step)
        return sums, torch.stack(out)

    assert not check_device(steps, torch.zeros(2, DIM), grid(key_of(1), 2)).waits
