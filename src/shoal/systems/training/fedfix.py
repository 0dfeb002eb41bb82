"""FedFix: the server takes what has come at fixed instants, and weighs it by how long it took.

Every `period_s` seconds the server adds the displacements of all clients who have returned since
the last instant, gives them the new model, and they start again. Nobody is waited for, yet many
works go into one version, so that it is steadier than a version per work; a period as long as the
slowest client is federated averaging. A client that takes k periods counts with k times its
importance: otherwise fast clients would count more, and another loss would be minimised.

A work is the difference between the local model and the one that the client was sent, not the
newest one. `parts.asynchronous.schedule.analyze_schedule` tells weights, bias and staleness of
such schemes before anything is trained.

Fraboni et al. 2023 (arXiv 2206.10189).
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.lab.card import Arm, Budget, Claim, Source, System, at_least, at_most
from shoal.lab.chart import Chart
from shoal.parts.asynchronous import audit
from shoal.parts.asynchronous.learning import Learning
from shoal.parts.asynchronous.participation import Habits
from shoal.parts.asynchronous.settings import ServerSettings
from shoal.rounds.workload import Workload
from shoal.systems.training import _fedfix_claims as measured
from shoal.systems.training._fedfix_rule import FixedTimesRule


@dataclass(frozen=True)
class FedFix(ServerSettings):
    """A version every `period_s` seconds; clients make `steps` local steps of SGD.

    server_lr multiplies the weights; most_periods: a work counts for that many periods at most, so
    that a client that was away for long makes no leap. The others: see `ServerSettings`.

    Assumes that the server's clock is the one that instants are counted on. Raises UsageError for
    settings that no run could use.

    >>> FedFix(period_s=0.0)
    Traceback (most recent call last):
    ...
    shoal.base.errors.UsageError: fedfix: period_s=0.0; need a positive number (raise it)
    """

    period_s: float = 0.5
    server_lr: float = 1.0
    most_periods: int = 100
    steps: int = 10

    def rule(self) -> FixedTimesRule:
        return FixedTimesRule(self.period_s, self.server_lr, self.importances, self.most_periods)

    def bind(self, workload: Workload) -> Learning:
        """The program for a task."""
        return self.learning(workload, Habits(low=self.steps), ties=True)


INVARIANTS = audit.INVARIANTS
"""What every run keeps, whatever its faults: for fault fuzzing."""

_NOISY = {"task.label_noise": 0.2}
_OFTEN = {"eval_every": 4}
_EQUAL = {"seconds": 20.0}

SYSTEM = System(
    name="fedfix",
    kind="program",
    title="A version of the model at fixed instants, from whoever has returned",
    make=FedFix,
    source=Source(
        "Fraboni et al. 2023",
        "A General Theory for Federated Optimization with Asynchronous and Heterogeneous Clients "
        "Updates",
        arxiv="2206.10189",
        venue="Journal of Machine Learning Research 24(110)",
    ),
    scenario="training.digits_clients",
    uses={"topology": None, "exchange": None},
    arms={
        "fedavg_clean_02": Arm(
            set={"period_s": 1.0, "lr": 0.02}, prepare=measured.fastest_by_80
        ),
        "fedavg_clean_10": Arm(set={"period_s": 1.0, "lr": 0.1}, prepare=measured.fastest_by_80),
        "fedavg_clean_50": Arm(set={"period_s": 1.0, "lr": 0.5}, prepare=measured.fastest_by_80),
        "fedavg_noisy_02": Arm(
            set={"period_s": 1.0, "lr": 0.02}, scenario=_NOISY, prepare=measured.fastest_by_80
        ),
        "fedavg_noisy_10": Arm(
            set={"period_s": 1.0, "lr": 0.1}, scenario=_NOISY, prepare=measured.fastest_by_80
        ),
        "fedavg_noisy_50": Arm(
            set={"period_s": 1.0, "lr": 0.5}, scenario=_NOISY, prepare=measured.fastest_by_80
        ),
        "fixed_clean_02": Arm(set={"lr": 0.02}, prepare=measured.fastest_by_80),
        "fixed_clean_10": Arm(set={"lr": 0.1}, prepare=measured.fastest_by_80),
        "fixed_clean_50": Arm(set={"lr": 0.5}, prepare=measured.fastest_by_80),
        "fixed_noisy_02": Arm(
            set={"lr": 0.02}, scenario=_NOISY, prepare=measured.fastest_by_80
        ),
        "fixed_noisy_10": Arm(set={"lr": 0.1}, scenario=_NOISY, prepare=measured.fastest_by_80),
        "fixed_noisy_50": Arm(set={"lr": 0.5}, scenario=_NOISY, prepare=measured.fastest_by_80),
        "fifth_noisy_10": Arm(
            set={"period_s": 0.2, "lr": 0.1}, scenario=_NOISY, prepare=measured.fastest_by_80
        ),
        "buffer_noisy_10": Arm(
            system="fedbuff", set={"buffer": 5, "exponent": 0.0, "lr": 0.1, "steps": 10},
            scenario={**_NOISY, **_OFTEN}, prepare=measured.fastest_by_80,
        ),
        "async_clean_02": Arm(
            system="async-fedavg", set={"lr": 0.02}, scenario=_OFTEN,
            prepare=measured.fastest_by_80,
        ),
        "same_clean_02": Arm(
            system="async-fedavg", set={"lr": 0.02, "weighting": "identical"}, scenario=_OFTEN,
            prepare=measured.fastest_by_80,
        ),
        "async_noisy_10": Arm(
            system="async-fedavg", set={"lr": 0.1}, scenario={**_NOISY, **_OFTEN},
            prepare=measured.fastest_by_80,
        ),
        "same_noisy_10": Arm(
            system="async-fedavg", set={"lr": 0.1, "weighting": "identical"},
            scenario={**_NOISY, **_OFTEN}, prepare=measured.fastest_by_80,
        ),
        "fedavg_equal": Arm(
            set={"period_s": 1.0, "lr": 0.02}, scenario=_EQUAL, prepare=measured.equally_fast
        ),
        "fixed_equal": Arm(
            set={"server_lr": 0.5, "lr": 0.02}, scenario=_EQUAL, prepare=measured.equally_fast
        ),
        "async_equal": Arm(
            system="async-fedavg", set={"server_lr": 0.05, "lr": 0.02},
            scenario={**_EQUAL, "eval_every": 20}, prepare=measured.equally_fast,
        ),
        "buffer_equal": Arm(
            system="fedbuff",
            set={"buffer": 5, "exponent": 0.0, "server_lr": 0.25, "lr": 0.02, "steps": 10},
            scenario={**_EQUAL, **_OFTEN}, prepare=measured.equally_fast,
        ),
    },
    claims=(
        Claim(
            "bias", "Asynchronous averaging with the same weight for all ends with a higher loss "
            "than with unbiased weights (labels as they are, rate 0.02)",
            holds=at_least(1.05), measure=measured.bias_is_real, scale="full",
        ),
        Claim(
            "async_is_fast", "Asynchronous averaging has the loss that FedAvg has at half time in "
            "a fifth of that time (labels as they are, rate 0.02)",
            holds=at_most(0.2), measure=measured.async_is_fast, at="abstract",
        ),
        Claim(
            "faster", "FedFix has it in 0.7 of that time, in each of six settings",
            holds=at_most(0.7), measure=measured.fedfix_is_faster, scale="full", at="abstract",
        ),
        Claim(
            "steadier", "With wrong labels the loss of FedFix rises a twentieth as much as that of "
            "asynchronous averaging (rate 0.1)",
            holds=at_most(0.05), measure=measured.fedfix_is_steady, at="abstract",
        ),
        Claim(
            "ends_lower", "And ends no higher than that of FedAvg",
            holds=at_most(0.0), measure=measured.fedfix_ends_lower, scale="full",
        ),
        Claim(
            "agree", "With equal speeds, and server rates that make up for how often it steps, all "
            "schemes end with the loss of FedAvg",
            holds=at_most(0.05), measure=measured.schemes_agree,
        ),
    ),
    charts=(
        Chart(
            "Federated loss with 20% wrong labels, rate 0.1 (drawn up to 5)", "curves",
            measured.losses_over_time, x="virtual time (s)", y="loss",
        ),
    ),
    deviations=(
        "softmax regression on digits, 20 clients with Dirichlet(0.1) labels; speeds follow the "
        "clients' main labels, or no bias would show",
        "20% of the labels are wrong where instability is shown: without them all schemes reach a "
        "loss near 0, and asynchronous averaging simply wins",
        "a work's weight is the client's importance times the periods that it really took, instead "
        "of ceil(tau / period): the same for constant times, and unbiased for random ones",
        "asynchronous averaging measures how long clients take; nobody tells it",
        "FedAvg is FedFix with a period of the slowest client's time, which is the same bit for "
        "bit; no momentum",
        "works take 0.2% less than the nominal times, which leaves 2 ms for messages: who would "
        "come at an instant comes before it",
    ),
    small=Budget(seeds=1, scenario={"seconds": 20.0}),
    full=Budget(seeds=3),
)  # fmt: skip
