"""A killed process, and another one that goes on with the round that the first had reached."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import resumed
from resumed import ROUNDS, experiment
from safetensors.torch import load_file

from shoal.lab import launch
from shoal.lab.card import Arm
from shoal.lab.cell import cell_of, stacks
from shoal.lab.experiment import Experiment, Tick
from shoal.lab.faults import FaultSetting
from shoal.lab.scenario import Scenario
from shoal.lab.store import Store
from shoal.world.record import Run

STOP = 5


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What SIGKILL left of an experiment in round STOP of its first run."""
    home = tmp_path_factory.mktemp("killed") / ".shoal"
    command = [sys.executable, resumed.__file__]
    environment = {**os.environ, "SHOAL_HOME": str(home), "STOP_AT": str(STOP)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        line = ""
        while line != "stands still\n":
            line = process.stdout.readline()
            assert line, "it ended by itself"
        process.kill()
    assert process.returncode < 0
    return home


@pytest.fixture
def home(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / ".shoal"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("undisturbed")
    go_on(home)
    return stored(home)


def go_on(home: Path, **settings: Any) -> list[str]:
    """Run it to the end; what was told."""
    notes: list[str] = []

    def tell(tick: Tick) -> None:
        notes.append(f"{tick.cell} {tick.note}")
        assert tick.reused == ("resumed at round 5 of" in tick.note or tick.note == "stored")

    with Store(home) as store:
        experiment().run(store, progress=tell, **settings)
    return notes


def stored(home: Path) -> dict[str, Any]:
    """Every number of every run, but for the time that it took, and the parameters' files."""
    found: dict[str, Any] = {}
    with Store(home) as store:
        for cell in experiment().cells():
            key = cell.key()
            assert key is not None
            run = store.get(key)
            assert run is not None
            kept = [f.name for f in fields(Run) if f.name not in ("wall_s", "cpu_s")]
            params = {k: v.tolist() for k, v in load_file(store.params_path(key)).items()}
            found[f"{cell.arm} {cell.seed}"] = ([getattr(run, name) for name in kept], params)
    return found


def checkpoints(home: Path) -> list[Path]:
    return sorted((home / "checkpoints").glob("*"))


@pytest.mark.live
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_experiment_goes_on_within_its_runs(
    home: Path, undisturbed: dict[str, Any], jobs: int
) -> None:
    assert len(checkpoints(home)) == 1
    notes = go_on(home, jobs=jobs)
    assert stored(home) == undisturbed
    assert checkpoints(home) == []
    told = [note for note in notes if "resumed" in note]
    if jobs == 1:
        assert told[0] == f"ring, seed 0 and 1 more seeds, resumed at round {STOP} of {ROUNDS}"
        assert told[1].endswith(f"round {STOP + 1} of {ROUNDS}, resumed at round {STOP}")
    assert [note for note in told if "done" in note] == [
        f"ring, seed {seed} done, resumed at round {STOP}" for seed in (0, 1)
    ]
    # Nothing is left to do.
    assert all(note.endswith("stored") for note in go_on(home))


@pytest.mark.live
def test_fresh_starts_from_the_beginning(home: Path, undisturbed: dict[str, Any]) -> None:
    notes = go_on(home, fresh=True)
    assert not any("resumed" in note for note in notes)
    assert stored(home) == undisturbed
    assert checkpoints(home) == []


@pytest.mark.live
@pytest.mark.parametrize("how", ["truncated", "other code"])
def test_what_cannot_be_used_costs_a_line_and_the_rounds(
    home: Path, undisturbed: dict[str, Any], how: str, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (path,) = checkpoints(home)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        monkeypatch.setattr("shoal.lab.cell.code_digest", lambda: "other")
    notes = go_on(home)
    assert not any("resumed" in note for note in notes)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: this checkpoint is ignored, it ")
    assert stored(home) == undisturbed
    assert checkpoints(home) == []


def test_runs_that_are_not_kept_have_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a store, for live objects, programs, and on the other engines."""
    made: list[Path] = []

    def checkpoint(path: Path, key: str) -> Any:
        made.append(path)
        return resumed.Eager(path, key)

    monkeypatch.setattr(launch, "checkpoint", checkpoint)
    world = Scenario("tiny", peers=4, rounds=2, task="digits", topology="ring")
    mine = Experiment({"mine": live_object()}, world)
    with Store(tmp_path) as store:
        Experiment({"ring": "dpsgd"}, world).run()
        mine.run(store)
        Experiment({"ring": "dpsgd"}, world, engine="event").run(store)
        assert made == []
        Experiment({"ring": "dpsgd"}, world).run(store)
    assert [path.parent for path in made] == [tmp_path / "checkpoints"]


def live_object() -> Any:
    from shoal.parts import find

    return find("strategy", "local_steps")(lr=0.1, steps=1)


def test_only_seeds_that_end_together_share_a_stack() -> None:
    """Otherwise a kill takes the first with the last."""
    world = Scenario("small", peers=6, rounds=4, task="digits", topology="ring")

    def of(seed: int, **changes: Any) -> Any:
        return stacks(cell_of("ring", Arm(system="dpsgd"), seed, world.with_settings(changes)))

    assert of(0) == of(1) is not None
    assert of(0, seconds=3.0) != of(1, seconds=3.0)
    skew = (FaultSetting("skew", who=(1,), settings={"offset_s": 1.0}),)
    assert of(0, faults=skew) != of(1, faults=skew)
