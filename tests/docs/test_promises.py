"""What the README promises about numbers: the same in every process, and again from a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.lab.report import Report

# Faults, loss, jitter, skew and a wire that flips bits: whatever could depend on an order.
RUNS = """
import json
import shoal

world = shoal.Scenario(
    peers=10, rounds=4, seconds=60.0, topology={"name": "random_regular", "degree": 4},
    task={"name": "digits", "split": "dirichlet", "hidden": [8]},
    links={"name": "links", "latency_s": 0.05, "jitter_s": 0.01, "loss": 0.05},
    device={"name": "device", "flops_per_s": 1e8, "spread": 0.5},
    faults=[
        {"kind": "crash", "fraction": 0.3, "at": {"round": 1}, "until": {"round": 2}},
        {"kind": "slow", "count": 2, "at": 0.1},
    ],
)
skewed = {"kind": "skew", "who": [2, 3], "at": 0.2, "offset_s": 0.05, "drift": 1e-4}
broken = {"kind": "corrupt", "who": [4], "at": 0.3, "until": 1.0}
rough = world.with_settings({"faults": [*(f.to_json() for f in world.faults), skewed, broken]})
out = {}
for name, place, engine in (
    ("dpsgd", world, "lockstep"), ("dpsgd", rough, "event"), ("fedavg", world, "lockstep"),
    ("gossip", rough, "event"),
):
    run = shoal.run(name, place, engine=engine, seed=5)
    out[f"{name} {engine}"] = [run.trace_digest, run.state_digest, run.messages_delivered]
print(json.dumps(out))
"""


def test_another_process_with_another_hash_seed_agrees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "4242" if os.environ.get("PYTHONHASHSEED") != "4242" else "1"
    env = {**os.environ, "PYTHONHASHSEED": other, "OMP_NUM_THREADS": "1"}
    loaded = """
import sys
print(json.dumps([name for name in ("torch._dynamo", "sympy") if name in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", RUNS + loaded], env=env, cwd=tmp_path, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    capsys.readouterr()
    exec(RUNS, {})
    here = json.loads(capsys.readouterr().out)
    there, compilers = map(json.loads, done.stdout.splitlines())
    assert here == there
    assert len(here) == 4
    for what, (trace, state, delivered) in here.items():
        assert state, what
        assert delivered, what
        assert trace or what.endswith("lockstep"), what
    # Torch loads its compiler whenever it is touched in a wrong place; a short run takes twice as
    # long then.
    assert compilers == []


def test_a_report_replays_and_a_changed_number_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / ".shoal"))
    settings = ("peers=6", "rounds=12", "eval_every=1", "topology=ring")
    words = ["run", "gossip", *(word for each in settings for word in ("--set", each))]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    (file,) = (tmp_path / ".shoal" / "reports").glob("*.json")
    assert CliRunner().invoke(app, ["replay", str(file)]).exit_code == 0
    report = Report.load(file)
    brief = tmp_path / "brief.json"
    brief.write_text(report.brief().to_json(), encoding="utf-8")
    assert brief.stat().st_size < file.stat().st_size / 2
    assert CliRunner().invoke(app, ["replay", str(brief)]).exit_code == 0
    report.cells[0].totals["messages_sent"] += 1
    file.write_text(report.to_json(), encoding="utf-8")
    found = CliRunner().invoke(app, ["replay", str(file)])
    assert found.exit_code == 1
    assert "messages_sent" in found.output
