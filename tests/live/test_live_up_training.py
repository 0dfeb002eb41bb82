"""Training with `shoal up` while processes are killed: accuracy, and that nothing hangs."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from up_processes import Upped

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(600)]

WORLD = ("--set", "task=digits", "--set", "links=none", "--set", "eval_every=1", "--gone-s", "4")


@dataclass(frozen=True)
class Training:
    """What is trained: words for `shoal up`, and the round in whose course peers die."""

    words: tuple[str, ...]
    middle: int


TRAININGS = {
    "dpsgd": Training(
        ("dpsgd", "--set", "topology=full", "--set", "rounds=120", "--set", "round_s=0.5",
         "--set", "epochs=1", "--set", "lr=0.1"), 50,
    ),
    "diloco": Training(
        ("diloco", "--set", "topology=full", "--set", "rounds=50", "--set", "round_s=1.0"), 20,
    ),
    "modest": Training(
        ("modest", "--set", "rounds=300", "--set", "task.split=iid", "--set", "sample_size=4",
         "--set", "ping_timeout_s=1.0", "--set", "aggregation_timeout_s=5.0"), 60,
    ),
}  # fmt: skip


def final_accuracy(up: Upped) -> float:
    """Of the mean model of the last round."""
    return up.report()["curves"]["mean_model_accuracy"][-1][2]


def undisturbed(folder: Path, training: Training) -> float:
    folder.mkdir()
    up = Upped(folder, "8", *training.words, *WORLD, patience_s=240)
    try:
        assert up.end() == 0, up.told()
    finally:
        up.close()
    return final_accuracy(up)


@pytest.mark.parametrize("name", TRAININGS)
def test_accuracy_survives_two_deaths_and_one_comes_back(tmp_path: Path, name: str) -> None:
    training = TRAININGS[name]
    wanted = undisturbed(tmp_path / "calm", training)
    (tmp_path / "killed").mkdir()
    up = Upped(tmp_path / "killed", "8", *training.words, *WORLD, "--restart", "--restarts", "1",
               patience_s=240)  # fmt: skip
    try:
        up.wait_for_round(training.middle)
        up.kill(3)
        up.kill(6)
        up.happened("restarted", 6)
        up.kill(6)  # Its only restart is used up.
        up.happened("restarted", 3)
        code = up.end()
    finally:
        up.close()
    end = up.last("finished")
    assert (code, end["lost"]) == (1, [6]), up.told()
    assert end["restarts"] == {"3": 1, "6": 1}
    assert "rejoined from its store" in (up.run_folder() / "peer-3.log").read_text()
    found = final_accuracy(up)
    assert wanted > 0.85
    assert found >= wanted - 0.02


# Who is left of too few peers for its method waits for others until the horizon, so there is one.
SHORT = {"dpsgd": ("--set", "rounds=60"), "modest": ("--set", "seconds=30.0")}


@pytest.mark.parametrize("seed", range(10))
def test_no_schedule_of_kills_makes_training_hang(tmp_path: Path, seed: int) -> None:
    draws = random.Random(seed)
    name = "dpsgd" if seed % 2 else "modest"
    restart = ("--restart",) if draws.random() < 0.7 else ()
    words = (*TRAININGS[name].words, *SHORT[name], *WORLD, *restart)
    up = Upped(tmp_path, "4", *words, patience_s=200)
    try:
        up.happened("started", 3)
        if not restart:
            up.wait_for_round(1)  # A death before the start would end such a run.
        for _ in range(draws.randint(1, 4)):
            time.sleep(draws.uniform(0.0, 5.0))
            if up.process.poll() is None:
                up.kill_if_alive(draws.randrange(4))
        code = up.end()
    finally:
        up.close()
    assert code in (0, 1), up.told()
    assert "internal error" not in up.stderr(), up.told()
    if code == 0:
        assert final_accuracy(up) > 0.5
        assert not up.half_written()
