"""AD-PSGD: asynchronous decentralised SGD in which two peers at a time average, atomically.

Each peer computes gradients on its own clock and adds them to its model when they are ready,
whatever has happened to the model meanwhile. Beside that, one half of the peers (the active ones)
keep averaging with a random neighbour of the other half: both end up in the middle between their
models. Passive peers never wait for anybody and active ones never answer, so no two can wait for
each other.

An exchange has a number, and is asked for again until it is answered: it counts once at each end
however many messages are lost, and the sum of all models changes by gradients alone.

Lian et al. 2018, algorithm 1 (arXiv 1710.06952).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from shoal.base.errors import Leaving, UsageError
from shoal.kernel.peer import Cost, Peer
from shoal.lab.card import Source, System
from shoal.parts.optimise.sgd import SGD
from shoal.parts.topology.full import Full
from shoal.rounds.workload import Workload
from shoal.systems.baselines._adpsgd_peer import Node, Offer, displacement
from shoal.tensor import keyed
from shoal.tensor.flops import count_flops
from shoal.world.record import Run
from shoal.world.topology import Topology


def active_peers(topology: Topology) -> frozenset[int]:
    """The half that asks. Every peer has a neighbour in the other half, and the edges between the
    halves connect all peers that the graph connects; a bipartite graph keeps all of its edges.

    >>> from shoal.parts.topology.ring import Ring
    >>> sorted(active_peers(Ring(6))), sorted(active_peers(Full(5)))
    ([1, 3, 5], [1, 3])
    """
    side: dict[int, int] = {}
    counts = [0, 0]
    for root in range(topology.peers):
        queue = deque([root])
        seen = {root}
        while queue:
            peer = queue.popleft()
            if peer in side:
                continue
            neighbors = topology.neighbors(peer, 0)
            known = [side[other] for other in neighbors if other in side]
            passive = len(known) - sum(known)
            # Across from most of those that are placed, so across from one at least.
            if not known or 2 * passive == len(known):
                side[peer] = int(counts[1] < counts[0]) if known else 0
            else:
                side[peer] = int(2 * passive > len(known))
            counts[side[peer]] += 1
            queue.extend(other for other in neighbors if other not in seen)
            seen.update(neighbors)
    return frozenset(peer for peer, which in side.items() if which)


@dataclass(frozen=True)
class ADPSGD:
    """Asynchronous decentralised SGD; see the module's text.

    period_s: least time between two updates of a peer (0 = four times a median update, 0.2 s at
    least); slower peers make fewer. A run of `rounds` lasts that many periods. steps: SGD steps per
    update of batches of batch_size, at rate lr. retry_s: silence after which an
    exchange is asked for again (0 = 2 periods); patience_s: and after which another neighbour is
    asked (0 = 20 periods). The half-open exchange is taken up with the next offer to that peer.

    The scenario's aggregator is not used: pairs average. Breaks where a peer dies for good between
    the two ends of an exchange: the other end's share of it is missing from the sum.

    >>> ADPSGD(lr=0.05).steps
    1
    """

    lr: float = 0.1
    steps: int = 1
    batch_size: int = 32
    period_s: float = 0.0
    retry_s: float = 0.0
    patience_s: float = 0.0
    workload: Workload | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not self.lr >= 0:
            raise UsageError(
                f"adpsgd: lr={self.lr}, steps={self.steps}, batch_size={self.batch_size}; need a "
                "rate >= 0, and at least one step and sample"
            )
        if min(self.period_s, self.retry_s, self.patience_s) < 0:
            raise UsageError(
                f"adpsgd: period_s={self.period_s}, retry_s={self.retry_s}, patience_s="
                f"{self.patience_s}; need seconds >= 0"
            )

    def bind(self, workload: Workload) -> Bound:
        """The program for a task and a graph."""
        topology = workload.topology or Full(workload.task.peers)
        start, task = workload.initial, workload.task
        static = (task, SGD(self.lr), self.steps, self.batch_size)
        key = keyed.key_of(workload.seed, "cost", device=start.device)
        cost = Cost(flops=count_flops(displacement, start, task.shard(0), key, *static))
        period_s = self.period_s or 4.0 * max(cost.flops / 1e8, 0.05)
        end_s = float("inf")
        if workload.rounds is not None:
            end_s = workload.rounds * period_s
        if workload.seconds is not None:
            end_s = min(end_s, workload.seconds)
        settings = replace(
            self, workload=workload, period_s=period_s, retry_s=self.retry_s or 2.0 * period_s,
            patience_s=self.patience_s or 20.0 * period_s,
        )  # fmt: skip
        return Bound(settings, workload, active_peers(topology), end_s, static, cost)


@dataclass(frozen=True, eq=False)
class Bound:
    """AD-PSGD with its task and graph: the program that peers run."""

    settings: ADPSGD
    workload: Workload
    active: frozenset[int]
    end_s: float
    static: tuple[Any, ...]
    cost: Cost

    async def run(self, peer: Peer) -> None:
        node = Node(self, peer)
        peer.serve(Offer, node.answer)
        try:
            async with peer.tasks() as group:
                await node.learn(group)
                await node.finish()
        except Leaving:
            return


def exchanges_count_once(run: Run) -> str | None:
    """Nobody averages for one exchange twice; where no peer lost its memory, what counted at the
    active end counted at the passive one, and without losses the other way round."""
    ends: dict[tuple[int, int], list[int]] = {}
    for row in run.series("averaged"):
        ends.setdefault((row.peer, int(dict(row.labels)["other"])), []).append(int(row.value))
    if len(run.series("fresh")) > run.peers:
        return None
    for (peer, other), numbers in ends.items():
        if len(set(numbers)) != len(numbers):
            return f"peer {peer} averaged twice for an exchange with {other}: {sorted(numbers)}"
        theirs = ends.get((other, peer), [])
        calm = not run.happenings and not any(run.dropped.values())
        if calm and sorted(theirs) != sorted(numbers):
            return f"peers {peer} and {other} averaged {len(numbers)} and {len(theirs)} times"
    return None


INVARIANTS = (exchanges_count_once,)
"""What every run keeps, whatever its faults: for fault fuzzing."""

SYSTEM = System(
    name="adpsgd",
    kind="program",
    title="Asynchronous decentralised SGD: pairs of peers average, atomically",
    make=ADPSGD,
    source=Source(
        "Lian et al. 2018",
        "Asynchronous Decentralized Parallel Stochastic Gradient Descent",
        arxiv="1710.06952",
        venue="ICML 2018",
    ),
    scenario="baselines.digits_home",
    deviations=(
        "graphs that are not bipartite lose the edges within either half, where the paper asks for "
        "a bipartite one",
        "an exchange adds half of the difference of the two models, so that a gradient that came "
        "in between is kept; without one both ends are at the middle, as in the paper",
    ),
)
