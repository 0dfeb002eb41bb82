"""A launcher that trains nothing but behaves like an engine, and cards for it to run."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.base import keyed
from shoal.base.errors import Stalled
from shoal.lab.scenario import Scenario
from shoal.world.record import Happening, Row, Run

CARD = '''
"""{title}, in two sentences. It exists for tests."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.lab.card import (
    Arm, Budget, Claim, Source, System, at_least, at_most, difference, ratio, value,
)
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario


@dataclass(frozen=True)
class Method:
    """A rate of learning."""

    rate: float = {rate}
    note: str = "plain"
    layers: tuple[int, ...] = (8,)


def late(rows: Rows) -> dict[int, float]:
    """Rounds to 60%."""
    return {{seed: rows.reach("{name}", seed, "accuracy", 0.6) for seed in rows.seeds}}


SYSTEM = System(
    name="{name}", kind="strategy", make=Method,
    title="{title}",
    source=Source("Writer et al. 2021", "On {title}", arxiv="2101.00001"),
    scenario=Scenario("small", peers=12, rounds=20, topology="ring"),
    arms={{"{name}": Arm(), "slow": Arm(set={{"rate": 0.05}})}},
    claims=(
        Claim("faster", "ends above the slow one", at="table 1", metric="accuracy",
              compare=difference("{name}", "slow"), holds=at_least(0.01)),
        Claim("cheap", "no more bytes", metric="bytes_sent",
              compare=ratio("{name}", "slow"), holds=at_most(1.1)),
        Claim("soon", "arrives early", measure=late, holds=at_most(2.0), expected="fails",
              reason="the fake is slow"),
        Claim("large", "holds at the paper's size", metric="accuracy", compare=value("{name}"),
              holds=at_least(0.99), scale="full"),
    ),
    deviations=("nothing is trained",),
    small=Budget(seeds=2, scenario={{"rounds": 8}}),
    full=Budget(seeds=5),
)
'''


def write_cards(root: Path) -> Path:
    """Two strategies of one family, with a scenario; returns the folder for SHOAL_SYSTEMS."""
    family = root / "systems" / "fakes"
    family.mkdir(parents=True)
    for name, title, rate in (("alpha", "Alpha averaging", 0.3), ("beta-x", "Beta rays", 0.2)):
        file = family / f"{name.replace('-', '_')}.py"
        file.write_text(CARD.format(name=name, title=title, rate=rate))
    (family / "scenarios.py").write_text(
        "from shoal.lab.scenario import Scenario\n"
        'SCENARIOS = {"tiny": Scenario("tiny", peers=6, rounds=5, topology="ring")}\n'
    )
    return root / "systems"


def fake_launch(
    what: Any,
    scenario: Scenario,
    *,
    seed: int,
    engine: str,
    progress: Any = None,
    params: bool = True,
) -> Run:
    """Accuracy rises with `what.rate`; everything is a function of settings and seed."""
    rounds, rate = scenario.rounds or 10, getattr(what, "rate", 0.1)
    run = Run(engine="event" if engine == "auto" else engine, seed=seed, peers=scenario.peers)
    gone: dict[int, int] = {}
    for fault in scenario.explicit_faults():
        at = getattr(fault.at, "round", 0)
        gone |= dict.fromkeys(fault.who or (), at)
        run.happenings.append(Happening(at * 1.5, fault.kind, fault.who or ()))
    for round in range(rounds + 1):
        time_s = round * (1.5 + 0.1 * keyed.uniform(seed, "pace"))
        for peer in range(scenario.peers):
            if gone.get(peer, rounds + 1) <= round:
                continue
            noise = 0.05 * keyed.normal(seed, "accuracy", peer, round)
            value = 0.1 + 0.85 * (1 - math.exp(-rate * round)) + noise * (0.2 + 0.8 / (1 + round))
            run.rows.append(Row("accuracy", min(max(value, 0.0), 1.0), time_s, round, peer))
            run.rows.append(
                Row("loss", 2.3 * math.exp(-rate * round) + abs(noise), time_s, round, peer)
            )
        run.rows.append(Row("bytes_sent", 4096.0 * scenario.peers * round, time_s, round))
        if progress is not None:
            progress(round / rounds, f"round {round} of {rounds}")
    if params:
        _train(run, rate)
    run.bytes_sent = [
        int(4096 * rounds * (0.5 + keyed.uniform(seed, "load", p))) for p in range(scenario.peers)
    ]
    run.bytes_received = run.bytes_sent[::-1]
    run.messages_sent, run.messages_delivered = 10 * rounds, 9 * rounds
    run.dropped, run.virtual_s, run.cpu_s = {"lost": rounds}, rounds * 1.5, 0.25
    run.trace_digest = f"{keyed.fold(seed, 'trace', rounds, str(rate)):032x}"
    run.state_digest = f"{keyed.fold(seed, 'state', rounds, str(rate)):032x}"
    return run


def _train(run: Run, rate: float) -> None:
    """Final parameters of 7 numbers, by key."""
    import torch

    from shoal.tensor import keyed as stacked

    key = stacked.key_of(run.seed, "params")
    for peer in range(run.peers):
        run.final[peer] = rate * stacked.normal(stacked.fold(key, peer), torch.arange(7))
    run.names, run.shapes = ("weight", "bias"), ((2, 3), (1,))


def failing_launch(what: Any, scenario: Scenario, *, seed: int, engine: str, progress: Any) -> Run:
    """As `fake_launch`, but seed 1 stalls."""
    if seed == 1:
        raise Stalled("12 peers wait and nothing could wake them")
    return fake_launch(what, scenario, seed=seed, engine=engine, progress=progress)


def counting_launch(what: Any, scenario: Scenario, *, seed: int, engine: str, progress: Any) -> Run:
    """As `fake_launch` without parameters; leaves a line in FAKE_LOG, then blocks if told to.

    The line is the evidence of which cells were really run. FAKE_BLOCK is a seed at which the run
    reads from a pipe that nobody writes, so that a test can kill it in the middle.
    """
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(f"{type(what).__name__} {getattr(what, 'rate', 0)} {seed}\n")
    if os.environ.get("FAKE_BLOCK") == str(seed):
        reader, _writer = os.pipe()
        os.read(reader, 1)
    return fake_launch(what, scenario, seed=seed, engine=engine, progress=progress, params=False)


@dataclass(frozen=True)
class Mine:
    """A user's own strategy, as a live object."""

    rate: float = 0.15
