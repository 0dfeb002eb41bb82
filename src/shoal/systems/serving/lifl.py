"""LIFL: updates of many clients are summed by short-lived aggregators in shared memory.

Peer 0 coordinates. Each node has a gateway, which puts every update into shared memory once, and
aggregators, which get keys and add in place: leaves of `fan_in` updates, a middle per node, and one
top for the job. Clients are placed on few nodes by best fit, so that most sums never leave their
node; aggregators are planned from the load, started before updates come, used again as they are
free, and all stopped when the round is over. An aggregator that dies is replaced: the sum that it
was making is thrown away, what went into it still lies in memory. The same text runs in virtual
time and on real processes, in both with real shared memory.

Qi et al. 2024 (MLSys, arXiv 2405.10968); FedAvg: McMahan et al. 2017 (arXiv 1602.05629).
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.base.errors import UsageError
from shoal.base.limits import check_positive
from shoal.lab.card import Arm, Budget, Claim, Source, System, at_least, at_most
from shoal.lab.chart import Chart
from shoal.parts.serving.placement import POLICIES
from shoal.parts.serving.shared_object_store import DTYPES
from shoal.rounds.workload import Workload
from shoal.systems.serving import _lifl_charts as charts
from shoal.systems.serving import _lifl_claims as measured
from shoal.systems.serving._lifl_bound import Bound
from shoal.systems.serving._lifl_costs import costs_of
from shoal.systems.serving._lifl_layout import Layout


@dataclass(frozen=True)
class LIFL:
    """Hierarchical aggregation on shared memory; see the module's text.

    nodes, aggregators: how many nodes, and aggregators on each (None = a quarter of the peers and
    as many nodes as fit); capacity: updates that a node can process at once. fan_in: updates per
    leaf; merge: sums that a middle merges before it frees them. placement: "best_fit", "first_fit",
    "worst_fit" or "round_robin". planning: start what the smoothed load asks for when the round
    begins, otherwise one for each piece of work that waits; smoothing: share of the past in the
    load. reuse: an aggregator takes any work while it is warm, otherwise it makes one sum. eager:
    add what arrives at once. always_on: never stop any. cold_start_s: what a start takes in virtual
    time; costs: what moving and adding takes there, "none", "shared", "socket" or "broker" (see
    `_lifl_costs`). fewest, most: clients asked in a round, drawn by key (0 = all); goal: share of
    them that is enough. lr, steps, batch_size: their SGD; client_s, client_spread: what it takes in
    virtual time (0 = by counting flops) and how far it varies; hibernating, hibernate_s: chance
    that a client sleeps first, and for how long at most. collect_s: wait for updates; patience_s:
    silence after which a peer is taken to be gone, quiet_s: the coordinator; attempts: at a round
    before it is skipped; pace_s: a round at most so often. slots: objects in a gateway's memory
    (None = enough).

    Assumes that clients are honest and the peers of a node share a machine; the coordinator and the
    gateways may crash and come back, a round under way begins again then.

    >>> LIFL(fan_in=4, placement="worst_fit").fan_in
    4
    """

    nodes: int = 2
    aggregators: int | None = None
    capacity: int = 20
    fan_in: int = 2
    merge: int = 16
    placement: str = "best_fit"
    planning: bool = True
    smoothing: float = 0.7
    reuse: bool = True
    eager: bool = True
    always_on: bool = False
    cold_start_s: float = 0.0
    costs: str = "none"
    fewest: int = 0
    most: int = 0
    goal: float = 1.0
    lr: float = 0.1
    steps: int = 5
    batch_size: int = 32
    client_s: float = 0.0
    client_spread: float = 0.0
    hibernating: float = 0.0
    hibernate_s: float = 0.0
    collect_s: float = 4.0
    patience_s: float = 0.5
    quiet_s: float = 10.0
    attempts: int = 3
    pace_s: float = 0.0
    slots: int | None = None

    def __post_init__(self) -> None:
        check_positive(
            "lifl", self, "nodes", "capacity", "fan_in", "steps", "batch_size", "collect_s",
            "patience_s", "quiet_s", "attempts", finite=True,
        )  # fmt: skip
        if self.placement not in POLICIES:
            raise UsageError(
                f"lifl: placement={self.placement!r}; need one of {', '.join(POLICIES)}"
            )
        if self.merge < 2:
            raise UsageError(f"lifl: merge={self.merge}; need at least 2 sums")
        if not 0 < self.goal <= 1 or not 0 <= self.hibernating <= 1:
            raise UsageError(
                f"lifl: goal={self.goal}, hibernating={self.hibernating}; need shares up to 1, the "
                "goal above 0"
            )
        if not 0 <= self.fewest <= self.most:
            raise UsageError(
                f"lifl: fewest={self.fewest}, most={self.most}; need 0 <= fewest <= most (0 = all)"
            )
        if not 0 <= self.client_spread < 1 or min(
            self.cold_start_s, self.client_s, self.hibernate_s, self.pace_s
        ) < 0:  # fmt: skip
            raise UsageError("lifl: times of 0 or more are needed, and client_spread in [0, 1)")
        costs_of(self.costs)

    def bind(self, workload: Workload) -> Bound:
        """The program for a task: who is what, and how large the shared memory is."""
        layout = Layout.fitting(workload.task.peers, self.nodes, self.aggregators)
        dtype = str(workload.initial.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise UsageError(f"lifl: a model of {dtype}; need one of {', '.join(DTYPES)}")
        if type(workload.aggregator).__name__ != "Mean":
            raise UsageError(
                f"lifl: aggregator {workload.aggregator!r}; a tree of sums gives a mean and no "
                "more (leave the aggregator out)"
            )
        if type(workload.transform).__name__ != "Identity":
            raise UsageError(
                f"lifl: transform {workload.transform!r}; sums are made where updates lie, so they "
                "come as they are (leave the transform out)"
            )
        if self.most > len(layout.clients):
            raise UsageError(
                f"lifl: most={self.most} of {len(layout.clients)} clients; ask no more than that"
            )
        least = layout.each + layout.nodes + self.fan_in + self.merge
        if self.slots is not None and self.slots <= least:
            raise UsageError(f"lifl: slots={self.slots}; need more than {least} (raise it)")
        return Bound(self, workload, layout, dtype)


INVARIANTS = (
    measured.everybody_counts_once,
    measured.nobody_is_kept_for_nothing,
    measured.nothing_is_left_in_memory,
)
"""What every run keeps, whatever its faults: for fault fuzzing."""


_FIVE = {
    "nodes": 5, "aggregators": 12, "capacity": 20, "cold_start_s": 2.0, "fewest": 20, "most": 100,
    "client_s": 10.0, "client_spread": 0.05, "costs": "shared", "collect_s": 60.0,
    "patience_s": 10.0, "quiet_s": 600.0, "steps": 1, "batch_size": 8,
}  # fmt: skip
"""5 nodes that can take 20 updates each; 20 to 100 clients of a round are done within a second."""

_OF_OLD = {"placement": "worst_fit", "planning": False, "reuse": False, "eager": False}
_TWENTY = {**_FIVE, "fewest": 20, "most": 20}
_LEARNING = {
    "peers": 40, "rounds": 30, "eval_every": 1, "eval_peers": None,
    "task": {
        "name": "digits", "split": "dirichlet", "alpha": 0.3, "hidden": [64],
        "holders": list(range(9, 40)),
    },
}  # fmt: skip
_STEPS = {"lr": 0.1, "steps": 5, "batch_size": 32}

SYSTEM = System(
    name="lifl",
    kind="program",
    title="Aggregation in shared memory by short-lived functions, placed and planned",
    make=LIFL,
    source=Source(
        "Qi et al. 2024",
        "LIFL: A Lightweight, Event-driven Serverless Platform for Federated Learning",
        arxiv="2405.10968",
        venue="MLSys",
    ),
    scenario="serving.five_nodes",
    uses={"topology": None, "exchange": None},
    arms={
        "lifl": Arm(set=_FIVE),
        "SF": Arm(
            set={**_FIVE, **_OF_OLD, "eager": True, "reuse": True, "always_on": True,
                 "costs": "socket"},
        ),
        "SL-B": Arm(set={**_FIVE, **_OF_OLD, "costs": "broker"}),
        "SL-H": Arm(set={**_FIVE, **_OF_OLD}),
        "flat": Arm(set={**_FIVE, "capacity": 100, "fan_in": 100}),
        "no shared memory": Arm(set={**_FIVE, "costs": "socket"}),
        "no best fit": Arm(set={**_FIVE, "placement": "worst_fit"}),
        "no planning": Arm(set={**_FIVE, "planning": False}),
        "no reuse": Arm(set={**_FIVE, "reuse": False}),
        "no eager": Arm(set={**_FIVE, "eager": False}),
        "twenty": Arm(set=_TWENTY, scenario={"rounds": 5}),
        "twenty in turn": Arm(
            set={**_TWENTY, "placement": "round_robin"}, scenario={"rounds": 5}
        ),
        "tree": Arm(
            set={**_STEPS, "nodes": 2, "aggregators": 3, "capacity": 20}, scenario=_LEARNING
        ),
        "fedavg": Arm(
            system="fedavg", set=_STEPS, scenario={**_LEARNING, "exchange.hub_works": False}
        ),
    },
    claims=(
        Claim(
            "faster", "From the first update to the new model takes at most 0.7 of what SL-H takes",
            at_most(0.7), measure=measured.act_over_slh, at="evaluation",
        ),
        Claim(
            "as-fast", "and no longer than on the always-on tree (SF)",
            at_most(1.0), measure=measured.act_over_sf, at="evaluation",
        ),
        Claim(
            "lighter", "Aggregators are held for at most 0.6 of the seconds of the always-on tree",
            at_most(0.6), measure=measured.reserved_over_sf, at="evaluation",
        ),
        Claim(
            "no-broker", "Moving and adding takes less than a fifth of the processor time that it "
            "takes through a broker",
            at_most(0.2), measure=measured.work_over_broker, at="abstract",
        ),
        Claim(
            "packed", "20 updates are placed on one node",
            at_most(1.0), measure=measured.nodes_of_twenty, statistic="max",
        ),
        Claim(
            "spread", "where placing them in turn takes five",
            at_least(5.0), measure=measured.nodes_in_turn, statistic="min",
        ),
        Claim(
            "local", "and no sum of them goes from node to node",
            at_most(0.0), measure=measured.transfers_of_twenty, statistic="max",
        ),
        Claim(
            "reuse", "Using warm aggregators again spares 40% of the cold starts",
            at_least(0.4), measure=measured.starts_saved, scale="full",
        ),
        Claim(
            "without-memory", "Without shared memory it takes more processor time",
            at_least(1.001), measure=measured.without_memory,
        ),
        Claim(
            "without-best-fit", "Without best fit more sums go from node to node",
            at_least(1.001), measure=measured.without_best_fit,
        ),
        Claim(
            "without-planning", "Without planning it takes longer",
            at_least(1.001), measure=measured.without_planning,
        ),
        Claim(
            "without-eager", "Without eager aggregation it takes longer",
            at_least(1.001), measure=measured.without_eager,
        ),
        Claim(
            "once", "Every update is in the model exactly once, in all arms and rounds",
            at_most(0.0), measure=measured.not_in_the_model, statistic="max",
        ),
        Claim(
            "zero", "No aggregator is alive when its node has nothing to do",
            at_most(0.0), measure=measured.kept_for_nothing, statistic="max",
        ),
        Claim(
            "same-model", "Learning digits gives plain averaging's accuracy in every round",
            at_most(1e-9), measure=measured.accuracy_apart, statistic="max",
        ),
    ),
    charts=(
        Chart(
            "Aggregation of a round, by way of serving", "bars", charts.completion, "", "seconds"
        ),
        Chart("What a round holds and takes", "bars", charts.held, "", "seconds"),
    ),
    deviations=(
        "in virtual time a model of a few hundred numbers stands for one of 44 MiB; what moving "
        "and adding that takes was measured by lifl-machine, and is charged to whoever does it",
        "20 to 100 clients in a round instead of 120, since 5 nodes of 20 updates take no more; "
        "they are done within a second of each other, and hibernation is left out of the "
        "comparison: it would delay all arms alike",
        "eBPF redirection in the kernel needs rights that a library has not; keys go over the "
        "engine's messages, or over Unix sockets in lifl-machine",
        "a middle merges 16 sums at a time, so that memory stays bounded; leaves keep no process "
        "busy while they wait, since all that a sum needs lies in shared memory",
        "a round begins when the one before is over, so that nodes are idle when clients are "
        "placed (k E = 0 in RC = MC - k E); the smoothed load decides how many aggregators start",
        "completion times of the paper were on its own cluster; ratios are what is compared",
        "adding takes so little of what a start takes that a single warm aggregator (arm flat, a "
        "node without bound on its updates) keeps up with a tree here",
    ),
    small=Budget(seeds=1, scenario={"rounds": 4}),
    full=Budget(seeds=3),
)  # fmt: skip
