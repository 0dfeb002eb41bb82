"""An audit of private training by membership inference: what is claimed beside what is proved.

Canaries (samples that stand out) are put into the training data by fair coins, the training runs,
and an attacker who sees every step says how likely each canary was there. How well that goes proves
a lower bound of epsilon, at a stated confidence; the accountant claims an upper one. A bound above
the claim shows that something is wrong: too little noise, an accountant that counts sampling which
does not happen, clipping left out. Each of these can be planted here, and must be found.

Three bounds: from many runs with one canary each, without any assumption (`bound`) and under that
of a Gaussian mechanism (`gaussian_bound`, sharper); from one run with many canaries
(`one_run_bound`), which is what a user with one long training can afford. `loss_bound` is what the
last model's loss alone gives away, as to who is handed the model and nothing else. A bound below
the claim is no proof that the claim is right.

What is audited is `shoal.parts.strategy.private_steps`, as it runs in any scenario, and
`private_momentum` (DP-BREM), whose record moves many releases and has another accountant. From
Python,
`shoal.parts.privacy.audit_bounds` takes the scores of any attack.

Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846); Nasr et al. 2023 (arXiv 2302.07956).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from shoal.base.errors import UsageError
from shoal.base.stopwatch import Stopwatch
from shoal.lab.build import build
from shoal.lab.card import Arm, Budget, Claim, Source, System, at_least, at_most, value
from shoal.lab.chart import Chart
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario
from shoal.parts.privacy.audit_bounds import (
    gaussian_runs_epsilon,
    many_runs_epsilon,
    one_run_epsilon,
)
from shoal.parts.privacy.ledger import Ledger
from shoal.parts.privacy.momentum_accountant import momentum_epsilon
from shoal.parts.privacy.sampled_gaussian import GaussianRelease
from shoal.parts.strategy.private_steps import Draws, PrivateSteps
from shoal.parts.tasks.base import ModuleTask
from shoal.systems.privacy._audit_momentum import momentum_of, momentum_runs
from shoal.systems.privacy._audit_training import Canaries, Scores, many_runs, one_run
from shoal.tensor import keyed
from shoal.tensor.threads import one_thread
from shoal.world.record import Row, Run

Mechanism = Literal["fresh", "tree", "momentum"]
Bug = Literal["none", "less noise", "all records", "no clipping", "one release"]
UNCLIPPED = 1e6
"""A norm that no gradient reaches."""


def planted(claimed: PrivateSteps, bug: Bug) -> PrivateSteps:
    """What really runs where these settings are claimed.

    "less noise": a quarter of it. "all records": every step uses all of them, and the accountant
    counts the gain from sampling all the same. "no clipping": gradients as they are, with the noise
    of clipped ones. "one release" is in what is claimed: that a record moves the momentum of the
    round in which it is drawn, and none of those after it.
    """
    if bug == "less noise":
        return replace(claimed, noise=claimed.noise / 4)
    if bug == "all records":
        return replace(claimed, sampling=1.0)
    if bug == "no clipping":
        return replace(claimed, clip=UNCLIPPED, noise=claimed.noise * claimed.clip / UNCLIPPED)
    return claimed


def privacy_audit(
    scenario: Scenario, noise: float = 2.0, sampling: float = 1.0, draws: Draws = "poisson",
    mechanism: Mechanism = "fresh", bug: Bug = "none", runs: int = 2000, canaries: int = 120,
    records: int = 20, lr: float = 1.0, delta: float = 1e-4, confidence: float = 0.99,
    beta: float = 0.9,
) -> Run:  # fmt: skip
    """Claimed and proved epsilon of the scenario's rounds of noisy steps on `records` records.

    noise ... mechanism: see `PrivateSteps`, with clip = 1; "momentum" is `PrivateMomentum` with its
    beta, and noise is over what one record moves. bug: see `planted`. runs: of one canary
    each, half of them to choose a threshold, half to test it; canaries: of the one run, half of
    whom are guessed about (no such run, and a bound of 0, where records are dealt into parts, and
    for momentum).
    The first peer of the scenario lends its samples, the others the canary.

    Numbers: `claimed` (infinite without noise, "never" in tables), `bound`, `gaussian_bound`,
    `one_run_bound`, `loss_bound`, `accuracy`; each bound holds with the confidence on its own.
    """
    if bug not in get_args(Bug):
        raise UsageError(f"bug={bug!r}; need one of {', '.join(get_args(Bug))}")
    rounds = scenario.rounds or 0
    if rounds < 1 or runs < 8:
        raise UsageError(f"rounds={scenario.rounds}, runs={runs}; need a round and 8 runs at least")
    if (bug == "one release") > (mechanism == "momentum") or (
        mechanism == "momentum" and (draws != "poisson" or bug not in ("none", "one release"))
    ):
        raise UsageError(
            f"mechanism={mechanism!r}, draws={draws!r}, bug={bug!r}; momentum needs draws = "
            "'poisson' and no bug or 'one release', which nothing else can have"
        )
    claimed = PrivateSteps(
        lr=lr, sampling=sampling, noise=noise, draws=draws, records=records,
        mechanism="fresh" if mechanism == "momentum" else mechanism,
    )  # fmt: skip
    if draws == "parts" and records % claimed.parts:
        raise UsageError(
            f"records={records}, sampling={sampling}; the canary must come into the first part, "
            f"where a tree hides it least (take a multiple of {claimed.parts})"
        )
    task = build(scenario).task
    if not isinstance(task, ModuleTask):
        raise UsageError(
            f"Scenario {scenario.name!r}: task = {type(task).__name__}; need samples and a model "
            "(set task = 'digits')"
        )
    watch = Stopwatch()
    real = planted(claimed, bug)
    key = keyed.key_of(scenario.seed, "privacy audit", device=task.x.device)
    run = Run(engine="study", seed=scenario.seed, peers=scenario.peers)
    with one_thread():
        world, bright = Canaries.of(task, records, 1), Canaries.bright(task, records, canaries)
        many: Scores
        if mechanism == "momentum":
            moved = momentum_of(noise, sampling, beta, records, lr)
            many = momentum_runs(world, moved, rounds, runs, key)
            epsilon = momentum_claim(noise, sampling, rounds, beta, delta, bug)
        else:
            many = many_runs(world, real, rounds, runs, key)
            epsilon = claimed.epsilon(rounds, delta)
        numbers = {"claimed": epsilon, "one_run_bound": 0.0}
        seen = (many.included, delta, confidence)
        numbers |= {
            "bound": many_runs_epsilon(many.steps, *seen),
            "gaussian_bound": gaussian_runs_epsilon(many.steps, *seen),
            "loss_bound": many_runs_epsilon(many.loss, *seen),
        }
        if draws == "poisson" and mechanism != "momentum":
            # As many records more are there, and the step is over all of them.
            whole = replace(real, records=records + canaries // 2)
            once = one_run(bright, whole, rounds, key)
            numbers["one_run_bound"] = one_run_epsilon(once.steps, once.included, delta, confidence)
        numbers["accuracy"] = many.accuracy
    run.rows.extend(Row(name, float(value), 0.0) for name, value in numbers.items())
    run.wall_s, run.cpu_s = watch.wall_s, watch.cpu_s
    return run


def momentum_claim(
    noise: float, sampling: float, rounds: int, beta: float, delta: float, bug: Bug
) -> float:
    """epsilon of momentum; with the bug that of rounds that know nothing of each other."""
    if bug == "one release":
        alone = GaussianRelease(noise / (1 - beta), sampling)
        return Ledger().after(alone, rounds).epsilon(delta)
    return momentum_epsilon(noise, sampling, rounds, beta, delta, tight=True)


BOUNDS = ("bound", "gaussian_bound", "one_run_bound", "loss_bound")
RIGHT = ("all", "poisson", "parts", "tree", "momentum", "momentum, drawn")
"""Arms in which what is claimed is what runs."""
WRONG = ("less noise", "all records", "no clipping", "one release")


def _above(rows: Rows, arm: str, seed: int, names: tuple[str, ...] = BOUNDS) -> float:
    """By how much the highest of some bounds exceeds the claim; nan where the run is missing."""
    run = rows.run(arm, seed)
    if run is None:
        return math.nan
    found = {row.name: row.value for row in run.rows}
    return max(found[name] for name in names if name in found) - found["claimed"]


def worst_excess(rows: Rows) -> dict[int, float]:
    """The highest bound minus the claim, over all bounds and all arms without a bug."""
    return {s: max(_above(rows, arm, s) for arm in RIGHT) for s in rows.seeds}


def least_found(rows: Rows) -> dict[int, float]:
    """The bound without assumptions minus the claim, in the arm with a bug where it is least."""
    return {s: min(_above(rows, arm, s, ("bound",)) for arm in WRONG) for s in rows.seeds}


def least_found_once(rows: Rows) -> dict[int, float]:
    """The bound from one run minus the claim, at the lower of `all records` and `no clipping`."""
    arms = ("all records", "no clipping")
    return {s: min(_above(rows, arm, s, ("one_run_bound",)) for arm in arms) for s in rows.seeds}


def share_proved(rows: Rows) -> dict[int, float]:
    """The least share of the claim that the Gaussian bound proves, over arms without sampling."""
    out = {}
    for s in rows.seeds:
        arms = ("all", "parts", "tree", "momentum")
        out[s] = min(
            rows.value(arm, s, "gaussian_bound") / rows.value(arm, s, "claimed") for arm in arms
        )
    return out


def proved_bars(rows: Rows) -> Mapping[str, list[tuple[Any, float]]]:
    """The claim and each bound, of every arm; of the first seed."""
    out: dict[str, list[tuple[Any, float]]] = {}
    for name in ("claimed", *BOUNDS):
        for arm in rows.arms:
            run = rows.run(arm, rows.seeds[0])
            for row in run.series(name) if run is not None else ():
                if math.isfinite(row.value):
                    out.setdefault(name, []).append((arm, row.value))
    return out


SYSTEM = System(
    name="privacy-audit",
    kind="study",
    title="Membership inference on canaries: epsilon that is proved beside epsilon that is claimed",
    make=privacy_audit,
    source=Source(
        "Steinke et al. 2023",
        "Privacy Auditing with One (1) Training Run",
        arxiv="2305.08846",
        venue="NeurIPS 2023",
    ),
    scenario="privacy.digits_audit",
    arms={
        "all": Arm(set={"noise": 2.5}),
        "poisson": Arm(set={"noise": 0.7, "sampling": 0.2}),
        "parts": Arm(set={"noise": 1.0, "sampling": 0.1, "draws": "parts"}),
        "tree": Arm(set={"noise": 2.0, "sampling": 0.1, "draws": "parts", "mechanism": "tree"}),
        "momentum": Arm(set={"noise": 1.5, "lr": 0.05, "mechanism": "momentum"}),
        "momentum, drawn": Arm(
            set={"noise": 0.7, "sampling": 0.2, "lr": 0.05, "mechanism": "momentum"}
        ),
        "no noise": Arm(set={"noise": 0.0}),
        "less noise": Arm(set={"noise": 8.0, "bug": "less noise", "runs": 4000}),
        "all records": Arm(set={"noise": 1.5, "sampling": 0.1, "bug": "all records"}),
        "no clipping": Arm(set={"noise": 12.0, "bug": "no clipping"}),
        "one release": Arm(
            set={"noise": 1.5, "lr": 0.05, "mechanism": "momentum", "bug": "one release"}
        ),
    },
    claims=(
        Claim(
            "sound",
            "with the right accountant no bound exceeds the claim, at 99% confidence each",
            at_most(0.0),
            measure=worst_excess,
            statistic="max",
        ),
        Claim(
            "sharp",
            "the Gaussian bound proves at least half of the claim where all records are used (by "
            "steps or by momentum), are dealt into parts, or go into a tree",
            at_least(0.5),
            measure=share_proved,
        ),
        Claim(
            "bugs",
            "a quarter of the noise, sampling that is counted and not done, clipping that is left "
            "out, and momentum whose records are counted in one release each are all found: the "
            "bound without assumptions exceeds the claim",
            at_least(0.05),
            measure=least_found,
            statistic="min",
        ),
        Claim(
            "bugs-once",
            "one run with 120 canaries finds the second and the third of them, too",
            at_least(0.05),
            measure=least_found_once,
        ),
        Claim(
            "open",
            "without noise the bound without assumptions is at least 3.5, near what 2,000 runs can "
            "prove",
            at_least(3.5),
            "bound",
            value("no noise"),
            statistic="min",
        ),
    ),
    charts=(
        Chart(
            "epsilon at delta = 0.0001, claimed and proved",
            "bars",
            proved_bars,
            x="arm",
            y="epsilon",
        ),
    ),
    deviations=(
        "20 of the 8x8 digits, a linear model of 650 parameters, 20 steps: small enough for 2,000 "
        "runs at once; delta is 1e-4, as the bound from one run needs delta * canaries to be "
        "small",
        "canaries of the one run are images of one bright pixel with every label in turn, in place "
        "of mislabelled samples: gradients of 120 digits overlap so much in 650 parameters that "
        "an attacker tells two thirds of the coins, with these nine tenths",
        "half of the canaries are guessed about, a number that was fixed beforehand; the paper "
        "takes the best of several",
        "momentum is audited for one client, the others' vectors being known; its learning rate is "
        "0.05, at which the canary's gradients point the same way in all rounds, the worst case "
        "that its accountant counts; where records are drawn, the attacker takes the mean over "
        "draws for what it does not know",
        "noise of the arms is chosen such that claims lie where 2,000 runs can prove something: no "
        "bound without assumptions exceeds 5 with so few",
    ),
    small=Budget(seeds=1),
    full=Budget(seeds=4),
)
