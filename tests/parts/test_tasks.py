"""Tasks: who gets which samples, batches, joined seeds, and modules that cannot be used."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal.base.errors import UsageError
from shoal.parts.tasks._images import held_out
from shoal.parts.tasks._splits import SPLITS, Split, shards_of, subset
from shoal.parts.tasks.base import ModuleTask, task_of
from shoal.parts.tasks.digits import Digits
from shoal.rounds.task import Batch, Shard
from shoal.tensor import keyed

CLASSES = 5


def table(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, CLASSES, count)


@given(
    kind=st.sampled_from(SPLITS),
    count=st.integers(40, 200), peers=st.integers(1, 20), seed=st.integers(0, 99),
    alpha=st.sampled_from([0.05, 1.0, 50.0]),
)  # fmt: skip
def test_a_split_gives_out_every_sample_exactly_once(
    kind: str, count: int, peers: int, seed: int, alpha: float
) -> None:
    parts = Split(kind, alpha=alpha).parts(table(count), peers, seed)
    assert len(parts) == peers
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert all(len(part) for part in parts)
    again = Split(kind, alpha=alpha).parts(table(count), peers, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_another_seed_gives_another_split() -> None:
    for kind in SPLITS:
        first, second = (Split(kind).parts(table(100), 5, seed) for seed in (0, 1))
        assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True)), kind


def test_uneven_parts_hold_few_classes_each_in_unequal_numbers() -> None:
    labels = np.random.default_rng(0).integers(0, 10, 1500)
    split = Split("uneven", classes_per_peer=3, spread=0.5)
    for seed in range(20):
        parts = split.parts(labels, 10, seed)
        held = [len(np.unique(labels[part])) for part in parts]
        assert 3 <= min(held) <= max(held) <= 5
        assert len(set(held)) > 1
        owners = [sum(c in labels[part] for part in parts) for c in range(10)]
        assert max(owners) - min(owners) <= 1
        sizes = [len(part) for part in parts]
        assert max(sizes) > 1.5 * min(sizes)


@given(count=st.integers(40, 300), peers=st.integers(1, 20), seed=st.integers(0, 99))
def test_iid_parts_are_equal_in_size_and_balanced_in_classes(
    count: int, peers: int, seed: int
) -> None:
    labels = table(count)
    parts = Split().parts(labels, peers, seed)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for label in range(CLASSES):
        counts = [int((labels[part] == label).sum()) for part in parts]
        assert max(counts) - min(counts) <= 1


def test_dirichlet_shares_follow_alpha() -> None:
    """The mean squared share of a class at one of n peers is (alpha + 1) / (n (n alpha + 1))."""
    peers, labels = 10, np.repeat(np.arange(CLASSES), 2000)
    for alpha in (0.1, 1.0, 100.0):
        squares = []
        for seed in range(60):
            parts = Split("dirichlet", alpha=alpha).parts(labels, peers, seed)
            for label in range(CLASSES):
                shares = np.array([(labels[part] == label).sum() for part in parts]) / 2000
                squares.append(peers * np.mean(shares**2))
        expected = (alpha + 1) / (peers * alpha + 1)
        error = np.std(squares) / np.sqrt(len(squares))
        assert abs(np.mean(squares) - expected) < 5 * error + 2e-4, alpha


def test_classes_per_peer_bounds_the_labels_of_each() -> None:
    labels = np.repeat(np.arange(10), 100)
    parts = Split("classes", classes_per_peer=2).parts(labels, 10, 3)
    seen = [len(np.unique(labels[part])) for part in parts]
    # A piece of 50 lies within one class of 100.
    assert max(seen) <= 2
    assert {len(part) for part in parts} == {100}


def test_sizes_spread_as_asked() -> None:
    labels = table(20_000)
    sizes = [len(p) for p in Split("sizes", spread=1.0).parts(labels, 200, 0)]
    assert np.log(sizes).std() == pytest.approx(1.0, abs=0.25)
    equal = [len(p) for p in Split("sizes", spread=0.0).parts(labels, 200, 0)]
    assert max(equal) - min(equal) <= 1


@given(
    kind=st.sampled_from(SPLITS),
    each=st.integers(1, 10), seed=st.integers(0, 99),
)  # fmt: skip
def test_samples_per_peer_is_exact_and_without_replacement_distinct(
    kind: str, each: int, seed: int
) -> None:
    parts = Split(kind, samples_per_peer=each).parts(table(100), 10, seed)
    assert [len(part) for part in parts] == [each] * 10
    everything = np.concatenate(parts)
    assert len(np.unique(everything)) == len(everything)


def test_with_replacement_any_number_of_peers_is_served() -> None:
    for kind in ("iid", "dirichlet", "classes", "sizes"):
        rule = Split(kind, samples_per_peer=30, with_replacement=True, classes_per_peer=2)
        labels = table(50)
        parts = rule.parts(labels, 40, 1)
        assert [len(part) for part in parts] == [30] * 40
        assert len(np.unique(np.concatenate(parts))) < 30 * 40
        if kind == "classes":
            assert max(len(np.unique(labels[part])) for part in parts) <= 2


def test_only_holders_get_data() -> None:
    parts = Split(holders=(1, 4)).parts(table(60), 6, 0)
    assert [len(part) for part in parts] == [0, 30, 0, 0, 30, 0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Split("random"), "split = 'random'; need one of iid, dirichlet"),
        (lambda: Split(alpha=0.0), "alpha=0.0"),
        (lambda: Split(samples_per_peer=0), "samples_per_peer=0"),
        (lambda: Split(with_replacement=True), "with_replacement needs samples_per_peer"),
        (lambda: Split().parts(table(5), 6, 0), "6 peers share 5 samples"),
        (lambda: Split("classes").parts(table(5), 3, 0), "need 6 pieces of 5 samples"),
        (lambda: Split(samples_per_peer=3).parts(table(5), 2, 0), "need more than the 5 samples"),
        (lambda: Split(holders=(0, 2)).parts(table(5), 2, 0), "ids 0 to 1"),
        (lambda: Split(holders=()).parts(table(5), 2, 0), "ids 0 to 1"),
        (lambda: subset(table(5), 6, 0), "need 1 to 5"),
        (lambda: Digits(peers=2000), "2000 peers share"),
        (lambda: Digits(peers=2, model="cnn", hidden=(3, 4)), "a cnn has one hidden layer"),
        (lambda: Digits(peers=2, label_noise=1.5), "label_noise=1.5"),
    ],
)
def test_splits_that_cannot_be_made_are_refused(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


@given(count=st.integers(1, 60), seed=st.integers(0, 9))
def test_a_subset_is_balanced_and_held_out_samples_are_disjoint(count: int, seed: int) -> None:
    labels = np.repeat(np.arange(CLASSES), 20)
    chosen = subset(labels, count, seed)
    assert len(np.unique(chosen)) == count
    counts = np.bincount(labels[chosen], minlength=CLASSES)
    assert counts.max() - counts.min() <= 1
    train, test = held_out(labels, 0.2)
    assert sorted([*train, *test]) == list(range(100))
    assert np.bincount(labels[test]).tolist() == [4] * CLASSES


def test_noisy_peers_learn_from_noisy_copies_of_their_own_samples() -> None:
    clean, noisy = Digits(peers=4), Digits(peers=4, noisy=(1, 3), pixel_noise=0.5)
    count = len(clean.y)
    assert len(noisy.y) == 9 * count
    for peer in range(4):
        before, after = clean.shard(peer), noisy.shard(peer)
        own = before.index[: int(before.size)]
        if peer not in (1, 3):
            assert torch.equal(after.index[: int(after.size)], own)
            continue
        places = after.index[: int(after.size)]
        assert (places >= count).all()
        assert sorted((places % count).tolist()) == sorted(own.tolist() * 8)
        assert torch.equal(noisy.y[places], clean.y[places % count])
        added = noisy.x[places] - clean.x[places % count]
        assert abs(float(added.std()) - 0.5) < 0.01
        assert abs(float(added.mean())) < 0.01
    assert torch.equal(noisy.test_x, clean.test_x)
    # Seeds share their images, so that they run together.
    other = Digits(peers=4, noisy=(0,), pixel_noise=0.5, seed=1)
    assert noisy.joined([noisy, other]).peers == 8
    with pytest.raises(UsageError, match=r"noisy=\(4,\)"):
        Digits(peers=4, noisy=(4,))


def test_label_noise_replaces_its_share_by_wrong_labels() -> None:
    clean, noisy = Digits(peers=4), Digits(peers=4, label_noise=0.3)
    labels = noisy.shares.labels
    assert labels is not None
    own = torch.arange(labels.shape[-1]) < noisy.shares.size.unsqueeze(-1)
    true = clean.y[noisy.shares.index]
    wrong = (labels != true)[own].double().mean().item()
    count = int(own.sum())
    assert abs(wrong - 0.3) < 5 * (0.21 / count) ** 0.5
    assert labels.min() >= 0
    assert labels.max() <= 9
    # Batches carry the noisy labels.
    shard = noisy.shard(2)
    batch = noisy.batch(shard, keyed.key_of(1), 200)
    assert int((batch.y != clean.batch(clean.shard(2), keyed.key_of(1), 200).y).sum()) > 20
    # The sample decides, so owners of one sample see one label.
    twice = Digits(peers=4, label_noise=0.3, samples_per_peer=800, with_replacement=True).shares
    seen: dict[int, int] = {}
    assert twice.labels is not None
    pairs = zip(twice.index.flatten().tolist(), twice.labels.flatten().tolist(), strict=True)
    assert all(seen.setdefault(sample, label) == label for sample, label in pairs)


def test_lost_samples_are_lost_from_their_round_on() -> None:
    until = Digits(peers=3, losers=(1,), lost_at=5).shares.until
    assert until is not None
    assert until.tolist()[1] == 5
    assert min(until.tolist()[0], until.tolist()[2]) > 10**12


def small(peers: int = 2, seed: int = 0) -> ModuleTask:
    parts = Split("sizes").parts(np.zeros(len(TABLE[0]), int), peers, seed)
    return task_of(MODULE, "mse", TABLE, TABLE, shards_of(parts))


MODULE = nn.Linear(3, 1)
TABLE = (torch.arange(120.0).view(40, 3) / 120, torch.arange(40.0))


def test_joined_seeds_are_the_single_tasks() -> None:
    first, second = Digits(peers=3, split="sizes"), Digits(peers=3, split="sizes", seed=1)
    joined = first.joined([first, second])
    assert joined.peers == 6
    keys = keyed.fold(keyed.key_of(2), torch.arange(6))
    params = joined.init(keys)
    batch = joined.batch(joined.shard(torch.arange(6)), keys, 16)
    gradients = joined.grad(params, batch)
    for number, task in enumerate((first, second)):
        rows = slice(3 * number, 3 * number + 3)
        shard = task.shard(torch.arange(3))
        single = task.batch(shard, keys[rows], 16)
        assert torch.equal(single.x, batch.x[rows])
        assert torch.equal(single.y, batch.y[rows])
        assert torch.equal(task.init(keys[rows]), params[rows])
        torch.testing.assert_close(task.grad(params[rows], single), gradients[rows])
        # Epochs go in the same order, however long the shards of the other seed are.
        ours = list(task.epoch(shard, keys[rows], 64))
        epochs = list(joined.epoch(joined.shard(torch.arange(6)), keys, 64))
        for a, b in zip(ours, epochs, strict=False):
            width = a.mask.shape[-1]
            assert torch.equal(a.mask, b.mask[rows, :width])
            assert torch.equal(a.y[a.mask], b.y[rows, :width][a.mask])


def test_tasks_of_other_data_or_models_are_not_joined() -> None:
    first = Digits(peers=3)
    for other in (Digits(peers=3, hidden=(8,)), Digits(peers=3, standardise=True), small()):
        with pytest.raises(UsageError, match="must share samples, model and loss"):
            first.joined([first, other])


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4), size=st.integers(1, 5))
@settings(max_examples=30)
def test_an_epoch_shows_every_own_sample_once(sizes: list[int], size: int) -> None:
    starts = np.cumsum([0, *sizes])
    parts = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    task = task_of(MODULE, "mse", TABLE, TABLE, shards_of(parts))
    keys = keyed.fold(keyed.key_of(0), torch.arange(len(sizes)))
    batches = list(task.epoch(task.shard(torch.arange(len(sizes))), keys, size))
    for peer, part in enumerate(parts):
        seen = [y for b in batches for y in b.y[peer][b.mask[peer]].tolist()]
        assert sorted(seen) == part.tolist()
    assert all(b.mask.shape[-1] <= size for b in batches)


def test_batches_are_drawn_from_own_samples_evenly_and_masked_without_any() -> None:
    task = task_of(MODULE, "mse", TABLE, TABLE, shards_of([np.arange(4), np.zeros(0, int)]))
    keys = keyed.fold(keyed.key_of(0), torch.arange(2))
    batch = task.batch(task.shard(torch.arange(2)), keys, 4000)
    assert batch.mask.all(-1).tolist() == [True, False]
    assert not batch.mask[1].any()
    counts = torch.bincount(batch.y[0].long(), minlength=4)
    # Chi-square with 3 degrees of freedom; 21.1 is its 0.9999 quantile.
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 21.1
    assert len(counts) == 4
    params = task.init(keys)
    assert task.loss(params, batch)[1] == 0.0
    assert not task.grad(params, batch)[1].any()


def test_a_peer_s_batch_does_not_depend_on_the_others() -> None:
    task = small(peers=3)
    keys = keyed.fold(keyed.key_of(4), torch.arange(3))
    together = task.batch(task.shard(torch.arange(3)), keys, 8)
    for peer in range(3):
        alone = task.batch(task.shard(peer), keys[peer], 8)
        assert torch.equal(alone.y, together.y[peer])


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + torch.rand(())


class Growing(Hidden):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.inner(x)


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (sequence(nn.BatchNorm1d(4)), "BatchNorm1d '1' mixes samples .* nn.GroupNorm"),
        (sequence(nn.BatchNorm1d(4, track_running_stats=False)), "mixes samples"),
        (sequence(nn.Dropout(0.5)), r"Dropout '1' drops with p=0.5; .*set p=0"),
        (nn.Linear(3, 2).requires_grad_(False), "no trainable parameter"),
        (nn.Sequential(nn.LazyLinear(2)), "lazy parameters"),
        (Hidden(), "hidden random numbers"),
        (Growing(), "buffer 'steps' changes"),
        (nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)), "must map"),
        (nn.Linear(3, 1), "labels reach from 0 to 1; .* allows 0 to 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_modules_that_no_peer_can_share_are_refused(module: nn.Module, words: str) -> None:
    samples = (torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1]))
    split = Shard(torch.arange(6).view(2, 3), torch.tensor([3, 3]))
    with pytest.raises(UsageError, match=words):
        task_of(module, "cross_entropy", samples, samples, split)


def test_dropout_that_never_drops_is_fine() -> None:
    samples = (torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1]))
    split = Shard(torch.arange(6).view(2, 3), torch.tensor([3, 3]))
    assert task_of(sequence(nn.Dropout(0.0)), "cross_entropy", samples, samples, split).peers == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": (torch.randn(6, 3), torch.zeros(5))}, "6 samples and 5 targets"),
        ({"train": (torch.randn(0, 3), torch.zeros(0))}, "at least one"),
        ({"test": (torch.randn(6, 4), torch.zeros(6))}, "need one shape"),
        ({"split": Shard(torch.arange(3), torch.tensor(3))}, r"index \[peers, most\]"),
        ({"split": Shard(torch.tensor([[6]]), torch.tensor([1]))}, "names sample 6 of 6"),
        ({"loss": "hinge"}, "no loss named 'hinge'"),
        ({"batching": "fast"}, "batching='fast'; use one of auto, stacked"),
        ({"module": nn.Sequential(nn.Linear(3, 1), nn.Softplus()), "batching": "stacked"},
         "needs an nn.Sequential of known layers"),
    ],
)  # fmt: skip
def test_tables_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    samples = (torch.randn(6, 3), torch.zeros(6))
    values: dict[str, Any] = {
        "module": nn.Linear(3, 1), "loss": "mse", "train": samples, "test": samples,
        "split": Shard(torch.arange(6).view(2, 3), torch.tensor([3, 3])), **change,
    }  # fmt: skip
    with pytest.raises(UsageError, match=words):
        task_of(**values)


def test_a_clip_must_be_positive() -> None:
    task = small()
    batch = Batch(torch.zeros(1, 3), torch.zeros(1), torch.ones(1, dtype=torch.bool))
    with pytest.raises(UsageError, match=r"clip=0\.0"):
        task.clipped_grad_sum(torch.zeros(4), batch, 0.0)


def test_the_user_s_module_is_not_touched() -> None:
    module = nn.Linear(3, 1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.eval()
    split = Shard(torch.arange(4).view(2, 2), torch.tensor([2, 2]))
    task = task_of(module, "mse", TABLE, TABLE, split)
    keys = keyed.fold(keyed.key_of(0), torch.arange(2))
    task.grad(task.init(keys), task.batch(task.shard(torch.arange(2)), keys, 2))
    assert not module.training
    assert all(torch.equal(before[n], v) for n, v in module.state_dict().items())


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((4, 2)), torch.zeros(4), "train has samples of type ndarray; need tensors"),
        (torch.tensor([[0.0], [float("nan")]]), torch.tensor([0, 1]), "1 of 2 train samples hold"),
        (torch.zeros(2, 1), torch.tensor([0.0, float("inf")]), "1 of 2 train targets hold NaN"),
        (torch.zeros(2, 1), torch.tensor([0.0, 1.0]), "float32 of shape (2,); cross_entropy needs"),
    ],
)
def test_samples_that_nothing_can_learn_from_are_refused(x: Any, y: Any, message: str) -> None:
    split = Shard(torch.tensor([[0], [1]]), torch.tensor([1, 1]))
    good = torch.zeros(2, 1), torch.tensor([0, 1])
    with pytest.raises(UsageError) as found:
        task_of(nn.Linear(1, 2), "cross_entropy", (x, y), good, split)
    assert message in str(found.value)


def test_shares_of_classes_are_targets_of_cross_entropy() -> None:
    split = Shard(torch.tensor([[0], [1]]), torch.tensor([1, 1]))
    soft = torch.zeros(2, 1), torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    assert task_of(nn.Linear(1, 2), "cross_entropy", soft, soft, split).peers == 2
