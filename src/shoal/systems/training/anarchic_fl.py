"""Anarchic federated learning: workers take part when they like, and do as much as they like.

A worker pulls the newest model, makes a number of SGD steps that it chooses itself, and returns the
mean of its gradients. The server waits for nobody: with method "cd" (cross-device) it makes a
version from the first `buffer` returns, with "cs" (cross-silo) the new returns replace the old ones
of the same workers in its memory, and the version is made from all of that. Dividing by the number
of steps keeps eager workers from counting for more; the memory keeps those who return often from
counting for more.

Yang et al. 2022, algorithms 1 and 2 (arXiv 2108.09875).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from shoal.base.errors import UsageError
from shoal.lab.card import (
    Arm,
    Budget,
    Claim,
    Plot,
    Source,
    System,
    at_least,
    at_most,
    difference,
    ratio,
)
from shoal.parts.asynchronous import audit
from shoal.parts.asynchronous.learning import Learning, Terms
from shoal.parts.asynchronous.staleness import Staleness
from shoal.rounds.workload import Workload
from shoal.systems.training import _anarchic_claims as measured
from shoal.systems.training._anarchic_rules import AFA_CD, AFA_CS, MeanGradient
from shoal.systems.training._anarchic_workers import Crowd

METHODS = ("cd", "cs")


@dataclass(frozen=True)
class AnarchicFL:
    """AFA-CD or AFA-CS and its workers; see the module's text. A run of `rounds` makes so many
    versions.

    Server: method; buffer: returns per version; server_lr; start: how "cs" begins, see `AFA_CS`;
    max_delay: returns that are more versions late are dropped and counted, or with late="weigh"
    count less (None = any delay); hold: workers wait for the version that has their return.
    Workers: lr, batch_size; steps to most_steps local steps, drawn anew each time; per_step: return
    the mean of the gradients, not their sum; rest_s: mean of their exponential rests; step_s: what
    a step takes (0 = by counting operations).
    bias: workers whose data are mostly of the first half of the classes return so many times as
    often, because the others rest longer (bias_by="rest") or compute as many times slower
    ("speed"). effort "class": these workers always make most_steps and the others `steps`. hours:
    "any", or only in the third of the day that is theirs ("diurnal"), or while their batteries last
    ("battery").

    >>> AnarchicFL(method="cd", buffer=2).rule.rate
    0.25
    """

    method: str = "cs"
    buffer: int = 5
    server_lr: float = 5.0
    lr: float = 0.05
    batch_size: int = 32
    steps: int = 1
    most_steps: int = 9
    per_step: bool = True
    max_delay: int | None = None
    late: str = "drop"
    start: str = "pass"
    hold: bool = False
    rest_s: float = 2.0
    step_s: float = 1.0
    bias: float = 1.0
    bias_by: str = "rest"
    effort: str = "any"
    hours: str = "any"
    patience_s: float = 5.0
    give_up_s: float = 600.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"anarchic: method={self.method!r}; need one of {', '.join(METHODS)}")
        if self.batch_size < 1:
            raise UsageError(f"anarchic: batch_size={self.batch_size}; need at least 1")
        # The parts know their rules; ask them now, not when the run begins.
        _ = self.rule, self.crowd

    @cached_property
    def rule(self) -> AFA_CD | AFA_CS:
        """The server's side."""
        staleness = Staleness(self.max_delay, self.late)
        both = (self.buffer, self.server_lr, self.lr, staleness, self.hold)
        return AFA_CD(*both) if self.method == "cd" else AFA_CS(*both, self.start)

    @cached_property
    def crowd(self) -> Crowd:
        """The workers' side."""
        return Crowd(
            self.steps, self.most_steps, self.rest_s, self.step_s, self.bias, self.bias_by,
            self.effort, self.hours,
        )  # fmt: skip

    def bind(self, workload: Workload) -> Learning:
        """The program for a task: how workers behave may depend on their data."""
        terms = Terms(patience_s=self.patience_s, give_up_s=self.give_up_s)
        habits, pace = self.crowd.of(workload.task, range(1, workload.task.peers))
        work = MeanGradient(self.lr, self.batch_size, self.per_step)
        return Learning(workload, self.rule, work, habits, pace, terms)


INVARIANTS = audit.INVARIANTS
"""What every run keeps, whatever its faults: for fault fuzzing."""

_CD = {"method": "cd", "max_delay": 5}
_CS = {"method": "cs", "max_delay": 5}
_BIASED_CD = {"method": "cd", "bias": 8.0}
_BIASED_CS = {"method": "cs", "bias": 8.0}
_SUM = {"method": "cd", "server_lr": 1.0, "per_step": False, "effort": "class"}
_FEDAVG = {"lr": 0.05, "steps": 5}
_STAR = {"exchange": {"name": "star", "hub_works": False}}
_P1 = {"task.classes_per_peer": 1}
_P10 = {"task.classes_per_peer": 10}
_MLP = {"task.hidden": [32]}
_COUNTED = {"rounds": 200, "eval_every": 1}

SYSTEM = System(
    name="anarchic-fl",
    kind="program",
    title="Workers take part when and as much as they like; memories undo the bias of it",
    make=AnarchicFL,
    source=Source(
        "Yang et al. 2022",
        "Anarchic Federated Learning",
        arxiv="2108.09875",
    ),
    scenario="training.digits_anarchic",
    uses={"topology": None},
    arms={
        "cd_1": Arm(set=_CD, scenario=_P1),
        "cd_5": Arm(set=_CD),
        "cd_10": Arm(set=_CD, scenario=_P10),
        "cs_1": Arm(set=_CS, scenario=_P1),
        "cs_5": Arm(set=_CS),
        "cs_10": Arm(set=_CS, scenario=_P10),
        "fedavg_1": Arm(system="fedavg", set=_FEDAVG, scenario={**_STAR, **_P1}),
        "fedavg_5": Arm(system="fedavg", set=_FEDAVG, scenario=_STAR),
        "fedavg_10": Arm(system="fedavg", set=_FEDAVG, scenario={**_STAR, **_P10}),
        "cd_5_mlp": Arm(set=_CD, scenario=_MLP),
        "cd_10_mlp": Arm(set=_CD, scenario={**_P10, **_MLP}),
        "cs_1_mlp": Arm(set=_CS, scenario={**_P1, **_MLP}),
        "cs_5_mlp": Arm(set=_CS, scenario=_MLP),
        "cs_10_mlp": Arm(set=_CS, scenario={**_P10, **_MLP}),
        "fedavg_1_mlp": Arm(system="fedavg", set=_FEDAVG, scenario={**_STAR, **_P1, **_MLP}),
        "fedavg_5_mlp": Arm(system="fedavg", set=_FEDAVG, scenario={**_STAR, **_MLP}),
        "fedavg_10_mlp": Arm(system="fedavg", set=_FEDAVG, scenario={**_STAR, **_P10, **_MLP}),
        "fednova_1": Arm(set={"method": "cd", "buffer": 10, "hold": True}, scenario=_P1),
        "fedbuff_1": Arm(
            system="fedbuff",
            set={"lr": 0.05, "steps": 1, "most_steps": 9, "buffer": 5, "step_s": 1.0},
            scenario=_P1,
        ),
        "centralised": Arm(
            system="centralised", set={"lr": 0.5, "steps": 5},
            scenario={
                "topology": None, "task.holders": None, "task.classes_per_peer": 1, "rounds": 400,
                "eval_every": 100,
            },
        ),
        "cd_biased": Arm(set=_BIASED_CD, scenario=_P1),
        "cs_biased": Arm(set=_BIASED_CS, scenario=_P1),
        "cd_slow": Arm(set={**_BIASED_CD, "bias_by": "speed", "max_delay": 5}, scenario=_P1),
        "cs_slow": Arm(set={**_BIASED_CS, "bias_by": "speed", "max_delay": 5}, scenario=_P1),
        "cs_slow_any_delay": Arm(set={**_BIASED_CS, "bias_by": "speed"}, scenario=_P1),
        "effort": Arm(set={**_CD, "effort": "class"}, scenario=_P1),
        "effort_sum": Arm(set=_SUM, scenario=_P1),
        "m1": Arm(set={**_CD, "buffer": 1, "server_lr": 5.0, "max_delay": None}, scenario=_COUNTED),
        "m2": Arm(set={**_CD, "buffer": 2, "server_lr": 7.07}, scenario=_COUNTED),
        "m4": Arm(set={**_CD, "buffer": 4, "server_lr": 10.0}, scenario=_COUNTED),
        "m8": Arm(set={**_CD, "buffer": 8, "server_lr": 14.14}, scenario=_COUNTED),
        "m2_fixed": Arm(set={**_CD, "buffer": 2}, scenario=_COUNTED),
        "m4_fixed": Arm(set={**_CD, "buffer": 4}, scenario=_COUNTED),
        "m8_fixed": Arm(set={**_CD, "buffer": 8}, scenario=_COUNTED),
    },
    claims=(
        Claim(
            "cd_uniform",
            "Uniform arrivals, softmax regression: AFA-CD ends as accurate as synchronous FedAvg "
            "(5 and 10 classes per worker)",
            holds=at_least(-0.03), measure=measured.cd_over_fedavg, at="section 4.1",
        ),
        Claim(
            "cs_uniform",
            "Uniform arrivals, softmax regression: AFA-CS ends as accurate as synchronous FedAvg "
            "(1, 5 and 10 classes)",
            holds=at_least(-0.03), measure=measured.cs_over_fedavg, at="section 4.2",
        ),
        Claim(
            "cd_uniform_mlp", "The same of AFA-CD with an MLP",
            holds=at_least(-0.03), measure=measured.cd_over_fedavg_mlp, at="section 5",
        ),
        Claim(
            "cs_uniform_mlp", "The same of AFA-CS with an MLP",
            holds=at_least(-0.03), measure=measured.cs_over_fedavg_mlp, at="section 5",
        ),
        Claim(
            "biased_accuracy",
            "Half of the classes return 8 times as often: AFA-CS ends more accurate than AFA-CD",
            holds=at_least(0.005), metric="accuracy",
            compare=difference("cs_biased", "cd_biased"), at="section 4.2",
        ),
        Claim(
            "biased_floor",
            "And where AFA-CD's gradient does not vanish, AFA-CS's goes on to",
            holds=at_most(0.3), metric="gradient_square", compare=ratio("cs_biased", "cd_biased"),
            at="theorem 1",
        ),
        Claim(
            "speed_up",
            "With rates that grow as sqrt(m), 8 returns per version need at most half of the "
            "versions that 1 needs",
            holds=at_most(0.5), measure=measured.speed_up, at="corollary 2",
        ),
        Claim(
            "effort_accuracy",
            "Half of the classes make 9 steps and the others 1: without dividing by the steps "
            "AFA-CD ends less accurate",
            holds=at_least(0.015), metric="accuracy", compare=difference("effort", "effort_sum"),
            at="section 4.1",
        ),
        Claim(
            "effort_floor", "And with a larger gradient",
            holds=at_least(5.0), metric="gradient_square", compare=ratio("effort_sum", "effort"),
            at="section 4.1",
        ),
    ),
    plots=(
        Plot(
            "Training loss after 200 versions", "training_loss", "returns per version",
            {
                "rate as sqrt(m)": ((1, "m1"), (2, "m2"), (4, "m4"), (8, "m8")),
                "one rate": ((1, "m1"), (2, "m2_fixed"), (4, "m4_fixed"), (8, "m8_fixed")),
            },
        ),
    ),
    deviations=(
        "real 8x8 digits with softmax regression (650 parameters) and an MLP of 32 hidden units "
        "instead of MNIST, CIFAR-10 and Shakespeare; 10 workers with 1, 5 or 10 classes as in the "
        "paper",
        "pixels are standardised; rates were not tuned: local 0.05 and server 5, the mean number "
        "of steps, so that a version moves as far as a round of FedAvg with 5 steps at rate 0.05",
        "arrivals come from the workers' own clocks (exponential rests, a second per local step), "
        "not from a sampler at the server; delays are what follows, 1.3 versions in the mean, and "
        "more than 5 are dropped",
        "biased arms: the workers of the second half of the classes rest longer, and no return is "
        "dropped; where they compute more slowly instead (cd_slow, cs_slow) a bound of 5 drops "
        "most of what they return",
        "the first pass of AFA-CS does not wait for a worker when another one has returned 20 "
        "times",
    ),
    small=Budget(
        seeds=1, scenario={"rounds": 100},
        arms=(
            "cd_5", "cd_10", "cs_1", "cs_5", "cs_10", "fedavg_1", "fedavg_5", "fedavg_10",
            "cd_5_mlp", "cd_10_mlp", "cs_1_mlp", "cs_5_mlp", "cs_10_mlp", "fedavg_1_mlp",
            "fedavg_5_mlp", "fedavg_10_mlp", "cd_biased", "cs_biased", "effort", "effort_sum",
            "m1", "m8",
        ),
    ),
    full=Budget(seeds=3),
)  # fmt: skip
