"""A pipeline trained in one process through failures: what long comparisons run on.

The numbers are those of a pipeline of peers, bit for bit; time is virtual, by a cost model in units
of a plain iteration. Checkpointing and redundant computation never leave the course of failure-free
training, so that one training serves for both, replayed.

Blagoev et al. 2025 (arXiv 2506.15461).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Literal

from shoal.base.errors import UsageError
from shoal.base.stopwatch import Stopwatch
from shoal.lab.card import System
from shoal.lab.scenario import Scenario
from shoal.parts.pipeline.base import Unrecoverable
from shoal.parts.pipeline.check_free import RULES, CheckFree
from shoal.parts.pipeline.cost_model import CostModel, Failure, Moment, Replay, drive
from shoal.parts.pipeline.failure_trace import FailureTrace
from shoal.parts.pipeline.trainer import Trainer
from shoal.systems.robust._checkfree_settings import Training, Where, drawn, plan_of
from shoal.tensor.threads import one_thread
from shoal.world.record import Happening, Row, Run

_PLAIN = CheckFree()
"""The rule of a training in which nothing fails, so that all of them are one."""


def checkfree_training(
    scenario: Scenario, method: Literal["check_free", "checkpoint", "redundant"] = "check_free",
    where: Where = "nowhere", rate: float = 0.004, rule: str = "weighted", plus: bool = False,
    swaps: bool = False, times: float = 1.0, probes: bool = False, published: bool = False,
    width: int = 32, lr: float = 2e-3, lr_boost: float = 1.1, pairs: bool = True,
    power: float = 2.0, lost: tuple[tuple[int, int], ...] = (), held_out: int = 64,
) -> Run:  # fmt: skip
    """`times` as many iterations as the scenario has rounds, on a stage less than it has peers.

    where, rate: which parts fail, with what probability each in an executed iteration; lost: these
    failures instead, as (executed iteration, part); the others are settings of `CheckFree` and of
    the model. probes: at the end, and at 1/2.5 of it, what the loss of each stage would do under
    every rule. published: seconds as the paper measured them, not units of a plain iteration.

    Rows: "loss" after every `eval_every` iterations; "spike", the rise of the loss at a failure,
    and "rise", what it would have been under every rule (of middle stages, without plus);
    "executed", iterations so far; "repeated", iterations that a failure costs.
    """
    stages = scenario.peers - 1
    if scenario.rounds is None:
        raise UsageError("checkfree-training: no rounds; it needs a number of iterations")
    iterations = round(scenario.rounds * times)
    recovery = CheckFree(plus, rule, power, lr_boost, pairs)
    training = Training(stages, recovery, swaps or plus, width, lr=lr, held_out=held_out)
    costs = CostModel.published() if published else CostModel()
    trace = FailureTrace(stages, lost)
    if not lost and where != "nowhere":
        trace = drawn(where, rate, stages, iterations, scenario.seed)
    every = max(1, scenario.eval_every)
    watch = Stopwatch()
    with one_thread():
        found = _Course(scenario, training, every)
        if method == "check_free" and trace.failures:
            found.go(Trainer(plan_of(training), scenario.seed), method, trace, iterations, costs)
        else:
            plain = Training(stages, _PLAIN, swaps or plus, width, lr=lr, held_out=held_out)
            losses, probed = undisturbed(plain, scenario.seed, iterations, every)
            found.go(Replay(dict(losses)), method, trace, iterations, costs)
            found.run.rows += probed if probes else ()
    found.run.wall_s, found.run.cpu_s = watch.wall_s, watch.cpu_s
    return found.run


class _Course:
    """A run as it is driven."""

    def __init__(self, scenario: Scenario, training: Training, every: int) -> None:
        self.run = Run("study", scenario.seed, scenario.peers)
        self.training = training
        self.every = every

    def go(
        self, training: Trainer | Replay, method: str, trace: FailureTrace, iterations: int,
        costs: CostModel,
    ) -> None:  # fmt: skip
        rows, run = self.run.rows, self.run
        rises = isinstance(training, Trainer)
        executed = 0

        def moment(now: Moment) -> None:
            nonlocal executed
            executed += 1
            run.virtual_s = now.time_s
            if now.done % self.every == 0 or now.done == iterations:
                rows.append(Row("loss", training.loss(), now.time_s, now.done))
                rows.append(Row("executed", float(executed), now.time_s, now.done))

        def failure(what: Failure) -> None:
            nonlocal executed
            executed += 1
            run.happenings.append(Happening(what.time_s, "lost", what.lost))
            if method == "checkpoint":
                rows.append(Row("repeated", float(what.repeated), what.time_s, training.done))
            if rises:
                assert isinstance(training, Trainer)
                before = training.loss()
                for part in what.lost:
                    rise = training.loss(training.rebuilt([part])) - before
                    rows.append(Row("spike", rise, what.time_s, training.done, part))
                    self.compare(training, part, before, what.time_s)

        rows.append(Row("loss", float(training.loss()), 0.0, 0))
        swaps = self.training.swapped
        drive(training, method, trace, iterations, costs, swaps=swaps, moment=moment,
              failure=failure)  # fmt: skip

    def compare(self, trainer: Trainer, part: int, before: float, time_s: float) -> None:
        """What the loss would do under every rule, at this very failure of a middle stage."""
        own = self.training.recovery
        if own.plus or not 1 < part < self.training.stages:
            return
        for rule in RULES:
            plan = plan_of(replace(self.training, recovery=replace(own, rule=rule)))
            rise = trainer.loss(trainer.rebuilt([part], plan)) - before
            self.run.rows.append(Row("rise", rise, time_s, trainer.done, part, (("rule", rule),)))


@lru_cache(maxsize=8)
def undisturbed(
    training: Training, seed: int, iterations: int, every: int
) -> tuple[tuple[tuple[int, float], ...], tuple[Row, ...]]:
    """Failure-free training: its losses by iteration, and rows of probes; see above."""
    trainer = Trainer(plan_of(training), seed)
    losses = [(0, trainer.loss())]
    probed: list[Row] = []
    while trainer.done < iterations:
        trainer.iterate()
        if trainer.done % every == 0 or trainer.done == iterations:
            losses.append((trainer.done, trainer.loss()))
        if trainer.done in (iterations * 2 // 5, iterations):
            probed += _probed(trainer, training)
    return tuple(losses), tuple(probed)


def _probed(trainer: Trainer, training: Training) -> list[Row]:
    """The rise of the loss if a stage were lost now, by stage and rule.

    Rule "partner" copies the swap partner, whether or not there were swaps in training.
    """
    before, stages = trainer.loss(), training.stages
    rows = []
    for rule in (*RULES, *(("partner",) if stages >= 4 else ())):
        recovery = CheckFree(plus=True) if rule == "partner" else CheckFree(rule=rule)
        swaps = training.swapped or rule == "partner"
        plan = plan_of(Training(stages, recovery, swaps, training.width, lr=training.lr,
                                held_out=training.held_out))  # fmt: skip
        chosen = (1, 2, stages - 1, stages) if rule == "partner" else range(1, stages + 1)
        for stage in chosen:
            try:
                parts = trainer.rebuilt([stage], plan)
            except Unrecoverable:
                continue
            rise = trainer.loss(parts) - before
            rows.append(Row("probe", rise, 0.0, trainer.done, stage, (("rule", rule),)))
    return rows


SYSTEM = System(
    name="checkfree-training",
    kind="study",
    title="A pipeline trained in one process through failures, by a cost model",
    make=checkfree_training,
    scenario="robust.pipeline",
)
