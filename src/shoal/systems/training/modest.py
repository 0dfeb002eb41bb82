"""MoDeST: random samples train and average in turn, drawn by every peer alone, with no server.

Everybody has a view of who is there, and orders it by a hash of (peer, round); the first live ones
are the round's sample. A participant of round k trains the model that it got and sends it to the
aggregators, the first `aggregators` live peers of sample k + 1. An aggregator that has enough
models averages them and sends the result to all of sample k + 1, which begins round k + 1. Views
travel with the models and merge like a CRDT, so joins, leaves and crashes become known to those
who need to know. A round moves 2 * sample_size * aggregators models however many peers there are.

Rounds count from 0, whose participants train the common initial model; the model of round k has
been trained k times.

De Vos et al. 2023, algorithms 1 to 4 (arXiv 2302.13837).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from shoal.base.errors import Leaving, UsageError
from shoal.base.limits import check_positive
from shoal.kernel.peer import Cost, Peer
from shoal.lab.card import Arm, Budget, Claim, Source, System, at_least, at_most
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.workload import Workload
from shoal.systems.training import _modest_claims as measured
from shoal.systems.training._modest_node import Node, train
from shoal.tensor import keyed
from shoal.tensor.flops import count_flops
from shoal.tensor.types import Vector


@dataclass(frozen=True)
class MoDeST:
    """Sampled training without a server; see the module's text.

    sample_size (None = 10, or all of fewer peers) train per round, `aggregators` of them (None = 2)
    average; success_fraction: which part of a sample's models an aggregator waits for.
    ping_timeout_s: how long an answer may take, or ping_patience times the slowest answer of recent
    samples if that is less (0 = always ping_timeout_s). inactivity_rounds: who was not active for
    longer is no candidate. An aggregator waits for aggregation_patience times the median time that
    it has heard of, at most aggregation_timeout_s (patience 0 = always that long).
    restart: the restart rule, for a peer that has seen nothing new for idle_rounds median rounds:
    if it is the first live candidate of the latest round it knows, it sends its model to that
    round's sample again. founders: how many peers of the roster, the first ones, are in the first
    view (None = all); others advertise that they join. Joining and leaving is told to
    adverts * sample_size random peers.
    lr, steps or epochs (default 1 epoch), batch_size, momentum: local training.

    Assumes that a ping is answered within its timeout and that most of a sample survives a round.
    Raises UsageError for settings that no run could use.

    >>> MoDeST(sample_size=10, aggregators=2, success_fraction=0.9).enough
    9
    """

    sample_size: int | None = None
    aggregators: int | None = None
    success_fraction: float = 0.9
    ping_timeout_s: float = 5.0
    ping_patience: float = 3.0
    inactivity_rounds: int = 20
    aggregation_timeout_s: float = 300.0
    aggregation_patience: float = 5.0
    restart: bool = True
    idle_rounds: float = 10.0
    founders: int | None = None
    adverts: int = 10
    lr: float = 0.1
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 32
    momentum: float = 0.0

    def __post_init__(self) -> None:
        size, few = self.sample_size, self.aggregators
        if size is not None and size < 1:
            raise UsageError(f"modest: sample_size={size}; need at least 1")
        if few is not None and not 1 <= few <= (10 if size is None else size):
            raise UsageError(
                f"modest: aggregators={few} of sample_size={10 if size is None else size}; need 1 "
                "to all of the sample"
            )
        if not 0.0 < self.success_fraction <= 1.0:
            raise UsageError(
                f"modest: success_fraction={self.success_fraction}; need more than 0, up to 1"
            )
        if size is not None and self.enough < 1:
            raise UsageError(
                f"modest: success_fraction={self.success_fraction} of sample_size={size} is less "
                "than one model (raise it)"
            )
        times = ("ping_timeout_s", "aggregation_timeout_s", "idle_rounds")
        check_positive("modest", self, *times, finite=True)
        for name in ("inactivity_rounds", "adverts", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"modest: {name}={getattr(self, name)}; need at least 1")
        for name in ("aggregation_patience", "ping_patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(
                    f"modest: {name}={getattr(self, name)}; need 0 or more (0 = the timeout alone)"
                )
        if self.steps is not None and self.epochs is not None:
            raise UsageError(f"modest: steps={self.steps} and epochs={self.epochs}; give one")

    @property
    def enough(self) -> int:
        """Models that complete a round."""
        return math.floor((self.sample_size or 10) * self.success_fraction + 1e-9)

    @property
    def training(self) -> tuple[Any, ...]:
        """Static arguments of `train` after the task."""
        epochs = 1 if self.steps is None and self.epochs is None else self.epochs
        return SGD(self.lr, momentum=self.momentum), self.steps, epochs, self.batch_size

    def bind(self, workload: Workload) -> Bound:
        """The program for a task: what depends on the number of peers is settled here."""
        peers = workload.task.peers
        members = peers if self.founders is None else self.founders
        if not 1 <= members <= peers:
            raise UsageError(f"modest: founders={members} of {peers} peers; need 1 to all of them")
        size = min(10, members) if self.sample_size is None else self.sample_size
        if size > members:
            raise UsageError(
                f"modest: sample_size={size} of {members} peers; need at most all of them"
            )
        few = min(2, size) if self.aggregators is None else self.aggregators
        settings = replace(self, sample_size=size, aggregators=few, founders=members)
        initial = workload.initial
        key = keyed.key_of(workload.seed, "cost", device=initial.device)
        shard = workload.task.shard(0)
        flops = count_flops(train, initial, shard, key, workload.task, *self.training)
        return Bound(settings, workload, size, few, members, initial, Cost(flops=flops))


@dataclass(frozen=True, eq=False)
class Bound:
    """MoDeST with its task: the program that peers run."""

    settings: MoDeST
    workload: Workload
    sample_size: int
    aggregators: int
    founders: int
    initial: Vector
    cost: Cost

    async def run(self, peer: Peer) -> None:
        node = Node(self, peer)
        async with peer.tasks() as group:
            life = group.start(node.live(lambda: life.cancel()))
            try:
                await life.join()
            except Leaving:
                life.cancel()
                await node.say_goodbye()


INVARIANTS = (
    measured.trains_once_per_round,
    measured.averages_once_per_round,
    measured.counts_nobody_twice,
    measured.trained_what_was_averaged,
)
"""What every run keeps, whatever its faults: for fault fuzzing."""

_LOCAL = {"lr": 0.1, "steps": 5, "batch_size": 8}
_MODEST = {
    **_LOCAL, "sample_size": 10, "aggregators": 2, "success_fraction": 0.9, "ping_patience": 0.0,
}  # fmt: skip
_CRASHES = {**_MODEST, "success_fraction": 0.7}

SYSTEM = System(
    name="modest",
    kind="program",
    title="Random samples train and average in turn, with no server",
    make=MoDeST,
    source=Source(
        "De Vos et al. 2023",
        "MoDeST: Bridging the Gap between Federated and Decentralized Learning with Decentralized "
        "Sampling",
        arxiv="2302.13837",
    ),
    scenario="training.digits_sampled",
    uses={"topology": None, "exchange": None},
    arms={
        "modest": Arm(set=_MODEST),
        "fedavg": Arm(system="fedavg", set=_LOCAL, scenario={"rounds": 100, "exchange.sample": 10}),
        "modest_fast": Arm(set={**_MODEST, "lr": 0.3}, scenario={"rounds": 50}),
        "dpsgd_regular": Arm(
            system="dpsgd", set={**_LOCAL, "lr": 0.5},
            scenario={
                "rounds": 30, "eval_peers": 25,
                "topology": {"name": "random_regular", "degree": 10},
            },
        ),
        "dpsgd_exponential": Arm(
            system="dpsgd", set={**_LOCAL, "lr": 0.5},
            scenario={
                "rounds": 90, "eval_peers": 25,
                "topology": {"name": "exponential", "one_peer": True},
            },
        ),
        "gossip": Arm(
            system="gossip", set={**_LOCAL, "period_s": 15.0},
            scenario={"rounds": 40, "eval_every": 5, "topology": {"name": "full"}},
        ),
        "one_by_one": Arm(
            set=_CRASHES, scenario={"rounds": 240}, prepare=measured.one_by_one
        ),
        "at_once": Arm(
            set={**_CRASHES, "restart": False}, scenario={"rounds": 100}, prepare=measured.at_once
        ),
        "at_once_restart": Arm(
            set=_CRASHES, scenario={"rounds": 100}, prepare=measured.at_once
        ),
        "join": Arm(
            set={**_MODEST, "founders": 80}, scenario={"rounds": 90}, prepare=measured.joining
        ),
        "fragile": Arm(
            set={
                **_MODEST, "aggregators": 1, "success_fraction": 1.0, "restart": False,
                "aggregation_patience": 0.0,
            },
            scenario={"rounds": 90}, prepare=measured.one_by_one,
        ),
    },
    claims=(
        Claim(
            "rounds", "85% accuracy in as many rounds as FedAvg with as many clients per round",
            holds=at_most(1.15), measure=measured.rounds_over_fedavg, scale="full", at="section 5",
        ),
        Claim(
            "bytes_regular",
            "Bytes to 85% accuracy, each at its best rate: a third or less of D-PSGD's on a random "
            "10-regular graph",
            holds=at_most(1 / 3), measure=measured.bytes_over_regular, at="abstract",
        ),
        Claim(
            "bytes_exponential",
            "Bytes to 85% accuracy, each at its best rate: a third or less of D-PSGD's on the "
            "one-peer exponential graph",
            holds=at_most(1 / 3), measure=measured.bytes_over_exponential, at="abstract",
        ),
        Claim(
            "stall_while_dying",
            "80% of the peers go silent one by one: no round takes more than 6 median rounds of "
            "before, waiting for pings included",
            holds=at_most(6.0), measure=measured.stall_while_dying, at="section 5",
        ),
        Claim(
            "stall_afterwards",
            "Once the views have dropped the dead, no round takes more than 1.5 median rounds",
            holds=at_most(1.5), measure=measured.stall_afterwards, scale="full", at="section 5",
        ),
        Claim(
            "accuracy_while_dying", "The survivors keep the accuracy of before the crashes",
            holds=at_least(-0.02), measure=measured.gain_one_by_one, at="abstract",
        ),
        Claim(
            "bare_protocol_halts",
            "80% go silent at once in the middle of a round: without the restart rule most runs "
            "halt (a participant survives with probability 0.2, three of ten with 0.32)",
            holds=at_least(0.5), measure=measured.halts_bare, statistic="mean",
            scale="full",
        ),
        Claim(
            "restart_goes_on", "With the restart rule rounds go on after 80% went silent at once",
            holds=at_most(0.0), measure=measured.halts_with_restart, statistic="max",
        ),
        Claim(
            "accuracy_with_restart", "And the survivors keep the accuracy of before the crash",
            holds=at_least(-0.02), measure=measured.gain_with_restart, scale="full", at="abstract",
        ),
        Claim(
            "joiners_sampled", "Each of 20 joiners is sampled within 5 n / s rounds",
            holds=at_most(1.0), measure=measured.waits_of_joiners, scale="full", at="section 5",
        ),
        Claim(
            "joiners_known", "Ten rounds after joining, 99% of the live views hold each joiner",
            holds=at_least(0.99), measure=measured.views_with_joiners, at="section 5",
        ),
        Claim(
            "load", "No hot spot: the busiest peer moves at most 3 times the mean bytes",
            holds=at_most(3.0), measure=measured.load_of_modest,
        ),
        Claim(
            "load_of_server", "FedAvg's server moves at least n / 2 times the mean",
            holds=at_least(1.0), measure=measured.load_of_fedavg,
        ),
        Claim(
            "fragile_stalls",
            "With success_fraction 1, one aggregator and a fixed timeout the same crashes make "
            "the system stand still for more than 6 median rounds",
            holds=at_least(6.0), measure=measured.stall_of_fragile, scale="full",
        ),
    ),
    deviations=(
        "digits in shards of two classes and an MLP of 4,810 parameters instead of image data sets "
        "and CNNs; the message counts and their order are the protocol's own",
        "aggregators that time out: 5 times the median of the aggregation times that came with the "
        "last 21 models instead of always 300 s (aggregation_patience=0 restores that)",
        "ping timeouts follow the slowest answers of recent samples by default (ping_patience); "
        "the arms here wait 5 s each time, as published",
        "the restart rule is not in the paper and is on by default (restart=False); a participant "
        "that has trained already sends its result again",
        "a peer that hears nothing for inactivity_rounds / 2 rounds, or idle_rounds, says so to "
        "sample_size random peers: with 10 of 100 sampled, 12% of the living would otherwise be "
        "forgotten within 20 rounds",
        "the first sample is not pinged: everybody reads it off the first view",
        "joining is told to 10 * sample_size peers, as the public code does, which is everybody of "
        "100; with 120 peers 87% of the views hold a joiner after 10 rounds, since a view only "
        "changes when its peer is sampled",
    ),
    small=Budget(seeds=1),
    full=Budget(seeds=6),
)  # fmt: skip
