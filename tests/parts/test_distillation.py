"""Distillation against closed forms, finite differences and plain autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap

from shoal.base.errors import UsageError
from shoal.parts.distillation.augmentation import PLAIN, Augmentation
from shoal.parts.distillation.contrast import contrastive_loss
from shoal.parts.distillation.distribution_matching import (
    DistributionMatching,
    class_means,
    distill_local,
    matching_loss,
)
from shoal.parts.distillation.gradient_matching import (
    GradientMatching,
    cross_entropy,
    distill_global,
    gradient_distance,
    matching_distance,
    pseudo_gradient,
)
from shoal.parts.distillation.network import network_of
from shoal.parts.distillation.virtual_data import labels, members, real_images, statistics
from shoal.parts.tasks.base import task_of
from shoal.parts.tasks.digits import Digits
from shoal.parts.tasks.digits_domains import DOMAINS, DigitsDomains, as_domain
from shoal.rounds.task import Batch, Shard
from shoal.tensor.keyed import grid, key_of

KEY = key_of(3, "distillation")


def digits(**settings) -> Digits:
    return Digits(peers=2, hidden=(24, 16), **settings)


def batch_of(task: Digits, size: int = 40) -> Batch:
    return task.batch(task.shard(0), KEY, size)


# Views.


def test_a_plain_view_is_the_image() -> None:
    images = torch.rand(3, 4, 2, 5, 7)
    assert torch.equal(PLAIN.draw(grid(KEY, 3), images).of(images), images)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_views_are_affine_and_their_transpose_brings_gradients_back(seed: int) -> None:
    images = torch.rand(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
    view = Augmentation().draw(grid(key_of(seed), 2), images)
    weight = torch.rand_like(images)
    found = torch.func.grad(lambda x: (view.of(x) * weight).sum())(images)
    torch.testing.assert_close(view.back(weight), found)
    # The same view for all images of a row.
    again = view.of(images[:, :1])
    torch.testing.assert_close(again, view.of(images)[:, :1])


def test_a_turn_by_a_quarter_is_exact() -> None:
    images = torch.rand(1, 1, 1, 4, 4).double()
    quarter = Augmentation(colour=0, shift=0, scale=1, rotate_deg=90, cut=0)
    # Of many keys one draws an angle near the end.
    views = quarter.draw(grid(KEY, 2000), images).of(images.expand(2000, -1, -1, -1, -1))
    for k in (1, -1):
        turned = torch.rot90(images, k, (-2, -1))
        assert float((views - turned).abs().amax((1, 2, 3, 4)).min()) < 0.02


# Distribution matching.


def test_equal_sets_have_no_loss_and_no_gradient() -> None:
    task = digits()
    network, params = network_of(task), task.init(KEY).double()
    y = labels(10, 3, torch.device("cpu"))
    x = torch.rand(30, 1, 8, 8, dtype=torch.float64)
    own, there = members(y, torch.ones(30, dtype=torch.bool), 10, torch.float64)
    means = class_means(network, params[None], x[None], own[None])[0]
    slope, loss = torch.func.grad_and_value(
        lambda images: matching_loss(network, params, images, means, there)
    )(x)
    assert float(loss) <= 1e-24
    assert float(slope.abs().max()) <= 1e-12


def test_matching_lowers_the_loss_and_leaves_missing_classes_alone() -> None:
    task = digits()
    network, params = network_of(task), task.init(KEY)
    real = batch_of(task, 120)
    real = Batch(real.x, real.y, real.y != 4)
    images, targets = distill_local(
        task, real, 2, KEY, params, matching=DistributionMatching(15, augmentation=PLAIN)
    )
    own, there = members(real.y, real.mask, 10, torch.float32)
    means = class_means(network, params[None], real.x[None], own[None])[0]
    begun, _ = distill_local(task, real, 2, KEY, params, matching=DistributionMatching(0))
    before, after = (
        float(matching_loss(network, params, x, means, there)) for x in (begun, images)
    )
    assert after < 0.5 * before
    assert not there[4]
    assert not images[targets == 4].any()
    assert images[targets != 4].flatten(1).any(-1).all()
    assert targets.tolist() == [c for c in range(10) for _ in range(2)]


def test_statistics_are_those_of_the_real_images() -> None:
    task = digits()
    real = batch_of(task, 200)
    found = statistics(real, 10)
    for c in range(10):
        own = real.x[real.y == c]
        assert float(found.mean[c, 0]) == pytest.approx(float(own.mean()), abs=1e-5)
        deviation = float(own.std(correction=0))
        assert float(found.deviation[c, 0]) == pytest.approx(deviation, abs=1e-5)
    many = found.images(200, (1, 8, 8), KEY).view(10, -1)
    torch.testing.assert_close(many.mean(1), found.mean[:, 0], atol=0.02, rtol=0)
    torch.testing.assert_close(many.std(1), found.deviation[:, 0], atol=0.02, rtol=0)


def test_real_images_are_of_their_class_and_distinct_while_there_are_enough() -> None:
    task = digits()
    real = next(iter(task.epoch(task.shard(0), KEY, 4000)))
    images = real_images(real, 10, 5, KEY)
    for image, label in zip(images, labels(10, 5, images.device), strict=True):
        same = (real.x == image).flatten(1).all(-1)
        assert label in real.y[same]
    assert len(torch.unique(images.flatten(1), dim=0)) == 50


# Gradient matching.


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_images_match_their_own_gradient(dtype: torch.dtype, most: float) -> None:
    """202 output rows, some of them dead: those must not count."""
    task = Digits(peers=2, hidden=(128, 64))
    network, params = network_of(task), task.init(KEY).to(dtype)
    real = batch_of(task, 50)
    x, y = real.x.to(dtype), real.y
    target = grad(lambda p: cross_entropy(network, p, x, y))(params)
    dead = target.view(-1)[: 128 * 64].view(128, 64).abs().amax(-1) == 0
    assert dead.any()
    assert float(matching_distance(network, params, x, y, target)) <= most


def test_distance_counts_rows_by_hand() -> None:
    spec = Digits(peers=2, hidden=(3,)).spec
    first = torch.randn(spec.dim, dtype=torch.float64)
    assert float(gradient_distance(spec, first, 7.0 * first)) == pytest.approx(0.0, abs=1e-12)
    assert float(gradient_distance(spec, first, -first)) == pytest.approx(2.0 * (3 + 10))
    assert float(gradient_distance(spec, first, 0.0 * first)) == pytest.approx(3 + 10)
    # Biases are left out.
    moved = spec.flatten(
        {n: t + (100.0 if n.endswith("bias") else 0.0) for n, t in spec.views(first).items()}
    )
    assert float(gradient_distance(spec, first, moved)) == pytest.approx(0.0, abs=1e-12)


def test_matching_turns_the_gradient() -> None:
    task = digits()
    network, params = network_of(task), task.init(KEY)
    real = batch_of(task, 60)
    wanted = task.grad(params, real)
    virtual, y = 0.3 * torch.rand(20, 1, 8, 8), labels(10, 2, torch.device("cpu"))
    moved = distill_global(task, params, wanted, virtual, y, matching=GradientMatching(15, lr=0.5))
    before, after = (
        float(matching_distance(network, params, x, y, wanted)) for x in (virtual, moved)
    )
    assert after < 0.95 * before


def test_second_derivatives_against_finite_differences() -> None:
    """Of a smooth network, through the whole distance."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(6, 1, 2, 2, dtype=torch.float64)
    y = torch.arange(6) % 3
    split = Shard(torch.arange(6).view(2, 3), torch.tensor([3, 3]))
    task = task_of(module, "cross_entropy", (x, y), (x, y), split, classes=3)
    network, params = network_of(task), task.init(KEY).double()
    target = torch.randn(task.spec.dim, dtype=torch.float64)

    def loss(images: torch.Tensor) -> torch.Tensor:
        return matching_distance(network, params, images, y, target)

    assert torch.autograd.gradcheck(loss, x.clone().requires_grad_(), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("lr", [0.01, 0.1])
def test_a_plain_step_gives_its_gradient_back(dtype: torch.dtype, most: float, lr: float) -> None:
    task = digits()
    before = task.init(KEY).to(dtype)
    shard = task.shard(torch.arange(2))
    batch = next(iter(task.epoch(shard, grid(KEY, 2), 4000)))
    gradients = task.grad(before.expand(2, -1), batch)
    after = (before - lr * gradients).mean(0)
    found = pseudo_gradient(before, after, lr)
    expected = gradients.mean(0)
    assert float((found - expected).norm() / expected.norm()) <= most


# Contrast.


@pytest.mark.parametrize(("samples", "value"), [(4, 1.94591), (16, 3.43399)])
def test_equal_features_give_the_logarithm(samples: int, value: float) -> None:
    rows = 2 * samples
    loss = contrastive_loss(
        torch.full((rows, 5), 0.7), torch.arange(samples).repeat(2), torch.ones(rows).bool()
    )
    assert float(loss) == pytest.approx(value, abs=1e-5) == pytest.approx(math.log(rows - 1))


@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 100))
@settings(max_examples=25, deadline=None)
def test_contrast_is_its_double_sum_and_knows_no_scale(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (9,), generator=generator)
    valid = torch.rand(9, generator=generator) < 0.8
    rows = [i for i in range(9) if valid[i]]
    unit = features / features.norm(dim=1, keepdim=True)
    anchors = []
    for i in rows:
        others = [j for j in rows if j != i]
        positives = [j for j in others if y[j] == y[i]]
        if positives:
            total = sum(math.exp(float(unit[i] @ unit[o]) / 0.07) for o in others)
            terms = [float(unit[i] @ unit[p]) / 0.07 - math.log(total) for p in positives]
            anchors.append(-sum(terms) / len(terms))
    expected = sum(anchors) / len(anchors) if anchors else 0.0
    for factor in (1.0, scale):
        found = float(contrastive_loss(factor * features, y, valid))
        assert found == pytest.approx(expected, rel=1e-8, abs=1e-9)


def test_dead_features_have_finite_gradients() -> None:
    slope = grad(lambda f: contrastive_loss(f, torch.tensor([0, 0, 1]), torch.ones(3).bool()))
    assert slope(torch.zeros(3, 4)).isfinite().all()


# Networks, tasks and errors.


def test_features_and_head_are_the_model() -> None:
    for settings_ in ({}, {"model": "cnn", "hidden": (8,), "channels": (4,)}):
        task = Digits(**{"peers": 2, "hidden": (24, 16), **settings_})
        network, real = network_of(task), batch_of(task, 7)
        params = task.init(grid(KEY, 2))
        outputs = vmap(lambda p, n=network, x=real.x: n.classify(p, n.features(p, x)))(params)
        expected = task.work.forward(params, real.x[None].expand(2, -1, -1, -1, -1))
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


def test_random_networks_have_he_weights() -> None:
    network = network_of(Digits(peers=2, hidden=(128, 64)))
    drawn = network.random(grid(KEY, 3))
    views = network.spec.views(drawn)
    assert not views["1.bias"].any()
    assert float(views["3.weight"].std()) == pytest.approx(math.sqrt(2 / 128), rel=0.03)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(network.random(grid(KEY, 3)[1]), drawn[1])


def test_domains_are_disjoint_balanced_and_differ() -> None:
    task = DigitsDomains(peers=7, seed=4, samples_per_peer=100)
    sources = len(task.y) // len(DOMAINS)
    shard = task.shard(torch.arange(7))
    assert (shard.index // sources == (torch.arange(7) % 5).unsqueeze(-1)).all()
    assert len(torch.unique(shard.index % sources)) == 700
    counts = torch.stack([torch.bincount(task.y[row], minlength=10) for row in shard.index])
    assert counts.min() >= 5
    plain = task.x[:3, 0].numpy()
    assert abs(task.x[sources : sources + 3, 0].numpy() + plain).max() < 1e-6
    found = task.evaluate(task.init(grid(KEY, 2)))
    assert found["worst_domain"].shape == (2,)
    assert (found["worst_domain"] <= found["accuracy"] + 1e-6).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: distill_local(digits(), batch_of(digits()), 0, KEY), "ipc=0, start"),
        (lambda: distill_local(digits(), batch_of(digits()), 1, KEY, start="zeros"), "start='ze"),
        (
            lambda: distill_local(
                digits(), Batch(torch.rand(3, 64), torch.arange(3), torch.ones(3).bool()), 1, KEY
            ),
            r"images \(3, 64\)",
        ),
        (
            lambda: distill_global(
                digits(), torch.zeros(1), torch.zeros(1), torch.zeros(2), torch.zeros(3)
            ),
            "2 images and",
        ),
        (lambda: pseudo_gradient(torch.zeros(1), torch.zeros(1), 0.0), "lr=0.0"),
        (lambda: DistributionMatching(lr=0.0), "lr=0.0"),
        (lambda: GradientMatching(steps=-1), "steps=-1"),
        (lambda: Augmentation(cut=1.0), "cut=1.0"),
        (lambda: DigitsDomains(peers=5, samples_per_peer=300), "5 peers with 300 samples"),
        (lambda: DigitsDomains(peers=5, model="vit"), "model='vit'"),
        (lambda: as_domain("dark", torch.zeros(1, 8, 8).numpy()), "domain 'dark'"),
    ],
)
def test_errors_name_the_argument(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
