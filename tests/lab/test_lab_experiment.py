"""Experiments: pairing, precedence, grids, resuming, processes, failures."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from fake_lab import Mine, counting_launch, failing_launch, fake_launch

from shoal.base.errors import UsageError
from shoal.lab.card import Arm, Budget, Claim, System, at_least, difference
from shoal.lab.cell import Cell
from shoal.lab.experiment import Experiment, Tick
from shoal.lab.run import run
from shoal.lab.scenario import Part, Scenario
from shoal.lab.store import Store, decode_run, encode_run

WORLD = Scenario("w", peers=6, rounds=4, topology="ring", byzantine=1)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv("FAKE_LOG", str(path))
    return path


def test_arms_share_everything_that_a_seed_determines(catalogue: Path) -> None:
    experiment = Experiment(
        {"a": "alpha", "b": Arm("beta-x", set={"rate": 0.5}), "c": Mine()},
        WORLD.with_settings(
            {"peers": 40, "faults": [{"kind": "crash", "fraction": 0.3, "at": 1.0}]}
        ),
        seeds=3,
    )
    cells = experiment.cells()
    assert [(c.seed, c.arm) for c in cells] == [(s, a) for s in range(3) for a in "abc"]
    for seed in range(3):
        group = [c.scenario for c in cells if c.seed == seed]
        assert len({s.explicit_faults() for s in group}) == 1
        assert len({s.byzantine_peers() for s in group}) == 1
        assert all(s.seed == seed for s in group)
    assert len({c.scenario.explicit_faults() for c in cells}) == 3


def test_precedence_of_settings(catalogue: Path) -> None:
    experiment = Experiment(
        {
            "a": Arm("alpha", set={"rate": 0.5}, scenario={"peers": 8, "topology.x": 1}),
            "b": "alpha",
        },
        WORLD, changes={"peers": 7, "rounds": 9}, overrides={"rate": "0.25", "b.layers": "4,4"},
    )  # fmt: skip
    a, b = experiment.cells()
    assert (a.scenario.peers, b.scenario.peers) == (8, 7)
    assert a.scenario.rounds == b.scenario.rounds == 9
    assert a.scenario.topology == Part("ring", {"x": 1})
    assert dict(a.settings) == {"rate": 0.25}
    assert dict(b.settings) == {"rate": 0.25, "layers": (4, 4)}
    experiment.overrides = {"peers": "30"}
    assert [c.scenario.peers for c in experiment.cells()] == [30, 30]


def test_a_budget_may_leave_arms_out() -> None:
    def card(*arms: str, scale: str = "full") -> System:
        better = Claim(
            "better", "it is better", at_least(0.0), "accuracy", difference("new", "old"),
            scale=scale,
        )  # fmt: skip
        return System(
            name="two", kind="strategy", title="Two arms", make=Mine, scenario=WORLD,
            arms={"new": Arm(), "old": Arm(system="fedavg")}, claims=(better,),
            small=Budget(seeds=1, arms=arms), full=Budget(seeds=1),
        )  # fmt: skip

    card("old", "new", scale="any")
    with pytest.raises(UsageError, match="leaves out"):
        card("new", scale="any")
    with pytest.raises(UsageError, match="runs arm 'odl'"):
        card("odl")
    card("new")


def test_arms_that_a_budget_leaves_out_do_not_run(catalogue: Path) -> None:
    file = catalogue / "fakes" / "alpha.py"
    text = file.read_text().replace("seeds=2,", 'seeds=2, arms=("alpha",),')
    for bound in ("at_least(0.01)", "at_most(1.1)"):
        text = text.replace(f"holds={bound}", f'holds={bound}, scale="full"')
    file.write_text(text)
    small, full = (Experiment.of_system("alpha", word) for word in ("small", "full"))
    assert (tuple(small.arms), small.left_out) == (("alpha",), ("slow",))
    assert (tuple(full.arms), full.left_out) == (("alpha", "slow"), ())
    report = small.run(launcher=fake_launch)
    assert report.arms == ("alpha",)
    verdicts = {each.name: each.verdict for each in report.verdicts}
    assert (verdicts["faster"], verdicts["soon"]) == ("out of scale", "fails")


def test_grids_try_every_combination(catalogue: Path) -> None:
    experiment = Experiment(
        {"a": "alpha"}, WORLD, grid={"rate": ("0.1", "0.2"), "peers": ("4", "5")}
    )
    cells = experiment.cells()
    assert [c.arm for c in cells] == [
        "a [rate=0.1, peers=4]", "a [rate=0.1, peers=5]", "a [rate=0.2, peers=4]",
        "a [rate=0.2, peers=5]",
    ]  # fmt: skip
    assert [(dict(c.settings)["rate"], c.scenario.peers) for c in cells] == [
        (0.1, 4), (0.1, 5), (0.2, 4), (0.2, 5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overrides": {"rte": "1"}}, "did you mean 'rate'"),
        ({"overrides": {"peers": "x"}}, "need a whole number"),
        ({"overrides": {"rate": "fast"}}, "need a number"),
        ({"overrides": {"topology": "rnig"}}, "did you mean 'ring'"),
        ({"grid": {"pers": ("1",)}}, "did you mean 'peers'"),
        ({"seeds": (1, 1)}, "all different"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(
    catalogue: Path, settings: dict, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Experiment({"a": "alpha"}, WORLD, **settings).run(launcher=fake_launch)


def test_cells_round_trip_and_their_keys_depend_on_all_of_them(catalogue: Path) -> None:
    cells = Experiment({"a": "alpha", "b": "beta-x"}, WORLD, seeds=2).cells()
    for cell in cells:
        assert Cell.from_json(cell.to_json()) == cell
    changed = Experiment({"a": "alpha"}, WORLD, overrides={"rounds": 5}).cells()
    other = Experiment({"a": "alpha"}, WORLD, overrides={"rate": 0.9}).cells()
    engine = Experiment({"a": "alpha"}, WORLD, engine="event").cells()
    keys = [cell.key() for cell in (*cells, *changed, *other, *engine)]
    assert len(set(keys)) == len(keys)
    assert Experiment({"m": Mine()}, WORLD).cells()[0].key() is None


def test_finished_cells_are_not_run_again(catalogue: Path, log: Path, tmp_path: Path) -> None:
    ticks: list[Tick] = []
    with Store(tmp_path / "s") as store:
        first = Experiment({"a": "alpha"}, WORLD, seeds=2)
        before = first.run(store, launcher=counting_launch)
        wider = Experiment({"a": "alpha", "b": "beta-x"}, WORLD, seeds=3)
        after = wider.run(store, launcher=counting_launch, progress=ticks.append)
        assert store.count() == 6
        assert len(log.read_text().splitlines()) == 2 + 4
        assert sum(tick.reused for tick in ticks) == 2
        assert ticks[-1].done == ticks[-1].total == 6
        assert any(0 < tick.part < 1 for tick in ticks)
        wider.run(store, launcher=counting_launch, fresh=True)
        assert len(log.read_text().splitlines()) == 12
    for seed in (0, 1):
        assert after.cell("a", seed).curves == before.cell("a", seed).curves


def test_live_arms_run_each_time_and_store_nothing(log: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        for _ in range(2):
            report = Experiment({"m": Mine()}, WORLD).run(store, launcher=counting_launch)
        assert store.count() == 0
    assert log.read_text() == "Mine 0.15 0\n" * 2
    assert report.cell("m").live == ("arm m",)


def test_processes_give_what_one_process_gives(catalogue: Path, tmp_path: Path) -> None:
    experiment = Experiment({"a": "alpha", "m": Mine()}, WORLD, seeds=2)
    alone = experiment.run(launcher=fake_launch)
    with Store(tmp_path / "s") as store:
        spread = experiment.run(store, launcher=fake_launch, jobs=2)
        assert store.count() == 2
    for cell in alone.cells:
        other = spread.cell(cell.arm, cell.seed)
        assert other.curves == cell.curves
        assert other.state_digest == cell.state_digest
    assert spread.cell("a", 1).params_file


def test_processes_refuse_what_cannot_travel(catalogue: Path) -> None:
    class Local:
        rate = 0.1

    with pytest.raises(UsageError, match="cannot be sent to another process"):
        Experiment({"m": Local()}, WORLD, seeds=2).run(launcher=fake_launch, jobs=2)


def test_a_run_that_breaks_down_is_missing_not_fatal(catalogue: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        report = Experiment.of_system("alpha", "small").run(store, launcher=failing_launch)
        assert store.count() == 2  # seed 0 of both arms
    assert "Stalled: 12 peers wait" in report.cell("alpha", 1).error
    verdicts = {v.name: v.verdict for v in report.verdicts}
    assert verdicts["faster"] == "inconclusive"
    assert verdicts["large"] == "out of scale"
    assert report.exit_code == 1


def test_prepared_worlds_and_single_runs(catalogue: Path) -> None:
    arm = Arm("alpha", prepare=lambda s: s.with_settings({"peers": s.seed + 3}))
    cells = Experiment({"a": arm}, WORLD, seeds=(4, 6)).cells()
    assert [c.scenario.peers for c in cells] == [7, 9]
    assert run("alpha", WORLD, 5, launcher=fake_launch).seed == 5
    assert run(Mine(), WORLD, launcher=fake_launch).peers == 6


def test_stored_runs_come_back_whole() -> None:
    run = fake_launch(Mine(), WORLD, seed=2, engine="auto")
    again = decode_run(encode_run(run))
    run.final = {}
    assert again == run


def test_a_foreign_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "runs.sqlite").write_text("not a database, but long enough to be looked at" * 9)
    with pytest.raises(UsageError, match="cannot be used as a run store"):
        Store(tmp_path)


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
import shoal.lab.cell
from fake_lab import counting_launch
from shoal.lab.experiment import Experiment
from shoal.lab.store import Store
from shoal.lab.scenario import Scenario
# Keys hold a digest of the package's code, which may be under work while this test runs.
shoal.lab.cell.code_digest = lambda: "fixed"
if __name__ == "__main__":
    with Store({store!r}) as store:
        Experiment({{"a": "alpha", "b": "beta-x"}}, Scenario("k", peers=4, rounds=3), seeds=4).run(
            store, launcher=counting_launch, jobs=int(sys.argv[1]))
    print("finished")
"""


@pytest.mark.parametrize(("jobs", "how"), [(1, signal.SIGKILL), (2, signal.SIGKILL),
                                           (2, signal.SIGINT)])  # fmt: skip
def test_a_killed_grid_goes_on_where_it_stopped(
    catalogue: Path, log: Path, tmp_path: Path, jobs: int, how: signal.Signals
) -> None:
    script, store = tmp_path / "grid.py", tmp_path / "kept"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent), store=str(store)))
    command = [sys.executable, str(script), str(jobs)]
    blocked = {**os.environ, "FAKE_BLOCK": "2"}
    process = subprocess.Popen(
        command, env=blocked, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 50
    while " 2\n" not in log.read_text() or not _stored(store):
        assert time.monotonic() < deadline
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended too early: {process.wait(0.05)}")
    process.send_signal(how)
    process.wait(20)
    with Store(store) as kept:
        before = kept.count()
    assert 1 <= before < 8
    ran = len(log.read_text().splitlines())
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "finished\n"
    with Store(store) as kept:
        assert kept.count() == 8
    again = log.read_text().splitlines()[ran:]
    assert len(again) == 8 - before
    assert max(Counter(again).values()) == 1


def _stored(store: Path) -> int:
    if not (store / "runs.sqlite").exists():
        return 0
    with Store(store) as kept:
        return kept.count()
