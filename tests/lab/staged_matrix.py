"""A matrix over a launcher that trains nothing, also as a script that a test can kill half-way."""

from __future__ import annotations

import os
from typing import Any

from shoal.lab.experiment import Experiment
from shoal.lab.robustness import Matrix, make_matrix, parts_named
from shoal.lab.scenario import Scenario
from shoal.lab.store import Store
from shoal.world.record import Row, Run

WORLD = Scenario("staged", peers=12, rounds=2, task="digits", topology="full")
CLEAN = {"mean": 0.9, "median": 0.86, "krum": 0.8, "trimmed_mean": 0.89}
STANDS = {"mean": 0, "median": 5, "krum": 4, "trimmed_mean": 3}
HARM = {"sign_flip": 0.02, "gaussian": 0.01}


def accuracy(what: Any, scenario: Scenario, seed: int) -> float:
    """Falls with the number of liars; what a rule does not stand leaves 10%."""
    rule, count = scenario.aggregator, len(scenario.byzantine_peers())
    told = dict(rule.settings)
    clean = CLEAN[rule.name] - 0.01 * told.get("byzantine", told.get("trim", 0)) + 0.001 * seed
    # The median likes a larger learning rate than the others.
    clean += 0.05 if rule.name == "median" and what.lr == 0.3 else 0.0
    clean -= 0.1 if rule.name != "median" and what.lr != 0.1 else 0.0
    if scenario.attack is None:
        return clean
    assert count
    return clean - HARM[scenario.attack.name] * count if count <= STANDS[rule.name] else 0.1


def staged(what: Any, scenario: Scenario, *, seed: int, engine: str, progress: Any) -> Run:
    """Writes to STAGED_LOG what it runs; from run STAGED_BLOCK on it stands still."""
    if log := os.environ.get("STAGED_LOG"):
        with open(log, "a") as file:
            attack = scenario.attack.name if scenario.attack else "-"
            count = len(scenario.byzantine_peers())
            file.write(f"{scenario.aggregator.name} {attack} {count} {seed}\n")
        with open(log) as file:
            if len(file.readlines()) == int(os.environ.get("STAGED_BLOCK", "0")):
                reader, _writer = os.pipe()
                os.read(reader, 1)
    value = accuracy(what, scenario, seed)
    fair = [p for p in range(scenario.peers) if p not in scenario.byzantine_peers()]
    run = Run(engine="event", seed=seed, peers=scenario.peers)
    run.rows = [Row("accuracy", value, 1.0, 1, peer) for peer in fair]
    return run


def matrix(
    rules: str = "mean,median,krum", attacks: str = "sign_flip,gaussian",
    shares: tuple[float, ...] = (0.1, 0.25), *, hosts: tuple[str, ...] = ("dpsgd",),
    world: Scenario = WORLD, seeds: int = 1, launcher: Any = staged, **settings: Any,
) -> Matrix:  # fmt: skip
    """A matrix of staged runs."""
    chosen = {key: settings.pop(key) for key in ("grid", "overrides") if key in settings}
    experiment = Experiment({host: host for host in hosts}, world, seeds, title="Staged", **chosen)
    return make_matrix(
        experiment, parts_named(rules.split(","), "aggregator", "--aggregators"),
        parts_named(attacks.split(","), "attack", "--attacks"), shares, launcher=launcher,
        **settings,
    )  # fmt: skip


if __name__ == "__main__":
    with Store() as store:
        matrix(seeds=2, store=store)
