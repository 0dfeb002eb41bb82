"""The training shelf: methods against loops written by hand, and ten of them compared.

Each method runs in its system's own scenario, without evaluations, beside a loop by hand that does
the same arithmetic on the same data and nothing else; tests show that both end at the same
parameters when they draw the same samples. Two of them have no rounds that lockstep could stack:
just-one-byte is its calm form (one model stands for all machines), and anarchic-fl is the event
engine, which simulates every message of a server and its workers.

The comparison is that of `shoal compare`: ten strategies with three seeds on W1 (100 peers with 15
digits, MLP 64-128-10), once, and with five learning rates each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from shoal.base.stopwatch import Stopwatch
from shoal.lab.bench import _shelf_loops as loops
from shoal.lab.bench._rounds import lockstep
from shoal.lab.bench._row import Note, Row
from shoal.lab.bench._shelf_draws import Drawn
from shoal.lab.bench._timing import alternate
from shoal.lab.cell import cell_of
from shoal.lab.scenario import Part, Scenario

STRATEGIES = (
    "fedavg", "fedprox", "fedadam", "scaffold", "fedamd", "dpsgd", "choco-sgd",
    "gradient-tracking", "dfedsam", "variance-corrected",
)  # fmt: skip
JOBS = 2
"""Processes of a comparison; each computes with one thread."""

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Match:
    """A system's run and its loop. engine: what runs the system; settings, scenario: beside
    those of the card; world: in place of the card's; draws: what the loop's `Drawn` is told."""

    system: str
    loop: Callable[..., Any]
    rounds: int
    engine: str = "lockstep"
    settings: Mapping[str, Any] = field(default_factory=dict)
    scenario: Mapping[str, Any] = field(default_factory=dict)
    world: Scenario | None = None
    draws: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What its rows are called."""
        return self.system if self.world is None else f"{self.system} on {self.world.name}"


def w1(tiny: bool) -> Scenario:
    """W1 as a scenario, with digits that peers share out among themselves."""
    return Scenario(
        "W1", peers=6 if tiny else 100, rounds=2 if tiny else 50, eval_every=5, eval_peers=1,
        task=Part("digits", {
            "samples_per_peer": 15, "with_replacement": True, "hidden": (8 if tiny else 128,),
        }),
        topology=Part("random_regular", {"degree": 4 if tiny else 8}),
    )  # fmt: skip


SAMPLED: Mapping[str, Any] = {"exchange": {"name": "star", "sample": 10, "whole_first": True}}

MATCHES = (
    Match("variance-corrected", loops.VarianceCorrected, 30),
    Match("dimat", loops.Dimat, 3),
    Match("just-one-byte", loops.OneByte, 200, "calm", draws={"batch_size": 32}),
    Match(
        "fedamd", loops.FedAMD, 40, scenario=SAMPLED, settings={"lr": 0.1}, draws={"batch_size": 8}
    ),
    Match("anarchic-fl", loops.Anarchic, 100, "event", draws={"batch_size": 32}),
    Match("scaffold", loops.Scaffold, 20),
    Match("scaffold", loops.Scaffold, 10, world=w1(False)),
)


@dataclass
class Contest:
    """One match, ready to run: `ours()` gives final parameters [rows, dim], `theirs` a loop."""

    match: Match
    rounds: int
    task: Any = None
    begin: Any = None
    ours: Any = None
    method: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        from shoal.lab.card import Arm
        from shoal.lab.cell import make
        from shoal.lab.launch import method_of, program_of
        from shoal.lab.run import scenario_of

        match, rounds = self.match, self.rounds
        arm = Arm(system=match.system, set=match.settings, scenario=match.scenario)
        world = match.world or scenario_of(match.system)
        base = replace(world, rounds=rounds, eval_every=rounds, measures=())
        made = make(cell_of(match.system, arm, self.seed, base))
        assert isinstance(made, tuple)
        what, scenario = made
        if match.engine == "lockstep":
            self.method, network, *_ = method_of(what, scenario, self.seed)
            self.task = self.method.task
            self.ours = lambda: torch.stack(list(lockstep((self.method, network)).final.values()))
            starts = [self.method.start(peer) for peer in range(self.method.peers)]
            self.begin = torch.stack(starts)[: 1 if self.method.exchange.hub is not None else None]
            return
        program, network = program_of(what, scenario, self.seed)
        self.task, self.begin = program.workload.task, program.workload.initial.unsqueeze(0)
        if match.engine == "event":
            from shoal.engine.event import simulate

            self.ours = lambda: simulate(program, network, seed=self.seed).final[0].unsqueeze(0)
        else:
            from shoal.parts.zeroth_order.calm import calm

            def all_iterations() -> Any:
                begin = program.workload.initial
                *_, (_, after) = calm(self.task, program.rule, program.spsa, begin, rounds)
                return after.unsqueeze(0)

            self.ours = all_iterations

    def theirs(self, chance: loops.Chance) -> Any:
        """The loop by hand, at its beginning."""
        task = self.task
        return self.match.loop(self.begin, task.spec.shapes, task.x, task.y, chance)

    def drawn(self, **more: Any) -> Drawn:
        """Chance for the loop, of torch's own generator."""
        shares = self.task.shares
        return Drawn(
            shares.index, shares.size, dim=self.task.spec.dim, **{**self.match.draws, **more}
        )


def measure(tiny: bool, note: Note) -> Iterator[Row]:
    for match in MATCHES:
        yield from _beside(match, tiny, note)
    yield from _compared(tiny, note)


def _beside(match: Match, tiny: bool, note: Note) -> Iterator[Row]:
    rounds = 2 if tiny else match.rounds
    contest = Contest(match, rounds)

    def by_hand(**more: Any) -> None:
        # From its beginning, as ours: how long a round takes depends on how far it has come.
        loop = contest.theirs(contest.drawn(**more))
        for _ in range(rounds):
            loop.round()

    name, engine = match.name, match.engine
    contestants = {f"{name}, {engine}": contest.ours, f"{name}, by hand": by_hand}
    if match.engine == "calm":
        contestants[f"{name}, by hand, generator's noise"] = lambda: by_hand(counted=False)
    ours, hand, *other = alternate(contestants, 1 if tiny else 9, note, rounds).values()
    for what in ("cpu", "wall"):
        label = what.upper() if what == "cpu" else what
        yield Row.of(
            f"{name}: {engine} against a loop by hand, {label}", getattr(ours, what), "s/round",
            against=("loop by hand", getattr(hand, what)), bound="<= 1.3",
        )  # fmt: skip
    for seconds in other:
        yield Row.of(
            f"{name}: {engine} against a loop whose noise cannot be made again in parts, CPU",
            ours.cpu, "s/round", against=("loop with torch's generator", seconds.cpu),
        )  # fmt: skip


def _compared(tiny: bool, note: Note) -> Iterator[Row]:
    from shoal.lab.experiment import Experiment

    arms = {name: name for name in (STRATEGIES[:2] if tiny else STRATEGIES)}
    for label, grid, bound in (
        ("", {}, "<= 60"), (" x 5 learning rates", {"lr": RATES}, "<= 300"),
    ):  # fmt: skip
        note(f"{len(arms)} strategies{label}")
        watch = Stopwatch()
        experiment = Experiment(arms, w1(tiny), seeds=2 if tiny else 3, grid=grid)
        report = experiment.run(jobs=1 if tiny else JOBS)
        wall_s = watch.wall_s
        cells = len(report.arms) * len(report.seeds)
        missing = cells - sum(
            not report.cell(arm, seed).error for arm in report.arms for seed in report.seeds
        )
        yield Row.of(
            f"compare {len(arms)} strategies x {len(report.seeds)} seeds{label}, wall", wall_s, "s",
            bound=bound,
        )  # fmt: skip
        yield Row.of(f"compare{label}: runs that broke down", float(missing), "", bound="<= 0")
