"""Every attack found in `parts/attack`, against its contract, closed forms and plain numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from shoal.base.errors import UsageError
from shoal.parts import find, names
from shoal.parts.aggregate.mean import Mean
from shoal.parts.aggregate.nna import NNA
from shoal.parts.attack.alie import ALIE, believable
from shoal.parts.attack.base import EVALUATIONS
from shoal.parts.attack.dissensus import Dissensus
from shoal.parts.attack.drop import Drop
from shoal.parts.attack.gaussian import Gaussian
from shoal.parts.attack.infinite import Infinite
from shoal.parts.attack.inner_product import InnerProduct
from shoal.parts.attack.label_flip import LabelFlip
from shoal.parts.attack.label_flip_difference import LabelFlipDifference
from shoal.parts.attack.mimic import Mimic
from shoal.parts.attack.sign_flip import SignFlip
from shoal.parts.attack.silent import Silent
from shoal.parts.attack.uniform import Uniform
from shoal.parts.attack.zero import Zero
from shoal.rounds.attack import Knowledge, View
from shoal.rounds.task import Batch, Shard
from shoal.tensor import keyed
from shoal.testing.attack import check_attack

EXAMPLES = [(name, s) for name in names("attack") for s in find("attack", name).examples]
KEY = keyed.key_of(1, "attack")


@dataclass(eq=False)
class Labels:
    """Samples with whole-number targets, as far as an attack on data needs a task."""

    y: torch.Tensor
    classes: int | None = 10
    peers: int = 4

    def shard(self, peer) -> Shard:
        peer = torch.as_tensor(peer)
        index = torch.arange(5) * 3 % len(self.y) + peer.unsqueeze(-1)
        size = torch.full(peer.shape, 4)
        return Shard(index=index, size=size)

    def batch(self, shard: Shard, key: torch.Tensor, size: int) -> Batch:
        draw = keyed.uniform(keyed.grid(key, size))
        place = (draw * shard.size.unsqueeze(-1)).long()
        y = self.y[shard.index.gather(-1, place)]
        if shard.labels is not None:
            y = shard.labels.gather(-1, place)
        images = y[..., None, None].expand(*y.shape, 3, 3).to(torch.float64)
        return Batch(x=images, y=y, mask=torch.ones_like(y, dtype=torch.bool))


TASK = Labels(torch.arange(20) * 7 % 10)


def view(honest: torch.Tensor, byzantine: int = 2, rule=None) -> View:
    own = honest[..., :1, :].expand(*honest.shape[:-2], byzantine, honest.shape[-1])
    return View(honest=honest, own=own, round=0, rule=rule)


@pytest.mark.parametrize(("name", "settings"), EXAMPLES)
def test_contract(name: str, settings: dict) -> None:
    check_attack(find("attack", name)(**settings), task=TASK)  # type: ignore[arg-type]


class _Leaking(SignFlip):
    def __call__(self, view: View, key: torch.Tensor) -> torch.Tensor:
        view.own.mul_(-1)
        return view.own


class _Global(Gaussian):
    def __call__(self, view: View, key: torch.Tensor) -> torch.Tensor:
        return keyed.normal(keyed.grid(key.flatten()[:1], view.own.shape[-1])) + 0 * view.own


class _Greedy(ALIE):
    def __call__(self, view: View, key: torch.Tensor) -> torch.Tensor:
        for _ in range(9):
            view.rule(view.own)
        return view.own


class _Renaming(LabelFlip):
    def poison(self, task, shard: Shard, key: torch.Tensor) -> Shard:
        return Shard(shard.index + 1, shard.size)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (_Leaking(), "written to"),
        (_Global(), "among others|became"),
        (_Greedy(), "9 times"),
        (_Renaming(), "other samples"),
    ],
)
def test_the_contract_finds_broken_attacks(broken, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        check_attack(broken, task=TASK)  # type: ignore[arg-type]


def test_believable_is_the_papers_value() -> None:
    # Baruch et al. 2019: 50 workers, 24 corrupted; s = 2, Phi(z) = 24/26.
    assert believable(26, 24) == pytest.approx(1.4261, abs=1e-4)
    # n = 26, f = 5: s = 9, Phi(z) = 12/21.
    assert believable(21, 5) == pytest.approx(0.1800, abs=1e-3)
    assert believable(20, 2) == 0.0
    assert believable(3, 30) == pytest.approx(0.9674, abs=1e-4)  # a majority: finite


def test_alie_is_mean_plus_z_deviations() -> None:
    x = np.random.default_rng(0).normal(size=(3, 7, 4))
    out = ALIE(z=1.3)(view(torch.tensor(x), 3), KEY.expand(3)).numpy()
    expected = x.mean(1) + 1.3 * np.sqrt(x.var(1))
    np.testing.assert_allclose(out, np.repeat(expected[:, None], 3, axis=1), rtol=1e-12)


def test_a_diverged_honest_peer_does_not_blind_the_attackers() -> None:
    x = torch.tensor([[1.0], [3.0], [float("nan")]])
    assert ALIE(z=1.0)(view(x, 1), KEY).item() == 3.0
    assert InnerProduct(1.0)(view(x, 1), KEY).item() == -2.0
    assert Mimic()(view(x, 1), KEY).item() in (1.0, 3.0)


def test_sign_flip_inner_product_and_silence() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    torch.testing.assert_close(
        InnerProduct(0.5)(view(x), KEY), torch.tensor([[-1.0, -2.0]]).expand(2, 2)
    )
    own = View(honest=x[:1], own=x[:1], round=0)
    torch.testing.assert_close(SignFlip(2.0)(own, KEY), torch.tensor([[-2.0, -4.0]]))
    assert Silent()(own, KEY).isnan().all()


def test_gaussian_has_its_deviation_and_no_correlation() -> None:
    own = torch.full((40, 1, 500), 5.0, dtype=torch.float64)
    keys = keyed.grid(KEY, 40)
    noise = Gaussian(3.0)(View(honest=own, own=own, round=0), keys)[:, 0]
    assert noise.mean().abs() < 4 * 3.0 / np.sqrt(noise.numel())
    assert noise.std().item() == pytest.approx(3.0, rel=0.02)
    between = torch.corrcoef(noise) - torch.eye(40, dtype=torch.float64)
    assert between.abs().max() < 5 / np.sqrt(500)
    added = Gaussian(3.0, add=True)(View(honest=own, own=own, round=0), keys)[:, 0]
    torch.testing.assert_close(added, noise + 5.0)
    moved = Gaussian(3.0, mean=-2.0)(View(honest=own, own=own, round=0), keys)[:, 0]
    torch.testing.assert_close(moved, noise - 2.0)


def test_mimic_follows_the_principal_direction() -> None:
    x = np.random.default_rng(3).normal(size=(4, 9, 5))
    out = Mimic()(view(torch.tensor(x)), KEY.expand(4)).numpy()
    for world in range(4):
        centred = x[world] - x[world].mean(0)
        along = centred @ np.linalg.svd(centred)[2][0]
        np.testing.assert_array_equal(out[world, 0], x[world, np.abs(along).argmax()])
    np.testing.assert_array_equal(Mimic(target=4)(view(torch.tensor(x)), KEY)[:, 1], x[:, 4])
    with pytest.raises(UsageError, match="target=9 of 9 honest"):
        Mimic(target=9)(view(torch.tensor(x)), KEY)


@pytest.mark.parametrize(("scale", "left"), [(1.0, 1.0), (0.0, 1 / 4), (3.0, 2.5)])
def test_dissensus_undoes_agreement_under_the_mean(scale: float, left: float) -> None:
    honest = torch.sin(torch.arange(24.0, dtype=torch.float64)).reshape(6, 4)
    sent = Dissensus(scale)(view(honest), KEY)
    assert sent.shape == (6, 2, 4)
    heard = torch.cat((honest.expand(6, 6, 4), sent), -2)
    after = Mean()(heard, mask=torch.ones(6, 8, dtype=torch.bool))
    before = honest - honest.mean(0)
    # (h mean + b x + scale h (x - mean)) / (h + b), of which x - mean is left so often.
    torch.testing.assert_close(after - after.mean(0), before * left)


def test_dissensus_on_a_graph_undoes_what_each_receiver_hears() -> None:
    honest = torch.cos(torch.arange(20.0, dtype=torch.float64)).reshape(5, 4) + 1e3
    ring = torch.eye(5, dtype=torch.bool) | torch.eye(5, dtype=torch.bool).roll(1, 0)
    liars = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 1], [1, 0]], dtype=torch.bool)
    heard = torch.cat((ring | ring.mT, liars), -1)
    sent = Dissensus()(View(honest, honest[:2], 0, None, heard), KEY)
    for place in range(5):
        rows = torch.cat((honest, sent[place]))
        torch.testing.assert_close(Mean()(rows, mask=heard[place]), honest[place])


def test_label_flip_mirrors_the_labels_in_the_order_of_the_index() -> None:
    shard = TASK.shard(torch.tensor([0, 2]))
    out = LabelFlip().poison(TASK, shard, keyed.grid(KEY, 2))
    assert torch.equal(out.labels, 9 - TASK.y[shard.index])
    again = LabelFlip().poison(TASK, out, keyed.grid(KEY, 2))
    assert torch.equal(again.labels, TASK.y[shard.index])
    with pytest.raises(UsageError, match="whole numbers"):
        LabelFlip().poison(Labels(torch.rand(20)), shard, keyed.grid(KEY, 2))
    with pytest.raises(UsageError, match="classification"):
        LabelFlip().poison(Labels(TASK.y, classes=None), shard, keyed.grid(KEY, 2))


@pytest.mark.parametrize("attack", [ALIE(factor="search"), InnerProduct(0.1, factor="search")])
def test_a_search_does_at_least_the_harm_of_the_fixed_strength(attack) -> None:
    keys = keyed.grid(KEY, 6)
    honest = 5 + keyed.normal(keyed.grid(keyed.grid(keys, 13), 8), dtype=torch.float64)
    rule_of = NNA(2)
    asked = []

    def rule(candidate: torch.Tensor) -> torch.Tensor:
        asked.append(candidate)
        x = torch.cat((honest, candidate), -2)
        return rule_of.everyone(x, torch.ones(x.shape[:-1], dtype=torch.bool))[..., :13, :]

    mean = honest.mean(-2, keepdim=True)

    def harm(sent: torch.Tensor) -> torch.Tensor:
        return (rule(sent) - mean).norm(dim=-1).mean(-1)

    found = attack(view(honest, 2, rule), keys)
    assert len(asked) == EVALUATIONS == 8
    fixed = type(attack)()(view(honest, 2), keys)
    assert (harm(found) >= harm(fixed) - 1e-12).all()
    assert (harm(found) > 1.02 * harm(fixed)).any()
    # Each world searched for itself.
    alone = attack(
        view(
            honest[2],
            2,
            lambda c: NNA(2).everyone(torch.cat((honest[2], c)), torch.ones(15, dtype=torch.bool))[
                :13
            ],
        ),
        keys[2],
    )
    torch.testing.assert_close(alone, found[2])


def test_a_search_finds_the_edge_of_what_a_filter_lets_through() -> None:
    # Harm grows with strength up to 5 deviations, where the filter sees through the attack.
    honest = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)

    def rule(candidate: torch.Tensor) -> torch.Tensor:
        sent = candidate.mean(-2, keepdim=True)
        return torch.where(sent.abs() <= 5.0, sent, torch.zeros_like(sent)).expand(honest.shape)

    found = ALIE(factor="search")(view(honest, 1, rule), KEY).item()
    assert 5.0 / np.sqrt(2) <= found <= 5.0


def test_a_search_without_a_rule_says_so() -> None:
    for attack in (ALIE(factor="search"), InnerProduct(factor="search")):
        with pytest.raises(UsageError, match="factor='search' asks the rule"):
            attack(view(torch.zeros(3, 2)), KEY)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SignFlip(float("nan")), "scale=nan; need a finite number >= 0"),
        (lambda: Gaussian(-1.0), "scale=-1.0"),
        (lambda: ALIE(factor="best"), "factor='best'; need one of fixed, search"),
        (lambda: ALIE(z=float("inf")), "z=inf"),
        (lambda: InnerProduct(epsilon=-1), "epsilon=-1"),
        (lambda: Mimic(target=-1), "target=-1"),
        (lambda: Dissensus(scale=True), "scale=True"),
    ],
)
def test_bad_settings_say_what_to_do(make, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


def test_only_omniscient_attacks_see_others() -> None:
    blind = {n for n in names("attack") if find("attack", n).knowledge is Knowledge.OWN}
    assert blind >= {"sign_flip", "gaussian", "silent", "label_flip"}
    assert not blind & {"alie", "inner_product", "mimic", "dissensus"}


def alone(own: torch.Tensor) -> View:
    return View(honest=own, own=own, round=0)


def test_uniform_numbers_fill_their_interval_independently() -> None:
    own = torch.zeros((40, 1, 500), dtype=torch.float64)
    sent = Uniform(-2.0, 3.0)(alone(own), keyed.grid(KEY, 40))[:, 0]
    assert sent.min() >= -2.0
    assert sent.max() < 3.0
    assert sent.mean().item() == pytest.approx(0.5, abs=5 * np.sqrt(25 / 12 / sent.numel()))
    assert sent.var().item() == pytest.approx(25 / 12, rel=0.03)
    between = torch.corrcoef(sent) - torch.eye(40, dtype=torch.float64)
    assert between.abs().max() < 5 / np.sqrt(500)


@pytest.mark.parametrize("fill", ["zero", "uniform"])
def test_drop_replaces_its_share_and_nothing_else(fill: str) -> None:
    own = torch.full((30, 1, 1000), 7.0)
    sent = Drop(0.3, fill)(alone(own), keyed.grid(KEY, 30))[:, 0]
    lost = sent != 7.0
    assert lost.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert (sent[lost] == 0).all() == (fill == "zero")
    assert ((sent[lost] >= 0) & (sent[lost] <= 1)).all()
    # Other coordinates at each attacker and in each round.
    assert (lost[0] != lost[1]).any()
    assert (Drop(0.0)(alone(own), keyed.grid(KEY, 30)) == own).all()
    assert (Drop(1.0)(alone(own), keyed.grid(KEY, 30)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_and_infinities(dtype: torch.dtype) -> None:
    own = torch.ones((1, 3), dtype=dtype)
    assert (Zero()(alone(own), KEY) == 0).all()
    assert (Infinite(-1)(alone(own), KEY) == -torch.inf).all()
    vast = Infinite(finite=True)(alone(own), KEY)
    assert vast.isfinite().all()
    assert (vast * 2).isinf().all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Uniform(1.0, 1.0), "need low < high"),
        (lambda: Drop(1.5), "share=1.5"),
        (lambda: Drop(fill="ones"), "fill='ones'"),
        (lambda: Infinite(sign=0), "sign=0"),
    ],
)
def test_attacks_without_knowledge_refuse_bad_settings(make, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


def test_the_difference_of_flipped_labels_is_what_it_says() -> None:
    x = np.random.default_rng(4).normal(size=(3, 7, 4))
    honest = torch.tensor(x)
    honest[1, 2] = torch.nan
    own = torch.tensor(x[:, :2] * 3)
    sent = LabelFlipDifference()(View(honest=honest, own=own, round=0), keyed.grid(KEY, 3))
    means = np.nanmean(honest.numpy(), axis=1, keepdims=True)
    np.testing.assert_allclose(sent.numpy(), 3 * x[:, :2] - means)
    shard = TASK.shard(torch.arange(2))
    flipped = LabelFlipDifference().poison(TASK, shard, keyed.grid(KEY, 2))
    assert torch.equal(flipped.labels, LabelFlip().poison(TASK, shard, keyed.grid(KEY, 2)).labels)
