"""The Flag Aggregator at a parameter server: engines agree, claims measure what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import shoal
from shoal.engine.lockstep import run_lockstep
from shoal.lab.rows import Rows
from shoal.parts import find
from shoal.parts.aggregate.flag import Flag
from shoal.parts.aggregate.mean import Mean
from shoal.parts.exchange.star import Star
from shoal.parts.strategy.diloco import DiLoCo
from shoal.parts.tasks.digits import Digits
from shoal.rounds.method import Method
from shoal.systems.robust import flag_aggregator as system
from shoal.systems.robust.scenarios import SCENARIOS
from shoal.testing.ladder import check_strategy
from shoal.world.device import Device
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Row, Run

PEERS, FAULTY = 8, (6, 7)
SERVER = DiLoCo(
    inner="sgd", lr=1.0, steps=1, batch_size=8, weight_decay=5e-4, send="update", outer_lr=0.1,
    outer_momentum=0.9,
)  # fmt: skip


def method_of(rule, attack=None, transform=None, rounds=3) -> Method:
    task = Digits(peers=PEERS, hidden=(8,), holders=tuple(range(1, PEERS)))
    codec = (transform or find("transform", "identity")()).bind(task.spec)
    return Method(
        SERVER, task, Star(PEERS, hub_works=False), rule, codec, rounds, 5.0, seed=3,
        attack=attack, byzantine=FAULTY if attack else (),
    )  # fmt: skip


def network() -> Network:
    return Network(PEERS, links=Links(latency_s=0.05), device=Device(flops_per_s=1e8))


def trained(method: Method) -> torch.Tensor:
    return run_lockstep([method], [network()])[0].final[0]


@pytest.mark.parametrize("rule", [Flag(), Flag(rescale="median_norm", regulariser=2.0)])
@pytest.mark.parametrize("attack", ["uniform", "drop"])
def test_engines_agree(rule: Flag, attack: str) -> None:
    check_strategy(method_of(rule, find("attack", attack)()), network())


@pytest.mark.parametrize("name", ["meamed", "phocas", "caf", "smea", "mda", "arc"])
def test_no_rule_lets_the_largest_numbers_through(name: str) -> None:
    rule = find("aggregate", name)(byzantine=2)
    model = trained(method_of(rule, find("attack", "infinite")(finite=True)))
    assert float(model.abs().max()) < 10.0


def test_the_servers_step_is_no_longer_than_its_rate_allows() -> None:
    method = method_of(Flag(), find("attack", "uniform")(high=1e6), rounds=1)
    moved = trained(method) - method.initial
    # Nesterov's first step goes (1 + momentum) times the gradient, of length 1 at most.
    assert 0.0 < float(moved.norm()) <= 0.1 * 1.9 * (1 + 1e-4)
    plain = trained(replace(method, aggregator=Mean())) - method.initial
    assert float(plain.norm()) > 1e3


def test_the_arms_name_what_runs() -> None:
    world = replace(SCENARIOS["digits_server"], rounds=2)
    for trouble in system._TROUBLE:
        lossy = system._arm("multikrum", f"{trouble} lossy")
        assert lossy.scenario["transform"] == {"name": "lossy", "share": 0.4}
        told = {"uniform 6": 6, "corrupt 5": 5}.get(trouble, 3)
        assert lossy.scenario["aggregator"] == {"name": "multi_krum", "byzantine": told}
    arms = system.SYSTEM.all_arms()
    flag, mean = arms["flag noisy 10"], arms["normalised noisy 10"]
    assert flag.scenario["task.noisy"] == tuple(range(1, 11))
    run = shoal.run(replace(flag, system="flag-aggregator"), world)
    other = shoal.run(mean, world)
    assert run.peers == other.peers == 16
    assert run.messages_sent == other.messages_sent
    assert run.state_digest != other.state_digest


def test_the_oracle_is_the_mean_of_honest_gradients() -> None:
    silent = method_of(Mean(), find("attack", "silent")(), rounds=2)
    task = Digits(peers=PEERS, hidden=(8,), holders=tuple(range(1, PEERS)))
    honest = tuple(peer for peer in range(1, PEERS) if peer not in FAULTY)
    alone = replace(silent, task=task, attack=find("attack", "uniform")(), aggregator=_Only(honest))
    torch.testing.assert_close(trained(silent), trained(alone))


class _Only(Mean):
    """The mean of the rows of some peers; row 0 is the server's own, then peers in order."""

    def __init__(self, peers: tuple[int, ...]) -> None:
        super().__init__()
        object.__setattr__(self, "peers", peers)

    def __call__(self, x, *, mask, weight=None, center=None):
        some = torch.tensor([row in self.peers for row in range(x.shape[-2])])
        return super().__call__(x, mask=mask & some, weight=weight, center=center)


def fake(accuracies: dict[str, list[float]]) -> Rows:
    runs = {}
    for arm, values in accuracies.items():
        rows = [Row("accuracy", v, float(i), 2 * i + 1) for i, v in enumerate(values)]
        runs[arm, 0] = Run(engine="fake", seed=0, peers=16, rows=rows)
    return Rows(runs, tuple(accuracies), (0,))


def test_claims_take_the_worst_case_and_the_best_baseline() -> None:
    ends = {"flag": 0.9, "multikrum": 0.91, "bulyan": 0.8, "median": 0.85}
    arms = {
        f"{rule} {trouble}": [ends.get(rule, 0.7) + (0.05 if trouble != "noisy lossy" else 0.0)]
        for rule in ("flag", *system.BASELINES)
        for trouble in system.GRID
    }
    rows = fake(arms)
    assert system.worst(rows, 0, "flag") == pytest.approx(0.9)
    assert system.worst_against_best(rows)[0] == pytest.approx(-0.01)
    assert system.worst_against_weak(rows)[0] == pytest.approx(0.1)
    assert system.over_baselines(rows)[0] == pytest.approx(-0.01)


def test_bytes_are_counted_to_the_first_evaluation_above_the_target() -> None:
    rows = fake({"flag uniform": [0.1, 0.5, 0.86], "oracle uniform": [0.2, 0.9, 0.9]})
    assert system.bytes_to_target(rows)[0] == pytest.approx(6 / 4)
