"""Just One Byte as processes: the one that orders is killed and comes back as a newcomer."""

from __future__ import annotations

from pathlib import Path

import pytest
from up_processes import Upped

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(300)]

ROUNDS = 1500
WORLD = (
    "--set", "task=rotated_digits", "--set", "links=none", "--set", f"rounds={ROUNDS}",
    "--set", "eval_every=100", "--set", "wait_s=0.3", "--set", "silence_s=1.0",
    "--set", "retry_s=0.3", "--set", "check_every=10", "--set", "audit=true", "--gone-s", "4",
)  # fmt: skip


def test_a_killed_sequencer_is_replaced_and_comes_back(tmp_path: Path) -> None:
    up = Upped(tmp_path, "4", "just-one-byte", *WORLD, "--restart", "--restarts", "1",
               patience_s=240)  # fmt: skip
    try:
        up.wait_for_round(150)
        up.kill(0)
        up.happened("restarted", 0)
        code = up.end()
    finally:
        up.close()
    assert code == 0, up.told()
    assert "internal error" not in up.stderr(), up.told()
    report = up.report()
    curves = report["curves"]
    assert curves["mean_model_loss"][-1][2] < 0.8 * curves["mean_model_loss"][0][2]
    # All that ended hold the same bits, and each log gives them.
    assert curves["drift"][-1][2] < 1e-5
    assert all(value == 1.0 for _, _, value in curves["replayed"])
    assert all(value == ROUNDS for _, _, value in curves["iterations"])
