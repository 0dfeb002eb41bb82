"""What attackers know: the rule they ask is the rule that honest peers will use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from round_methods import DIM, counting
from torch import Tensor

from shoal.parts import find
from shoal.rounds.adversary import Sides, craft, in_hand, outcome
from shoal.rounds.attack import Knowledge, View

SIDES = Sides((0, 1, 3), (2, 4))
RULES = ("mean", "median", "trimmed_mean", "krum", "nna", "centered_clipping", "geometric_median")


def vectors(count: int, seed: int = 0) -> Tensor:
    return torch.randn(
        count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def rule_of(name: str) -> Any:
    cls = find("aggregate", name)
    return cls(**cls.examples[0])


def test_who_will_be_used_follows_the_graph_and_the_own_vector_always_counts() -> None:
    method = counting(5, byzantine=SIDES.byzantine, attack=find("attack", "sign_flip")())
    # A ring of 0 to 4; columns 0, 1, 3, then 2, 4.
    assert in_hand(method, 0, 0, SIDES).tolist() == [
        [True, True, False, False, True],
        [True, True, False, True, False],
        [False, False, True, True, True],
    ]


@pytest.mark.parametrize("name", RULES)
def test_the_outcome_is_what_each_honest_peer_computes_itself(name: str) -> None:
    rule = rule_of(name)
    method = counting(5, rule=rule, byzantine=SIDES.byzantine, attack=find("attack", "sign_flip")())
    # The short cut of `outcome`: rules without a center are asked once for all receivers.
    shared = hasattr(rule, "everyone") and not (rule.centered and hasattr(rule, "among"))
    heard = torch.ones(3, 5, dtype=torch.bool) if shared else in_hand(method, 0, 0, SIDES)
    honest, byzantine = vectors(3), vectors(2, 1)
    found = outcome(method, honest, byzantine, heard)
    rows = torch.cat((honest, byzantine))
    for place in range(3):
        order = [place, *(i for i in range(5) if i != place)]
        expected = rule(rows[order], mask=heard[place][order], center=rows[place])
        torch.testing.assert_close(found[place], expected, msg=name)


@pytest.mark.parametrize("name", [*RULES, "bulyan", "nnm"])
def test_on_a_graph_an_attack_asks_the_rule_about_what_each_peer_hears(name: str) -> None:
    rule, honest, byzantine = rule_of(name), vectors(7), vectors(2, 1)
    sides, asked = Sides((0, 1, 3, 5, 6, 7, 8), (2, 4)), []

    class Asks:
        knowledge, per_receiver = Knowledge.ALL, False

        def __call__(self, view: View, key: Tensor) -> Tensor:
            asked.append((view.heard, view.rule(view.own)))  # type: ignore[misc]
            return view.own

    method = counting(9, rule=rule, byzantine=sides.byzantine, attack=Asks())
    craft([method], 0, 0, [sides], honest[None], byzantine[None])
    (heard, found), rows = asked[0], torch.cat((honest, byzantine))
    assert torch.equal(heard[0], in_hand(method, 0, 0, sides))
    for place in range(7):
        order = [place, *(i for i in range(9) if i != place)]
        expected = rule(rows[order], mask=heard[0, place][order], center=rows[place])
        torch.testing.assert_close(found[0, place], expected, msg=name)


def test_where_an_idle_hub_combines_each_honest_peer_stands_in_for_it() -> None:
    attack = find("attack", "sign_flip")()
    star = find("exchange", "star")(5, hub=0, hub_works=False)
    method = replace(counting(5, byzantine=(2, 4), attack=attack), exchange=star)
    assert in_hand(method, 0, 0, Sides((1, 3), (2, 4))).all()


@dataclass(frozen=True)
class Spy:
    """Sends zeros and keeps what it saw."""

    knowledge: ClassVar[Knowledge] = Knowledge.ALL
    per_receiver: ClassVar[bool] = False
    views: list[View] = field(default_factory=list, compare=False)

    def __call__(self, view: View, key: Tensor) -> Tensor:
        self.views.append(view)
        return torch.zeros_like(view.own)


@dataclass(frozen=True)
class Alone(Spy):
    knowledge: ClassVar[Knowledge] = Knowledge.OWN


def crafted(attack: Any, rule: Any = None) -> tuple[Tensor, Tensor]:
    method = counting(5, rule=rule, byzantine=SIDES.byzantine, attack=attack)
    honest = 1.0 + 0.1 * vectors(3)
    return honest, craft([method], 2, 0, [SIDES], honest[None], vectors(2, 1)[None])[0]


def test_an_omniscient_attack_sees_all_and_can_ask_the_rule() -> None:
    spy = Spy()
    honest, sent = crafted(spy, rule_of("median"))
    assert torch.equal(sent, torch.zeros(2, DIM, dtype=torch.float64))
    (view,) = spy.views
    assert torch.equal(view.honest[0], honest)
    assert view.round == 2
    assert view.rule is not None
    assert view.rule(view.own).shape == (1, 3, DIM)


def test_an_attack_that_knows_its_own_vector_sees_no_other() -> None:
    spy = Alone()
    _, sent = crafted(spy)
    assert sent.shape == (2, DIM)
    (view,) = spy.views
    # One world for each attacker.
    assert view.own.shape == view.honest.shape == (1, 2, 1, DIM)
    assert torch.equal(view.honest[0, :, 0], vectors(2, 1))
    assert view.rule is None


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "nna", "krum"])
@pytest.mark.parametrize("name", ["alie", "inner_product"])
def test_a_line_search_harms_at_least_as_much_as_the_fixed_strength(name: str, rule: str) -> None:
    """On the graph at hand, measured with the rule in force."""
    harms = {}
    for factor in ("fixed", "search"):
        attack = find("attack", name)(factor=factor)
        honest, sent = crafted(attack, rule_of(rule))
        method = counting(5, rule=rule_of(rule), byzantine=SIDES.byzantine, attack=attack)
        after = outcome(method, honest, sent, in_hand(method, 2, 0, SIDES))
        harms[factor] = float((after - honest.mean(0)).norm(dim=-1).mean())
    assert harms["search"] >= harms["fixed"] - 1e-12


def test_a_line_search_finds_a_stronger_attack_where_there_is_one() -> None:
    """A mean has no defence, so the strongest candidate is the longest."""
    harms = []
    for factor in ("fixed", "search"):
        honest, sent = crafted(find("attack", "alie")(z=0.5, factor=factor), rule_of("mean"))
        harms.append(float((sent[0] - honest.mean(0)).norm()))
    assert harms[1] > 2 * harms[0]


def test_worlds_are_attacked_each_for_itself() -> None:
    """Two seeds together give what each gives alone."""
    attack = find("attack", "alie")(factor="search")
    methods = [
        counting(5, rule=rule_of("nna"), byzantine=SIDES.byzantine, attack=attack, seed=seed)
        for seed in (0, 1)
    ]
    honest = torch.stack([vectors(3, 5), 3.0 * vectors(3, 6)])
    own = torch.stack([vectors(2, 7), vectors(2, 8)])
    together = craft(methods, 0, 0, [SIDES, SIDES], honest, own)
    for world, method in enumerate(methods):
        alone = craft([method], 0, 0, [SIDES], honest[world][None], own[world][None])
        torch.testing.assert_close(together[world], alone[0])
