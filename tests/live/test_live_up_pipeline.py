"""A pipeline with `shoal up`, one of whose stages is killed and rebuilt by its neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest
from up_processes import Upped

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(300)]

WORDS = (
    "checkfree", "--set", "width=8", "--set", "heads=2", "--set", "length=6", "--set",
    "batch_size=2", "--set", "held_out=3", "--set", "iterations=40", "--set", "evaluate_every=20",
    "--set", "pace_s=0.1", "--set", "timeout_s=1.0", "--set", "patience_s=120", "--restart",
)  # fmt: skip


def test_a_stage_that_is_killed_is_rebuilt_by_its_neighbours(tmp_path: Path) -> None:
    up = Upped(tmp_path, "5", *WORDS, patience_s=240)
    try:
        up.wait_for_round(10)
        up.kill(2)
        up.happened("restarted", 2)
        assert up.end() == 0, up.told()
    finally:
        up.close()
    cell = up.report()
    rebuilt = cell["curves"]["rebuilt"]
    assert len(rebuilt) == 1
    assert 10 <= rebuilt[0][2] < 40
    assert set(cell["finals"]["version"]) == {40.0}
    losses = cell["curves"]["loss"]
    assert losses[-1][2] < losses[0][2]
    assert "unrecoverable" not in cell["curves"]
