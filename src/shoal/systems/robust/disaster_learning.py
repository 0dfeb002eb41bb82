"""Decentralised learning when a disaster takes peers away: lost connections against lost data.

Some peers hold data, the others only pass models on (DecAvg with relays). At one round a set of
peers disappears for good, without a word. To tell what hurts, the same positions of the same graph
are struck in three worlds: C, only relays were there, so connections are lost and data are not; D,
holders were there, both are lost; K, holders were there and lose their data, but stay as relays.
Every effect is taken against an undisturbed run with the same roles.

Positions are the hubs of a Barabasi-Albert graph, or random ones. The lists of faults are explicit:
`parts/disruption` makes them, and any strategy runs in such a world (`run_disaster`).

Palmieri et al. 2023 (arXiv 2310.02986) and 2024 (arXiv 2405.02377).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shoal.lab.build import topology_of
from shoal.lab.card import Arm, Budget, Claim, Plot, Source, System, at_least, at_most, between
from shoal.lab.run import run
from shoal.lab.scenario import Scenario
from shoal.parts.disruption.battery import Battery
from shoal.parts.disruption.removal import By, Removal
from shoal.parts.disruption.roles import Roles
from shoal.parts.strategy.dec_avg import DecAvg
from shoal.systems.robust import _disaster_claims as measured
from shoal.world.faults import to_data
from shoal.world.record import Run

EARLY, LATE = 2, 20
"""Rounds before knowledge has spread, and after."""
STRUCK = 0.14
"""Share of the peers that are struck."""
LOSSY: Mapping[str, Any] = {"links.loss": 0.1}
"""One message in ten is lost, in the arms without rounds."""
LOCAL: Mapping[str, Any] = {"steps": 6, "batch_size": 8, "lr": 0.1}


def run_disaster(
    strategy: Any, scenario: Scenario, disruptions: Sequence[Removal | Battery],
    roles: Roles | None = None, *, seed: int = 0, engine: str = "auto",
) -> Run:  # fmt: skip
    """Any decentralised strategy (or a system's name, or an `Arm`) in a world that falls apart.

    The scenario's topology is the graph; roles: who holds the task's data (None = half of the
    peers, at random). Peers that would take all data or all peers away are refused unless the
    removal says `everybody=True`. With engine="live" peers are processes that are stopped.

    >>> world = Scenario(peers=6, rounds=3, topology="ring",
    ...     task={"name": "digits", "train_samples": 60, "hidden": [8]},
    ...     exchange={"name": "gossip", "weighted": False})
    >>> found = run_disaster(DecAvg(), world, [Removal(1, by="degree", count=2)])
    >>> len(found.series("accuracy")), found.happenings[0].what
    (14, 'crash')
    """
    world = replace(scenario, seed=seed)
    graph = topology_of(world)
    holders = (roles or Roles()).assign(graph, seed)
    faults = []
    for each in disruptions:
        more = (
            each.faults(graph, seed)
            if isinstance(each, Battery)
            else each.faults(graph, seed, holders)
        )
        faults += [to_data(fault) for fault in more]
    changed = world.with_settings({"task.holders": holders, "faults": faults})
    return run(strategy, changed, seed, engine)


def struck(scenario: Scenario, by: By, share: float = STRUCK) -> tuple[int, ...]:
    """The positions that are struck, the same in every world of a seed."""
    return Removal(by=by, share=share).chosen(topology_of(scenario), scenario.seed)


@dataclass(frozen=True)
class World:
    """Roles, and what happens at the struck positions.

    by: which positions; data: whether their peers hold any; at_round < 0: nothing happens; stays:
    data are lost, the peers are not; rewired: once the loss was noticed, others find new links.
    """

    by: By
    data: bool
    at_round: int = -1
    stays: bool = False
    share: float = STRUCK
    rewired: bool = False

    @property
    def __name__(self) -> str:
        return repr(self)

    def __call__(self, scenario: Scenario) -> Scenario:
        graph = topology_of(scenario)
        where: Collection[int] = struck(scenario, self.by, self.share)
        roles = {"include": where} if self.data else {"exclude": where}
        holders = Roles().assign(graph, scenario.seed, **roles)
        changes: dict[str, Any] = {"task.holders": holders}
        if self.at_round >= 0 and self.stays:
            changes |= {"task.losers": where, "task.lost_at": self.at_round}
        elif self.at_round >= 0:
            gone = Removal(self.at_round, by="named", who=tuple(where))
            faults = gone.faults(graph, scenario.seed, holders)
            changes["faults"] = [to_data(fault) for fault in faults]
        if self.rewired:
            # Silence in the round of the loss is how neighbours notice it.
            edges = [(p, q) for p in range(graph.peers) for q in graph.neighbors(p) if p < q]
            changes["topology"] = {
                "name": "rewired", "edges": edges, "gone": where, "at_round": self.at_round + 1,
            }  # fmt: skip
        return scenario.with_settings(changes)


calm_c, calm_d = World("degree", data=False), World("degree", data=True)
early_c, late_c = (World("degree", data=False, at_round=at) for at in (EARLY, LATE))
early_d, late_d = (World("degree", data=True, at_round=at) for at in (EARLY, LATE))
early_k, late_k = (World("degree", data=True, at_round=at, stays=True) for at in (EARLY, LATE))
random_calm_c, random_calm_d = World("random", data=False), World("random", data=True)
random_c, random_d = (World("random", data=data, at_round=EARLY) for data in (False, True))
random_k = World("random", data=True, at_round=EARLY, stays=True)
rewired_c = World("degree", data=False, at_round=EARLY, rewired=True)


def server_lost(scenario: Scenario) -> Scenario:
    """As many holders as elsewhere; the server, peer 0, crashes late."""
    holders = Roles().assign(topology_of(scenario), scenario.seed)
    gone = to_data(Removal(LATE, by="named", who=(0,)).faults(topology_of(scenario), 0)[0])
    return scenario.with_settings({"task.holders": holders, "faults": [gone]})


def _arm(prepare: Any, **settings: Any) -> Arm:
    return Arm(set={**LOCAL, **settings}, prepare=prepare)


def _share(world: World, share: float) -> Arm:
    """The same with more hubs; only its end is drawn."""
    return Arm(set=LOCAL, prepare=replace(world, share=share), scenario={"eval_every": 0})


def _line(calm: str, name: str) -> tuple[tuple[float, str], ...]:
    """The points of a world by the share of hubs that are lost."""
    more = ((share, f"{name}, {share:.0%}") for share in (0.2, 0.3, 0.4))
    return ((0.0, calm), (STRUCK, name), *more)


SYSTEM = System(
    name="disaster-learning",
    kind="strategy",
    title="Decentralised learning after a disaster: lost connections against lost data",
    make=DecAvg,
    source=Source(
        "Palmieri et al. 2023",
        "Exploring the Impact of Disrupted Peer-to-Peer Communications on Fully Decentralized "
        "Learning in Disaster Scenarios",
        arxiv="2310.02986",
    ),
    scenario="robust.digits_disaster",
    uses={"exchange": {"name": "gossip", "weighted": False}},
    arms={
        "calm C": _arm(calm_c),
        "calm D": _arm(calm_d),
        "early C": _arm(early_c),
        "early D": _arm(early_d),
        "early K": _arm(early_k),
        "early C, 20%": _share(early_c, 0.2),
        "early C, 30%": _share(early_c, 0.3),
        "early C, 40%": _share(early_c, 0.4),
        "early D, 20%": _share(early_d, 0.2),
        "early D, 30%": _share(early_d, 0.3),
        "early D, 40%": _share(early_d, 0.4),
        "early K, 20%": _share(early_k, 0.2),
        "early K, 30%": _share(early_k, 0.3),
        "early K, 40%": _share(early_k, 0.4),
        "early C rewired": _arm(rewired_c),
        "asynchronous calm C": Arm(
            system="disaster-asynchronous", set=LOCAL, prepare=calm_c, scenario=LOSSY
        ),
        "asynchronous early C": Arm(
            system="disaster-asynchronous", set=LOCAL, prepare=early_c, scenario=LOSSY
        ),
        "late C": _arm(late_c),
        "late D": _arm(late_d),
        "late K": _arm(late_k),
        "random calm C": _arm(random_calm_c),
        "random calm D": _arm(random_calm_d),
        "random C": _arm(random_c),
        "random D": _arm(random_d),
        "random K": _arm(random_k),
        "uniform calm C": _arm(calm_c, weights="uniform"),
        "uniform early C": _arm(early_c, weights="uniform"),
        "dpsgd early C": Arm(system="dpsgd", set=LOCAL, prepare=early_c),
        "isolated": Arm(system="local-only", set=LOCAL, prepare=calm_c),
        "centralised": Arm(system="centralised", set={"epochs": 3, "batch_size": 8}),
        "centralised rest": Arm(
            system="centralised",
            set={"epochs": 3, "batch_size": 8},
            scenario={"task.train_samples": 288},
        ),
        "server lost": Arm(system="fedavg", set=LOCAL, prepare=server_lost),
    },
    claims=(
        Claim(
            "not-vacuous",
            "removing 14% of the peers by degree leaves 10% to 60% of the others outside the giant "
            "component",
            between(0.1, 0.6),
            measure=measured.outside,
        ),
        Claim(
            "connections-hurt",
            "hubs lost early: the loss of connections alone (C) costs at least 5 points",
            at_least(0.05),
            measure=measured.connectivity_effect,
            at="section 5",
            scale="full",
        ),
        Claim(
            "more-than-data",
            "that is at least twice what the loss of the hubs' data alone (K) costs",
            at_least(0.0),
            measure=measured.connectivity_over_data,
            at="section 5",
            scale="full",
        ),
        Claim(
            "new-links-heal",
            "peers that link with others at two hops once hubs are lost early lose at most half as "
            "much",
            at_most(0.0),
            measure=measured.rewired_over_early,
            scale="full",
        ),
        Claim(
            "also-asynchronous",
            "without rounds and with one message in ten lost, the loss of connections costs at "
            "least 5 points as well",
            at_least(0.05),
            measure=measured.asynchronous_effect,
            scale="full",
        ),
        Claim(
            "hubs-not-random",
            "as many random relays cost at most half as much as the hubs",
            at_most(0.0),
            measure=measured.random_over_hubs,
            at="section 5",
            scale="full",
        ),
        Claim(
            "data-when-connected",
            "random positions: the loss of data costs more than that of connections",
            at_least(0.0),
            measure=measured.random_data_over_connectivity,
            scale="full",
        ),
        Claim(
            "giant-keeps",
            "hubs lost late: the giant component keeps 95% of the undisturbed accuracy",
            at_least(0.95),
            measure=measured.giant_kept,
            at="section 5",
            scale="full",
        ),
        Claim(
            "all-keep",
            "and all survivors, fragments included, keep 90%",
            at_least(0.9),
            measure=measured.all_kept,
            at="section 5",
            scale="full",
        ),
        Claim(
            "late-costs-less",
            "hubs lost late cost less than hubs lost early",
            at_most(-1e-9),
            measure=measured.late_over_early,
            at="section 5",
            scale="full",
        ),
        Claim(
            "isolated-keep",
            "survivors without any neighbour left keep what they had, within 5 points",
            at_least(-0.05),
            measure=measured.isolated_change,
            scale="full",
        ),
        Claim(
            "better-than-alone",
            "even after hubs are lost early, survivors are better than peers that never exchange",
            at_least(0.0),
            measure=measured.over_isolated,
            scale="full",
        ),
        Claim(
            "server-stops",
            "federated averaging makes no round after its server is lost",
            at_most(LATE - 1),
            measure=measured.last_round_of_server,
            scale="full",
        ),
    ),
    plots=(
        Plot(
            "Hubs lost early: with their data (D), without (C), and their data alone (K)",
            "accuracy",
            "share of the peers that are struck, hubs first",
            {
                "C, connections": _line("calm C", "early C"),
                "D, both": _line("calm D", "early D"),
                "K, data": _line("calm D", "early K"),
            },
        ),
    ),
    deviations=(
        "50 peers, BA(50, 2), 400 digits and an MLP 64-64-10 in place of 100 peers with MNIST: "
        "7 hubs lost leave as many outside the giant component as in the paper's harsher cases; "
        "m is not stated in the paper, 2 makes hubs matter",
        "the rule for peers without data is not stated; chosen: weight 0 until taught, then the "
        "mean amount of data among those last averaged, which a peer can know by itself",
        "with equal shares uniform weights and weights by data are the same numbers; both are arms",
        "world C keeps its 400 samples; 288 are left in D and K, with other roles than in C: D is "
        "reported and only C and K enter claims on effects",
        "averaging without training ends at the mean weighted by own data times the data of the "
        "closed neighbourhood, not by own data, except on a complete graph; tested in that form",
        "recovery: re-broadcasting last models is what every round of DecAvg does anyway; rewiring "
        "begins in the round after the loss, with one new link for each one lost",
        "evaluated every 5 rounds, so that the accuracy before the late loss is that of round 19",
    ),
    small=Budget(seeds=1, scenario={"rounds": 30, "eval_every": 10}),
    full=Budget(seeds=10),
)
