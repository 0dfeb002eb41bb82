"""Eight processes that train together, of which two lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from up_processes import Upped

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(900)]

# A round ends when everybody was heard; its deadline is there for the dead.
WORLD = (
    "dpsgd", "--set", "task=digits", "--set", "links=none", "--set", "topology=full",
    "--set", "rounds=40", "--set", "round_s=5.0", "--set", "eval_every=10", "--set", "epochs=1",
    "--set", "lr=0.1", "--gone-s", "4",
)  # fmt: skip
ROBUST = ("--set", "aggregator=trimmed_mean", "--set", "aggregator.trim=2")
LIARS = (2, 5)
LIES = {
    "flipped": ("--set", "attack=sign_flip", "--set", "attack.scale=3.0"),
    "noise": ("--set", "attack=gaussian", "--set", "attack.scale=1.0"),
}
"""Attacks that know what their peer would have sent, and nothing else."""


def accuracy(folder: Path, *words: str, liars: Sequence[int] = ()) -> float:
    """Of the honest peers' mean model after the last round."""
    folder.mkdir()
    lying = ("--set", f"byzantine={list(liars)}") if liars else ()
    up = Upped(folder, "8", *WORLD, *words, *lying, patience_s=300)
    try:
        assert up.end() == 0, up.told()
    finally:
        up.close()
    cell = up.report()
    assert cell["byzantine"] == list(liars)
    return cell["curves"]["mean_model_accuracy"][-1][2]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> float:
    """What a robust rule reaches when nobody lies."""
    found = accuracy(tmp_path_factory.mktemp("honest") / "run", *ROBUST)
    assert found > 0.85
    return found


@pytest.mark.parametrize("name", LIES)
def test_a_robust_rule_learns_among_liars_and_the_mean_does_not(
    tmp_path: Path, honest: float, name: str
) -> None:
    assert accuracy(tmp_path / "robust", *ROBUST, *LIES[name], liars=LIARS) >= honest - 0.02
    assert accuracy(tmp_path / "mean", *LIES[name], liars=LIARS) < honest - 0.02
