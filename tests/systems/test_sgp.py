"""Stochastic gradient push: what push-sum conserves, where it leads, engines that agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import shoal
from shoal.base.errors import UsageError
from shoal.engine.lockstep import run_lockstep
from shoal.lab.launch import launch, method_of
from shoal.parts import find
from shoal.parts.strategy.local_steps import LocalSteps
from shoal.parts.strategy.push_sum import PushSum
from shoal.rounds.method import Method
from shoal.rounds.unpaced import Unpaced
from shoal.rounds.workload import Workload
from shoal.tensor import keyed
from shoal.testing.ladder import check_strategy
from shoal.world.faults import Crash
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run

TINY = shoal.Scenario(
    peers=6, rounds=3, topology={"name": "random_peers", "degree": 2}, exchange="gossip",
    eval_every=1, task={"name": "quadratics"}, links={"name": "links", "latency_s": 0.02},
    device={"name": "device", "flops_per_s": 1e8},
)  # fmt: skip

GRAPHS: tuple[dict[str, Any], ...] = (
    {"name": "random_peers", "degree": 2},
    {"name": "exponential", "directed": True},
    {"name": "exponential", "one_peer": True},
    {"name": "barabasi_albert", "mixing": "uniform"},
    {"name": "star"},
)


def still(graph: dict[str, Any], peers: int, rounds: int, seed: int, **more: Any) -> Run:
    """Peers who begin apart and learn nothing: what is left is the average."""
    world = TINY.with_settings(
        {"peers": peers, "rounds": rounds, "topology": graph, "initial": "independent", **more}
    )
    method, network, *_ = method_of(PushSum(lr=0.0), world, seed, least_s=5.0)
    return run_lockstep([method], [network])[0]


def starts(peers: int, seed: int) -> Tensor:
    task = find("tasks", "quadratics")(peers=peers)
    return task.init(torch.stack([keyed.key_of(seed, "init", peer) for peer in range(peers)]))


def weights(run: Run, round: int) -> list[float]:
    return [row.value for row in run.series("weight") if row.round == round]


@given(st.sampled_from(GRAPHS), st.integers(2, 9), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_masses_and_weights_keep_their_sums(graph: dict[str, Any], peers: int, seed: int) -> None:
    if graph["name"] in ("random_peers", "barabasi_albert"):
        peers = max(peers, 4)
    run = still(graph, peers, 4, seed)
    last = weights(run, 3)
    assert len(last) == peers
    assert sum(last) == pytest.approx(peers, rel=1e-12)
    mass = sum(weight * run.final[peer] for peer, weight in enumerate(last))
    torch.testing.assert_close(mass, starts(peers, seed).sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: "-".join(map(str, graph.values())))
def test_every_model_becomes_the_mean(graph: dict[str, Any]) -> None:
    run = still(graph, 8, 150, 3)
    ended = torch.stack([run.final[peer] for peer in range(8)])
    torch.testing.assert_close(ended, starts(8, 3).mean(0).expand(8, -1), rtol=1e-9, atol=1e-9)


def test_plain_means_of_what_one_hears_lead_elsewhere() -> None:
    world = TINY.with_settings(
        {"peers": 8, "rounds": 150, "topology": GRAPHS[3], "initial": "independent"}
    )
    method, network, *_ = method_of(LocalSteps(lr=0.0), world, 3, least_s=5.0)
    ended = run_lockstep([method], [network])[0].final[0]
    assert float((ended - starts(8, 3).mean(0)).norm()) > 0.05


def test_one_peer_a_round_averages_exactly_in_three() -> None:
    run = still(GRAPHS[2], 8, 3, 5)
    ended = torch.stack([run.final[peer] for peer in range(8)])
    torch.testing.assert_close(ended, starts(8, 5).mean(0).expand(8, -1), rtol=1e-12, atol=1e-12)
    assert weights(run, 2) == pytest.approx([1.0] * 8, rel=1e-12)


def test_on_a_regular_graph_it_is_dpsgd() -> None:
    """Equal shares: weights stay 1, and masses are models."""
    world = TINY.with_settings({"topology": "ring", "rounds": 6})
    one, other = (launch(s, world, seed=2) for s in (PushSum(lr=0.1), LocalSteps(lr=0.1)))
    for peer in range(6):
        torch.testing.assert_close(one.final[peer], other.final[peer])


def test_shares_are_column_stochastic() -> None:
    method, *_ = method_of(PushSum(), TINY, 3, least_s=5.0)
    for round in range(3):
        (wave,) = method.waves(round)
        assert wave.mixing is not None
        total = torch.zeros(6, dtype=torch.float64)
        for peer in range(6):
            total[peer] += wave.mixing[peer, 0]
            for slot, source in enumerate(wave.sources[peer]):
                total[source] += wave.mixing[peer, slot + 1]
        torch.testing.assert_close(total, torch.ones(6).double(), rtol=1e-12, atol=0)


@given(st.floats(0.05, 0.6), st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_losses_take_mass_and_weight_alike(loss: float, seed: int) -> None:
    """All models lie between the smallest and the largest that there was, and nothing is added."""
    links = {"name": "links", "latency_s": 0.02, "loss": loss}
    run = still({"name": "random_peers", "degree": 2}, 6, 12, seed, links=links)
    ended, begun = torch.stack([run.final[p] for p in range(6)]), starts(6, seed)
    assert bool((ended <= begun.amax(0) + 1e-12).all() and (ended >= begun.amin(0) - 1e-12).all())
    totals = [sum(weights(run, round)) for round in range(12)]
    assert all(b <= a + 1e-12 for a, b in zip([6.0, *totals], totals, strict=False))
    assert totals[-1] < 6.0


def test_who_takes_no_part_keeps_what_it_has() -> None:
    """Half of the peers each round: shares are of those who are there."""
    exchange = {"name": "gossip", "participation": 0.5}
    run = still({"name": "random_peers", "degree": 2}, 6, 10, 4, exchange=exchange)
    ended = torch.stack([run.final[p] for p in range(6)])
    begun = starts(6, 4)
    assert bool((ended <= begun.amax(0) + 1e-12).all() and (ended >= begun.amin(0) - 1e-12).all())
    assert float(ended.std(0).mean()) < 0.5 * float(begun.std(0).mean())


@pytest.mark.parametrize("place", range(len(PushSum.examples)))
def test_every_engine_does_the_same(place: int) -> None:
    strategy = PushSum(**PushSum.examples[place])
    method, network, *_ = method_of(strategy, TINY, 3, least_s=5.0)
    check_strategy(method, network, live=place == 0)


def test_engines_agree_under_losses_and_a_crash() -> None:
    method, network, *_ = method_of(PushSum(), TINY, 3, least_s=5.0)
    links = Links(latency_s=0.02, loss=0.2)
    faults = (Crash(who=(1,), at=6.0),)
    check_strategy(method, Network(6, network.topology, links, network.device, faults=faults))


def test_seeds_stack() -> None:
    pairs = [method_of(PushSum(), TINY, seed, least_s=5.0)[:2] for seed in (1, 2)]
    together = run_lockstep([m for m, _ in pairs], [n for _, n in pairs])
    for (method, network), run in zip(pairs, together, strict=True):
        alone = run_lockstep([method], [network])[0]
        for peer in range(6):
            torch.testing.assert_close(run.final[peer], alone.final[peer])


# Errors.


def _method(exchange: Any) -> Method:
    task = find("tasks", "quadratics")(peers=4)
    codec = find("transform", "identity")().bind(task.spec)
    return Method(PushSum(), task, exchange, find("aggregate", "mean")(), codec, 2, 1.0)


def test_a_hub_and_several_waves_are_refused() -> None:
    graph = find("topology", "ring")(4)
    with pytest.raises(UsageError, match="hub or several waves"):
        _method(find("exchange", "star")(4))
    with pytest.raises(UsageError, match="hub or several waves"):
        _method(find("exchange", "gossip")(graph, steps=2))


def test_turns_without_rounds_are_refused() -> None:
    task = find("tasks", "quadratics")(peers=4)
    codec = find("transform", "identity")().bind(task.spec)
    load = Workload(task, find("aggregate", "mean")(), codec, 3, None, 1)
    with pytest.raises(UsageError, match="pushes shares"):
        Unpaced(PushSum()).bind(load)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"batch_size": 0}, {"momentum": 1.0}, {"lr": -1.0}])
def test_wrong_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PushSum(**bad)
