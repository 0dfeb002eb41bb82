"""Secure aggregation as 8 processes of which one is killed, with keys of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from up_processes import Upped

from shoal.parts.privacy.signed_round import Roster

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(300)]

WORDS = (
    "secure-aggregation", "--set", "rounds=40", "--set", "audit=true", "--set", "secrets=system",
    "--set", "work_s=20", "--set", "phase_s=5", "--set", "links=none", "--gone-s", "4",
)  # fmt: skip


def test_a_killed_process_is_taken_off_the_sum(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    Roster.write(keys, 8)
    words = *WORDS, "--set", f"identities={keys}"
    up = Upped(tmp_path, "8", *words, "--restart", "--restarts", "1", patience_s=240)
    try:
        up.wait_for_round(5)
        up.kill(3)
        up.happened("restarted", 3)
        assert up.end() == 0, up.told()
    finally:
        up.close()
    curves = up.report()["curves"]
    clients = [value for _, _, value in curves["clients"]]
    assert max(clients) == clients[-1] == 7
    assert min(clients) < 7
    losses = [value for _, _, value in curves["loss"]]
    assert losses[-1] < losses[0]
