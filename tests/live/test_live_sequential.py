"""Sequential gradient coding as 8 processes whose workers stall on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest
from up_processes import Upped

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(300)]

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
