"""Bristle's integrator: what it looks at, what it gives weight, and plain Python beside it."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean, pstdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.screening.class_merge import ClassMerge, OwnTests, f1_scores, trust
from shoal.parts.screening.heads import Heads, Message
from shoal.parts.screening.nearness import most, prioritised, quotas
from shoal.tensor import keyed

KEY = keyed.key_of(3, "screening")


def thirds(count: int) -> list[range]:
    """The ranks of each third, as long as each other but for one."""
    cuts = [math.ceil(part * count / 3) for part in range(4)]
    return [range(a, b) for a, b in pairwise(cuts)]


@pytest.mark.parametrize(("alpha", "counts"), [(0.4, (4, 5, 2)), (0.3, (5, 4, 1))])
def test_of_ten_models_so_many_are_near_in_the_middle_and_far(alpha: float, counts: tuple) -> None:
    assert quotas(alpha, 10) == counts
    distance = torch.tensor([(7 * i) % 30 for i in range(30)]).double()
    chosen = prioritised(distance.expand(50, 30), alpha, 10, keyed.grid(KEY, 50))
    for third, count in zip(thirds(30), counts, strict=True):
        inside = torch.isin(distance, torch.tensor(list(third)).double())
        assert (chosen[:, inside].sum(-1) == count).all()
    # Another key, others of them; and all of them have their turn.
    assert len(chosen.unique(dim=0)) > 40
    assert chosen.any(0).all()


@given(
    absent=st.lists(st.booleans(), min_size=1, max_size=24),
    alpha=st.sampled_from([0.0, 0.2, 0.4, 0.5, 1.0]), k=st.integers(1, 12), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_few_models_are_all_looked_at_and_absent_ones_never(
    absent: list[bool], alpha: float, k: int, seed: int
) -> None:
    key = keyed.key_of(seed)
    distance = keyed.uniform(key, torch.arange(len(absent)))
    distance[torch.tensor(absent)] = math.nan
    chosen = prioritised(distance, alpha, k, key)
    here = len(absent) - sum(absent)
    assert not chosen[torch.tensor(absent)].any()
    if here < k:
        assert int(chosen.sum()) == here
        return
    order = distance.argsort().tolist()
    assert int(chosen.sum()) <= most(alpha, k)
    for third, quota in zip(thirds(here), quotas(alpha, k), strict=True):
        assert sum(bool(chosen[order[rank]]) for rank in third) == min(quota, len(third))


def test_bad_settings_of_the_choice() -> None:
    with pytest.raises(UsageError, match=r"alpha=1.5.*from 0 to 1"):
        quotas(1.5, 10)
    with pytest.raises(UsageError, match="at least one model"):
        ClassMerge(k=0)
    with pytest.raises(UsageError, match="classes='best'"):
        ClassMerge(classes="best")


def test_f1_is_scikit_learn_s() -> None:
    from sklearn.metrics import f1_score

    y = (keyed.uniform(KEY, torch.arange(40)) * 6).long()
    said = (keyed.uniform(keyed.fold(KEY, "said"), torch.arange(120)) * 6).long().view(3, 40)
    said[0] = y
    mask = torch.arange(40) < 33
    found = f1_scores(said, y, mask, 8)
    for row, guess in zip(found, said, strict=True):
        theirs = f1_score(
            y[mask], guess[mask], labels=list(range(8)), average=None, zero_division=0
        )
        torch.testing.assert_close(row, torch.tensor(theirs))


def judged(own: list[float], other: list[float], rule: ClassMerge | None = None, **more):
    """One sender who announces everything that the receiver knows."""
    count = len(own)
    familiar = more.get("familiar", torch.ones(count, dtype=torch.bool))
    told = more.get("told", torch.ones(1, count))
    return (rule or ClassMerge()).judge(
        torch.tensor(own, dtype=torch.float64), torch.tensor([other], dtype=torch.float64),
        familiar, told,
        torch.ones(1, dtype=torch.bool),
    )  # fmt: skip


@given(f1=st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_peer_that_does_as_well_has_its_certainty_as_weight(f1: list[float]) -> None:
    found = judged(f1, f1)
    assert (found.weights[0] == found.certainty[0]).all()
    assert float(found.foreign) == float(found.certainty)
    assert float(found.certainty) == pytest.approx(max(0.0, fmean(f1) - pstdev(f1)), abs=1e-12)


def test_worse_by_a_third_is_worth_nothing_and_better_up_to_six() -> None:
    wd = 10 * abs(0.9 - 0.6)
    assert -(wd**4.9) == pytest.approx(-217.7, abs=0.1)
    assert judged([0.9], [0.6]).weights.tolist() == [[0.0]]
    assert float(trust(torch.tensor(-100.0))) == 0.0
    assert float(trust(torch.tensor(-40.4))) > 0.0
    assert float(trust(torch.tensor(-40.6))) == 0.0
    # 10^3 is far out on the sigmoid.
    assert float(judged([0.0], [1.0]).weights) == pytest.approx(6.0, abs=1e-3)
    assert torch.isfinite(judged([1.0] * 10, [0.0] * 10).foreign).all()


def test_which_classes_count() -> None:
    familiar = torch.tensor([True, True, True, False])
    own, other = [0.5, 0.5, 0.5, 0.0], [0.2, 0.9, 0.4, 0.0]
    told = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    found = judged(own, other, familiar=familiar, told=told)
    assert found.selected.tolist() == [[True, False, True, False]]
    nobody = judged(own, other, familiar=familiar, told=torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    assert nobody.selected.tolist() == [[False, True, False, False]]
    count = ClassMerge(classes="count")
    for claim, chosen in (
        (2, [False, True, True, False]), (0, [False, True, False, False]),
        (99, [True, True, True, False]),
    ):  # fmt: skip
        found = judged(own, other, count, familiar=familiar, told=torch.tensor([claim]))
        assert found.selected.tolist() == [chosen]


def by_hand(own: Tensor, others: Tensor, familiar: list[int], told: list[list[int]]) -> list[dict]:
    """Steps 3 to 6 and 8 for each sender, on numbers."""
    out = []
    for scores, classes in zip(others.tolist(), told, strict=True):
        selected = [c for c in familiar if c in classes]
        selected = selected or [max(familiar, key=lambda c: scores[c])]
        score = {}
        for c in selected:
            mine, theirs = float(own[c]), scores[c]
            wd = 10 * abs(mine - theirs)
            score[c] = wd ** (3 + mine) if theirs > mine else -(wd ** (4 + mine))
        values = [scores[c] for c in selected]
        certainty = max(0.0, fmean(values) - pstdev(values))

        def weight(value: float, certainty: float = certainty) -> float:
            even = 1 / (1 + math.exp(-value / 100)) if value > -7e4 else 0.0
            return certainty * max(0.0, 10 * even - 4)

        out.append(
            {"known": {c: weight(max(-100.0, score[c])) for c in selected},
             "foreign": weight(sum(score.values()))}
        )  # fmt: skip
    return out


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_integration_is_that_of_plain_python(data: st.DataObject) -> None:
    classes, width, n = 5, 4, data.draw(st.integers(0, 8))
    key = keyed.key_of(data.draw(st.integers(0, 10_000)))
    some = st.lists(st.integers(0, classes - 1), min_size=1, max_size=classes, unique=True)
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=12)))
    told = [data.draw(some) for _ in range(n)]
    x = keyed.normal(keyed.grid(keyed.grid(keyed.fold(key, "x"), len(labels)), width - 1)).double()
    heads = keyed.normal(
        keyed.grid(keyed.grid(keyed.grid(keyed.fold(key, "h"), n + 1), width), classes)
    ).double()
    inbox = Heads(x, labels, classes, ClassMerge(k=20))
    for head, of in zip(heads[1:], told, strict=True):
        inbox.on_message(Message(head, of))
    report = inbox.integrate(heads[0])

    ones = torch.cat((x, x.new_ones(len(x), 1)), -1)
    f1 = f1_scores((ones @ heads).argmax(-1), labels, torch.ones_like(labels).bool(), classes)
    familiar = sorted(set(labels.tolist()))
    expected = by_hand(f1[0], f1[1:], familiar, told)
    for c in range(classes):
        weights = [
            found["known"].get(c, 0.0) if c in familiar else found["foreign"] for found in expected
        ]
        torch.testing.assert_close(report.weights[:, c], torch.tensor(weights).double())
        total = heads[0][:, c] + sum(w * h[:, c] for w, h in zip(weights, heads[1:], strict=True))
        torch.testing.assert_close(report.head[:, c], total / (1 + sum(weights)))
        # A convex combination.
        assert (report.head[:, c] <= heads[:, :, c].amax(0) + 1e-9).all()
        assert (report.head[:, c] >= heads[:, :, c].amin(0) - 1e-9).all()
        if not sum(weights):
            assert torch.equal(report.head[:, c], heads[0][:, c])
    assert report.chosen.all()


def test_an_empty_inbox_changes_nothing_and_an_inbox_is_emptied() -> None:
    own = torch.eye(3)[:, :2].contiguous()
    inbox = Heads(torch.eye(2), torch.tensor([0, 1]), 2)
    assert torch.equal(inbox.integrate(own).head, own)
    inbox.on_message(Message(2 * own, [0, 1]))
    assert len(inbox.integrate(own).weights) == 1
    assert torch.equal(inbox.integrate(own).head, own)


def test_receivers_together_are_receivers_alone_and_nonsense_is_absent() -> None:
    rows, n, samples, classes, width = 4, 14, 9, 3, 6
    dim = width * classes
    models = keyed.normal(keyed.grid(keyed.grid(keyed.grid(KEY, rows), n + 1), dim)).double()
    models[1, 3] = math.nan
    models[2, 5, 1] = math.inf
    mask = keyed.uniform(keyed.grid(keyed.grid(keyed.fold(KEY, "m"), rows), n)) < 0.8
    told = (keyed.uniform(keyed.grid(keyed.grid(keyed.grid(KEY, rows), n), classes)) < 0.6).float()
    x = keyed.normal(keyed.grid(keyed.grid(keyed.grid(KEY, rows), samples), width)).double()
    y = (keyed.uniform(keyed.grid(keyed.grid(KEY, rows), samples)) * classes).long()
    there = keyed.uniform(keyed.grid(keyed.grid(keyed.fold(KEY, "t"), rows), samples)) < 0.9
    column = torch.arange(classes).repeat(width)
    keys = keyed.grid(KEY, rows)

    def run(part):
        def outputs(heads: Tensor) -> Tensor:
            return x[part].unsqueeze(-3) @ heads.view(*heads.shape[:-1], width, classes)

        tests = OwnTests(outputs, y[part], there[part], classes)
        return ClassMerge(k=6).integrate(
            models[part][..., 0, :], models[part][..., 1:, :], mask[part], told[part], tests,
            column, keys[part],
        )  # fmt: skip

    vector, found, place = run(slice(None))
    assert vector.isfinite().all()
    assert not (place[1] == 2).any()
    assert not (place[2] == 4).any()
    assert 0 < int((place >= 0).sum()) < int(mask.sum())
    for row in range(rows):
        alone, judgement, where = run(row)
        torch.testing.assert_close(vector[row], alone)
        torch.testing.assert_close(found.weights[row], judgement.weights)
        assert torch.equal(place[row], where)


GOOD = torch.zeros(3, 2)
X, Y = torch.eye(2), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Heads(X[:0], Y[:0], 2), "at least one.*for testing"),
        (lambda: Heads(X, Y[:1], 2), "features and.*labels"),
        (lambda: Heads(X, Y, 1), "labels from 0 to 1; need 0 to 0"),
        (lambda: Heads(X, Y, 4, trained=[1, 3]), r"classes \[3\] are trained on.*tests"),
        (lambda: Heads(X, Y, 2).on_message(Message(GOOD[:2], [0])), r"shape \(2, 2\); need"),
        (lambda: Heads(X, Y, 2, fingerprint=7).on_message(Message(GOOD, [0], 8)), "0x8.*0x7"),
        (lambda: Heads(X, Y, 2).on_message(Message(GOOD, [])), "need some of 0 to 1"),
        (lambda: Heads(X, Y, 2).on_message(Message(GOOD, [2])), "need some of 0 to 1"),
        (lambda: Heads(X, Y, 2).on_message(Message(GOOD, 1)), "classes='count'"),
        (lambda: Heads(X, Y, 2, ClassMerge(classes="count")).on_message(Message(GOOD, 3)),
         "3 classes; need 1 to 2"),
        (lambda: Heads(X, Y, 2, ClassMerge(classes="count")).on_message(Message(GOOD, 0)),
         "0 classes; need 1 to 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(make, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


def test_a_count_may_come_from_classes() -> None:
    inbox = Heads(X, Y, 2, ClassMerge(classes="count"))
    head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    for classes in ([0, 1], 2):
        inbox.on_message(Message(head, classes))
    assert (inbox.integrate(head).weights == 1.0).all()
