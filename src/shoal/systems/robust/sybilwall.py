"""SybilWall: histories of models that spread by gossip show which peers are one adversary's.

Anybody can make identities for nothing, and on a graph each honest peer sees only a few of them.
Every peer keeps a history of each neighbour: the sum of (model received - own model before
training) over the rounds. Identities that push towards one goal have histories that point the same
way, so FoolsGold's scores take their votes away. With each model goes one history of a third peer,
drawn so that near ones are more likely: a Sybil that shows one face to each victim is then still
seen twice. Many Sybils give themselves away; a single one has nobody to be compared with, and gets
through.

Beside it the same step with the plain mean, the median, Krum and Multi-Krum that know how many
Sybils a peer may have beside it, with the histories of neighbours alone, and with a server that
keeps everybody's. `sybil_attack(graph, sybils, edges_per_sybil, kind)` puts Sybils around any
graph. `--set signed=true` signs histories, so that nobody can frame a peer that it is not beside.

Werthenbach and Pouwelse 2023 (arXiv 2306.15044).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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
    value,
)
from shoal.parts.topology.base import GraphTopology
from shoal.parts.topology.sybil_graph import Density, attacked
from shoal.systems.robust._sybilwall_claims import accuracy_range, few_and_many, worst_case
from shoal.systems.robust._sybilwall_node import HistoryFilter, SybilWall
from shoal.systems.robust._sybilwall_seals import SignedWall

HONEST = 40
TRAINING: Mapping[str, Any] = {"lr": 0.5, "epochs": 2, "batch_size": 10}
WORLDS: Mapping[str, tuple[int, int, Density]] = {
    "calm": (0, 1, "dense"),
    "dense": (20, 8, "dense"),
    "dense 2": (10, 8, "dense"),
    "distributed": (20, 2, "distributed"),
    "sparse": (10, 2, "sparse"),
    "1 sybil": (1, 40, "distributed"),
    "2 sybils": (2, 20, "distributed"),
    "10 sybils": (10, 4, "distributed"),
}
"""How many Sybils, attack edges of each, and what that is."""
BACKDOOR: Mapping[str, Any] = {
    "name": "sybils", "goal": "backdoor", "settings": (("target", 0), ("size", 2)),
}  # fmt: skip


def sybilwall(
    kappa: float = 1.0, lam: float = 0.8, history: str = "relative", gossip: bool = True,
    layer: str = "all", mix: str = "mean", byzantine: int = 1, keep_rounds: int | None = None,
    signed: bool = False, lr: float = 0.5, epochs: int = 2, batch_size: int = 10,
) -> HistoryFilter:  # fmt: skip
    """FoolsGold over histories, with gossip of them (signed if asked), or of neighbours alone."""
    common = (kappa, history, layer, mix, byzantine, keep_rounds, lr, epochs, batch_size)
    wall = (SignedWall if signed else SybilWall)(*common, lam=lam)
    if gossip:
        return wall
    if signed:
        raise UsageError("sybilwall: signed=True without gossip; nothing to sign (drop it)")
    return HistoryFilter(*common)


def sybil_attack(
    graph: GraphTopology, sybils: int, edges_per_sybil: int, kind: Density,
    *, joins_at: int | None = None, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Changes to a scenario that put Sybils around a graph of honest peers.

    kind: "dense", "distributed" or "sparse", see the topology `sybil_graph`; joins_at: the round in
    which they flood in, None = they are there from the start. The attack, the task and all else
    stay the scenario's; only honest peers have data of the task.

    >>> from shoal.parts.topology.ring import Ring
    >>> world = sybil_attack(Ring(8), sybils=4, edges_per_sybil=4, kind="dense")
    >>> world["peers"], world["byzantine"]
    (12, (8, 9, 10, 11))
    """
    if joins_at is not None and joins_at < 1:
        raise UsageError(
            f"sybil_attack: joins_at={joins_at}; need a round from 1 on (None = from the start)"
        )
    edges = attacked(graph, sybils, edges_per_sybil, kind, seed)
    world: dict[str, Any] = {
        "peers": graph.peers + sybils,
        "byzantine": tuple(range(graph.peers, graph.peers + sybils)),
        "topology": {"name": "from_edges", "edges": edges, "mixing": "uniform"},
        "task.holders": tuple(range(graph.peers)),
    }
    return world | ({} if joins_at is None else _late(world["byzantine"], joins_at))


def _late(who: tuple[int, ...], round: int) -> dict[str, Any]:
    return {"faults": [{"kind": "join", "who": list(who), "at": {"round": round}}]}


def _world(name: str) -> dict[str, Any]:
    """One of `WORLDS`; with " late" the Sybils come half-way, with " backdoor" for a patch."""
    plain = name.removesuffix(" late").removesuffix(" backdoor")
    sybils, edges, kind = WORLDS[plain]
    who = tuple(range(HONEST, HONEST + sybils))
    graph = {"name": "sybil_graph", "sybils": sybils, "edges_per_sybil": edges, "kind": kind}
    world: dict[str, Any] = {
        "peers": HONEST + sybils, "byzantine": who, "topology": graph,
        "task.holders": tuple(range(HONEST)),
    }  # fmt: skip
    if name.endswith(" late"):
        world |= _late(who, 15)
    return world | ({"attack": BACKDOOR} if name.endswith(" backdoor") else {})


def _arm(rule: str, world: str, **settings: Any) -> Arm:
    """A rule in a world."""
    scenario = _world(world)
    if rule == "wall":
        return Arm(set=settings, scenario=scenario)
    if rule == "neighbours":
        return Arm(set={"gossip": False}, scenario=scenario)
    if rule == "server":
        # The server is one more peer, without data; the graph is of no use.
        sybils = len(scenario["byzantine"])
        scenario |= {
            "peers": 1 + HONEST + sybils, "topology": None,
            "exchange": {"name": "star", "hub_works": False}, "eval_peers": 1,
            "byzantine": tuple(range(1 + HONEST, 1 + HONEST + sybils)),
            "task.holders": tuple(range(1, 1 + HONEST)),
        }  # fmt: skip
        return Arm(set={"gossip": False}, scenario=scenario)
    sybils, edges, _ = WORLDS[world.removesuffix(" late").removesuffix(" backdoor")]
    told = {"byzantine": math.ceil(sybils * edges / HONEST)}
    rules: Mapping[str, Mapping[str, Any]] = {
        "average": {"name": "mean"},
        "median": {"name": "median"},
        "krum": {"name": "krum", **told},
        "multikrum": {"name": "multi_krum", **told},
    }
    return Arm(system="dpsgd", set=TRAINING, scenario={**scenario, "aggregator": rules[rule]})


SYSTEM = System(
    name="sybilwall",
    kind="strategy",
    title="Histories of models that spread by gossip show who is one adversary's",
    make=sybilwall,
    source=Source(
        "Werthenbach and Pouwelse 2023",
        "Towards Sybil Resilience in Decentralized Learning",
        arxiv="2306.15044",
    ),
    scenario="robust.digits_sybils",
    uses={"exchange": {"name": "gossip"}},
    arms={
        "average calm": _arm("average", "calm"),
        "average dense": _arm("average", "dense"),
        "average dense 2": _arm("average", "dense 2"),
        "average distributed": _arm("average", "distributed"),
        "average sparse": _arm("average", "sparse"),
        "median calm": _arm("median", "calm"),
        "median dense": _arm("median", "dense"),
        "median dense 2": _arm("median", "dense 2"),
        "median distributed": _arm("median", "distributed"),
        "median sparse": _arm("median", "sparse"),
        "krum calm": _arm("krum", "calm"),
        "krum dense": _arm("krum", "dense"),
        "krum dense 2": _arm("krum", "dense 2"),
        "krum distributed": _arm("krum", "distributed"),
        "krum sparse": _arm("krum", "sparse"),
        "multikrum calm": _arm("multikrum", "calm"),
        "multikrum dense": _arm("multikrum", "dense"),
        "multikrum dense 2": _arm("multikrum", "dense 2"),
        "multikrum distributed": _arm("multikrum", "distributed"),
        "multikrum sparse": _arm("multikrum", "sparse"),
        "neighbours calm": _arm("neighbours", "calm"),
        "neighbours dense": _arm("neighbours", "dense"),
        "neighbours dense 2": _arm("neighbours", "dense 2"),
        "neighbours distributed": _arm("neighbours", "distributed"),
        "neighbours sparse": _arm("neighbours", "sparse"),
        "server calm": _arm("server", "calm"),
        "server dense": _arm("server", "dense"),
        "server sparse": _arm("server", "sparse"),
        "wall calm": _arm("wall", "calm"),
        "wall dense": _arm("wall", "dense"),
        "wall dense 2": _arm("wall", "dense 2"),
        "wall distributed": _arm("wall", "distributed"),
        "wall sparse": _arm("wall", "sparse"),
        "wall 1 sybil": _arm("wall", "1 sybil"),
        "wall 2 sybils": _arm("wall", "2 sybils"),
        "wall 10 sybils": _arm("wall", "10 sybils"),
        "average dense late": _arm("average", "dense late"),
        "wall dense late": _arm("wall", "dense late"),
        "average dense backdoor": _arm("average", "dense backdoor"),
        "average distributed backdoor": _arm("average", "distributed backdoor"),
        "wall dense backdoor": _arm("wall", "dense backdoor"),
        "wall distributed backdoor": _arm("wall", "distributed backdoor"),
        "update dense": _arm("wall", "dense", history="update"),
        "sum dense": _arm("wall", "dense", history="sum"),
        "latest dense": _arm("wall", "dense", history="latest"),
        "wall median dense": _arm("wall", "dense", mix="median"),
        "wall krum dense": _arm("wall", "dense", mix="krum", byzantine=4),
    },
    claims=(
        Claim(
            "dense",
            "with 4 attack edges for each honest peer at most a tenth of the attacked class is "
            "taken for the target",
            at_most(0.1),
            metric="attack_success",
            compare=value("wall dense"),
            at="figure 5",
        ),
        Claim(
            "dense-average",
            "there the attack succeeds at most a fifth as often as against the plain mean",
            at_most(0.2),
            metric="attack_success",
            compare=ratio("wall dense", "average dense"),
            at="figure 5",
        ),
        Claim(
            "dense-accuracy",
            "there the other classes' accuracy is at most 15 points below the plain mean's without "
            "attack",
            at_least(-0.15),
            metric="untouched_accuracy",
            compare=difference("wall dense", "average calm"),
            at="figure 5",
            scale="full",
        ),
        Claim(
            "worst-case",
            "over dense, distributed and sparse attacks the worst success is at least 0.3 below "
            "every decentralised baseline's worst",
            at_most(-0.3),
            measure=worst_case,
            at="section 5",
            scale="full",
        ),
        Claim(
            "consistent",
            "accuracy with and without attacks stays within 10 points",
            at_most(0.1),
            measure=accuracy_range,
            at="section 5",
            scale="full",
        ),
        Claim(
            "gossip",
            "with one Sybil beside each honest peer the attack succeeds at most a fifth as often "
            "as without gossip",
            at_most(0.2),
            metric="attack_success",
            compare=ratio("wall distributed", "neighbours distributed"),
            at="section 5",
            scale="full",
        ),
        Claim(
            "few-sybils",
            "at 40 attack edges 1 or 2 Sybils succeed at least as often as 10 or 20",
            at_least(0.0),
            measure=few_and_many,
            at="section 5",
            scale="full",
        ),
    ),
    plots=(
        Plot(
            "The attack's success over its density",
            "attack_success",
            "attack edges per honest peer",
            {
                "average": (
                    (0, "average calm"), (0.5, "average sparse"), (1, "average distributed"),
                    (2, "average dense 2"), (4, "average dense"),
                ),
                "neighbours": (
                    (0, "neighbours calm"), (0.5, "neighbours sparse"),
                    (1, "neighbours distributed"), (2, "neighbours dense 2"),
                    (4, "neighbours dense"),
                ),
                "SybilWall": (
                    (0, "wall calm"), (0.5, "wall sparse"), (1, "wall distributed"),
                    (2, "wall dense 2"), (4, "wall dense"),
                ),
            },
        ),
        Plot(
            "The attack's success over the number of Sybils, at 40 attack edges",
            "attack_success",
            "Sybils",
            {
                "SybilWall": (
                    (1, "wall 1 sybil"), (2, "wall 2 sybils"), (10, "wall 10 sybils"),
                    (20, "wall distributed"),
                ),
            },
        ),
    ),
    deviations=(
        "digits, softmax regression and 40 honest peers in place of about 99 and larger data sets.",
        "a history sums (model received - receiver's own model before training) by default. Sums "
        "of whole models, and of their successive differences (which add up to about the latest "
        "model), make honest peers alike: `history` offers sum, latest, and updates that the "
        "sender claims.",
        "a history goes out with the model of the same round, so it is what the peer knew after "
        "the round before.",
        "Sybils draw 200 samples each from the whole training set, train from the model of their "
        "own neighbourhood and send the mean of what they have made; they pass on no histories.",
        "Krum and Multi-Krum are told the largest number of Sybils beside a peer.",
        "one Sybil with 40 attack edges is like nobody and succeeds (0.46, median of 3 seeds); two "
        "are found out as surely as twenty (0.013 and 0.017), so few-sybils, which counts the "
        "lower of one and two, is close to a tie. Without attack the price is 7.5 points of "
        "accuracy (0.780 against the mean's 0.855), since peers with like data look like Sybils.",
    ),
    small=Budget(
        seeds=1,
        scenario={"rounds": 20},
        arms=(
            "average calm", "average dense", "average distributed", "neighbours distributed",
            "wall calm", "wall dense", "wall distributed",
        ),
    ),
    full=Budget(seeds=3),
)  # fmt: skip
