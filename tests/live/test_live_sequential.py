"""Sequential gradient coding on sockets and processes whose workers stall on purpose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from up_processes import Upped

from shoal.cli.app import app

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(300)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "stragglers.toml"
JOBS = 24
WORDS = (
    "sequential-gradient-coding", "--set", "task.holders=[0]", "--set", f"rounds={JOBS}",
    "--set", "most=2", "--set", "base_s=0.2", "--set", "slope_s=0.5", "--set", "noise_s=0.01",
    "--set", "stationary=0.15", "--set", "slow=8", "--set", "retry_s=5", "--set", "patience_s=60",
    "--set", "quiet_s=100", "--set", "links=none",
)  # fmt: skip


def test_processes_that_stall_are_cancelled_and_gradients_stay_exact(tmp_path: Path) -> None:
    up = Upped(tmp_path, "8", *WORDS, patience_s=240)
    try:
        assert up.end() == 0, up.told()
    finally:
        up.close()
    curves = up.report()["curves"]
    assert max(value for _, _, value in curves["gradient_error"]) < 1e-10
    losses = [value for _, _, value in curves["job_loss"]]
    assert losses[-1] < losses[0]
    # Somebody was late, and was not waited for.
    assert any(value > 0 for _, _, value in curves["late"])
    assert "substituted" not in curves


def told(folder: Path, engine: str) -> dict[str, dict[str, Any]]:
    """What the example's report says of each arm."""
    words = ["run", str(EXAMPLE), "--engine", engine, "--set", "rounds=8", "--out", str(folder)]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    (report,) = folder.glob("*.json")
    return {cell["arm"]: cell for cell in json.loads(report.read_text())["cells"]}


def test_what_is_saved_on_sockets_is_what_simulation_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / ".shoal"))
    found = {engine: told(tmp_path / engine, engine) for engine in ("event", "live")}
    took = {
        engine: {arm: cell["curves"]["finished_s"][-1][2] for arm, cell in cells.items()}
        for engine, cells in found.items()
    }
    for seconds in took.values():
        assert seconds["m-sgc"] < seconds["gradient-coding"] < seconds["uncoded"]
    for arm, simulated_s in took["event"].items():
        # Workers sleep for their delays, whatever else they do.
        assert took["live"][arm] > 0.98 * simulated_s, arm
        losses = [
            [value for _, _, value in found[engine][arm]["curves"]["job_loss"]] for engine in took
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-8)
