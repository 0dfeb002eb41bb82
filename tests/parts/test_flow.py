"""Flow matching: the exact decomposition, rules of ensembles, partitions, distances, tasks."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.flow.distance import energy_distance, frechet_distance, sliced_wasserstein
from shoal.parts.flow.ensemble import Ensemble, Rule, integrate
from shoal.parts.flow.gaussians import Gaussians
from shoal.parts.flow.partition import partition
from shoal.parts.flow.path import draws, on_path, time_features
from shoal.parts.tasks.flow_digits import FlowDigits, digit_features
from shoal.parts.tasks.flow_gaussians import FlowGaussians
from shoal.tensor import keyed

RULES = ("full", "uniform", "sample", "top1", "top2", "threshold0.2", "nucleus0.7")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tiny matrices: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(seed: int, components: int, clusters: int, dim: int = 2) -> Gaussians:
    """Components of any place, width and weight; every cluster has one."""
    g = generator(seed)
    means = 2 * torch.randn(components, dim, generator=g, dtype=torch.float64)
    deviations = 0.1 + torch.rand(components, generator=g, dtype=torch.float64)
    weights = 0.1 + torch.rand(components, generator=g, dtype=torch.float64)
    cluster = torch.arange(components) % clusters
    return Gaussians(means, deviations, weights, cluster)


def points(seed: int, count: int = 64, dim: int = 2) -> tuple[Tensor, Tensor]:
    g = generator(seed + 1000)
    x = 3 * torch.randn(count, dim, generator=g, dtype=torch.float64)
    t = torch.rand(count, generator=g, dtype=torch.float64)
    t[:2] = torch.tensor([0.0, 1.0])
    return x, t


# The identity on which everything rests.


@given(st.integers(0, 999), st.integers(1, 9), st.data())
@settings(max_examples=40)
def test_the_flow_is_the_posterior_mean_of_the_clusters(
    seed: int, components: int, data: st.DataObject
) -> None:
    clusters = data.draw(st.integers(1, components))
    exact = mixture(seed, components, clusters)
    x, t = points(seed)
    share, each = exact.posterior(x, t), exact.cluster_velocity(x, t)
    torch.testing.assert_close(share.sum(-1), torch.ones(len(x), dtype=torch.float64))
    whole = (share.unsqueeze(-1) * each).sum(-2)
    assert (whole - exact.velocity(x, t)).abs().max() <= 1e-10


@given(st.integers(0, 999), st.integers(2, 8), st.integers(0, 7))
@settings(max_examples=30)
def test_losing_a_cluster_leaves_exactly_the_flow_of_the_rest(
    seed: int, clusters: int, gone: int
) -> None:
    exact = mixture(seed, 2 * clusters, clusters)
    kept = torch.arange(clusters) != gone % clusters
    experts = tuple(lambda x, t, k=k: exact.cluster_velocity(x, t)[:, k] for k in range(clusters))
    whole = Ensemble(experts, exact.posterior)
    # Far away the others' probabilities underflow, and nothing is left to scale.
    x, t = points(seed)
    sure = exact.posterior(x, t)[:, kept].sum(-1) > 1e-9
    rest = whole.without(gone % clusters).velocity(x, t)
    torch.testing.assert_close(
        rest[sure], exact.only(kept).velocity(x, t)[sure], rtol=1e-6, atol=1e-6
    )
    assert (whole.velocity(x, t) - exact.velocity(x, t)).abs().max() <= 1e-10


def test_the_exact_flow_is_the_mean_velocity_of_many_samples() -> None:
    """By simulation: E[e - x_0 | x_t near a point], with importance weights instead of bins."""
    exact = mixture(3, 4, 2, dim=1)
    clean, _ = exact.draw(keyed.key_of(5), 400_000)
    for t, at in ((0.3, 0.5), (0.7, -0.4)):
        # Given x_0, the noise that leads to `at` is known, and so is how likely it is.
        noise = (at - (1 - t) * clean) / t
        weight = torch.exp(-0.5 * noise.square()).squeeze(-1)
        found = (weight * (noise - clean).squeeze(-1)).sum() / weight.sum()
        wanted = exact.velocity(
            torch.tensor([[at]], dtype=torch.float64), torch.tensor([t], dtype=torch.float64)
        )
        assert float(found) == pytest.approx(float(wanted), abs=0.02)


def test_at_pure_noise_the_posterior_is_the_prior() -> None:
    exact = mixture(7, 6, 3)
    x, _ = points(7)
    share = exact.posterior(x, torch.ones(len(x), dtype=torch.float64))
    torch.testing.assert_close(share, exact.priors().expand_as(share))


def test_samples_of_the_exact_flow_are_the_mixture() -> None:
    exact = Gaussians.ring(8)
    noise = torch.randn(4000, 2, generator=generator(1), dtype=torch.float64)
    made = integrate(exact.velocity, noise, 50, heun=True)
    real, component = exact.draw(keyed.key_of(2), 4000)
    shares = torch.bincount(exact.component(made), minlength=8) / 4000
    assert (shares - 1 / 8).abs().max() < 0.025
    assert energy_distance(made, real) < 0.01
    assert (exact.component(real) == component).double().mean() > 0.999


def test_heun_converges_faster_than_euler() -> None:
    exact = mixture(2, 3, 3)
    noise = torch.randn(200, 2, generator=generator(4), dtype=torch.float64)
    true = integrate(exact.velocity, noise, 800, heun=True)
    wrong = {
        (steps, heun): float((integrate(exact.velocity, noise, steps, heun=heun) - true).norm())
        for steps in (40, 80) for heun in (False, True)
    }  # fmt: skip
    assert wrong[40, False] / wrong[80, False] == pytest.approx(2.0, rel=0.3)
    assert wrong[40, True] / wrong[80, True] > 3.0


def test_mixtures_that_make_no_sense_are_refused() -> None:
    ones = torch.ones(3)
    with pytest.raises(UsageError, match="number them from 0"):
        Gaussians(torch.zeros(3, 2), ones, ones, torch.tensor([0, 2, 2]))
    with pytest.raises(UsageError, match="above 0"):
        Gaussians(torch.zeros(3, 2), ones, 0 * ones, torch.tensor([0, 1, 2]))
    with pytest.raises(UsageError, match="need means"):
        Gaussians(torch.zeros(3, 2), ones[:2], ones, torch.tensor([0, 1, 2]))
    with pytest.raises(UsageError, match=r"times from 0 to 1\.5"):
        Gaussians.ring(4).velocity(torch.zeros(2, 2), torch.tensor([0.0, 1.5]))
    with pytest.raises(UsageError, match="no cluster is kept"):
        Gaussians.ring(4).only(torch.zeros(4, dtype=torch.bool))


# Rules and ensembles.


@given(st.integers(0, 999), st.integers(1, 7), st.sampled_from(RULES))
@settings(max_examples=60)
def test_weights_are_a_mean_of_the_likeliest(seed: int, experts: int, word: str) -> None:
    share = torch.rand(20, experts, generator=generator(seed), dtype=torch.float64) ** 3
    share = share / share.sum(-1, keepdim=True)
    rule = Rule.of(word)
    weight = rule.weights(share, keyed.grid(keyed.key_of(seed), 20))
    torch.testing.assert_close(weight.sum(-1), torch.ones(20, dtype=torch.float64))
    counts = weight > 0
    if rule.kind == "top":
        assert (counts.sum(-1) == min(int(rule.amount), experts)).all()
    if rule.kind == "sample":
        assert (counts.sum(-1) == 1).all()
    if rule.kind in ("top", "threshold", "nucleus"):
        # Who counts is likelier than who does not, and counts in proportion.
        least = torch.where(counts, share, math.inf).amin(-1)
        assert (torch.where(counts, 0.0, share).amax(-1) <= least).all()
        kept = torch.where(counts, share, 0.0)
        torch.testing.assert_close(weight, kept / kept.sum(-1, keepdim=True))
    if rule.kind == "nucleus":
        mass = torch.where(counts, share, 0.0).sum(-1)
        assert (mass >= 0.7 - 1e-12).all()
        smallest = torch.where(counts, share, math.inf).amin(-1)
        assert (mass - smallest < 0.7 + 1e-12).all()
    if rule.kind == "threshold":
        assert ((counts & (share < 0.2)).sum(-1) <= (counts.sum(-1) == 1)).all()


def test_top_all_and_nucleus_of_everything_are_full() -> None:
    share = torch.rand(9, 5, generator=generator(3)).softmax(-1)
    full = Rule.of("full").weights(share)
    for word in ("top5", "top9", "nucleus1", "threshold0"):
        torch.testing.assert_close(Rule.of(word).weights(share), full)


def test_drawn_experts_come_as_often_as_they_are_likely() -> None:
    share = torch.tensor([0.1, 0.6, 0.3]).expand(20_000, 3)
    weight = Rule.of("sample").weights(share, keyed.grid(keyed.key_of(8), 20_000))
    torch.testing.assert_close(weight.mean(0), share[0], atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "word", ["", "best", "top0", "top1.5", "nucleus0", "nucleus1.1", "threshold2", "1top"]
)
def test_words_that_are_no_rule(word: str) -> None:
    with pytest.raises(UsageError, match="rule"):
        Rule.of(word)
    with pytest.raises(UsageError, match="needs a key"):
        Rule.of("sample").weights(torch.ones(2, 2))


def test_one_expert_is_plain_flow_matching_bit_for_bit() -> None:
    noise = torch.randn(50, 2, generator=generator(9))

    def only(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3 * x) + t.unsqueeze(-1)

    made, asked = Ensemble((only,)).sample(noise, 20)
    assert torch.equal(made, integrate(only, noise, 20))
    assert asked == 1.0


def test_experts_are_asked_only_where_they_count() -> None:
    asked: list[int] = []

    def expert(sign: float, x: Tensor, t: Tensor) -> Tensor:
        asked.append(len(x))
        return torch.full_like(x, sign)

    def router(x: Tensor, t: Tensor) -> Tensor:
        left = (x[:, 0] < 0).float().unsqueeze(-1)
        return torch.cat((0.9 * left + 0.05, 0.95 - 0.9 * left), -1)

    whole = Ensemble((partial(expert, -1.0), partial(expert, 1.0)), router)
    x = torch.tensor([[-1.0], [2.0], [3.0]])
    found = whole.velocity(x, torch.full((3,), 0.5), Rule.of("top1"))
    assert found.flatten().tolist() == [-1.0, 1.0, 1.0]
    assert asked == [1, 2]
    _, per_step = whole.sample(x, 4, "top1")
    assert per_step == 1.0
    assert whole.sample(x, 4, "full")[1] == 2.0


def test_ensembles_that_cannot_answer_name_the_expert() -> None:
    def narrow(x: Tensor, t: Tensor) -> Tensor:
        return x[:, :1]

    def even(x: Tensor, t: Tensor) -> Tensor:
        return torch.ones(len(x), 2)

    x, t = torch.zeros(3, 2), torch.zeros(3)
    with pytest.raises(UsageError, match=r"expert 1 gives \(3, 1\)"):
        Ensemble((lambda x, t: x, narrow), even).velocity(x, t)
    with pytest.raises(UsageError, match="no expert is there"):
        Ensemble((None, None), even)
    with pytest.raises(UsageError, match="2 experts and no router"):
        Ensemble((narrow, narrow))
    with pytest.raises(UsageError, match="router gives"):
        Ensemble((narrow, narrow, narrow), even).velocity(x, t)
    with pytest.raises(UsageError, match="times from -1 to -1"):
        Ensemble((narrow,)).velocity(x, t - 1)
    with pytest.raises(UsageError, match="steps=0"):
        Ensemble((lambda x, t: x,)).sample(x, 0)


# Partitions.


@given(st.integers(0, 99), st.integers(1, 6), st.floats(1.0, 2.0))
@settings(max_examples=25)
def test_a_partition_is_disjoint_complete_and_balanced(seed: int, k: int, balance: float) -> None:
    rng = np.random.default_rng(seed)
    # Blobs of very different sizes: nearest centers alone would be far from balanced.
    sizes = rng.integers(1, 60, 4)
    x = np.concatenate([rng.normal(5 * i, 1.0, (n, 3)) for i, n in enumerate(sizes)])
    if len(x) < k:
        return
    fine = max(k, len(x) // 4)
    found = partition(x, k, fine, balance, seed)
    counts = np.bincount(found, minlength=k)
    assert found.shape == (len(x),)
    assert counts.sum() == len(x)
    assert len(counts) == k
    assert counts.min() >= 1
    assert np.array_equal(found, partition(x, k, fine, balance, seed))
    # At most one group more than the room, and a group is a small part of all.
    assert counts.max() <= balance * len(x) / k + len(x) / 2


def test_a_partition_of_digits_is_balanced_within_its_ratio() -> None:
    for seed in range(3):
        task = FlowDigits(peers=8, fine=256, seed=seed, hidden=(4,))
        sizes = task.shares.size
        assert int(sizes.sum()) == 1438
        assert int(sizes.max()) <= 1.25 * 1438 / 8 + 30
        rows = [task.shares.index[p, : int(n)] for p, n in enumerate(sizes)]
        assert len(torch.unique(torch.cat(rows))) == 1438


def test_separate_blobs_are_the_clusters() -> None:
    exact = Gaussians.ring(8)
    x, component = exact.draw(keyed.key_of(1), 4000)
    found = partition(x.numpy(), 8, seed=4)
    pairs = {(int(a), int(b)) for a, b in zip(found, component, strict=True)}
    counts = {pair: sum((found == pair[0]) & (component.numpy() == pair[1])) for pair in pairs}
    assert sum(sorted(counts.values())[-8:]) > 0.99 * 4000


@pytest.mark.parametrize(
    ("rows", "k", "more", "match"),
    [
        (3, 4, {}, "4 clusters of 3 samples"),
        (3, 0, {}, "0 clusters"),
        (9, 4, {"fine": 2}, "fine=2"),
        (9, 4, {"balance": 0.5}, "balance=0.5"),
    ],
)
def test_partitions_that_cannot_be(rows: int, k: int, more: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        partition(np.arange(3.0 * rows).reshape(rows, 3), k, **more)
    with pytest.raises(UsageError, match="1 different samples for 2"):
        partition(np.zeros((9, 3)), 2)


# Distances.


def test_distances_are_those_of_the_libraries() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (300, 1)), rng.normal(0.5, 2, (200, 1))
    both = torch.from_numpy(x), torch.from_numpy(y)
    # scipy's is the root of the same number in one dimension, up to its factor.
    assert energy_distance(*both) == pytest.approx(
        stats.energy_distance(x[:, 0], y[:, 0]) ** 2, rel=1e-9
    )
    z = rng.normal(0.5, 2, (300, 1))
    found = sliced_wasserstein(both[0], torch.from_numpy(z), keyed.key_of(1))
    assert found == pytest.approx(stats.wasserstein_distance(x[:, 0], z[:, 0]), rel=1e-9)
    a, b = rng.normal(0, 1, (400, 5)) @ rng.normal(0, 1, (5, 5)), rng.normal(1, 2, (300, 5))
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(wanted)


def test_equal_sets_have_no_distance() -> None:
    x = torch.randn(100, 3, generator=generator(5))
    assert energy_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-12)
    assert sliced_wasserstein(x, x.flip(0), keyed.key_of(1)) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-6)


def test_distances_refuse_tables_that_do_not_fit() -> None:
    x = torch.zeros(4, 2)
    for wrong in (torch.zeros(4, 3), torch.zeros(1, 2), torch.zeros(4)):
        for distance in (energy_distance, frechet_distance):
            with pytest.raises(UsageError, match="need two tables"):
                distance(x, wrong)
    with pytest.raises(UsageError, match="4 and 5 samples"):
        sliced_wasserstein(x, torch.zeros(5, 2), keyed.key_of(0))


# The path and the tasks.


def test_time_features_tell_all_times_apart() -> None:
    t = torch.linspace(0, 1, 101)
    found = time_features(t, 6)
    assert found.shape == (101, 12)
    assert torch.cdist(found, found).fill_diagonal_(9.0).min() > 0.1


def test_draws_are_uniform_times_and_normal_noise() -> None:
    t, noise = draws(keyed.key_of(3), 5000, 2, torch.float64)
    assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(t.numpy(), noise[:, 0].numpy())[0, 1]) < 0.05


def test_batches_lie_on_the_path_and_tell_its_velocity() -> None:
    task = FlowGaussians(peers=3, hidden=(8,), train_samples=300)
    keys = keyed.grid(keyed.key_of(2), 3)
    batch = task.batch(task.shard(torch.arange(3)), keys, 16)
    assert batch.x.shape == (3, 16, 2 + 12)
    features = batch.x[..., 2:]
    # The slowest pair gives the time: cos and sin of pi t / 2.
    t = torch.atan2(features[..., 6], features[..., 0]) * 2 / math.pi
    clean = batch.x[..., :2] - t.unsqueeze(-1) * batch.y
    own = task.x[task.shares.index, :2]
    apart = torch.cdist(clean, own, compute_mode="donot_use_mm_for_euclid_dist").amin(-1)
    assert apart.max() < 1e-4
    torch.testing.assert_close(on_path(clean, clean + batch.y, t), batch.x[..., :2])
    alone = task.batch(task.shard(1), keys[1], 16)
    assert torch.equal(alone.x, batch.x[1])
    assert torch.equal(alone.y, batch.y[1])
    epoch = list(task.epoch(task.shard(0), keys[0], 32))
    assert sum(int(each.mask.sum()) for each in epoch) == int(task.shard(0).size)
    assert not torch.equal(epoch[0].x[:4], epoch[1].x[:4])


def test_seeds_run_together_as_they_do_alone() -> None:
    tasks = [FlowGaussians(peers=2, seed=s, hidden=(8,), train_samples=200) for s in (0, 1)]
    both = tasks[0].joined(tasks)
    keys = keyed.grid(keyed.key_of(1), 4)
    params = both.init(keys)
    found = both.grad(params, both.batch(both.shard(torch.arange(4)), keys, 8))
    for row in range(4):
        task, peer = tasks[row // 2], row % 2
        alone = task.grad(params[row], task.batch(task.shard(peer), keys[row], 8))
        torch.testing.assert_close(found[row], alone)


def test_the_exact_flow_has_no_error_and_the_least_loss() -> None:
    task = FlowGaussians(peers=8, hidden=(8,))

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return task.exact.velocity(x.double(), t.double()).float()

    best = task.held_out(exact)
    assert best["velocity_error"] < 1e-10
    worse = task.held_out(lambda x, t: exact(x, t) + 0.1)
    assert worse["velocity_error"] == pytest.approx(0.02, rel=1e-3)
    # The loss of the exact flow is the part that nobody can learn.
    assert worse["flow_loss"] - best["flow_loss"] == pytest.approx(0.01, abs=0.01)


def test_the_posterior_of_clusters_and_of_random_parts() -> None:
    x, t = torch.randn(50, 2, generator=generator(1)), torch.full((50,), 0.4)
    clusters = FlowGaussians(peers=8, hidden=(8,))
    share = clusters.posterior(x, t)
    exact = clusters.exact.posterior(x.double(), t.double()).float()
    # The same up to the order of the peers.
    torch.testing.assert_close(share.sort(-1).values, exact.sort(-1).values, atol=0.01, rtol=0)
    random = FlowGaussians(peers=4, hidden=(8,), split="iid").posterior(x, t)
    torch.testing.assert_close(random, torch.full_like(random, 0.25), atol=0.01, rtol=0)


def test_a_router_sees_noised_samples_and_their_owners() -> None:
    task = FlowGaussians(peers=4, components=4, hidden=(8,), train_samples=400)
    routing = task.routing(hidden=(8,))
    assert routing.peers == 1
    assert int(routing.shard(0).size) == 400
    assert routing.classes == 4
    batch = routing.batch(routing.shard(0), keyed.key_of(4), 64)
    assert batch.y.dtype == torch.int64
    t = torch.atan2(batch.x[:, 8], batch.x[:, 2]) * 2 / math.pi
    early = t < 0.1
    likely = task.posterior(batch.x[:, :2], t).argmax(-1)
    assert early.any()
    assert (likely[early] == batch.y[early]).all()
    params = routing.init(keyed.key_of(1))
    share = routing.probabilities(params, batch.x[:, :2], t)
    torch.testing.assert_close(share.sum(-1), torch.ones(64))


def test_ensembles_of_parameters_warn_of_the_missing_and_refuse_strangers() -> None:
    task = FlowGaussians(peers=3, hidden=(8,), train_samples=90)
    params = list(task.init(keyed.grid(keyed.key_of(0), 3)))
    with pytest.warns(UserWarning, match=r"experts \[1\] are missing"):
        some = task.ensemble([params[0], None, params[2]], task.posterior)
    x, t = task.test_points()
    whole = task.ensemble(params, task.posterior)
    assert torch.equal(whole.without(1).velocity(x, t), some.velocity(x, t))
    with pytest.raises(UsageError, match=r"expert 2 has parameters \(3,\)"):
        task.ensemble([*params[:2], torch.zeros(3)], task.posterior)


def test_digit_features_tell_digits_from_noise() -> None:
    task = FlowDigits(peers=2, hidden=(4,), split="iid")
    everybody = torch.ones(2, dtype=torch.bool)
    real = task.clean()
    assert real.shape == (1438, 64)
    assert (real.min(), real.max()) == (-1.0, 1.0)
    halves = task.quality(real[::2], everybody)["digit_fd"]
    noise = torch.rand(700, 64, generator=generator(2)) * 2 - 1
    assert task.quality(noise, everybody)["digit_fd"] > 20 * halves
    # One class alone is no set of digits.
    ones = task.clean(torch.tensor([True, False]))[:1]
    assert task.quality(ones.repeat(300, 1) + 0.01 * noise[:300], everybody)["digit_fd"] > halves
    assert digit_features(real[:5]).shape == (5, 32)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"split": "cluster"}, "split='cluster'; need one of clusters, iid"),
        ({"frequencies": 0}, "frequencies=0"),
        ({"train_samples": 2, "peers": 3}, "3 clusters of 2 samples"),
    ],
)
def test_tasks_that_cannot_be(more: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        FlowGaussians(**{"peers": 2, "hidden": (4,), **more})
