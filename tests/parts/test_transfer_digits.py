"""Letters, the layers that learn them, digits on top, and samples that peers keep for testing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.optimise.sgd import SGD
from shoal.parts.tasks import task_of
from shoal.parts.tasks._letters import letters
from shoal.parts.tasks._splits import set_aside
from shoal.parts.tasks.digits import Digits
from shoal.parts.tasks.quadratics import Quadratics
from shoal.parts.tasks.transfer_digits import TransferDigits, _letters_task, pretrained
from shoal.rounds.local import descend
from shoal.rounds.strategy import Step
from shoal.rounds.task import Shard
from shoal.tensor import keyed

QUICK = {"pretraining": 10}


def test_letters_are_images_of_all_letters_in_several_faces() -> None:
    x, y = letters()
    assert x.shape[1:] == (1, 8, 8)
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    counts = y.bincount()
    assert len(counts) == 26
    assert len(set(counts.tolist())) == 1
    assert len(x) > 2000
    # An I is a thin bar in the middle, an O is a ring.
    shape = x[y == 14].mean(0)[0]
    assert float(shape[3:5, 3:5].mean()) < 0.5 * float(shape[1:7, 1].mean())
    bar = x[y == 8].mean(0)[0]
    assert float(bar[3:5, 3:5].mean()) > 2 * float(bar[3:5, :2].mean())
    assert torch.equal(letters.__wrapped__()[0], x)


def test_layers_are_learned_and_the_same_each_time() -> None:
    first, again = pretrained(10), pretrained(10)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [tuple(part.shape) for part in first] == [(128, 64), (128,), (64, 128), (64,)]
    task = _letters_task()
    start = task.evaluate(task.init(keyed.key_of(0, "letters")))["accuracy"]
    assert float(start) < 0.15


def test_another_process_has_the_same_fingerprint() -> None:
    code = (
        "from shoal.parts.tasks.transfer_digits import TransferDigits as T;"
        "print(T(peers=2, pretraining=10).fingerprint)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    own = TransferDigits(peers=2, **QUICK).fingerprint
    assert int(found.stdout) == own
    assert 0 < own < 1 << 48
    others = [
        TransferDigits(peers=2, pretraining=11), TransferDigits(peers=2, frozen=False),
        TransferDigits(peers=2, standardise=False, **QUICK),
    ]  # fmt: skip
    assert len({own, *[other.fingerprint for other in others]}) == 4


def test_features_are_standardised_over_the_training_images() -> None:
    task = TransferDigits(peers=2, **QUICK)
    train = task.x[:-300]
    torch.testing.assert_close(train.mean(0), torch.zeros(64), atol=1e-5, rtol=0)
    spread = train.std(0, correction=0)
    assert ((spread - 1).abs().lt(1e-3) | spread.eq(0)).all()
    assert (spread > 0).sum() > 32


@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize("frozen", [True, False])
def test_peers_have_their_classes_in_equal_numbers_and_tests_of_the_same(
    classes: int | None, frozen: bool
) -> None:
    task = TransferDigits(peers=20, classes_per_peer=classes, frozen=frozen, **QUICK)
    assert task.spec.dim == (650 if frozen else 17226)
    every = torch.arange(20)
    shard = task.shard(every)
    held = task.held(shard)
    assert held.mask.all()
    assert held.y.shape == (20, 40)
    owners = torch.zeros(10)
    for peer in range(20):
        trained = task.y[shard.index[peer, : int(shard.size[peer])]].bincount(minlength=10)
        tests = held.y[peer].bincount(minlength=10)
        kinds = classes or 10
        assert sorted(trained.tolist(), reverse=True)[:kinds] == [60 // kinds] * kinds
        assert torch.equal(tests * 60, trained * 40)
        owners += trained > 0
    assert (owners == 20 * (classes or 10) / 10).all()
    # Nobody trains on what anybody tests on, and nobody is scored on either.
    assert not np.intersect1d(shard.index.numpy(), shard.held.numpy()).size
    assert len(task.x) + len(task.test_x) == 1797
    assert len(task.test_y.unique()) == 10


def test_both_forms_have_the_same_samples() -> None:
    head, whole = (TransferDigits(peers=5, frozen=f, seed=3, **QUICK) for f in (True, False))
    assert torch.equal(head.shares.index, whole.shares.index)
    assert torch.equal(head.shares.held, whole.shares.held)
    assert torch.equal(head.test_y, whole.test_y)
    other = TransferDigits(peers=5, seed=4, **QUICK)
    assert not torch.equal(head.shares.index, other.shares.index)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"peers": 0}, "peers=0"), ({"peers": 2, "classes_per_peer": 11}, "1 to 10 classes"),
        ({"peers": 2, "samples_per_peer": 0}, "samples_per_peer=0"),
        ({"peers": 2, "own_tests": 121, "classes_per_peer": 4}, "own_tests=121 of 4 classes"),
        ({"peers": 2, "pretraining": -1}, "0 or more steps"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        TransferDigits(**settings)


def test_a_head_on_learned_features_learns_digits() -> None:
    """In 30 steps, where the whole network is still at the beginning."""
    accuracy = {}
    for frozen in (True, False):
        task = TransferDigits(peers=1, samples_per_peer=1000, pretraining=300, frozen=frozen)
        params = task.init(keyed.key_of(2))
        step = Step(0, task, task.shard(0), keyed.key_of(1), torch.tensor(True))
        params, _ = descend(task, SGD(0.5), params, SGD(0.5).init(params), step, steps=30)
        accuracy[frozen] = float(task.evaluate(params)["accuracy"])
    assert accuracy[True] > 0.8
    assert accuracy[True] > accuracy[False] + 0.1


# Samples that peers keep for testing.


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=40), count=st.integers(0, 20),
    cut=st.integers(0, 40),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_what_is_set_aside_is_a_share_of_each_class(
    labels: list[int], count: int, cut: int
) -> None:
    y = np.array(labels)
    parts = [np.arange(len(y))[:cut], np.arange(len(y))[cut:]]
    kept, held = set_aside(parts, y, count)
    for part, left, aside in zip(parts, kept, held, strict=True):
        found = aside[aside >= 0]
        assert sorted([*left, *found]) == sorted(part)
        assert set(y[left]) == set(y[part])
        spare = len(part) - len(np.unique(y[part]))
        assert len(found) == min(count, spare)
        for c in np.unique(y[part]) if count < spare else ():
            fair = count * (y[part] == c).sum() / len(part)
            assert abs((y[found] == c).sum() - fair) <= 1.5


def test_digits_kept_for_testing_are_not_trained_on() -> None:
    task = Digits(peers=4, own_tests=10, hidden=(8,), split="dirichlet", alpha=0.5)
    plain = Digits(peers=4, hidden=(8,), split="dirichlet", alpha=0.5)
    for peer in range(4):
        shard, whole = task.shard(peer), plain.shard(peer)
        kept = set(shard.index[: int(shard.size)].tolist())
        aside = set(shard.held.tolist()) - {-1}
        assert kept | aside == set(whole.index[: int(whole.size)].tolist())
        assert not kept & aside
        held = task.held(shard)
        assert torch.equal(held.y[held.mask], task.y[shard.held[held.mask]])
    with pytest.raises(UsageError, match="own_tests=-1"):
        Digits(peers=4, own_tests=-1)
    with pytest.raises(UsageError, match="set own_tests"):
        plain.held(plain.shard(0))


def test_tests_travel_with_the_shard() -> None:
    first = TransferDigits(peers=3, own_tests=20, classes_per_peer=2, **QUICK)
    second = TransferDigits(peers=3, own_tests=30, seed=1, classes_per_peer=3, **QUICK)
    joined = first.joined([first, second])
    held = joined.held(joined.shard(torch.arange(6)))
    assert held.mask.sum(-1).tolist() == [20] * 3 + [30] * 3
    alone = second.held(second.shard(1))
    assert torch.equal(held.y[4][held.mask[4]], alone.y)
    assert torch.equal(held.x[4][held.mask[4]], alone.x)
    with pytest.raises(UsageError, match="must share samples"):
        first.joined([first, TransferDigits(peers=3, own_tests=0, **QUICK)])


def test_outputs_are_those_of_each_model_on_its_samples() -> None:
    task = Digits(peers=3, own_tests=4, hidden=(8,))
    params = task.init(keyed.grid(keyed.key_of(1), 6).view(3, 2))
    x = task.held(task.shard(torch.arange(3))).x
    found = task.outputs(params, x.unsqueeze(1))
    assert found.shape == (3, 2, 4, 10)
    for peer in range(3):
        for model in range(2):
            alone = task.outputs(params[peer, model], x[peer])
            torch.testing.assert_close(found[peer, model], alone)
    views = task.spec.views(params[2, 1])
    weights = list(views.values())
    hidden = (x[2].flatten(1) @ weights[0].T + weights[1]).relu()
    torch.testing.assert_close(found[2, 1], hidden @ weights[2].T + weights[3])


def test_a_split_with_bad_tests_is_refused() -> None:
    x, y = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(6)
    index, size = torch.arange(6).view(2, 3), torch.tensor([3, 3])
    for held in (torch.tensor([[6], [0]]), torch.tensor([[-2], [0]]), torch.zeros(3, 1).long()):
        with pytest.raises(UsageError, match="held for testing"):
            task_of(torch.nn.Linear(3, 1), "mse", (x, y), (x, y), Shard(index, size, held=held))


def test_a_task_without_samples_has_none_to_keep() -> None:
    assert not hasattr(Quadratics(peers=2), "held")
