"""Tiered federated averaging: clients of like speed form tiers, which average among themselves.

The first round measures how long each client takes; its quantiles are the tiers. From then on the
clients of a tier wait for each other and for nobody else, and the server makes a version of each
tier's round, in which slow tiers count for more, since they are heard rarely. Nobody waits for the
slowest, and works are only as old as other tiers' rounds make them.

Chai et al. 2021 (FedAT, arXiv 2010.05958).
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.lab.card import Source, System
from shoal.parts.asynchronous import audit
from shoal.parts.asynchronous.learning import Learning
from shoal.parts.asynchronous.participation import Habits
from shoal.parts.asynchronous.settings import ServerSettings
from shoal.parts.asynchronous.staleness import Staleness
from shoal.parts.asynchronous.tiered import Tiered
from shoal.rounds.workload import Workload


@dataclass(frozen=True)
class TieredFedAvg(ServerSettings):
    """Averaging in tiers of like speed; clients make SGD steps.

    tiers, server_lr, wait: see `Tiered`; exponent: a work that is s versions late counts
    (s + 1) ** -exponent (0 = like any other). steps: local steps of a work. The others: see
    `ServerSettings`. With one tier it is synchronous averaging.

    >>> TieredFedAvg(tiers=2).rule().wait
    2.0
    """

    tiers: int = 3
    server_lr: float = 1.0
    wait: float = 2.0
    exponent: float = 0.0
    steps: int = 5

    def rule(self) -> Tiered:
        _ = Habits(self.steps)
        staleness = Staleness(decay="polynomial", exponent=self.exponent)
        return Tiered(self.tiers, self.server_lr, self.wait, self.importances, staleness)

    def bind(self, workload: Workload) -> Learning:
        """The program for a task."""
        return self.learning(workload, Habits(self.steps))


INVARIANTS = audit.INVARIANTS
"""What every run keeps, whatever its faults: for fault fuzzing."""

SYSTEM = System(
    name="tiered-fedavg",
    kind="program",
    title="Federated averaging in tiers of clients of like speed",
    make=TieredFedAvg,
    source=Source(
        "Chai et al. 2021",
        "FedAT: A High-Performance and Communication-Efficient Federated Learning System with "
        "Asynchronous Tiers",
        arxiv="2010.05958",
        venue="SC",
    ),
    scenario="baselines.digits_home",
    uses={"topology": None, "exchange": None},
    deviations=(
        "a version adds the tier's mean displacement times its share, where the paper keeps a "
        "model of each tier and takes their mean with these shares: the same where shares stay "
        "what they are, and no tier's model is older than its last round",
        "without the paper's compression and proximal term (transform = qsgd; see fedprox)",
        "claims about it are on the card of fedcompass",
    ),
)
