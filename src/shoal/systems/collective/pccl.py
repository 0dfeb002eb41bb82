"""PCCL: training on collectives whose members come and go, with one state at every peer.

Peer 0 keeps the group together (a master that counts votes and moves no tensors); the others hold
one training state bit for bit. A step is: work on own data, average in a ring, apply the average.
Whoever dies in the middle is dropped and the ring begins again without it; whoever waits is let in
between two steps and gets the state from a peer. The same text runs in virtual time and on real
sockets, and there a peer may be a process that is killed.

mode "ddp" averages a gradient per step; "diloco" the displacement of `steps` AdamW steps; "async"
does so while the next steps are under way, one step late.

Prime Intellect 2025 (arXiv 2505.14065); DiLoCo: Douillard et al. 2023, algorithm 1 (arXiv
2311.08105).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shoal.base.errors import Leaving, UsageError
from shoal.base.limits import check_positive
from shoal.kernel.peer import Cost, Peer
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
from shoal.parts.collective.master import Master
from shoal.parts.collective.quantised import Quantised
from shoal.parts.collective.ring import Ring
from shoal.parts.collective.training import InStep
from shoal.parts.optimise.adamw import AdamW
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import Optimizer
from shoal.rounds.workload import Workload
from shoal.systems.collective import _pccl_claims as measured
from shoal.systems.collective import _pccl_wan as wan
from shoal.systems.collective._pccl_peer import Trainer, inner_steps, one_gradient
from shoal.tensor import keyed
from shoal.tensor.flops import count_flops

MODES = ("ddp", "diloco", "async")


@dataclass(frozen=True)
class PCCL:
    """Training in step on a collective; see the module's text.

    lr, steps, batch_size, weight_decay: the inner AdamW, and how many of its steps make a common
    one (with "ddp" AdamW is the common optimiser, and `steps` of its steps count as a round).
    outer_lr, outer_momentum: the common Nesterov SGD of the others. quantise: one byte per number
    in the ring. least: peers that must be there to begin (None = all). master_works: whether peer 0
    trains as well. audit: the average also tells whose gradients are in it (not with quantise).
    keep: commit the state after every step, so that a peer that was killed goes on from it.
    inner_s: what `steps` inner steps take in virtual time (0 = by counting flops); pace_s: a common
    step at most so often. heartbeat_s, timeout_s: signs of life, and silence after which a peer is
    dropped; master_timeout_s: silence of the master after which peers connect anew; patience_s: how
    long a peer waits for others, or tries to come back, before it gives up. piece_bytes: of the
    ring; direct: small tensors go straight to the owners of their chunks instead; checked: a
    checksum on every piece, for links that may damage them. eager: with
    "async", inner steps go on from where the last ones led, although the common step is under way;
    without it they begin at parameters that do not know of them, which overshoots.

    Assumes that peer 0 lives: without it all stop until it is back.

    >>> PCCL(mode="async", steps=10).mode
    'async'
    """

    mode: str = "diloco"
    lr: float = 1e-3
    steps: int = 20
    batch_size: int = 32
    weight_decay: float = 0.01
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    quantise: bool = False
    least: int | None = None
    master_works: bool = True
    audit: bool = True
    keep: bool = True
    inner_s: float = 0.0
    pace_s: float = 0.0
    heartbeat_s: float = 0.1
    timeout_s: float = 1.0
    master_timeout_s: float = 5.0
    patience_s: float = 20.0
    piece_bytes: int = 1 << 20
    direct: bool = True
    checked: bool = True
    eager: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"pccl: mode={self.mode!r}; need one of {', '.join(MODES)}")
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError(
                f"pccl: steps={self.steps}, batch_size={self.batch_size}; need at least 1"
            )
        if not (self.inner_s >= 0 and self.pace_s >= 0):
            raise UsageError(
                f"pccl: inner_s={self.inner_s}, pace_s={self.pace_s}; need seconds >= 0"
            )
        check_positive("pccl", self, "heartbeat_s", "timeout_s", "master_timeout_s", "patience_s",
                       "piece_bytes")  # fmt: skip

    def bind(self, workload: Workload) -> Bound:
        """The program for a task: what depends on the number of peers is settled here."""
        peers = workload.task.peers
        workers = peers if self.master_works else peers - 1
        least = workers if self.least is None else self.least
        if workers < 2 or not 2 <= least <= workers:
            raise UsageError(
                f"pccl: least={least} of {workers} peers that train; need 2 or more, at most all"
            )
        if workload.rounds is None:
            raise UsageError("pccl: no rounds; a run needs a number of common steps (set rounds)")
        inner = AdamW(self.lr, weight_decay=self.weight_decay)
        momentum = self.outer_momentum
        outer: Optimizer = SGD(self.outer_lr, momentum=momentum, nesterov=momentum > 0)
        steps, own = workload.rounds, self.steps
        if self.mode == "ddp":
            outer, steps, own = inner, workload.rounds * self.steps, 0
        late = self.mode == "async"
        in_step = InStep(
            steps, least, late, late and self.eager, Quantised() if self.quantise else None,
            0 if self.quantise or not self.audit else peers, self.patience_s,
        )  # fmt: skip
        if self.mode == "ddp":
            workload = replace(workload, report_every=workload.report_every * self.steps)
        ring = Ring(piece_bytes=self.piece_bytes, checked=self.checked)
        if not self.direct:
            ring = replace(ring, direct_bytes=0)
        cost = self._cost(workload, inner, own)
        return Bound(self, workload, in_step, ring, inner, outer, own, cost)

    def _cost(self, workload: Workload, inner: Optimizer, own: int) -> Cost:
        if self.inner_s:
            return Cost(seconds=self.inner_s if own else self.inner_s / self.steps)
        params, task = workload.initial, workload.task
        key = keyed.key_of(workload.seed, "cost", device=params.device)
        shard = task.shard(0)
        if not own:
            return Cost(flops=count_flops(one_gradient, params, shard, key, task, self.batch_size))
        state = inner.init(params)
        return Cost(
            flops=count_flops(
                inner_steps, params, state, shard, key, task, inner, own, self.batch_size
            )
        )


@dataclass(frozen=True, eq=False)
class Bound:
    """PCCL with its task: the program that peers run."""

    settings: PCCL
    workload: Workload
    in_step: InStep
    ring: Ring
    inner: Optimizer
    outer: Optimizer
    inner_steps: int
    cost: Cost

    async def run(self, peer: Peer) -> None:
        settings = self.settings
        async with peer.tasks() as tasks:
            if peer.id == 0:
                master = Master(
                    settings.heartbeat_s, settings.timeout_s, diverged_s=4 * settings.timeout_s,
                    linger_s=max(2.0, 2 * settings.timeout_s),
                )  # fmt: skip
                tasks.start(master.run(peer))
            if peer.id or settings.master_works:
                try:
                    await Trainer(self, peer).live()
                except Leaving:
                    return


INVARIANTS = (
    measured.one_state_after_each_step,
    measured.everybody_counts_once,
    measured.who_ends_together_ends_equal,
)
"""What every run keeps, whatever its faults: for fault fuzzing."""

_SLOW = {
    "inner_s": 10.0, "master_works": False, "heartbeat_s": 1.0, "timeout_s": 6.0,
    "master_timeout_s": 30.0, "keep": False, "direct": False, "audit": False,
}  # fmt: skip
_NARROW = {
    "links": {"name": "links", "latency_s": 0.005, "slow_pairs": 1.0, "slow_bytes_per_s": 6.8e3},
}  # fmt: skip
"""Every directed pair carries 6.8 kB/s, so that a ring over 4,810 numbers takes 5 s."""


SYSTEM = System(
    name="pccl",
    kind="program",
    title="Training on collectives whose members come and go, bit for bit in step",
    make=PCCL,
    source=Source(
        "Keiblinger et al. 2025",
        "Prime Collective Communications Library - Technical Report",
        arxiv="2505.14065",
    ),
    scenario="collective.digits",
    uses={"topology": None, "exchange": None},
    arms={
        "ddp": Arm(set={**_SLOW, "mode": "ddp", "direct": True}, scenario=_NARROW),
        "diloco": Arm(set=_SLOW, scenario=_NARROW),
        "async": Arm(set={**_SLOW, "mode": "async"}, scenario=_NARROW),
        "async_plain": Arm(
            set={**_SLOW, "mode": "async", "eager": False}, scenario=_NARROW
        ),
        "u8": Arm(set={**_SLOW, "quantise": True}, scenario=_NARROW),
        "wan_1": Arm(
            system="wan-ring", scenario={"links.connections": 1}, prepare=wan.three_regions
        ),
        "wan_2": Arm(
            system="wan-ring", scenario={"links.connections": 2}, prepare=wan.three_regions
        ),
        "wan_4": Arm(
            system="wan-ring", scenario={"links.connections": 4}, prepare=wan.three_regions
        ),
        "wan_8": Arm(
            system="wan-ring", scenario={"links.connections": 8}, prepare=wan.three_regions
        ),
        "wan_16": Arm(
            system="wan-ring", set={"draws": 8}, scenario={"links.connections": 16},
            prepare=wan.three_regions,
        ),
    },
    claims=(
        Claim(
            "pool_gain",
            "On every pair 140 ms apart that is not capped 16 connections carry at least 8 times "
            "what one does",
            holds=at_least(8.0), measure=wan.pool_gain, statistic="min", at="section 4",
        ),
        Claim(
            "pool_rate",
            "Every pair carries min(P W / RTT, its cap, the link) within 10%, as peers measure it",
            holds=at_most(0.1), measure=wan.rate_error, statistic="max",
        ),
        Claim(
            "tour_time",
            "With 16 connections the slowest edge of the cheapest tour takes at most 0.7 of that "
            "of the mean random ring",
            holds=at_most(0.7), measure=wan.tour_time_pool, statistic="max", at="section 3",
        ),
        Claim(
            "tour_time_single", "With one connection too, where a 90 ms link is unavoidable",
            holds=at_most(0.7), measure=wan.tour_time_single, statistic="max", at="section 3",
        ),
        Claim(
            "tour_cost", "Up to 8 peers the tour costs what the cheapest of all orders does",
            holds=at_most(1e-9), measure=wan.tour_excess, statistic="max", at="section 3",
        ),
        Claim(
            "reduce_time",
            "An all-reduce of 2 MB in the chosen order takes at most 0.7 of the mean of 8 random "
            "orders, votes included",
            holds=at_most(0.7), measure=wan.reduce_time, statistic="max",
        ),
        Claim(
            "bytes_diloco", "DiLoCo sends 1/20 of what averaging every gradient does, within 5%",
            holds=at_most(1.05 / 20), metric="payload_bytes", compare=ratio("diloco", "ddp"),
            at="section 5",
        ),
        Claim(
            "bytes_u8", "One byte per number sends 3.8 times less than four",
            holds=at_least(3.8), metric="payload_bytes", compare=ratio("diloco", "u8"),
            at="section 2",
        ),
        Claim(
            "accuracy_diloco", "DiLoCo is within 2 points of averaging every gradient",
            holds=at_least(-0.02), metric="accuracy", compare=difference("diloco", "ddp"),
        ),
        Claim(
            "accuracy_u8", "And so it is with one byte per number",
            holds=at_least(-0.02), metric="accuracy", compare=difference("u8", "ddp"),
        ),
        Claim(
            "accuracy_async", "And one step late, when work goes on from its own result",
            holds=at_least(-0.02), metric="accuracy", compare=difference("async", "ddp"),
            scale="full",
        ),
        Claim(
            "wall_sync", "A ring that takes half of the work makes it at least 1.4 times as long",
            holds=at_least(1.4), measure=measured.wall_sync, at="section 5",
        ),
        Claim(
            "wall_async", "One step late it takes at most 1.05 times the work alone",
            holds=at_most(1.05), measure=measured.wall_async, scale="full", at="section 5",
        ),
        Claim(
            "one_state", "After every step all peers hold the same bits, in all forms",
            holds=at_least(1.0), measure=measured.one_state, statistic="min", at="section 2",
        ),
    ),
    plots=(
        Plot(
            "What a directed pair carries, by connections", "throughput_mbit", "connections",
            {
                "mean over all directed pairs": (
                    (1, "wan_1"), (2, "wan_2"), (4, "wan_4"), (8, "wan_8"), (16, "wan_16"),
                ),
            },
        ),
    ),
    deviations=(
        "digits and an MLP of 4,810 parameters on links of 6.8 kB/s, where a ring takes half of 20 "
        "inner steps, instead of language models: ratios of times and bytes are what counts",
        "a pool of connections is a rate, min(P W / RTT, cap, link): every message is spread over "
        "all connections, where PCCL gives each operation one of them",
        "DiLoCo one step late goes on from each peer's own result (eager updates, arXiv "
        "2502.12996); starting from parameters that do not know of it, as the published loop "
        "does, overshoots with outer momentum 0.9 (arm async_plain)",
        "the ring is reordered at once by the exact tour up to 12 peers (8 there) and by local "
        "search above; the search that follows in the background is exact up to 20 peers, else "
        "iterated local search (segment exchanges and reversals, perturbed by double bridges) for "
        "at most 30 s, without tabu lists and ant colonies; it works in slices of some 10 ms "
        "between the master's other duties",
        "every call of optimize_topology measures all links of each group anew, not only missing "
        "ones: what the search found is adopted only where it is better by the new rates",
        "bytes are those of the tensors, scales of the bytes included; headers are counted in "
        "bytes_sent",
        "small tensors go straight to the owners of their chunks by default (direct=False, as in "
        "all arms but ddp, restores the ring; as many bytes, equal bits)",
    ),
    small=Budget(seeds=1, scenario={"rounds": 12}),
    full=Budget(seeds=3),
)  # fmt: skip
