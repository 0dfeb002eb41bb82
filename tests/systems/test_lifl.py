"""LIFL: what it sums, who is started when, costs in virtual time, and everything that can fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import shoal
from shoal.base.errors import UsageError
from shoal.lab import discover
from shoal.lab.cell import cell_of, execute
from shoal.lab.fuzz import target
from shoal.lab.launch import launch, program_of
from shoal.lab.scenario import Scenario
from shoal.rounds.workload import Workload
from shoal.systems.serving import _lifl_kills as kills
from shoal.systems.serving._lifl_claims import (
    everybody_counts_once,
    nobody_is_kept_for_nothing,
    nothing_is_left_in_memory,
)
from shoal.systems.serving._lifl_layout import Layout
from shoal.systems.serving._lifl_wire import Add, Result
from shoal.systems.serving.lifl import INVARIANTS, LIFL
from shoal.systems.serving.lifl_machine import lifl_machine
from shoal.wire.message import declared_kinds
from shoal.world.record import Row, Run

PEERS, NODES, EACH = 24, 2, 3
CLIENTS = range(1 + NODES * (1 + EACH), PEERS)
WORLD = Scenario(
    "lifl", peers=PEERS, rounds=4, eval_every=1,
    task={"name": "digits", "split": "dirichlet", "alpha": 0.5, "hidden": [8],
          "train_samples": 400, "holders": list(CLIENTS)},
    links={"name": "links", "latency_s": 0.002},
    device={"name": "device", "flops_per_s": 1e8},
)  # fmt: skip
SETTINGS: dict[str, Any] = {
    "nodes": NODES,
    "aggregators": EACH,
    "capacity": 10,
    "steps": 2,
    "batch_size": 8,
}


def run(scenario: Scenario = WORLD, **settings: Any) -> Run:
    found = shoal.run(shoal.Arm(system="lifl", set={**SETTINGS, **settings}), scenario)
    rules = INVARIANTS if not settings.get("always_on") else INVARIANTS[:1]
    assert [rule(found) for rule in rules] == [None] * len(rules)
    return found


def values(found: Run, name: str) -> list[float]:
    return [row.value for row in found.series(name)]


def total(found: Run, name: str) -> float:
    return sum(values(found, name))


def with_faults(*faults: dict[str, Any], **changes: Any) -> Scenario:
    return WORLD.with_settings({"faults": list(faults), **changes})


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"placement": "worst_fit"}, {"eager": False}, {"reuse": False, "planning": False},
        {"fan_in": 1, "merge": 2}, {"fan_in": 5, "always_on": True},
    ],
)  # fmt: skip
def test_the_model_is_that_of_plain_averaging(settings: dict[str, Any]) -> None:
    """Whatever the tree: the hub's model in every round, within rounding."""
    plain = shoal.run(
        shoal.Arm(system="fedavg", set={"steps": 2, "batch_size": 8}),
        WORLD.with_settings({"exchange": {"name": "star", "hub_works": False}}),
    )
    tree = run(**settings)
    assert values(tree, "updates") == [len(CLIENTS)] * 4
    gap = (tree.final[0] - plain.final[0]).abs().max() / plain.final[0].abs().max()
    assert gap <= 1e-6
    hub = [row.value for row in plain.series("accuracy", 0)]
    assert [row.value for row in tree.series("accuracy", 0)] == hub
    assert len({tuple(params.tolist()) for params in tree.final.values()}) == 1
    assert sorted(tree.final) == list(range(PEERS))


def test_few_updates_stay_on_one_node() -> None:
    best = run(fewest=9, most=9)
    assert set(values(best, "nodes")) == {1.0}
    assert total(best, "transfers") == 0
    turn = run(fewest=9, most=9, placement="round_robin")
    assert set(values(turn, "nodes")) == {2.0}
    assert total(turn, "transfers") == 4
    assert set(values(best, "updates")) == {9.0}


def test_plans_shrink_to_the_load() -> None:
    """20 ms of work for 10 updates within a second need one aggregator, and so it is planned."""
    slow = {"client_s": 5.0, "client_spread": 0.1, "cold_start_s": 2.0, "fewest": 10, "most": 10}
    found = run(**slow, costs="shared", collect_s=20.0)
    assert values(found, "planned")[0] == 5.0
    assert values(found, "planned")[2:] == [1.0, 1.0]
    # Aggregators are warm before updates come; without planning the first one waits for them.
    late = run(**slow, costs="shared", collect_s=20.0, planning=False)
    assert min(values(late, "act_s")) > max(values(found, "act_s")[2:])


def test_what_costs_are_charged() -> None:
    """Work is the sum of the table's processor times, by hand."""
    found = run(fewest=9, most=9, costs="shared", eager=False, fan_in=3)
    # Nine puts, nine additions in three leaves, three in the middle, in each of four rounds.
    assert total(found, "work_s") == pytest.approx(4 * (9 * 0.009 + 12 * 0.008))
    socket = run(fewest=9, most=9, costs="socket", eager=False, fan_in=3)
    assert total(socket, "work_s") == pytest.approx(4 * 12 * 0.173)


def test_always_on_holds_all_for_the_whole_run() -> None:
    few = {"fewest": 4, "most": 4, "client_s": 5.0, "collect_s": 20.0}
    found = run(always_on=True, **few)
    assert total(found, "reserved_s") == pytest.approx(NODES * EACH * found.virtual_s, rel=0.01)
    assert total(found, "cold_starts") == NODES * EACH
    assert total(run(**few), "reserved_s") < 0.5 * total(found, "reserved_s")


def test_reuse_spares_cold_starts() -> None:
    assert total(run(), "cold_starts") <= 0.6 * total(run(reuse=False), "cold_starts")


def test_a_goal_ends_a_round_before_the_last_update() -> None:
    late = {"client_s": 1.0, "hibernating": 0.3, "hibernate_s": 30.0, "collect_s": 60.0}
    all_of_them, most_of_them = run(**late), run(**late, goal=0.5)
    assert set(values(all_of_them, "updates")) == {float(len(CLIENTS))}
    assert all(7 <= count <= 9 for count in values(most_of_them, "updates"))
    assert most_of_them.virtual_s < all_of_them.virtual_s / 2


def test_clients_that_are_late_are_not_waited_for() -> None:
    found = run(with_faults({"kind": "crash", "who": [10, 11], "at": 0.0}), collect_s=1.0)
    assert set(values(found, "updates")) == {float(len(CLIENTS) - 2)}


def test_memory_that_is_full_makes_clients_wait() -> None:
    """A node of few slots takes all updates in the end."""
    found = run(slots=12, merge=2, fan_in=2, fewest=10, most=10, costs="shared")
    assert set(values(found, "updates")) == {10.0}
    assert found.messages_sent > run(merge=2, fewest=10, most=10, costs="shared").messages_sent


AGGREGATOR = 3


def test_a_dead_aggregators_sum_is_made_again() -> None:
    """Costs are high, so that it dies within an addition; it comes back, or never does."""
    slow = {"costs": "socket", "client_s": 1.0, "collect_s": 20.0, "planning": False}
    for until in ({}, {"until": 2.0}):
        crash = {"kind": "crash", "who": [AGGREGATOR], "at": 1.2, **until}
        found = run(with_faults(crash), **slow)
        assert set(values(found, "updates")) == {float(len(CLIENTS))}
        assert total(found, "redone") > 0
        assert not values(found, "skipped")


def test_one_that_is_taken_for_dead_spoils_nothing() -> None:
    """A hundred times too slow, it still wants to write when its sum is made elsewhere."""
    slow = {"costs": "socket", "client_s": 1.0, "collect_s": 20.0, "patience_s": 0.2}
    found = run(
        with_faults({"kind": "slow", "who": [AGGREGATOR, 4], "at": 0.5, "factor": 100.0}), **slow
    )
    assert set(values(found, "updates")) == {float(len(CLIENTS))}
    assert total(found, "redone") > 0


@pytest.mark.parametrize("peer", [0, 1, 2])
def test_a_round_begins_again_when_coordinator_or_gateway_come_back(peer: int) -> None:
    crash = {"kind": "crash", "who": [peer], "at": 1.3, "until": 1.8}
    found = run(with_faults(crash), client_s=1.0, collect_s=10.0, attempts=6)
    assert found.finished
    rounds = {row.round for row in found.series("updates")}
    assert rounds == {0, 1, 2, 3}
    assert set(values(found, "updates")) == {float(len(CLIENTS))}
    calm = run(client_s=1.0, collect_s=10.0)
    gap = (found.final[0] - calm.final[0]).abs().max() / calm.final[0].abs().max()
    assert gap <= 1e-6


def test_without_a_coordinator_all_end() -> None:
    found = run(with_faults({"kind": "crash", "who": [0], "at": 0.01}), quiet_s=3.0)
    assert found.finished
    assert found.virtual_s < 30.0


@pytest.mark.parametrize(
    "settings",
    [
        {"capacity": 3}, {"capacity": 3, "reuse": False, "cold_start_s": 0.05, "costs": "socket"},
        {"capacity": 3, "eager": False, "planning": False, "placement": "worst_fit"},
    ],
)  # fmt: skip
def test_fault_lists_lose_and_double_nothing(settings: dict[str, Any]) -> None:
    small = {"task.hidden": [4], "task.train_samples": 240, "rounds": 3, **settings}
    explored = target("lifl", small).explore(8)
    assert not explored.failures
    assert explored.traces >= 6


def test_a_clock_that_is_set_back_is_no_load() -> None:
    """A gateway whose clock makes additions take no time at all, or less."""
    small = {"task.hidden": [4], "rounds": 4, "capacity": 3}
    assert not target("lifl", small).explore(1, first_seed=250).failures


def test_checkers_see_what_they_are_for() -> None:
    def seen(*rows: Row) -> list[bool]:
        found = Run("event", 0, 3, list(rows))
        return [rule(found) is not None for rule in INVARIANTS]

    assert seen() == [False] * 3
    assert seen(Row("miscounted", 0.5, 1.0, 2, 0)) == [True, False, False]
    twice = Row("updates", 2.0, 1.0, 2, 0, (("ids", "4 4"),))
    assert "updates of" in (everybody_counts_once(Run("event", 0, 3, [twice])) or "")
    alive = Run("event", 0, 3, [Row("alive", 2.0, 1.0)])
    assert "2 are alive" in (nobody_is_kept_for_nothing(alive) or "")
    left = Run("event", 0, 3, [Row("slots_left", 1.0, 1.0, -1, 1)])
    assert "1 slots are left at gateway 1" in (nothing_is_left_in_memory(left) or "")


def test_marks_show_what_was_really_added() -> None:
    """A lost, a doubled and a foreign update in the sum, under a list of ids that looks right."""
    bound, _ = program_of(LIFL(**SETTINGS), WORLD, 0)
    sizes = {c: float(bound.workload.task.shard(c).size) for c in bound.layout.clients}

    def result(counts: dict[int, int], ids: list[int]) -> Any:
        vector = sum(
            n * sizes[c] * bound.marked(torch.zeros(bound.dim), c) for c, n in counts.items()
        )
        weight = sum(sizes[c] for c in ids)
        return Result(0, 1, weight, tuple(ids), vector / weight, 0.0, 0.0)

    chosen = list(bound.layout.clients)
    a, b, c = chosen[:3]
    assert bound.miscounted(result({a: 1, b: 1}, [a, b]), chosen) < 1e-6
    assert bound.miscounted(result({a: 1}, [a, b]), chosen) == pytest.approx(1.0)
    assert bound.miscounted(result({a: 2, b: 1}, [a, b]), chosen) == pytest.approx(1.0, rel=1e-3)
    assert bound.miscounted(result({a: 1, b: 1, c: 1}, [a, b]), chosen) == pytest.approx(1.0)
    assert bound.miscounted(result({a: 1}, [a]), [b]) == float("inf")


def test_all_messages_are_checked() -> None:
    """A flipped bit in a key or a weight would spoil a sum that nobody can look into."""
    ours = [kind for kind in declared_kinds() if kind.__module__ == Add.__module__]
    assert len(ours) >= 12
    assert all(kind.checked for kind in ours)


def test_layouts() -> None:
    layout = Layout.fitting(PEERS, NODES, EACH)
    roles = [layout.role(peer) for peer in range(PEERS)]
    assert roles.count("coordinator") == 1
    assert roles.count("gateway") == NODES
    assert roles.count("aggregator") == NODES * EACH
    assert [p for p in range(PEERS) if roles[p] == "client"] == list(CLIENTS)
    owned = [a for node in range(NODES) for a in layout.aggregators(layout.gateway(node))]
    assert [p for p in range(PEERS) if roles[p] == "aggregator"] == owned
    for peers in range(4, 40):
        assert Layout.fitting(peers, 2, None).clients
    with pytest.raises(UsageError, match="raise peers"):
        Layout.fitting(3, 2, None)
    with pytest.raises(UsageError, match="3 aggregators each"):
        Layout.fitting(9, 2, 3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"placement": "best"}, "placement='best'"), ({"fan_in": 0}, "fan_in=0"),
        ({"merge": 1}, "merge=1"), ({"goal": 0.0}, "goal=0.0"),
        ({"fewest": 3, "most": 2}, "fewest=3, most=2"), ({"costs": "free"}, "costs='free'"),
        ({"client_spread": 1.0}, "client_spread"), ({"patience_s": 0.0}, "patience_s=0.0"),
    ],
)  # fmt: skip
def test_bad_settings_say_what_to_do(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        LIFL(**settings)


@pytest.mark.parametrize(
    ("changes", "settings", "says"),
    [
        ({"aggregator": "median"}, {}, "gives a mean"),
        ({"transform": "sign_sgd"}, {}, "leave the transform out"),
        ({}, {"most": 99, "fewest": 1}, "most=99 of 15"), ({}, {"slots": 5}, "need more than"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_tree_is_refused(
    changes: dict[str, Any], settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        run(WORLD.with_settings(changes), **settings)


def test_models_of_half_precision_are_refused() -> None:
    bound, _ = program_of(LIFL(**SETTINGS), WORLD, 0)
    workload = replace(bound.workload)
    workload.__dict__["initial"] = bound.workload.initial.half()
    assert isinstance(workload, Workload)
    with pytest.raises(UsageError, match="float16"):
        LIFL(**SETTINGS).bind(workload)


def test_the_kill_list_takes_aggregators_only_and_leaves_both_ends_alone() -> None:
    world = discover.scenario("serving.one_machine")
    faults = kills.kill_list(world).faults
    assert faults == kills.kill_list(world).faults
    times = [float(fault.at) for fault in faults]  # type: ignore[arg-type]
    assert 8 <= len(faults) <= 24
    assert times[0] >= 3.0
    assert times[-1] < 100 * kills.PACE_S - 3.0
    layout = Layout.fitting(world.peers, 1, 3)
    drawn = [f for seed in range(5) for f in kills.kill_list(replace(world, seed=seed)).faults]
    assert {peer for fault in drawn for peer in fault.who or ()} == set(layout.aggregators(1))
    assert layout.aggregators(1) == kills.AGGREGATORS


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"transport": "mail"}, "transport='mail'"), ({"updates": 0}, "updates=0")],
)
def test_the_machine_refuses_what_it_cannot_measure(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        lifl_machine(WORLD, **settings)


@pytest.mark.slow
@pytest.mark.live
@pytest.mark.timeout(300)
def test_processes_that_are_killed_lose_nothing() -> None:
    """Coordinator, gateway, two aggregators and three clients, of which an aggregator dies."""
    world = WORLD.with_settings(
        {
            "peers": 7, "rounds": 30, "task.holders": [4, 5, 6],
            "faults": [{"kind": "crash", "who": [2], "at": 2.0, "until": 2.5}],
        }
    )  # fmt: skip
    settings = {
        "nodes": 1, "aggregators": 2, "pace_s": 0.25, "patience_s": 1.0, "collect_s": 20.0,
        "attempts": 4, "steps": 2,
    }  # fmt: skip
    arm = shoal.Arm(system="lifl", set=settings, engine="processes")
    found = execute(cell_of("killed", arm, 0, world), launch)
    marks = [mark.what for mark in found.happenings if mark.peers == (2,)]
    assert any("SIGKILL" in mark for mark in marks)
    assert found.finished
    assert all(rule(found) is None for rule in INVARIANTS)
    assert values(found, "updates") == [3.0] * 30
