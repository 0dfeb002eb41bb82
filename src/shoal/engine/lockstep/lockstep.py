"""All peers of all seeds as one tensor: a round is a few calls on `[seeds * peers, dim]`.

Rows of different seeds never meet: they are worlds of their own that share the arithmetic. Times
are tensors too, so faults, loss and deadlines give the same deliveries as the event engine. One
thing is simpler here: a peer that comes back while a round is under way goes on with the next one
(`Run.settings["behind"]` counts those), where a program would repeat the round for itself.

What grows with the model (states, payloads, samples) lives where the task's tensors do. Clocks,
masks and who hears whom are small and decide what happens next, so they stay on the processor and
go over to the device once a round, without waiting for it; names that end in `_there` are theirs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.base.stopwatch import Stopwatch
from shoal.engine.executor import Executor, Local
from shoal.engine.lockstep.checkpoint import Checkpoint
from shoal.engine.lockstep.traffic import Slots
from shoal.engine.lockstep.world import World
from shoal.rounds import method as phases
from shoal.rounds.adapter import Model, Update
from shoal.rounds.adversary import Sides, craft
from shoal.rounds.attack import Knowledge
from shoal.rounds.measure import Measure
from shoal.rounds.method import Method, Wave
from shoal.rounds.strategy import Heard
from shoal.tensor import keyed, tree
from shoal.tensor.memory import kept_memory
from shoal.tensor.threads import one_thread
from shoal.wire.codec import size_of
from shoal.wire.message import Packed
from shoal.world.network import Network
from shoal.world.record import Run, digest_of


@dataclass(frozen=True)
class LockstepSettings:
    """How the engine works.

    chunk_bytes: most bytes of parameters that one call works on; bounds memory, and never depends
    on how much happens to be free. horizon_s: no round begins at or after this virtual time; the
    rounds under way are finished.
    """

    chunk_bytes: int = 1 << 26
    horizon_s: float = math.inf

    def __post_init__(self) -> None:
        if self.chunk_bytes < 1:
            raise UsageError(f"chunk_bytes={self.chunk_bytes}; need a positive number")
        if not self.horizon_s > 0:
            raise UsageError(f"horizon_s={self.horizon_s}; need a positive number of seconds")


def run_lockstep(
    methods: Sequence[Method], networks: Sequence[Network], *,
    settings: LockstepSettings | None = None, measures: Sequence[Measure] | None = None,
    executor: Executor | None = None, progress: Callable[[int], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[Run]:  # fmt: skip
    """Run one method per seed, all seeds together; one `Run` each, in order.

    The methods must be equal but for seed, task and exchange, and their tasks must be able to
    share a table (see `Task.joined`): the first method's strategy, aggregator and transform serve
    all. With a `checkpoint` the rounds go on where an earlier process was killed, to the same bits.
    """
    if any(network.links.windowed for network in networks):
        raise UsageError(
            "lockstep: links with windows or slow pairs, on which messages of different rounds "
            "wait for each other (use engine='event')"
        )
    with one_thread(), kept_memory():
        return Lockstep(
            methods, networks, settings or LockstepSettings(), measures, executor or Local()
        ).run(progress, checkpoint)


@dataclass(frozen=True)
class _Work:
    """Local work of some rows."""

    state: Any
    codec: Any
    size_bytes: Tensor
    sent: Tensor
    weight: Tensor | None
    extra: Mapping[str, Tensor]


def _work(
    state: Any, received: Tensor | None, given: Mapping[str, Tensor], codec: Any, shard: Any,
    keys: Tensor, method: Method, round: int,
) -> _Work:  # fmt: skip
    if received is None:
        done = phases.work(state, codec, shard, keys, method, round)
    else:
        done = phases.adopt_and_work(state, received, given, codec, shard, keys, method, round)
    state, codec, payload, sent, weight, extra = done
    # Receivers see `sent`, so only the payload's size is needed: lockstep never packs.
    return _Work(state, codec, payload.size_bytes(), sent, weight, dict(extra))


class _Stub:
    """A payload of no bytes: what a frame takes beside its payload."""

    def byte_count(self) -> int:
        return 0


class Lockstep:
    """One execution; see `run_lockstep`."""

    def __init__(
        self, methods: Sequence[Method], networks: Sequence[Network], settings: LockstepSettings,
        measures: Sequence[Measure] | None, executor: Executor,
    ) -> None:  # fmt: skip
        if not methods or len(methods) != len(networks):
            raise UsageError(f"lockstep: {len(methods)} methods for {len(networks)} networks")
        self.first = first = methods[0]
        if len(methods) > 1 and settings.horizon_s < math.inf:
            raise UsageError(
                "lockstep: seeds reach a horizon in different rounds (run them one by one)"
            )
        if len({(m.rounds, m.exchange.hub, m.peers) for m in methods}) > 1:
            raise UsageError(
                "lockstep: seeds that run together must have equal peers, rounds and hub (run them "
                "one by one)"
            )
        found = measures or [None] * len(methods)
        self.worlds = [
            World(m, n, measure, i * first.peers)
            for i, (m, n, measure) in enumerate(zip(methods, networks, found, strict=True))
        ]
        self.settings = settings
        self.executor = executor
        self.shared = first
        if len(methods) > 1:
            joined = first.task.joined([m.task for m in methods])
            self.shared = replace(first, task=joined, worlds=len(methods))
        self.total = first.peers * len(methods)
        self.hub = first.exchange.hub
        self.hub_rows = torch.tensor([w.offset + (self.hub or 0) for w in self.worlds])
        initial = torch.stack([m.initial for m in methods])
        self.device = initial.device
        self.hubs_there = self._there(self.hub_rows)
        self.keys_there = self._there(torch.stack([w.key for w in self.worlds])).unsqueeze(-1)
        self.peers_there = torch.arange(first.peers, device=self.device)
        if first.independent:
            everyone = torch.stack([m.start(peer) for m in methods for peer in range(m.peers)])
        else:
            everyone = initial.repeat_interleave(first.peers, 0)
        self.state = first.strategy.init(everyone)
        self.codec = first.transform.init(everyone)
        self.hub_state = None
        if self.hub is not None:
            self.hub_state = first.strategy.init(everyone[self.hubs_there])
        self.given: Mapping[str, Tensor] = {}
        self.adopted = everyone
        restarts = any(f.until is not None for n in networks for f in n.faults)
        self.fresh = (self.state, self.codec, self.hub_state) if restarts else None
        self.saved = self.fresh
        self.everyone = self.shared.task.shard(torch.arange(self.total, device=self.device))
        self.hubs = None if self.hub is None else self.shared.task.shard(self.hubs_there)
        self.shards = self._shards(methods)
        self._meshes: dict[int, _Mesh] = {}
        mixer = getattr(first.strategy, "mixer", None)
        self.own_mix = None if mixer is None else mixer(self.shared.task.spec)
        """what a strategy's own combining is, where a product can do it"""

    def _there(self, tensor: Tensor) -> Tensor:
        """A small tensor of the processor's on the device; nobody waits for it to arrive."""
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)

    def _shards(self, methods: Sequence[Method]) -> list[tuple[Tensor, Any]]:
        """Groups of rows whose shards have one structure: (rows, stacked shards there)."""
        task, attack, shard = self.shared.task, self.first.attack, self.everyone
        every = torch.arange(self.total)
        if attack is None or not any(m.byzantine for m in methods):
            return [(every, shard)]
        byzantine = [torch.tensor(m.byzantine, dtype=torch.int64) for m in methods]
        rows = torch.cat([b + w.offset for b, w in zip(byzantine, self.worlds, strict=True)])
        keys = torch.cat(
            [
                keyed.fold(keyed.key_of(m.seed, "poison"), b)
                for m, b in zip(methods, byzantine, strict=True)
            ]
        )
        poisoned = attack.poison(task, self._select(shard, rows), self._there(keys))
        honest = torch.ones_like(every, dtype=torch.bool)
        honest[rows] = False
        kept = honest.nonzero().flatten()
        return [(kept, self._select(shard, kept)), (rows, poisoned)]

    def _select(self, there: Any, rows: Tensor) -> Any:
        """Some rows of a tree on the device."""
        return tree.select(there, self._there(rows))

    def run(
        self, progress: Callable[[int], None] | None, checkpoint: Checkpoint | None = None
    ) -> list[Run]:
        begin, watch = (0, Stopwatch()) if checkpoint is None else checkpoint.resume(self)
        if begin and progress is not None:
            progress(begin)
        for round in range(begin, self.first.rounds):
            if all(world.earliest_s() >= self.settings.horizon_s for world in self.worlds):
                break
            self._round(round)
            if checkpoint is not None and round + 1 < self.first.rounds:
                checkpoint.offer(self, round + 1, watch)
            if progress is not None:
                progress(round + 1)
        return [self._finish(world, watch) for world in self.worlds]

    def _finish(self, world: World, watch: Stopwatch) -> Run:
        world.end()
        run = world.run
        run.virtual_s = world.ended_s
        run.happenings = world.timeline.happenings(run.virtual_s)
        run.bytes_sent = world.bytes_sent.tolist()
        run.bytes_received = world.bytes_received.tolist()
        params = self._params()[world.rows].cpu()
        run.final = dict(enumerate(params))
        run.state_digest = digest_of(run.final)
        run.settings = {**asdict(self.settings), "margin": world.margin, "behind": world.behind}
        if world.measure is not None:
            run.rows.extend(world.measure.rows())
        run.wall_s, run.cpu_s = watch.wall_s / len(self.worlds), watch.cpu_s / len(self.worlds)
        return run

    def _params(self) -> Tensor:
        if self.hub is None:
            return self.first.strategy.params(self.state)
        hub = self.first.strategy.params(self.hub_state)
        return self.adopted.index_copy(0, self.hubs_there, hub)

    # One round.

    def _round(self, round: int) -> None:
        worlds = self.worlds
        for world in worlds:
            world.begin(round)
            self._renew(world)
        # Every peer's key as its own program would make it: [seeds, peers].
        keys = keyed.fold(self.keys_there, self.peers_there, "round", round).flatten()
        received = self._down(round) if self.hub is not None else None
        on = torch.cat([w.on for w in worlds])
        work = self._work(on, keys, round, received)
        current, extra, codec, size = work.sent, work.extra, work.codec, work.size_bytes
        waves = [w.method.waves(round) for w in worlds]
        hops = len(waves[0])
        for world in worlds:
            world.work()
        heard = Heard(current, self._there(on.to(torch.int64)), extra)
        for hop in range(hops):
            if hop:
                payload, codec, current = phases.encode(current, codec, keys, self.shared, hop)
                size = payload.size_bytes()
            size = size.cpu()
            outgoing, special = self._attacked(current, codec, keys, round, hop)
            slots = [w.slots(hop, wave[hop]) for w, wave in zip(worlds, waves, strict=True)]
            told = self._told(slots, work.state, keys, round) if self.shared.addresses else {}
            everything = {**extra, **{name: value[:, 0] for name, value in told.items()}}
            frame = size_of(_update(round, hop, work.weight, everything)) + ((size + 7) & ~7)
            masks = [
                w.exchange(hop, hops, s, frame[w.rows]) for w, s in zip(worlds, slots, strict=True)
            ]
            mesh = self._mesh(hop, slots, masks, [wave[hop] for wave in waves])
            heard = self._combine(
                mesh, current, outgoing, special, work, extra, told, keys, round,
                last=hop == hops - 1,
            )  # fmt: skip
            current, extra = heard.vector, heard.extra
        self._conclude(work, codec, heard, keys, round)
        telling = [world for world in worlds if world.method.reports(round)]
        if not telling:
            return
        numbers = {} if self.hub is not None else phases.report(self.state, self.shared)
        for world in telling:
            world.mark()
            if world.measure is not None:
                times, present = self._reporting(world)
                world.measure.stacked(round, times, present, self._params()[world.rows])
            world.report(round, numbers)

    def _mesh(self, hop: int, slots: list[Slots], masks: list[Tensor], waves: list[Wave]) -> _Mesh:
        """The wave on stacked rows, kept while the same peers hear the same ones."""
        mesh = self._meshes.get(hop)
        if mesh is None or not mesh.serves(slots, waves):
            mesh = self._meshes[hop] = _Mesh(self, slots, waves)
        return mesh.with_masks(self, masks)

    def _reporting(self, world: World) -> tuple[Tensor, Tensor]:
        """(when, whether) each peer reports its parameters for this round."""
        if self.hub is None:
            return world.clock, world.done
        times, present = world.received_s.clone(), world.on.clone()
        times[self.hub] = world.clock[self.hub]
        present[self.hub] = world.led
        return times, present

    def _renew(self, world: World) -> None:
        """Peers that start again take the state of their last checkpoint, or a fresh one."""
        for peer, kept in world.reset:
            assert self.saved is not None
            assert self.fresh is not None
            source = self.saved if kept and self.first.checkpoint_every else self.fresh
            row = self._there(torch.tensor([peer + world.offset]))
            self.state = _copied(self.state, source[0], row)
            self.codec = _copied(self.codec, source[1], row)
            if peer == self.hub:
                which = self._there(torch.tensor([self.worlds.index(world)]))
                self.hub_state = _copied(self.hub_state, source[2], which)
        world.reset.clear()

    def _down(self, round: int) -> Tensor:
        """The hub's parameters go to the active clients: [rows, dim] as each holds them now."""
        params = self.first.strategy.params(self.hub_state)
        given = phases.down(self.hub_state, self.shared)
        size = size_of(Model(round, params[0], {name: value[0] for name, value in given.items()}))
        for world in self.worlds:
            world.lead(round, size)
        on = torch.cat([w.on for w in self.worlds])
        self.given = {name: self._for_clients(value) for name, value in given.items()}
        if bool(on.all()):
            self.adopted = self._for_clients(params)
        else:
            rows = self._there(on.nonzero().flatten())
            self.adopted = self.adopted.index_copy(0, rows, params[rows // self.first.peers])
        return self.adopted

    def _for_clients(self, value: Tensor) -> Tensor:
        """A row for each peer of what the hubs [worlds, *] give."""
        # In one world everybody holds the same: a view spares a copy for each.
        if len(self.worlds) == 1:
            return value.expand(self.total, *value.shape[1:])
        return value.repeat_interleave(self.first.peers, 0)

    def _work(self, on: Tensor, keys: Tensor, round: int, received: Tensor | None) -> _Work:
        """Local work of the rows that take part; the other rows keep what they had."""
        groups: list[tuple[Tensor, Any]] = []
        for rows, shard in self.shards:
            inside = on[rows].nonzero().flatten()
            if len(inside) == 0:
                continue
            whole = len(inside) == len(rows)
            mine = shard if whole else self._select(shard, inside)
            groups.append((rows if whole else rows[inside], mine))
        if not groups:
            none = torch.zeros_like(on, dtype=torch.int64)
            return _Work(self.state, self.codec, none, self._params(), None, {})
        order = [rows for rows, _ in groups]
        rows = torch.cat(order)
        joined = _Joined(len(rows))
        for some, mine in groups:
            for piece in self._chunks(some, mine, keys, round, received):
                joined.take(piece)
        done: _Work = joined.whole
        if len(rows) == self.total:
            if len(order) == 1:
                return done
            back = torch.argsort(rows)
            back_there = self._there(back)
            return tree.map_tree(lambda leaf: leaf[back if leaf.is_cpu else back_there], done)
        there = self._there(rows)
        base = _Work(
            self.state, self.codec, done.size_bytes.new_zeros(self.total), self._params(),
            None if done.weight is None else done.weight.new_zeros(self.total),
            {n: v.new_zeros((self.total, *v.shape[1:])) for n, v in done.extra.items()},
        )  # fmt: skip
        return tree.merge_trees(
            lambda pair: pair[0].index_copy(0, rows if pair[0].is_cpu else there, pair[1]),
            [base, done],
        )

    def _chunks(
        self, rows: Tensor, shard: Any, keys: Tensor, round: int, received: Tensor | None
    ) -> Iterator[_Work]:
        """One group of rows, in parts that fit the memory bound and keep every worker busy."""
        most = max(1, self.settings.chunk_bytes // (self.shared.task.spec.dim * 4))
        if self.executor.workers > 1:
            most = min(most, -(-len(rows) // self.executor.workers))
        every = len(rows) == self.total
        batches = []
        for i in range(0, len(rows), most):
            part = slice(i, min(i + most, len(rows)))
            at: Any = part if every else self._there(rows[part])
            batches.append(
                (
                    tree.select(self.state, at), None if received is None else received[at],
                    tree.select(self.given, at), tree.select(self.codec, at),
                    tree.select(shard, part), keys[at], self.shared, round,
                )
            )  # fmt: skip
        # One after the other where they run here, so that only one lives beside what they make.
        at_once = len(batches) if self.executor.workers > 1 else 1
        for i in range(0, len(batches), at_once):
            yield from self.executor.run(_work, batches[i : i + at_once])

    def _attacked(
        self, current: Tensor, codec: Any, keys: Tensor, round: int, hop: int
    ) -> tuple[Tensor, list[_Lies]]:
        """What receivers see [rows, dim], and what an equivocating attack tells each of them."""
        attack = self.first.attack
        if attack is None or not any(w.method.byzantine for w in self.worlds):
            return current, []
        outgoing = current.clone()
        special: list[_Lies] = []
        # Worlds with as many peers on each side search for their attack together.
        groups: dict[tuple[int, int], list[tuple[World, Tensor, Tensor]]] = {}
        for world in self.worlds:
            honest, byzantine = world.sides()
            if len(byzantine):
                alike = groups.setdefault((len(honest), len(byzantine)), [])
                alike.append((world, honest, byzantine))
        for (honest_count, _), group in groups.items():
            fair = torch.stack([honest + world.offset for world, honest, _ in group])
            liars = torch.stack([byzantine + world.offset for world, _, byzantine in group])
            rows = self._there(liars)
            made = current[rows]
            if honest_count or attack.knowledge is Knowledge.OWN:
                methods = [world.method for world, *_ in group]
                sides = [Sides(tuple(h.tolist()), tuple(b.tolist())) for _, h, b in group]
                made = craft(methods, round, hop, sides, current[self._there(fair)], made)
            state, mine = tree.select(codec, rows), keys[rows]
            if made.dim() == 4:
                receivers = made.shape[1]
                state = tree.map_tree(
                    lambda leaf, n=receivers: leaf.unsqueeze(1).expand(
                        leaf.shape[0], n, *leaf.shape[1:]
                    ),
                    state,
                )
                mine = mine.unsqueeze(1).expand(-1, receivers, -1)
            _, _, seen = phases.encode(made, state, mine, self.shared, hop)
            if seen.dim() == 4:
                lies = zip(fair, liars, seen, strict=True)
                special.extend(_Lies(*each) for each in lies)
                seen = seen[:, 0]
            outgoing[rows] = seen
        return outgoing, special

    def _combine(
        self, mesh: _Mesh, current: Tensor, outgoing: Tensor, special: list[_Lies],
        work: _Work, extra: Mapping[str, Tensor], told: Mapping[str, Tensor], keys: Tensor,
        round: int, *, last: bool,
    ) -> Heard:  # fmt: skip
        """phases.combine for all receivers; rows that receive nothing keep their own vector.

        In the last hop to hubs the result has a row for each hub: nobody asks for the others.
        """
        taught, weight = None, work.weight
        if weight is not None:
            taught = torch.cat((weight[mesh.receiver].unsqueeze(-1), weight[mesh.source]), -1)
            taught = taught.to(torch.float64)
        mask, share = phases.weights_of(mesh.mask, mesh.mixing, taught, self.shared.pushes)
        hubs = last and mesh.to_hubs
        if last and self.shared.combines:
            everyone = len(mesh.receiver) == len(current)
            if self.own_mix is not None and outgoing is current and everyone:
                matrix = _matrix(mesh, phases.shares(mask, share), self.total)
                mixed = self.own_mix(matrix, current, current)
                return Heard(mixed, mask.sum(-1), {})
            return self._own_combine(
                mesh, mask, share, current, outgoing, special, work, extra, told, keys, round
            )
        vector = self._aggregate(mesh, mask, share, current, outgoing, special)
        portion = phases.shares(mask, share)
        combined = {}
        for name, value in extra.items():
            rows = torch.cat((mesh.receiver.unsqueeze(-1), mesh.source), -1)
            mixed = (value[rows] * _aligned(portion, value[rows])).sum(1)
            combined[name] = mixed if hubs else _placed(value, mesh.receiver, mixed)
        if hubs:
            return Heard(vector, mask.sum(-1), combined)
        count = mesh.source.new_ones(self.total).index_copy(0, mesh.receiver, mask.sum(-1))
        return Heard(_placed(current, mesh.receiver, vector), count, combined)

    def _aggregate(
        self, mesh: _Mesh, mask: Tensor, share: Tensor | None, current: Tensor, outgoing: Tensor,
        special: list[_Lies],
    ) -> Tensor:  # fmt: skip
        """[receivers, dim] by one product for linear rules, else by gathered stacks in chunks."""
        rule = self.first.aggregator
        mix = getattr(rule, "mix", None)
        if mix is not None and outgoing is current:
            weights = mask.to(torch.float64) if share is None else share
            everyone = len(mesh.receiver) == len(current)
            own = current if everyone else current[mesh.receiver]
            mixed = mix(_matrix(mesh, weights, self.total), current, own)
            heard = (weights > 0).any(-1, keepdim=True)
            # Looking spares a copy here; on a device it would cost a wait.
            spared = heard.is_cpu and bool(heard.all())
            return mixed if spared else torch.where(heard, mixed, own)
        among = getattr(rule, "among", None)
        if among is not None and share is None and not special and self._dense(mesh):
            return self._among(mesh, mask, current, outgoing, among)
        every = torch.arange(len(mesh.receiver))
        return self._gathered(mesh, every, mask, share, current, outgoing, special)

    def _dense(self, mesh: _Mesh) -> bool:
        """Whether each world is so dense that all receivers at once cost less than gathering."""
        peers = self.first.peers
        return len(mesh.receiver) == self.total and 2 * mesh.source.shape[1] > peers

    def _among(
        self, mesh: _Mesh, mask: Tensor, current: Tensor, outgoing: Tensor,
        among: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        """All receivers of a world in one call of the rule, without gathering their stacks."""
        worlds, peers = len(self.worlds), self.first.peers
        # Receivers are all rows in order. Padding adds nothing to the count of the row it names.
        columns = torch.cat((mesh.receiver.unsqueeze(-1), mesh.source), -1) % peers
        count = torch.zeros(self.total, peers, dtype=torch.uint8, device=self.device)
        heard = count.scatter_add_(1, columns, mask.to(torch.uint8)) > 0
        x = outgoing.view(worlds, peers, -1)
        made = among(x, heard.view(worlds, peers, peers)).reshape(self.total, -1)
        if outgoing is current:
            return made
        # Byzantine peers hear their own honest vector, whatever they told the others.
        bad = torch.cat(
            [torch.tensor(w.method.byzantine, dtype=torch.int64) + w.offset for w in self.worlds]
        )
        own = self._gathered(mesh, bad, mask, None, current, outgoing, [])
        return made.index_copy(0, self._there(bad), own)

    def _gathered(
        self, mesh: _Mesh, places: Tensor, mask: Tensor, share: Tensor | None, current: Tensor,
        outgoing: Tensor, special: list[_Lies],
    ) -> Tensor:  # fmt: skip
        """The rule on the stacks [receivers, k + 1, dim] of some receivers, in chunks."""
        results = []
        for part, x in self._stacks(mesh, places, current, outgoing, special):
            weights = None if share is None else share[part]
            made = self.first.aggregator(x, mask=mask[part], weight=weights, center=x[:, 0])
            results.append(made)
        return torch.cat(results)

    def _stacks(
        self, mesh: _Mesh, places: Tensor, current: Tensor, outgoing: Tensor, special: list[_Lies]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(some receivers' places there, what they have in hand [receivers, k + 1, dim])."""
        slots = mesh.source.shape[-1] + 1
        step = max(1, self.settings.chunk_bytes // (4 * slots * current.shape[-1]))
        for here in places.split(step):
            part = self._there(here)
            receiver, source = mesh.receiver[part], mesh.source[part]
            x = outgoing[torch.cat((receiver.unsqueeze(-1), source), -1)]
            x[:, 0] = current[receiver]
            for lies in special:
                receiver_row, slot, told, liar = lies.places(mesh, here)
                x[self._there(receiver_row), self._there(slot)] = lies.vectors[
                    self._there(told), self._there(liar)
                ]
            yield part, x

    def _own_combine(
        self, mesh: _Mesh, mask: Tensor, share: Tensor | None, current: Tensor, outgoing: Tensor,
        special: list[_Lies], work: _Work, extra: Mapping[str, Tensor], told: Mapping[str, Tensor],
        keys: Tensor, round: int,
    ) -> Heard:  # fmt: skip
        """strategy.combine for all receivers: a row for each peer, or for each hub."""
        every = torch.arange(len(mesh.receiver))
        pieces = []
        for part, x in self._stacks(mesh, every, current, outgoing, special):
            receiver = mesh.receiver[part]
            columns = torch.cat((receiver.unsqueeze(-1), mesh.source[part]), -1)
            if self.hub is None:
                state, shard = tree.select(work.state, receiver), self.everyone
                shard = tree.select(shard, receiver)
            else:
                state, shard = tree.select(self.hub_state, part), tree.select(self.hubs, part)
            pieces.append(
                phases.own_combine(
                    state, x, mask[part], None if share is None else share[part],
                    {
                        **{name: value[columns] for name, value in extra.items()},
                        **self._by_source(mesh, part, columns, told),
                    },
                    work.sent[receiver], shard, keys[receiver], self.shared, round,
                )
            )  # fmt: skip
        heard: Heard = tree.merge_trees(lambda several: torch.cat(several), pieces)
        if self.hub is not None or len(mesh.receiver) == self.total:
            return heard
        raise UsageError(
            f"{type(self.first.strategy).__name__} combines what it hears by itself; it needs an "
            "exchange in which every peer receives, or a hub"
        )

    def _told(self, slots: list[Slots], state: Any, keys: Tensor, round: int) -> dict[str, Tensor]:
        """What each peer tells each of its targets by itself: [rows, targets, *]."""
        most = max(s.targets.shape[1] for s in slots)
        pad = torch.nn.functional.pad
        to = torch.cat([pad(s.targets, (0, most - s.targets.shape[1]), value=-1) for s in slots])
        own = self.peers_there.repeat(len(self.worlds))
        said = phases.address(state, self._there(to), own, self.everyone, keys, self.shared, round)
        liars = [
            torch.tensor(w.method.byzantine, dtype=torch.int64) + w.offset for w in self.worlds
        ]
        rows = self._there(torch.cat(liars))
        if not len(rows):
            return said
        truth, known = tree.select(said, rows), tree.select(state, rows)
        lies = phases.misaddressed(truth, known, self.shared)
        return {name: value.index_copy(0, rows, lies[name]) for name, value in said.items()}

    def _by_source(
        self, mesh: _Mesh, part: Tensor, columns: Tensor, told: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Who sent the rows of some receivers, and what each was told by itself: [.., k + 1, *]."""
        if not self.shared.names_sources:
            return {}
        found = {}
        for name, value in told.items():
            heard = value[mesh.source[part], mesh.rank[part]]
            found[name] = torch.cat((torch.zeros_like(heard[:, :1]), heard), 1)
            if not heard.shape[1]:
                found[name] = value.new_zeros((len(part), 1, *value.shape[2:]))
        source = torch.where(mesh.mask[part], columns % self.first.peers, -1)
        source[:, 0] = columns[:, 0] % self.first.peers
        return {**found, "source": source}

    def _conclude(self, work: _Work, codec: Any, heard: Heard, keys: Tensor, round: int) -> None:
        """strategy.apply, kept by the rows that lived to the end of the round."""
        done = torch.cat([w.conclude() for w in self.worlds])
        if self.hub is not None:
            self._lead(heard, work, keys, round)
            made = work.state
            # A client that did no work has nothing new to lose.
            fresh = done | ~torch.cat([w.on for w in self.worlds])
        else:
            fresh = done
            made, _ = phases.apply(
                work.state, heard, work.sent, self.everyone, keys, self.shared, round
            )
        self.state = self._kept(fresh, made, self.state)
        self.codec = self._kept(fresh, codec, self.codec)
        every = self.first.checkpoint_every
        if self.saved is not None and every and (round + 1) % every == 0:
            self.saved = (
                self._kept(done, self.state, self.saved[0]),
                self._kept(done, self.codec, self.saved[1]), self.hub_state,
            )  # fmt: skip

    def _lead(self, heard: Heard, work: _Work, keys: Tensor, round: int) -> None:
        """apply at the hubs."""
        rows = self.hubs_there
        led = torch.tensor([w.led for w in self.worlds])
        if not bool(led.any()):
            return
        at = heard if len(heard.vector) == len(rows) else tree.select(heard, rows)
        made, _ = phases.apply(
            self.hub_state, at, work.sent[rows], self.hubs, keys[rows], self.shared, round
        )
        self.hub_state = self._kept(led, made, self.hub_state)

    def _kept(self, done: Tensor, new: Any, old: Any) -> Any:
        return new if bool(done.all()) else tree.where(self._there(done), new, old)


@dataclass(frozen=True)
class _Lies:
    """Equivocation in one seed: vectors [receivers, byzantine, dim] there, with their rows."""

    receivers: Tensor
    byzantine: Tensor
    vectors: Tensor

    def places(self, mesh: _Mesh, part: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where stacks [part, k + 1, dim] hold lies, and which: (row, slot, receiver, liar)."""
        row, told = (mesh.receiver_here[part].unsqueeze(-1) == self.receivers).nonzero().unbind(1)
        source = mesh.source_here[part[row]]
        which, slot, liar = (source.unsqueeze(-1) == self.byzantine).nonzero().unbind(1)
        return row[which], slot + 1, told[which], liar


class _Joined:
    """Pieces of some rows as one tree, each copied to its place as soon as it is there.

    A tensor that stands in two places of the pieces does so in the whole: what is sent is often
    the state.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._at = 0
        self._made: list[Tensor] = []
        self._structure: Any = None
        self._places: list[int] = []

    def take(self, piece: Any) -> None:
        """The next rows."""
        leaves, structure = tree.flatten(piece)
        seen: dict[int, int] = {}
        places = [seen.setdefault(id(leaf), place) for place, leaf in enumerate(leaves)]
        if not self._made:
            self._structure, self._places = structure, places
            alone = len(leaves[0]) == self._rows
            self._made = [
                leaf if alone else leaf.new_empty((self._rows, *leaf.shape[1:])) if first == place
                else leaf
                for place, (leaf, first) in enumerate(zip(leaves, places, strict=True))
            ]  # fmt: skip
            if alone:
                return
        if structure != self._structure or places != self._places:
            raise UsageError(
                "lockstep: a strategy's state has another structure for some rows than for others "
                "(return the same tree whatever the numbers)"
            )
        for place, leaf in enumerate(leaves):
            if places[place] == place:
                self._made[place][self._at : self._at + len(leaf)] = leaf
        self._at += len(leaves[0])

    @property
    def whole(self) -> Any:
        return tree.unflatten(self._structure, [self._made[place] for place in self._places])


class _Mesh:
    """A wave of all seeds on stacked rows: who hears whom, what arrived, mixing weights.

    All on the device, but for the two that end in `_here`.
    """

    mask: Tensor
    """[receivers, k + 1], own row first: what each one uses"""

    def __init__(self, engine: Lockstep, slots: list[Slots], waves: list[Wave]) -> None:
        self._made_of = (slots, waves)
        self._width = width = max(s.source.shape[1] for s in slots)

        def wide(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))

        pairs = list(zip(engine.worlds, slots, strict=True))
        self.receiver_here = torch.cat([s.receiver + w.offset for w, s in pairs])
        self.source_here = torch.cat([wide(s.source) + w.offset for w, s in pairs])
        self.rank = engine._there(torch.cat([wide(s.rank) for _, s in pairs]))
        self.receiver = engine._there(self.receiver_here)
        self.source = engine._there(self.source_here)
        self.to_hubs = engine.hub is not None and torch.equal(self.receiver_here, engine.hub_rows)
        mixing = [wave.mixing for wave in waves]
        self.mixing: Tensor | None = None
        if all(m is not None for m in mixing):
            rows = [
                torch.nn.functional.pad(m, (0, width + 1 - m.shape[1]))
                for m in mixing
                if m is not None
            ]
            self.mixing = engine._there(torch.cat(rows))

    def serves(self, slots: list[Slots], waves: list[Wave]) -> bool:
        """Whether it was made of the very same."""
        old_slots, old_waves = self._made_of
        return all(a is b for a, b in zip((*old_slots, *old_waves), (*slots, *waves), strict=True))

    def with_masks(self, engine: Lockstep, masks: list[Tensor]) -> _Mesh:
        """This mesh with what arrived now."""
        wide = [torch.nn.functional.pad(m, (0, self._width + 1 - m.shape[1])) for m in masks]
        self.mask = engine._there(torch.cat(wide))
        return self


def _update(round: int, hop: int, weight: Tensor | None, extra: Mapping[str, Tensor]) -> Update:
    one = {name: value[0] for name, value in extra.items()}
    return Update(round, hop, Packed(_Stub()), None if weight is None else 1.0, one)  # type: ignore[arg-type]


def _matrix(mesh: _Mesh, weights: Tensor, total: int) -> Tensor:
    """The weights as [receivers, rows]: dense for a few receivers, sparse for many."""
    columns = torch.cat((mesh.receiver.unsqueeze(-1), mesh.source), -1)
    receivers, slots = columns.shape
    if receivers * total <= 1 << 16 or receivers * 8 <= total:
        dense = weights.new_zeros(receivers, total)
        return dense.scatter_add_(1, columns, weights)
    starts = torch.arange(0, receivers * slots + 1, slots, device=weights.device)
    with warnings.catch_warnings():
        # torch announces once per process that CSR is in beta.
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            starts, columns.flatten(), weights.flatten(), (receivers, total)
        )


def _aligned(portion: Tensor, like: Tensor) -> Tensor:
    return portion.reshape(portion.shape + (1,) * (like.dim() - 2)).to(like.dtype)


def _placed(base: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    return values if len(rows) == len(base) else base.index_copy(0, rows, values.to(base.dtype))


def _copied(into: Any, source: Any, rows: Tensor) -> Any:
    return tree.merge_trees(lambda pair: pair[0].index_copy(0, rows, pair[1][rows]), [into, source])
