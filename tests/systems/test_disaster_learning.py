"""Worlds that fall apart: relays, averaging weights, fragments that never meet again."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

import shoal
from shoal.base.errors import UsageError
from shoal.lab.build import topology_of
from shoal.lab.cell import cell_of, stacks
from shoal.lab.launch import launch
from shoal.parts.disruption.battery import Battery
from shoal.parts.disruption.removal import Removal
from shoal.parts.disruption.roles import Roles
from shoal.parts.strategy.dec_avg import DecAvg
from shoal.parts.topology.barabasi_albert import BarabasiAlbert
from shoal.parts.topology.base import components
from shoal.parts.topology.from_edges import FromEdges
from shoal.systems.robust import disaster_learning as system
from shoal.systems.robust._disaster_claims import parts_of

# 0-1-2 and 4-5-6 hang together by 3 alone; 7 hangs on 3 as well. Holders: 0, 5, 6.
EDGES = [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [4, 6], [3, 7]]
WORLD = shoal.Scenario(
    peers=8, rounds=5, topology={"name": "from_edges", "edges": EDGES},
    task={
        "name": "digits", "split": "sizes", "train_samples": 60, "hidden": [8],
        "holders": [0, 5, 6],
    },
    exchange={"name": "gossip", "weighted": False}, links={"name": "links", "latency_s": 0.02},
    device={"name": "device", "flops_per_s": 1e8}, round_s=5.0,
    faults=({"kind": "crash", "who": [3], "at": {"round": 2}},),
)  # fmt: skip
FIRST, SECOND = (0, 1, 2), (4, 5, 6)


class Resting(DecAvg):
    """No training: averaging alone, from given parameters."""

    start: torch.Tensor

    def init(self, params: torch.Tensor) -> Any:
        state = super().init(params)
        # One peer alone (when work is costed) has no row in `start`.
        return replace(state, params=self.start.clone()) if params.dim() == 2 else state

    def local(self, state: Any, step: Any) -> Any:
        kept = state.params
        state, parcel = super().local(state, step)
        return replace(state, params=kept), replace(parcel, vector=kept)


@pytest.mark.parametrize("engine", ["lockstep", "event"])
def test_fragments_never_influence_each_other(engine: str) -> None:
    """What one of them learns after the cut leaves the other bit-identical."""
    calm = launch(DecAvg(steps=2), WORLD, seed=1, engine=engine)
    # The second fragment loses its data at the moment of the cut, and learns nothing more.
    other = WORLD.with_settings({"task.losers": [5, 6], "task.lost_at": 2})
    told = launch(DecAvg(steps=2), other, seed=1, engine=engine)
    for peer in FIRST:
        assert torch.equal(calm.final[peer], told.final[peer])
    assert not any(torch.equal(calm.final[p], told.final[p]) for p in SECOND)


@pytest.mark.parametrize("engine", ["lockstep", "event"])
def test_the_removed_take_no_part(engine: str) -> None:
    run = launch(DecAvg(steps=2), WORLD, seed=1, engine=engine)
    rounds = {p: [r.round for r in run.series("accuracy", p)] for p in range(8)}
    # The moment of the crash is when the first peer enters round 2; by then peer 3 may have ended
    # round 1 or not.
    assert rounds[3] in ([0], [0, 1])
    assert all(rounds[p] == [0, 1, 2, 3, 4] for p in range(8) if p != 3)
    before = launch(
        DecAvg(steps=2), WORLD.with_settings({"rounds": 2, "faults": []}), seed=1, engine=engine
    )
    assert run.bytes_sent[3] <= before.bytes_sent[3]
    assert run.bytes_received[3] <= before.bytes_received[3]


def test_a_node_without_live_neighbours_keeps_its_model() -> None:
    """Peer 7 is a relay whose only neighbour disappears."""
    run = launch(DecAvg(steps=2), WORLD, seed=1)
    short = launch(DecAvg(steps=2), WORLD.with_settings({"rounds": 2, "faults": []}), seed=1)
    assert torch.equal(run.final[7], short.final[7])


@pytest.mark.parametrize("engine", ["lockstep", "event"])
def test_untaught_relays_do_not_poison(engine: str) -> None:
    """After one round a holder among untaught relays still has what it alone has learned."""
    one = WORLD.with_settings({"rounds": 1, "faults": []})
    run = launch(DecAvg(steps=2), one, seed=1, engine=engine)
    alone = launch(
        DecAvg(steps=2), one.with_settings({"exchange": {"name": "isolated"}}), seed=1,
        engine=engine,
    )  # fmt: skip
    assert torch.allclose(run.final[0], alone.final[0], atol=1e-6)
    assert torch.allclose(run.final[1], alone.final[0], atol=1e-6)  # taught by 0 alone
    assert torch.equal(run.final[2], alone.final[2])  # heard untaught relays only: untouched
    plain = shoal.run(shoal.Arm(system="dpsgd", set={"steps": 2}), one, seed=1, engine=engine)
    assert not torch.allclose(plain.final[0], run.final[0], atol=1e-3)  # D-PSGD lets them in


def test_relays_forward_with_the_mean_amount_of_data() -> None:
    strategy = DecAvg()
    state = replace(
        strategy.init(torch.zeros(1, 3)), taught=torch.tensor([True]), size=torch.zeros(1).double()
    )
    sizes = torch.tensor([10.0, 30.0]).double()
    inverse = ((sizes / sizes.sum()) * (1 / sizes)).sum().unsqueeze(0)
    heard = shoal.Heard(torch.ones(1, 3), torch.tensor([3]), {"inverse_size": inverse})
    assert float(strategy.apply(state, heard, None).size) == pytest.approx(20.0)  # type: ignore[arg-type]


def test_weights_sum_to_one_in_every_round() -> None:
    """If all hold one vector, an average with weights that sum to 1 changes nothing, ever."""
    resting = _resting(torch.full((8, _dim()), 0.7))
    run = launch(resting, WORLD, seed=2)
    for params in run.final.values():
        torch.testing.assert_close(params, torch.full_like(params, 0.7))


@pytest.mark.parametrize("complete", [True, False])
def test_limit_without_training(complete: bool) -> None:
    """Stationary weights: own data times those of the closed neighbourhood among the living."""
    peers = range(8)
    world = WORLD.with_settings({"rounds": 40, "eval_every": 0, "task.holders": list(peers)})
    if complete:
        world = world.with_settings({"topology": {"name": "full"}})
    start = torch.randn(8, _dim(), generator=torch.Generator().manual_seed(3))
    start[3] = 0.0  # removed before the start: its vector must not matter
    gone = world.with_settings({"faults": [{"kind": "crash", "who": [3], "at": 0.0}]})
    run = launch(_resting(start), gone, seed=2)
    from shoal.lab.build import build

    pieces = build(replace(gone, seed=2))
    sizes = pieces.task.shard(torch.arange(8)).size.double()
    graph = pieces.topology
    group = [p for p in peers if p != 3] if complete else list(FIRST)
    weight = torch.tensor(
        [float(sizes[p] * sum(sizes[q] for q in {p, *graph.neighbors(p)} - {3})) for p in group]
    ).double()
    if complete:
        torch.testing.assert_close(weight / weight.sum(), sizes[group] / sizes[group].sum())
    limit = (weight[:, None] * start[group].double()).sum(0) / weight.sum()
    for p in group:
        torch.testing.assert_close(run.final[p].double(), limit, rtol=1e-3, atol=1e-4)


def test_worlds_differ_in_data_only() -> None:
    base = replace(shoal.Scenario.from_json(_scenario().to_json()), seed=5)
    hubs = set(system.struck(base, "degree"))
    assert len(hubs) == 7
    c, d, k = system.early_c(base), system.early_d(base), system.early_k(base)
    assert {tuple(f.who or ()) for f in (*c.faults, *d.faults)} == {tuple(sorted(hubs))}
    assert k.faults == ()
    settings = {name: dict(w.task.settings) for name, w in (("c", c), ("d", d), ("k", k))}
    assert not hubs & set(settings["c"]["holders"])
    assert hubs <= set(settings["d"]["holders"])
    assert settings["k"]["holders"] == settings["d"]["holders"]
    assert set(settings["k"]["losers"]) == hubs
    assert {len(s["holders"]) for s in settings.values()} == {25}


def test_seeds_of_an_arm_run_as_one_stack() -> None:
    arm = system.SYSTEM.arms["early K"]
    cells = [
        cell_of("early K", arm, seed, _scenario(), system="disaster-learning") for seed in (0, 1)
    ]
    assert cells[0].scenario != cells[1].scenario
    assert stacks(cells[0]) == stacks(cells[1]) is not None


def test_components_after_removal() -> None:
    graph = BarabasiAlbert(30, attach=2, seed=4)
    gone = set(Removal(by="degree", count=6).chosen(graph, 4))
    groups = parts_of(graph, gone)
    assert sorted(p for g in groups for p in g) == [p for p in range(30) if p not in gone]
    for group in groups:
        for peer in group:
            assert set(graph.neighbors(peer)) - gone <= set(group)


def test_lost_peers_are_replaced_by_links_at_two_hops() -> None:
    base = replace(_scenario(), seed=5)
    before, after = topology_of(base), topology_of(system.rewired_c(base))
    hubs = set(system.struck(base, "degree"))
    assert system.rewired_c(base).faults == system.early_c(base).faults
    for peer in range(50):
        assert after.neighbors(peer, system.EARLY) == before.neighbors(peer)
        now = set(after.neighbors(peer, system.EARLY + 1))
        assert not now & hubs
        assert peer in hubs or set(before.neighbors(peer)) - hubs <= now
    # What the hubs held together holds together again.
    left = components(after.adjacency(system.EARLY + 1)).tolist()
    apart = parts_of(before, hubs)
    together = Counter(left[p] for p in range(50) if p not in hubs).most_common(1)[0][1]
    assert together > len(apart[0])


def test_the_picture_has_every_share_of_every_world() -> None:
    (plot,) = system.SYSTEM.plots
    for points in plot.lines.values():
        assert [share for share, _ in points] == [0.0, system.STRUCK, 0.2, 0.3, 0.4]
        for share, arm in points[1:]:
            prepare = system.SYSTEM.arms[arm].prepare
            assert isinstance(prepare, system.World)
            assert (prepare.share, prepare.at_round) == (share, system.EARLY)
    base = replace(_scenario(), seed=5)
    most = system.SYSTEM.arms["early C, 40%"].prepare
    assert most is not None
    assert len(most(base).faults[0].who) == 20


def test_run_disaster_with_any_strategy_and_any_disruption() -> None:
    world = WORLD.with_settings({"faults": [], "rounds": 4})
    run = system.run_disaster("dpsgd", world, [Battery(mean_rounds=3.0, rounds=4)], seed=1)
    assert {h.what for h in run.happenings} == {"crash"}
    run = system.run_disaster(
        DecAvg(), world, [Removal(1, by="holders", count=1)], Roles(0.5, "leaf"), seed=1,
        engine="event",
    )  # fmt: skip
    assert sum(len(h.peers) for h in run.happenings) == 1
    with pytest.raises(UsageError, match="peers with data would disappear"):
        system.run_disaster(DecAvg(), world, [Removal(1, by="holders", count=4)])
    with pytest.raises(UsageError, match="give one of them"):
        DecAvg(steps=1, epochs=1)


def _scenario() -> shoal.Scenario:
    from shoal.lab.run import scenario_of

    return scenario_of("disaster-learning")


def _dim() -> int:
    return 64 * 8 + 8 + 8 * 10 + 10


def _resting(start: torch.Tensor) -> Resting:
    strategy = Resting(lr=0.1)
    object.__setattr__(strategy, "start", start)
    return strategy


def test_the_graph_is_cut_as_drawn() -> None:
    graph = FromEdges(8, tuple((a, b) for a, b in EDGES))
    assert graph.neighbors(3) == (2, 4, 7)
