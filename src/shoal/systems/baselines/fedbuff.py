"""Buffered asynchronous federated learning: nobody waits, every tenth update makes a version.

A client pulls the newest model, makes some local steps and pushes by how much the model moved; then
it pulls again. The server collects `buffer` of these updates, whoever they came from, and adds
their mean, each weighted by how many versions it is late. A slow client delays nobody, and its
updates count for less. The server is peer 0, which does not train.

Nguyen et al. 2022, algorithm 1 (arXiv 2106.06639).
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.base.errors import UsageError
from shoal.lab.card import Arm, Budget, Claim, Source, System, at_least, at_most
from shoal.parts.asynchronous import audit
from shoal.parts.asynchronous.buffered import Buffered
from shoal.parts.asynchronous.learning import Even, Learning, Terms
from shoal.parts.asynchronous.local import Displacement
from shoal.parts.asynchronous.participation import Habits
from shoal.parts.asynchronous.staleness import Staleness
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.workload import Workload
from shoal.systems.baselines import _fedbuff_claims as measured


@dataclass(frozen=True)
class FedBuff:
    """Buffered aggregation; see the module's text. A run of `rounds` makes that many versions.

    buffer: updates per version; server_lr, server_momentum: of the server; exponent: an update that
    is s versions late counts (s + 1) ** -exponent (0 = like any other); max_staleness: later ones
    are dropped (None = none). hold: a client gets a model only once its own update is in it; with
    `buffer` = the number of clients that is synchronous averaging. lr, momentum, batch_size: of the
    clients' SGD; steps: local steps, or steps to most_steps of them, drawn anew each time.
    by_samples: weigh updates by data. step_s: what a local step takes in virtual time (0 = by
    counting operations). patience_s, give_up_s: see `Terms`.

    >>> FedBuff(buffer=4, exponent=0.0).rule.size
    4
    """

    buffer: int = 10
    server_lr: float = 1.0
    server_momentum: float = 0.0
    exponent: float = 0.5
    max_staleness: int | None = None
    hold: bool = False
    lr: float = 0.1
    momentum: float = 0.0
    steps: int = 5
    most_steps: int | None = None
    batch_size: int = 32
    by_samples: bool = False
    step_s: float = 0.0
    patience_s: float = 5.0
    give_up_s: float = 120.0

    def __post_init__(self) -> None:
        if not 0 <= self.step_s < float("inf") or self.batch_size < 1:
            raise UsageError(
                f"fedbuff: step_s={self.step_s}, batch_size={self.batch_size}; need a finite time "
                ">= 0 and a batch of at least 1"
            )
        # The parts know their rules; ask them now, not when the run begins.
        _ = self.rule, self.habits

    @property
    def rule(self) -> Buffered:
        """What the server does."""
        staleness = Staleness(self.max_staleness, decay="polynomial", exponent=self.exponent)
        return Buffered(
            self.buffer,
            self.server_lr,
            self.server_momentum,
            self.by_samples,
            self.hold,
            staleness,
        )

    @property
    def habits(self) -> Habits:
        """How much a client does."""
        return Habits(self.steps, self.most_steps)

    def bind(self, workload: Workload) -> Learning:
        """The program for a task."""
        work = Displacement(SGD(self.lr, momentum=self.momentum), self.batch_size)
        return Learning(
            workload, self.rule, work, self.habits, Even(self.step_s) if self.step_s else None,
            Terms(patience_s=self.patience_s, give_up_s=self.give_up_s),
        )  # fmt: skip


INVARIANTS = audit.INVARIANTS
"""What every run keeps, whatever its faults: for fault fuzzing."""

_LOCAL = {"lr": 0.1, "steps": 5}
_UNEVEN = {"device.spread": 1.0, "eval_peers": 1}
"""Of 32 devices the slowest takes about eight times as long as the median."""

SYSTEM = System(
    name="fedbuff",
    kind="program",
    title="Clients never wait; a server averages every few updates, the late ones less",
    make=FedBuff,
    source=Source(
        "Nguyen et al. 2022", "Federated Learning with Buffered Asynchronous Aggregation",
        arxiv="2106.06639",
    ),
    scenario="baselines.digits_home",
    uses={"topology": None, "exchange": None},
    arms={
        "fedbuff": Arm(set=_LOCAL, scenario={**_UNEVEN, "rounds": 250}),
        "all_alike": Arm(set={**_LOCAL, "exponent": 0.0}, scenario={**_UNEVEN, "rounds": 250}),
        "one_by_one": Arm(
            set={**_LOCAL, "buffer": 1, "server_lr": 0.1},
            scenario={**_UNEVEN, "rounds": 2500, "eval_every": 50},
        ),
        "fedavg": Arm(
            system="fedavg", set=_LOCAL, scenario={**_UNEVEN, "rounds": 60, "eval_every": 2}
        ),
    },
    claims=(
        Claim(
            "time",
            "With devices of very uneven speeds 85% accuracy takes at most two thirds of the time "
            "that FedAvg needs",
            holds=at_most(2 / 3), measure=measured.time_over_fedavg, at="section 5",
        ),
        Claim(
            "accuracy", "And in FedAvg's time FedBuff gets at least as accurate",
            holds=at_least(-0.01), measure=measured.gain_over_fedavg,
        ),
    ),
    deviations=(
        "real 8x8 digits and an MLP of 4,810 parameters instead of CelebA, Sent140 and CIFAR-10",
        "31 clients that work all the time instead of a thousand of a large pool; the paper's "
        "largest gain, 3.3 times, is for many more clients than fit into a buffer",
        "both methods with one local rate, 0.1, and a server rate of 1, not tuned",
    ),
    small=Budget(seeds=1),
    full=Budget(seeds=5),
)  # fmt: skip
