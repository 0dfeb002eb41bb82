"""Every aggregator found in `parts/aggregate`, against its contract and against broken ones."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import pytest
import torch

from shoal.base.errors import UsageError
from shoal.parts import find, names
from shoal.parts.aggregate.centered_clipping import CenteredClipping
from shoal.parts.aggregate.geometric_median import GeometricMedian
from shoal.parts.aggregate.krum import Krum
from shoal.parts.aggregate.mean import Mean
from shoal.parts.aggregate.median import Median
from shoal.parts.aggregate.multi_krum import MultiKrum
from shoal.parts.aggregate.nna import NNA
from shoal.parts.aggregate.nnm import NNM
from shoal.parts.aggregate.trimmed_mean import TrimmedMean
from shoal.testing.aggregate import check_aggregator

EXAMPLES = [(name, s) for name in names("aggregate") for s in find("aggregate", name).examples]


def here(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[:-1], dtype=torch.bool)


@pytest.mark.parametrize(("name", "settings"), EXAMPLES)
def test_contract(name: str, settings: dict) -> None:
    check_aggregator(find("aggregate", name)(**settings))


@pytest.mark.parametrize(("name", "settings"), EXAMPLES)
def test_settings_survive_json_and_hashing(name: str, settings: dict) -> None:
    rule = find("aggregate", name)(**settings)
    again = find("aggregate", name)(**json.loads(json.dumps(asdict(rule))))
    assert again == rule
    assert hash(rule) == hash(find("aggregate", name)(**settings))


def test_every_part_has_examples_and_says_whether_it_needs_a_center() -> None:
    for name in names("aggregate"):
        kind = find("aggregate", name)
        assert kind.examples, name
        assert isinstance(kind(**kind.examples[0]).centered, bool), name


@dataclass(frozen=True)
class _Boastful(Mean):
    """A mean that claims to be robust."""

    def tolerates(self, rows: int) -> int:
        return 2

    def kappa(self, rows: int) -> float:
        return 10.0


class _ZeroFilling(Median):
    """A median in which absent rows vote for zero."""

    def __call__(self, x, *, mask, weight=None, center=None):
        return super().__call__(torch.where(mask[..., None], x, 0.0), mask=here(x), center=center)


class _Flat:
    """A mean that also mixes worlds as soon as there are two leading axes."""

    def __call__(self, x, *, mask, weight=None, center=None):
        out = Mean()(x, mask=mask, center=center)
        return out if x.dim() < 4 else out.mean(0, keepdim=True).expand(out.shape)


class _First:
    """The first present row."""

    def __call__(self, x, *, mask, weight=None, center=None):
        return Mean()(x, mask=mask & (mask.cumsum(-1) == 1), center=center)


class _Numbers:
    """A mean that lets infinity through."""

    def __call__(self, x, *, mask, weight=None, center=None):
        x = torch.where(mask[..., None], x, 0.0)
        return x.sum(-2) / mask.sum(-1, keepdim=True)


class _Origin:
    """Clipping around zero, which follows no shift."""

    def __call__(self, x, *, mask, weight=None, center=None):
        rule = CenteredClipping(1.0)
        out = rule(x, mask=mask, center=torch.zeros_like(x[..., 0, :]) if x.shape[-2] else center)
        some = (mask & x.isfinite().all(-1)).any(-1, keepdim=True)
        rest = torch.zeros_like(out) if center is None else center
        return torch.where(some, out, rest)


class _Loner(NNA):
    """Serves everybody from the first receiver's point of view."""

    def everyone(self, x, mask):
        return self(x, mask=mask, center=x[..., 0, :]).unsqueeze(-2).expand(x.shape)


class _Mixed(Mean):
    """Divides by the number of senders whatever arrived."""

    def mix(self, weight, x):
        return weight @ torch.where(x.isfinite().all(-1, keepdim=True), x, 0.0) / x.shape[-2]


class _Double(Median):
    """Forgets the type of its input."""

    def __call__(self, x, *, mask, weight=None, center=None):
        center = None if center is None else center.double()
        return super().__call__(x.double(), mask=mask, center=center)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (_Boastful(), "beyond kappa"),
        (_ZeroFilling(), "absent row|not in the stack"),
        (_Flat(), "two leading axes"),
        (_First(), "order of rows"),
        (_Numbers(), "reached the result"),
        (_Origin(), "single row|equal rows|shift"),
        (_Loner(2), "everyone"),
        (_Mixed(), "mix differs"),
        (_Double(), "became"),
    ],
)
def test_the_contract_finds_broken_rules(broken: object, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        check_aggregator(broken)  # type: ignore[arg-type]


def test_an_own_rule_needs_only_the_call() -> None:
    def rule(x, *, mask, weight=None, center=None):
        return Median()(x, mask=mask, center=center)

    check_aggregator(rule)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TrimmedMean(-1), "trim=-1; need a whole number >= 0"),
        (lambda: TrimmedMean(1.5), "trim=1.5"),  # type: ignore[arg-type]
        (lambda: TrimmedMean(True), "trim=True"),
        (lambda: Krum(-1), "krum: byzantine=-1"),
        (lambda: MultiKrum(1, keep=0), "keep=0"),
        (lambda: GeometricMedian(smoothing=0.0), "smoothing=0.0"),
        (lambda: GeometricMedian(iterations=0), "iterations=0"),
        (lambda: CenteredClipping(radius=float("inf")), "radius=inf"),
        (lambda: NNA(2, expect=4), "expect=4; need a whole number >= 5"),
        (lambda: NNM(1, then="nnm"), "comes twice"),
        (lambda: NNM(1, then="meen"), "did you mean 'mean'"),
        (lambda: NNM(1, then="krum", settings={"trim": 1}), "no setting 'trim'"),
        (lambda: NNM(1, then="krum", settings={"byzantine": -2}), "byzantine=-2"),
    ],
)
def test_bad_settings_say_what_to_do(make, says: str) -> None:
    with pytest.raises(UsageError, match=says.replace("*", r"\*")):
        make()


def test_nnm_hands_its_count_to_the_next_rule() -> None:
    assert NNM(3).rule == TrimmedMean(3)
    assert NNM(3, then="krum").rule == Krum(3)
    assert NNM(3, then="krum", settings={"byzantine": 1}).rule == Krum(1)
    assert NNM(3, then="multi_krum", settings=(("keep", 4),)).rule == MultiKrum(3, keep=4)
    assert NNM(2, settings={"trim": 1}) == NNM(2, settings=(("trim", 1),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [Krum(2), MultiKrum(2), NNM(2), NNA(2), Median(), TrimmedMean(2)])
def test_enormous_rows_do_not_blur_the_others(rule, dtype: torch.dtype) -> None:
    # Rows near 1e38 beside rows that differ by 1e-3: the attack must not eat the digits.
    honest = 1.0 + 1e-3 * torch.arange(9, dtype=dtype)[:, None].expand(9, 4)
    huge = torch.tensor([[3e38], [-3e38]], dtype=dtype).expand(2, 4)
    x = torch.cat((honest, huge))
    out = rule(x, mask=here(x), center=honest[4])
    assert ((out >= honest[0]) & (out <= honest[-1])).all()
    assert (out - 1.004).abs().max() < 1.5e-3


@pytest.mark.parametrize("name", ["krum", "multi_krum", "nnm"])
def test_distances_keep_their_digits_far_from_the_origin(name: str) -> None:
    rule = find("aggregate", name)(byzantine=2)
    x = torch.sin(torch.arange(33.0, dtype=torch.float64)).reshape(11, 3)
    here_ = here(x)
    expected = rule(x, mask=here_)
    moved = rule(x + 1e9, mask=here_) - 1e9
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)


def test_silent_rows_use_up_the_faults_that_nna_and_krum_expect() -> None:
    nan = float("nan")
    x = torch.tensor([[0.0], [1.0], [2.0], [50.0], [nan], [nan]])
    # 6 received, 2 faulty: the four others are averaged, the mean of the farther one included.
    assert NNA(2)(x, mask=here(x), center=x[0]).item() == pytest.approx(53 / 4)
    # The same rows masked: 4 received, 2 kept.
    assert NNA(2)(x, mask=x[:, 0] == x[:, 0], center=x[0]).item() == pytest.approx(0.5)
    # The synchronous form counts missing ones as faulty.
    assert NNA(2, expect=6)(x, mask=x[:, 0] == x[:, 0], center=x[0]).item() == pytest.approx(53 / 4)


def test_clipping_moves_no_farther_than_its_radius() -> None:
    rule = CenteredClipping(radius=0.5, iterations=3)
    x = torch.tensor([[0.0, 0.0], [1e30, 0.0], [1e30, 1.0], [0.1, 0.1]])
    out = rule(x, mask=here(x), center=x[0])
    assert out.norm() <= 3 * 0.5
    # One arbitrary row of four: at most 2 * radius / 4 an iteration.
    for far in (-1e30, 0.0, 7.0, 1e30):
        other = x.clone()
        other[1] = far
        moved = rule(other, mask=here(x), center=x[0]) - out
        assert moved.norm() <= 3 * 2 * 0.5 / 4 + 1e-6


def test_claimed_weights_cannot_break_the_mean() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0]])
    for claim in (float("nan"), float("inf"), -5.0):
        out = Mean()(x, mask=here(x), weight=torch.tensor([1.0, 3.0, claim]))
        assert out.item() == pytest.approx(1.75)
    heavy = torch.tensor([3e38, 3e38, 3e38])
    assert Mean()(x, mask=here(x), weight=heavy).item() == pytest.approx(2.0)
    # A weight of zero means: I have learned nothing yet.
    nothing = Mean()(x, mask=here(x), weight=torch.zeros(3), center=torch.tensor([7.0]))
    assert nothing.item() == 7.0
