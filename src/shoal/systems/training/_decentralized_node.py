"""One island of a decentralised flow model: its expert, and on peer 0 the router and the ensemble.

An island hears nobody while it trains. What it sends is one finished expert, again and again until
peer 0 says that it has it, so nothing is lost with a message and nothing counts twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shoal.base.errors import PeerError, WireError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Cost, Envelope, Peer
from shoal.parts.flow.ensemble import Rule
from shoal.parts.optimise.adamw import AdamW
from shoal.parts.tasks import Flow, Routing
from shoal.rounds.task import Shard, Task
from shoal.tensor import keyed, tree
from shoal.tensor.types import Key, Mask, Vector
from shoal.wire.message import Packed, message

if TYPE_CHECKING:
    from shoal.systems.training.decentralized_diffusion import Bound

COLLECTOR = PeerId(0)
LOOKS = 64
"""How often, while peer 0 waits for experts, it looks whether they are there."""


@message(checked=True)
class Checkpoint:
    """A finished expert."""

    payload: Packed


@message
class Taken:
    """Peer 0 has it. usable: False for numbers that fit no expert."""

    usable: bool


@dataclass(frozen=True)
class Training:
    """How a network is trained: steps per round, samples per step, decay of the running mean."""

    optimizer: AdamW
    steps: int
    batch_size: int
    ema: float


def learn(
    params: Vector, state: Any, mean: Vector, shard: Shard, key: Key, task: Task,
    training: Training, round: int,
) -> tuple[Vector, Any, Vector]:  # fmt: skip
    """A round of steps on own data: (parameters, optimiser's state, running mean), all [..., dim].

    The running mean begins short, since the first parameters are of no worth.
    """
    for i in range(training.steps):
        batch = task.batch(shard, keyed.fold(key, i), training.batch_size)
        gradient = task.grad(params, batch)
        params, state = training.optimizer.step(params, gradient, state, donate=i > 0)
        done = round * training.steps + i + 1
        late = 1.0 - min(training.ema, (1 + done) / (10 + done)) if training.ema else 1.0
        mean = mean.lerp_(params, late) if i else mean.lerp(params, late)
    return params, state, mean


@dataclass(frozen=True)
class Sampling:
    """How the ensemble is tried: samples, steps of the sampler, and rules, in words."""

    samples: int
    steps: int
    heun: bool
    rules: tuple[str, ...]


def judge(
    experts: Vector, present: Mask, router: Vector, key: Key, task: Flow, routing: Routing | None,
    sampling: Sampling,
) -> dict[str, Tensor]:  # fmt: skip
    """What the ensemble of experts [peers, dim] is worth under each rule: numbers by name.

    All rules begin at the same noise. `asked_*`: experts asked per sample and step of the sampler;
    `router_kl`: mean KL(p(k | noise) || share of the data) at t = 1; `router_loss`: in nats.
    """
    gone = [k for k, here in enumerate(present.tolist()) if not here]
    likely = None if routing is None else partial(routing.probabilities, router)
    whole = task.ensemble(experts, likely).without(*gone)
    rows = keyed.grid(keyed.fold(key, "noise"), sampling.samples)
    noise = keyed.normal(keyed.grid(rows, task.width)).to(experts.dtype)
    found: dict[str, float] = {}
    numbers: Mapping[str, float] = {}
    for word in sampling.rules:
        rule = Rule.of(word)
        # One expert is all there is under any rule.
        if len(experts) > 1 or not numbers:
            made, asked = whole.sample(noise, sampling.steps, rule, heun=sampling.heun, key=key)

            def velocity(x: Tensor, t: Tensor, rule: Rule = rule) -> Tensor:
                return whole.velocity(x, t, rule, keyed.grid(key, len(x)))

            numbers = {**task.quality(made, present), **task.held_out(velocity), "asked": asked}
        found |= {f"{name}_{word}": number for name, number in numbers.items()}
    if routing is not None:
        found |= _of_router(task, routing, router, noise)
        if task.posterior(noise, torch.ones_like(noise[:, 0])) is not None:
            exact = task.ensemble(experts, task.posterior).without(*gone)
            fit = task.held_out(exact.velocity)
            found |= {f"{name}_oracle": number for name, number in fit.items()}
    device = experts.device
    return {k: torch.tensor(v, dtype=torch.float64, device=device) for k, v in found.items()}


def _of_router(task: Flow, routing: Routing, router: Vector, noise: Tensor) -> dict[str, float]:
    share = routing.probabilities(router, noise, torch.ones_like(noise[:, 0])).double()
    sizes = torch.bincount(task.owner[task.owner >= 0], minlength=share.shape[1]).double()
    prior = sizes / sizes.sum()
    apart = (share * (share.clamp_min(1e-300) / prior).log()).sum(-1).mean()
    return {"router_kl": float(apart), "router_loss": float(routing.evaluate(router)["loss"])}


class Island:
    """What one peer does and keeps."""

    def __init__(self, bound: Bound, peer: Peer) -> None:
        self.bound, self.peer = bound, peer
        self.workload = bound.workload
        self.experts: dict[int, Vector] = {}
        self.heard_s = 0.0

    async def live(self) -> None:
        peer, bound, task = self.peer, self.bound, self.bound.task
        if peer.id == COLLECTOR:
            self._remember()
            peer.serve(Checkpoint, self._take)
        start = self.workload.start(peer.id)
        shard = task.shard(peer.id)
        expert = await self._train("expert", task, bound.expert, start, shard, bound.expert_cost)
        if peer.id == COLLECTOR:
            self.experts[peer.id] = expert
            await self._gather()
        else:
            await self._deliver(expert)

    async def _train(
        self, name: str, task: Task, training: Training, start: Vector, shard: Shard, cost: Cost
    ) -> Vector:
        """The running mean of the parameters after all rounds; goes on from what was kept."""
        peer, rounds = self.peer, self.bound.rounds
        state = self._kept(name, (start, training.optimizer.init(start), start))
        for round in range(int(state[1].count) // training.steps, rounds):
            if name == "expert":
                peer.enter_round(round)
            key = self.workload.there(peer.key(name, round))
            state = await peer.compute(
                learn, *state, shard, key, static=(task, training, round), cost=cost
            )
            leaves, _ = tree.flatten(state)
            await peer.store.commit({f"{name}/{i}": leaf for i, leaf in enumerate(leaves)})
            last = round == rounds - 1
            if name == "expert" and (last or (round + 1) % self.workload.report_every == 0):
                peer.record("params", state[2])
        peer.record(f"{name}_flops", cost.flops * rounds)
        return state[2]

    def _kept(self, name: str, fresh: Any) -> Any:
        leaves, structure = tree.flatten(fresh)
        kept = [self.peer.store.get(f"{name}/{i}") for i in range(len(leaves))]
        if any(leaf is None for leaf in kept):
            return fresh
        return tree.unflatten(structure, [self.workload.there(leaf) for leaf in kept])

    # Experts.

    async def _deliver(self, expert: Vector) -> None:
        peer, settings, transform = self.peer, self.bound.settings, self.workload.transform
        key = self.workload.there(peer.key("encode"))
        payload, _ = transform.encode(expert, transform.init(expert), key)
        packed = Packed(payload)
        finished = Checkpoint(packed)
        for _ in range(settings.tries):
            again_s = peer.now() + settings.retry_s
            try:
                await peer.request(COLLECTOR, finished, deadline=again_s)
                return
            except PeerError:
                await peer.sleep_until(again_s)
        peer.record("undelivered", 1.0)

    # Peer 0.

    async def _take(self, envelope: Envelope[Checkpoint]) -> Taken:
        told = envelope.message
        vector = self._opened(told.payload)
        if vector is None:
            return Taken(False)
        source = envelope.source
        if source not in self.experts:
            self.experts[source] = vector
            self.heard_s = self.peer.now()
            # Only what is kept may be called taken: its sender will not send it again.
            await self.peer.store.commit({f"from/{source}": vector})
            self.peer.record("taken", source)
        return Taken(True)

    def _opened(self, packed: Packed) -> Vector | None:
        transform, content = self.workload.transform, packed.content
        try:
            if isinstance(content, bytes | bytearray | memoryview):
                content = self.workload.there(transform.unpack(content))
            vector = transform.decode(content)  # type: ignore[arg-type]
        except WireError:
            return None
        fits = vector.shape == self.workload.initial.shape and bool(vector.isfinite().all())
        return vector if fits else None

    def _remember(self) -> None:
        for source in range(self.bound.task.peers):
            kept = self.peer.store.get(f"from/{source}")
            if kept is not None:
                self.experts[source] = self.workload.there(kept)
        if not self.experts and self.peer.store.get("expert/0") is None:
            self.peer.record("fresh", 1)

    async def _gather(self) -> None:
        """Train the router, wait for the others, and try what is there."""
        peer, bound, settings = self.peer, self.bound, self.bound.settings
        router = self.workload.initial
        if bound.routing is not None:
            key = keyed.key_of(self.workload.seed, "router", device=router.device)
            shard = bound.routing.shard(0)
            router = await self._train(
                "router", bound.routing, bound.router, bound.routing.init(key), shard,
                bound.router_cost,
            )  # fmt: skip
        self.heard_s = peer.now()
        while len(self.experts) < bound.task.peers:
            if peer.now() >= self.heard_s + settings.patience_s:
                break
            await peer.sleep_until(peer.now() + settings.patience_s / LOOKS)
        peer.record("experts", len(self.experts))
        peer.record("complete_s", self.heard_s)
        zero = torch.zeros_like(self.workload.initial)
        rows = torch.stack([self.experts.get(k, zero) for k in range(bound.task.peers)])
        present = torch.tensor(
            [k in self.experts for k in range(bound.task.peers)], device=rows.device
        )
        numbers = await peer.compute(
            judge, rows, present, router, self.workload.there(peer.key("judge")),
            static=(bound.task, bound.routing, bound.sampling), cost=self._judging(),
            batch="never",
        )  # fmt: skip
        for name, number in numbers.items():
            peer.record(name, float(number))

    def _judging(self) -> Cost:
        """What sampling takes: one expert's forward pass per sample and step, a third of a step."""
        bound, sampling = self.bound, self.bound.sampling
        each = bound.expert_cost.flops / (3 * bound.expert.steps * bound.expert.batch_size)
        turns = sampling.steps * (2 if sampling.heun else 1) * len(sampling.rules)
        return Cost(flops=each * turns * sampling.samples * len(self.experts))
