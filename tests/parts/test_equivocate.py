"""Equivocation: camps hear different lies, out of any other attack."""

from __future__ import annotations

import pytest
import torch

from shoal.base.errors import UsageError
from shoal.parts import find, names
from shoal.parts.aggregate.mean import Mean
from shoal.parts.attack.equivocate import Equivocate
from shoal.rounds.attack import Aim, Knowledge, View
from shoal.tensor import keyed
from shoal.testing.attack import check_attack

KEY = keyed.key_of(5, "equivocate")
HONEST = 3.0 + torch.sin(torch.arange(35.0, dtype=torch.float64)).reshape(7, 5)
VIEW = View(honest=HONEST, own=HONEST[2:4] + 0.5, round=0)
PLAIN = [n for n in names("attack") if not find("attack", n).per_receiver]


@pytest.mark.parametrize("lie", PLAIN)
def test_one_camp_hears_the_attack_itself(lie: str) -> None:
    sent = Equivocate(lie, camps=1)(VIEW, KEY)
    assert sent.shape == (7, 2, 5)
    assert all(torch.equal(row.nan_to_num(), sent[0].nan_to_num()) for row in sent)
    attack = find("attack", lie)()
    key = keyed.fold(KEY, "camp", 0)
    if attack.knowledge is Knowledge.ALL:
        alone = attack(VIEW, key)
    else:
        own = VIEW.own.unsqueeze(1)
        alone = attack(View(own, own, 0), keyed.grid(key, 2)).squeeze(1)
    torch.testing.assert_close(sent[0], alone, equal_nan=True)


@pytest.mark.parametrize("lie", PLAIN)
def test_every_attack_keeps_the_contract_when_it_is_told_in_two_ways(lie: str) -> None:
    check_attack(Equivocate(lie))


def test_camps_are_neighbours_of_nearly_equal_size_and_pulled_apart() -> None:
    sent = Equivocate("sign_flip", {"scale": 2.0}, camps=3)(VIEW, KEY)
    flipped = -2.0 * VIEW.own
    mirrored = 2 * HONEST.mean(0) - flipped
    # 7 honest peers in 3 camps: 3, 2 and 2 of them.
    for receiver, expected in enumerate([flipped] * 3 + [mirrored] * 2 + [flipped] * 2):
        torch.testing.assert_close(sent[receiver], expected)


def test_averaging_peers_drift_apart_although_no_mean_moves() -> None:
    honest = torch.zeros(6, 4, dtype=torch.float64)
    honest[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    own = torch.ones(2, 4, dtype=torch.float64)
    sent = Equivocate("sign_flip")(View(honest=honest, own=own, round=0), KEY)
    heard = torch.cat((honest.expand(6, 6, 4), sent), -2)
    after = Mean()(heard, mask=torch.ones(6, 8, dtype=torch.bool))
    torch.testing.assert_close(after[:3], torch.full((3, 4), -0.25, dtype=torch.float64))
    torch.testing.assert_close(after[3:], torch.full((3, 4), 0.25, dtype=torch.float64))


def test_draws_differ_between_camps_and_are_the_same_within_one() -> None:
    sent = Equivocate("gaussian", mirror=False)(VIEW, KEY)
    assert torch.equal(sent[0], sent[3])
    assert torch.equal(sent[4], sent[6])
    assert not torch.equal(sent[3], sent[4])


def test_a_search_is_handed_the_rule_in_force() -> None:
    asked = []

    def rule(candidate: torch.Tensor) -> torch.Tensor:
        asked.append(candidate)
        total = HONEST.sum(0) + candidate.sum(-2)
        return (total / 9).expand(7, 5)

    view = View(HONEST, VIEW.own, 0, rule)
    sent = Equivocate("inner_product", (("factor", "search"),))(view, KEY)
    searched = find("attack", "inner_product")(factor="search")(view, KEY)
    torch.testing.assert_close(sent[0], searched)
    assert len(asked) == 3 * 8


def test_success_is_that_of_the_attack_which_is_told() -> None:
    assert Equivocate("class_flip", {"source": 2, "target": 3}).aim() == Aim(3, 2)
    with pytest.raises(UsageError, match="equivocate: lie='alie' has no target class"):
        Equivocate("alie").aim()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lie": "dissensus"}, "lie='dissensus' does not make one vector for everybody"),
        ({"lie": "equivocate"}, "lie='equivocate' does not make one vector"),
        ({"lie": "alei"}, "did you mean 'alie'"),
        ({"camps": 0}, "camps=0; need a whole number >= 1"),
        ({"lie": "sign_flip", "settings": {"scael": 1.0}}, "mend the settings"),
        ({"lie": "sign_flip", "settings": {"scale": -1.0}}, "scale=-1.0"),
    ],
)
def test_wrong_settings_are_told(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Equivocate(**settings)
