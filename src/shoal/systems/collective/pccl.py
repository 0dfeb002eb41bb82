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
from typing import Any

from shoal.base.errors import Leaving, UsageError
from shoal.base.limits import check_positive
from shoal.kernel.peer import Cost, Peer
from shoal.lab.card import Source, System
from shoal.parts.collective.master import Master
from shoal.parts.collective.quantised import Quantised
from shoal.parts.collective.ring import Ring
from shoal.parts.collective.training import InStep
from shoal.parts.optimise.adamw import AdamW
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import Optimizer
from shoal.rounds.workload import Workload
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
    trains as well. audit: the average also tells whose gradients are in it (exact numbers only).
    keep: commit the state after every step, so that a peer that was killed goes on from it.
    inner_s: what `steps` inner steps take in virtual time (0 = by counting flops); pace_s: a common
    step at most so often. heartbeat_s, timeout_s: signs of life, and silence after which a peer is
    dropped; master_timeout_s: silence of the master after which peers connect anew; patience_s: how
    long a peer waits for others, or tries to come back, before it gives up. piece_bytes: of the
    ring; direct: small tensors go straight to the owners of their chunks instead. eager: with
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
    audit: bool = False
    keep: bool = True
    inner_s: float = 0.0
    pace_s: float = 0.0
    heartbeat_s: float = 0.1
    timeout_s: float = 1.0
    master_timeout_s: float = 5.0
    patience_s: float = 20.0
    piece_bytes: int = 1 << 20
    direct: bool = True
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
            peers if self.audit else 0, self.patience_s,
        )  # fmt: skip
        if self.mode == "ddp":
            workload = replace(workload, report_every=workload.report_every * self.steps)
        ring = Ring(piece_bytes=self.piece_bytes)
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


_SETTINGS: dict[str, Any] = {}

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
    scenario="baselines.digits_tiny",
    uses={"topology": None, "exchange": None},
)
