"""MoNNA on the engines: the waiting form, searched and equivocating attacks, and its measures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import shoal
from shoal.base.errors import UsageError
from shoal.lab.launch import launch_seeds
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario
from shoal.parts import find
from shoal.parts.aggregate.nna import NNA, nearest_neighbor_average
from shoal.parts.attack.alie import ALIE
from shoal.parts.attack.base import EVALUATIONS
from shoal.parts.exchange.first_come import FirstCome
from shoal.parts.strategy.learn import Learn
from shoal.parts.strategy.momentum_step import MomentumStep
from shoal.parts.tasks.digits import Digits
from shoal.rounds.adversary import Sides, craft, in_hand, outcome
from shoal.rounds.method import Method
from shoal.systems.robust import monna as system
from shoal.tensor import keyed
from shoal.testing.ladder import check_strategy
from shoal.world.device import Device
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Row, Run

PEERS, FAULTY = 9, (2, 6)
WORLD = Scenario(
    "small", peers=9, rounds=4, byzantine=2, exchange={"name": "first_come"},
    task={"name": "digits", "hidden": [8]}, attack={"name": "alie", "factor": "search"},
)  # fmt: skip


def method_of(rule, attack=None, *, waits=True, steps=1, rounds=4, faulty=FAULTY) -> Method:
    task = Digits(peers=PEERS, hidden=(8,), split="dirichlet", alpha=1.0)
    exchange = FirstCome(PEERS, len(faulty) if waits else 0, faulty, steps)
    identity = find("transform", "identity")().bind(task.spec)
    return Method(
        MomentumStep(lr=0.2, beta=0.9, batch_size=2), task, exchange, rule, identity, rounds, 5.0,
        seed=4, attack=attack, byzantine=faulty if attack else (),
    )  # fmt: skip


def climb(method: Method) -> Run:
    return check_strategy(
        method, Network(PEERS, links=Links(latency_s=0.05), device=Device(flops_per_s=1e8))
    )


@pytest.mark.parametrize("rule", ["nna", "centered_clipping", "geometric_median", "median"])
@pytest.mark.parametrize("waits", [True, False])
def test_engines_agree_when_all_receivers_are_served_at_once(rule: str, waits: bool) -> None:
    settings = {"nna": {"byzantine": 2}, "centered_clipping": {"radius": 0.5}}.get(rule, {})
    climb(method_of(find("aggregate", rule)(**settings), ALIE(factor="search"), waits=waits))


@pytest.mark.parametrize("attack", ["silent", "sign_flip", "mimic", "dissensus", "label_flip"])
def test_engines_agree_under_other_attacks_and_repeated_coordination(attack: str) -> None:
    run = climb(method_of(NNA(2), find("attack", attack)(), steps=2))
    honest = [run.final[peer] for peer in range(PEERS) if peer not in FAULTY]
    assert torch.stack(honest).isfinite().all()


def test_receivers_of_different_lies_hold_different_models() -> None:
    run = climb(method_of(NNA(2), find("attack", "dissensus")(), rounds=1, waits=False))
    honest = torch.stack([run.final[peer] for peer in range(PEERS) if peer not in FAULTY])
    # Everybody sees the same honest vectors; what differs is what the faulty told each of them.
    assert len(honest.unique(dim=0)) > 1
    same = climb(method_of(NNA(0), None, rounds=1, waits=False))
    whole = torch.stack(list(same.final.values()))
    torch.testing.assert_close(whole, whole[:1].expand(whole.shape), rtol=0, atol=1e-6)


def test_honest_peers_use_all_faulty_vectors_and_too_few_others() -> None:
    method = method_of(NNA(2), ALIE(factor="search"))
    honest = tuple(peer for peer in range(PEERS) if peer not in FAULTY)
    seen = set()
    for round in range(30):
        heard = in_hand(method, round, 0, Sides(honest, FAULTY))
        assert heard.shape == (7, 9)
        assert (heard.sum(-1) == PEERS - 2).all()
        assert heard[:, 7:].all()
        assert heard[:, :7].diagonal().all()
        seen.update(map(tuple, heard.tolist()))
    assert len(seen) == math.comb(7, 2)  # any two others may come late, and in time all have
    wait_for_all = in_hand(method_of(NNA(2), ALIE(), waits=False), 0, 0, Sides(honest, FAULTY))
    assert wait_for_all.all()


def test_the_search_asks_for_what_receivers_will_really_hold() -> None:
    method = method_of(NNA(2), ALIE(factor="search"))
    sides = Sides(tuple(peer for peer in range(PEERS) if peer not in FAULTY), FAULTY)
    honest = keyed.normal(keyed.grid(keyed.grid(keyed.key_of(1), 7), 5), dtype=torch.float64)
    candidate = honest[:2] * 0.3
    heard = in_hand(method, 3, 0, sides)
    after = outcome(method, honest, candidate, heard)
    everybody = torch.cat((honest, candidate))
    for i in range(7):
        others = [j for j in range(9) if heard[i, j] and j != i]
        expected = nearest_neighbor_average(honest[i], everybody[others], 2)
        torch.testing.assert_close(after[i], expected)


def test_a_search_costs_at_most_eight_evaluations_whatever_the_seeds() -> None:
    calls = []

    class Counting(NNA):
        def among(self, x, heard):
            calls.append(x.shape)
            return super().among(x, heard)

    method = method_of(Counting(2), ALIE(factor="search"))
    sides = Sides(tuple(peer for peer in range(PEERS) if peer not in FAULTY), FAULTY)
    honest = keyed.normal(keyed.grid(keyed.grid(keyed.grid(keyed.key_of(1), 3), 7), 5))
    methods = [replace(method, seed=seed) for seed in (0, 1, 2)]
    made = craft(methods, 0, 0, [sides] * 3, honest, honest[:, :2])
    assert EVALUATIONS <= 8
    assert [tuple(shape) for shape in calls] == [(3, 9, 5)] * EVALUATIONS
    for world in range(3):
        alone = craft([methods[world]], 0, 0, [sides], honest[world][None], honest[world][None, :2])
        torch.testing.assert_close(made[world], alone[0])


def test_seeds_in_one_stack_are_what_they_are_alone() -> None:
    world = replace(WORLD, aggregator={"name": "nna"})
    scenarios = [replace(world, seed=seed) for seed in (3, 4)]
    strategy = MomentumStep(lr=0.2)
    together = launch_seeds(strategy, scenarios, [3, 4])
    for scenario, run in zip(scenarios, together, strict=True):
        assert len(scenario.byzantine_peers()) == 2
        alone = launch_seeds(strategy, [scenario], [scenario.seed])[0]
        for peer in run.final:
            torch.testing.assert_close(run.final[peer], alone.final[peer], rtol=1e-4, atol=1e-5)


def test_the_arm_sets_peers_faults_rule_and_host() -> None:
    waits = shoal.run(system.monna(9, 2, beta=0.5, lr=0.1, rounds_per_step=2), WORLD)
    whole = shoal.run(system.monna(9, 2, waits=False), WORLD)
    assert waits.peers == whole.peers == 9
    assert waits.state_digest != whole.state_digest
    assert waits.messages_sent == 2 * whole.messages_sent  # two waves a step
    assert math.isfinite([row.value for row in whole.rows if row.name == "accuracy"][-1])


@pytest.mark.parametrize(("n", "f"), [(4, 2), (10, 5), (5, -1)])
def test_too_many_faults_are_refused(n: int, f: int) -> None:
    with pytest.raises(UsageError, match=f"n={n}, f={f}"):
        system.monna(n, f)


def test_drift_is_the_distance_of_the_farthest_honest_model() -> None:
    run = shoal.run("monna", WORLD)
    bad = WORLD.byzantine_peers()
    models = torch.stack([model for peer, model in run.final.items() if peer not in bad])
    farthest = (models - models.mean(0)).norm(dim=-1).max()
    drift = [row.value for row in run.series("drift")]
    assert len(drift) == WORLD.rounds
    assert drift[-1] == pytest.approx(float(farthest), rel=1e-4)


def test_contraction_stays_below_the_papers_constants() -> None:
    measured = system.reduction(Rows({}, (), (0,)))
    assert all(0.1 < value <= 1.0 for value in measured.values())


def fake(accuracies: dict[str, list[float]], every: int = 1, name: str = "accuracy") -> Rows:
    runs = {}
    for arm, values in accuracies.items():
        rows = [Row(name, v, float(i), (i + 1) * every - 1) for i, v in enumerate(values)]
        runs[arm, 0] = Run(engine="fake", seed=0, peers=26, rows=rows)
    return Rows(runs, tuple(accuracies), (0,))


def test_gradients_are_counted_to_the_first_evaluation_above_the_target() -> None:
    curves = {f"f={f}": [0.1] * (1 + f) + [0.86] for f in system.FAULTS}
    rows = fake(curves, every=5)
    assert [system.gradients(rows, 0, f) for f in (0, 5)] == [10.0, 35.0]
    # 10 (1 + f/2) gradients: the slope over f/26 is 13 times the count at f = 0.
    assert system.overhead_slope(rows)[0] == pytest.approx(13.0)
    assert system.overhead(rows)[0] == pytest.approx(3.5 / (1 + 50 / 26))
    learn = fake({f"learn f={f}": [0.1, 0.2, 0.9] for f in system.FAULTS}, every=2)
    assert system.learn_gradients(learn, 0, 3) == 1 + 2 + 3
    never = fake({"learn f=0": [0.1] * 4}, every=2)
    assert system.learn_gradients(never, 0, 0) == Learn().gradients(4)


def test_one_baseline_may_tie_and_only_one() -> None:
    ends = {"monna": 0.9, "mogm": 0.905, "mocwtm": 0.89}
    arms = {
        f"{rule} {attack}": [ends.get(rule, 0.5) + (0.05 if attack == "sign" else 0.0)]
        for rule in ("monna", *system.BASELINES)
        for attack in system.ATTACKS
    }
    rows = fake(arms)
    assert system.over_best(rows)[0] == pytest.approx(-0.005)
    assert system.over_others(rows)[0] == pytest.approx(0.01)


def test_drift_growth_compares_the_last_two_quarters() -> None:
    arms = {
        f"monna {attack}": [9.0, 9.0, 2.0, 2.0, 1.0, 1.0, 3.0, 3.0] for attack in system.ATTACKS
    }
    assert system.drift_growth(fake(arms, name="drift"))[0] == pytest.approx(3.0)


def test_learn_takes_no_more_gradients_than_the_others() -> None:
    world = system._as_many_gradients(Scenario("x", rounds=300))
    assert world.rounds == 48
    assert Learn().gradients(24) == 300
