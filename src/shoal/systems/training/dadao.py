"""DADAO: accelerated optimisation whose peers take gradients and gossip at random moments of their
own, with no rounds and no common clock.

Each peer's gradient clock and each edge's gossip clock is a Poisson process. Between events a
peer's six vectors follow a linear differential equation, integrated exactly when the next event
comes; a gradient moves three of them, an exchange of one vector each way the other two. The number
of gradients grows with the square root of the condition number, and that of exchanges with the
square root of two constants of the graph: how slowly it mixes, and how much its worst edge resists.

The peer program runs in virtual time and on sockets; `dadao-counted` runs the same events in a
compiled loop, beside the methods that DADAO is compared with.

Nabli and Oyallon 2023 (arXiv 2208.00779).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal.base.errors import UsageError
from shoal.kernel.peer import Cost, Peer
from shoal.lab.card import (
    Arm,
    Budget,
    Claim,
    Source,
    System,
    at_least,
    at_most,
    between,
    ratio,
)
from shoal.lab.chart import Chart
from shoal.parts.topology._gossip_rates import GossipRates, Rates, gossip_edges, gossip_rates
from shoal.parts.topology.full import Full
from shoal.rounds.workload import Workload
from shoal.systems.training import _dadao_charts as charts
from shoal.systems.training import _dadao_claims as measured
from shoal.systems.training._dadao_claims import counted
from shoal.systems.training._dadao_flow import Constants
from shoal.systems.training._dadao_peer import live, spike
from shoal.tensor import keyed
from shoal.tensor.flops import count_flops

EXPERIMENTAL = (0.1, 10.0)
"""mu and L where nobody tells them: for tasks that are not convex, where nothing is promised."""


@dataclass(frozen=True)
class DADAO:
    """Decoupled accelerated gossip; see the module's text.

    mu, smoothness: every peer's function is mu-strongly convex and L-smooth, of the worst peer;
    None = what the task says of itself (`curvature`), and 0.1 and 10 where it says nothing, which
    is experimental. rates: of the edges' clocks, all equal or those of the smallest total.
    gradient_rates: of each peer's gradient clock per unit of time, () = 1 each, which the theory
    assumes. batch_size: of drawn batches, None = all samples; with one, peers report the mean of
    their points.
    unit_s: seconds per unit of time (0 = four times a typical gradient, 0.2 s at least); peers that
    do not keep up work on as fast as they can, with the same numbers. retry_s: silence after which
    a lost half is asked for (0 = 2 units), patience_s: and after which the other end is passed over
    until it is heard (0 = 50 units). audit: record each exchange. A run of `rounds` lasts that many
    units.

    Every peer must know the graph, the seed and these settings. Breaks where an exchange is applied
    at one end only, which takes a loss that lasts beyond patience or the death of a peer for good:
    what it held of the dual sums is missing, and the others converge to another point. Raises
    UsageError for constants that no function has, and for disconnected or one-way graphs.

    >>> DADAO(mu=0.1, smoothness=1.0).rates
    'uniform'
    """

    mu: float | None = None
    smoothness: float | None = None
    rates: Rates = "uniform"
    gradient_rates: tuple[float, ...] = ()
    batch_size: int | None = None
    unit_s: float = 0.0
    retry_s: float = 0.0
    patience_s: float = 0.0
    audit: bool = True

    def __post_init__(self) -> None:
        if (self.mu is None) != (self.smoothness is None):
            raise UsageError(
                f"dadao: mu={self.mu}, smoothness={self.smoothness}; give both, or neither"
            )
        if self.mu is not None and self.smoothness is not None:
            Constants(self.mu, self.smoothness, 1.0)
        if min(self.unit_s, self.retry_s, self.patience_s) < 0:
            raise UsageError(
                f"dadao: unit_s={self.unit_s}, retry_s={self.retry_s}, patience_s="
                f"{self.patience_s}; need seconds >= 0"
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"dadao: batch_size={self.batch_size}; need at least 1, or None")

    def bind(self, workload: Workload) -> Bound:
        """The program for a task and a graph."""
        peers = workload.task.peers
        topology = workload.topology or Full(peers)
        rates = gossip_rates(peers, gossip_edges(topology), self.rates)
        told = getattr(workload.task, "curvature", EXPERIMENTAL)
        mu, smoothness = told if self.mu is None else (self.mu, self.smoothness)
        constants = Constants(float(mu), float(smoothness), rates.chi_1)  # type: ignore[arg-type]
        cost = self._cost(workload, constants)
        unit_s = self.unit_s or 4.0 * max(cost.flops / 1e8, 0.05)
        end_s = float("inf") if workload.seconds is None else workload.seconds
        until = float("inf") if workload.rounds is None else float(workload.rounds)
        until = min(until, end_s / unit_s)
        if until == float("inf"):
            raise UsageError("dadao: no horizon; a run needs one (set rounds, or seconds)")
        return Bound(
            self, workload, rates, constants, unit_s, until, end_s, self.retry_s or 2.0 * unit_s,
            self.patience_s or 50.0 * unit_s, cost,
        )  # fmt: skip

    def _cost(self, workload: Workload, constants: Constants) -> Cost:
        """What one gradient event takes at one peer's shapes."""
        start, task = workload.initial, workload.task
        state = torch.zeros((6, start.shape[-1]), dtype=torch.float64, device=start.device)
        move = torch.eye(6, dtype=torch.float64, device=start.device)
        key = keyed.key_of(workload.seed, "cost", device=start.device)
        static = (task, constants, self.batch_size, start.dtype)
        return Cost(flops=count_flops(spike, state, move, task.shard(0), key, *static))


@dataclass(frozen=True, eq=False)
class Bound:
    """DADAO with its task and graph: the program that peers run. until: in units of time."""

    settings: DADAO
    workload: Workload
    rates: GossipRates
    constants: Constants
    unit_s: float
    until: float
    end_s: float
    retry_s: float
    patience_s: float
    cost: Cost

    async def run(self, peer: Peer) -> None:
        await live(self, peer)


INVARIANTS = (measured.exchanges_count_once, measured.both_ends_apply, measured.sums_are_kept)
"""What every run keeps, whatever its faults: for fault fuzzing."""

_CYCLE = {"name": "ring"}
_GRID = {"name": "torus", "wrap": False}
_BARBELL = {"name": "from_edges", "edges": measured.barbell(16)}

SYSTEM = System(
    name="dadao",
    kind="program",
    title="Accelerated optimisation and gossip on random clocks, without rounds",
    make=DADAO,
    source=Source(
        "Nabli and Oyallon 2023",
        "DADAO: Decoupled Accelerated Decentralized Asynchronous Optimization",
        arxiv="2208.00779",
        venue="ICML 2023",
    ),
    scenario="training.quadratics",
    arms={
        "dadao": counted(),
        "condition 10": counted(condition=10.0),
        "condition 100": counted(condition=100.0),
        "condition 300": counted(condition=300.0),
        "condition 1000": counted(condition=1000.0),
        "tracking": counted("tracking"),
        "tracking 10": counted("tracking", condition=10.0),
        "tracking 100": counted("tracking", condition=100.0),
        "tracking 300": counted("tracking", condition=300.0),
        "tracking 1000": counted("tracking", condition=1000.0),
        "peers 8": counted(peers=8),
        "peers 32": counted(peers=32),
        "ssda": counted("ssda"),
        "ssda 8": counted("ssda", peers=8),
        "ssda 32": counted("ssda", peers=32),
        "star": counted(topology="star"),
        "cycle": counted(topology=_CYCLE),
        "grid": counted(topology=_GRID),
        "barbell": counted(topology=_BARBELL),
        "barbell optimal": counted(topology=_BARBELL, rates="optimal"),
        "msda": counted("msda"),
        "msda star": counted("msda", topology="star"),
        "msda cycle": counted("msda", topology=_CYCLE),
        "msda barbell": counted("msda", topology=_BARBELL),
        "adom+": counted("adom+"),
        "adom+ star": counted("adom+", topology="star"),
        "adom+ cycle": counted("adom+", topology=_CYCLE),
        "consensus star": counted("adom+ consensus", topology="star"),
        "consensus cycle": counted("adom+ consensus", topology=_CYCLE),
        "continuized": counted("continuized"),
        "gossip SGD": counted("gossip", lr=0.1),
        "slow peer": counted(slow=measured.SLOWER),
        "ssda slow peer": counted("ssda", slow=measured.SLOWER),
        "messages": Arm(set={"audit": False}),
        "messages slow": Arm(
            set={"audit": False, "gradient_rates": (1 / measured.SLOWER, *(1.0,) * 15)},
            prepare=measured.one_slow,
        ),
    },
    claims=(
        Claim(
            "linear",
            "the logarithm of the distance falls along a straight line on every graph (least R^2)",
            at_least(0.97),
            measure=measured.straightest,
            at="abstract",
        ),
        Claim(
            "rate",
            "and at the rate sqrt(mu / 2L) / 8 of the flow at least",
            at_least(1.0),
            measure=measured.slowest_rate,
        ),
        Claim(
            "condition",
            "gradients grow with the square root of the condition number (exponent)",
            between(0.35, 0.65),
            measure=measured.gradients_over_condition,
            at="abstract",
        ),
        Claim(
            "condition-tracking",
            "where those of gradient tracking grow in proportion to it",
            between(0.8, 1.2),
            measure=measured.tracking_over_condition,
        ),
        Claim(
            "peers",
            "on full graphs exchanges grow in proportion to the number of peers (exponent)",
            at_most(1.3),
            measure=measured.exchanges_over_peers,
            at="abstract",
        ),
        Claim(
            "peers-ssda",
            "where those of a synchronous method grow with its square",
            at_least(1.8),
            measure=measured.ssda_over_peers,
        ),
        Claim(
            "dense",
            "with 32 peers on a full graph it needs at most 0.7 of SSDA's exchanges",
            at_most(0.7),
            metric="exchanges",
            compare=ratio("peers 32", "ssda 32"),
        ),
        Claim(
            "primal",
            "and on full graph, star and cycle no more than ADOM+, the primal synchronous method, "
            "with or without multi-consensus (the largest ratio)",
            at_most(1.0),
            measure=measured.exchanges_over_primal,
        ),
        Claim(
            "rates",
            "the best rates on a barbell of 16 peers lower sqrt(chi_1 chi_2) to 0.3 of "
            "what equal rates give",
            at_most(0.3),
            measure=measured.root_of_optimal,
        ),
        Claim(
            "rates-exchanges",
            "and save 60% of the exchanges",
            at_most(0.4),
            metric="exchanges",
            compare=ratio("barbell optimal", "barbell"),
        ),
        Claim(
            "slow",
            "a peer that takes gradients ten times slower at most doubles the time",
            at_most(2.0),
            metric="time",
            compare=ratio("slow peer", "dadao"),
        ),
        Claim(
            "slow-ssda",
            "where it makes a synchronous method ten times slower",
            at_least(9.9),
            metric="time",
            compare=ratio("ssda slow peer", "ssda"),
        ),
        Claim(
            "slow-messages",
            "and so it is with messages, on devices of which one is ten times slower",
            at_most(2.0),
            measure=measured.arrival_with_slow_peer,
            scale="full",
        ),
    ),
    charts=(
        Chart(
            "Orders of magnitude by which the squared distance to the minimum has fallen",
            "curves",
            charts.magnitudes,
            "units of time",
            "orders of magnitude",
        ),
        Chart(
            "Gradients until a millionth of the distance, by condition number",
            "bars",
            charts.gradients_by_condition,
            "condition number",
            "gradients",
        ),
        Chart(
            "Exchanges until then, by peers of a full graph",
            "bars",
            charts.exchanges_by_peers,
            "peers",
            "exchanges",
        ),
        Chart(
            "Exchanges, by graph of 16 peers", "bars", charts.exchanges_by_graph, "", "exchanges"
        ),
        Chart(
            "Gradients, by graph of 16 peers", "bars", charts.gradients_by_graph, "", "gradients"
        ),
    ),
    deviations=(
        "quadratics with one set of axes and random centres stand for the paper's regressions: "
        "their curvature and minimum are exact, and the dual methods' gradients in closed form; "
        "l2-logistic regression is not run",
        "the best rates are found by an interior-point method along the ratio of chi_1 to chi_2, "
        "up to 300 edges, instead of by one relaxed semidefinite program",
        "dual methods (SSDA, MSDA, continuized) are reference lines: with free dual gradients they "
        "need about a tenth of DADAO's gradients at condition 30, and fewer exchanges on sparse "
        "graphs",
        "an iteration of a synchronous method lasts as long as its slowest peer's gradient, by "
        "definition; its messages are not simulated",
        "the slow peer's gradient clock is ten times slower as well, which the theory does not "
        "cover",
        "step sizes, of 1, 1/2, 1/4 and 1/10 of 1/L on seed 1000: gradient tracking arrives first "
        "with 1, gossip SGD stays nearest with 1/10; all others follow their theory",
    ),
    small=Budget(seeds=1, scenario={"rounds": 60}),
    full=Budget(seeds=3),
)
