"""What a member holds: the log of bytes, the weights that follow from it, its next numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from shoal.kernel.peer import Peer
from shoal.parts.zeroth_order.noise import descend_along
from shoal.parts.zeroth_order.replay import Entry, Log, Rule, joined, unpack
from shoal.parts.zeroth_order.spsa import SPSA
from shoal.rounds.task import Shard, Task
from shoal.systems.compression import _just_one_byte_wire as wire
from shoal.tensor.types import Key, Scalar, Vector

if TYPE_CHECKING:
    from shoal.systems.compression.just_one_byte import Bound

MANY = 64
"""Entries that one computation applies when a peer catches up."""


def estimate(params: Vector, shard: Shard, key: Key, task: Task, spsa: SPSA) -> Tensor:
    """Projected gradients [..., samples]."""
    return spsa.estimate(task, params, shard, key)


def advance(
    params: Vector, keys: Key, scales: Scalar, shard: Shard, key: Key, task: Task, spsa: SPSA
) -> tuple[Vector, Tensor]:
    """Apply an iteration's numbers; then the projected gradients for the next one."""
    params = descend_along(params, keys, scales)
    return params, spsa.estimate(task, params, shard, key)


# Peers that are simulated together apply the same entries: each is taken apart once.


@lru_cache(maxsize=64)
def _steps(rule: Rule, iteration: int, entry: Entry) -> tuple[Key, Tensor]:
    return rule.steps(iteration, entry)


@lru_cache(maxsize=64)
def _keys(rule: Rule, iteration: int, machines: int) -> tuple[Key, ...]:
    return rule.machine_keys(iteration, machines).unbind()


@lru_cache(maxsize=64)
def entries_of(log: bytes, before: tuple[int, ...], number_bytes: int) -> list[Entry]:
    return unpack(log, before, number_bytes)


class Replica:
    """The state that all members have in common, and this one's numbers for the next iteration."""

    def __init__(self, program: Bound, peer: Peer) -> None:
        self.program = program
        self.peer = peer
        self.rule = program.rule
        self.workload = program.workload
        self.last = program.iterations
        self.shard = program.workload.task.shard(peer.id)
        self.log = Log(program.rule, tuple(range(program.founders)))
        self.start = program.workload.initial
        """the weights before the first entry of the log"""
        self.params = self.start
        self.before: Vector | None = None
        """the weights before the last entry, while it can be undone"""
        self.codes = b""
        self.progress_s = peer.now()
        self._offered = self._saturated = self._dropped = 0

    @property
    def end(self) -> int:
        """The next iteration."""
        return self.log.end

    def digest(self) -> int:
        """Of the weights, in the iterations before which they are compared, else 0."""
        every = self.program.settings.check_every
        return wire.digest(self.params) if every and self.end % every == 0 else 0

    def begin_at(self, iteration: int, group: tuple[int, ...], weights: Vector) -> None:
        """Take over weights in place of all entries before an iteration."""
        self.start = self.params = self.workload.there(weights)
        self.log = Log(self.rule, group, iteration)
        self.before = None

    def heal(self) -> None:
        """Make the weights anew from the log, which is what all have agreed on."""
        self.params, self.before = self.log.replay(self.start), None

    def tell(self, done: bool) -> None:
        """What a report shows of this peer."""
        peer = self.peer
        peer.record("iterations", self.end)
        peer.record("offered", self._offered)
        peer.record("payload_bytes", self._offered * self.rule.codec.width)
        peer.record("saturated", self._saturated)
        peer.record("dropped", self._dropped)
        if self.program.settings.audit and self.log.entries:
            again = wire.digest(self.log.replay(self.start))
            peer.record("replayed", float(again == wire.digest(self.params)))
        if done:
            self.audit(self.last, self.params)
        else:
            peer.record("gave_up", 1.0)

    async def extend(self, entries: Sequence[Entry]) -> None:
        """Apply the next entries, and be ready for the iteration after them."""
        peer, task = self.peer, self.workload.task
        *earlier, entry = entries
        for start in range(0, len(earlier), MANY):
            some = earlier[start : start + MANY]
            keys, scales = self.workload.there(joined(self.rule, self.log.end, some))
            self.params = await peer.compute(
                descend_along, self.params, keys, scales, cost=self.program.cost(len(keys), False)
            )
            self.log.entries.extend(some)
            self.before = None
        now = self.log.end
        keys, scales = self.workload.there(_steps(self.rule, now, entry))
        params, ahead = self.params, now + 1 < self.last
        cost = self.program.cost(len(keys), ahead)
        self.audit(now, params)
        if self.program.settings.audit:
            whose = " ".join(map(str, entry.machines))
            peer.record("applied", now, machines=whose, codes=entry.codes.hex())
        if ahead:
            after, found = await peer.compute(
                advance, params, keys, scales, self.shard, self._key(now + 1),
                static=(task, self.program.spsa), cost=cost,
            )  # fmt: skip
            self._offer(found, now + 1)
        else:
            after = await peer.compute(descend_along, params, keys, scales, cost=cost)
            self.codes = b""
        self.before, self.params = params, after
        self.log.entries.append(entry)
        self.progress_s = peer.now()
        if (now + 1) % self.workload.report_every == 0 or now + 1 == self.last:
            peer.record("params", after)
            peer.record("members", len(entry.group))
        if ahead:
            peer.enter_round(now + 1)

    async def estimate(self) -> None:
        """This peer's numbers for the next iteration, at the weights that it has."""
        if self.log.end < self.last:
            found = await self.peer.compute(
                estimate, self.params, self.shard, self._key(self.log.end),
                static=(self.workload.task, self.program.spsa), cost=self.program.cost(0, True),
            )  # fmt: skip
            self._offer(found, self.log.end)

    def _offer(self, found: Tensor, iteration: int) -> None:
        numbers = found.tolist()
        self.codes = self.rule.codec.encode(numbers)
        if self.program.settings.audit:
            self.peer.record("made", iteration, codes=self.codes.hex())
        self._offered += len(numbers)
        self._saturated += self.rule.codec.saturated(numbers)
        self._dropped += sum(number - number != 0 for number in numbers)

    def _key(self, iteration: int) -> Key:
        return self.workload.there(_keys(self.rule, iteration, len(self.peer.roster))[self.peer.id])

    def audit(self, iteration: int, params: Vector) -> None:
        """The weights before an iteration's entry are for good once that entry is there."""
        every = 1 if self.program.settings.audit else self.program.settings.check_every
        if every and (iteration % every == 0 or iteration == self.last):
            self.peer.record("state", wire.digest(params), iteration=str(iteration))

    def undo(self) -> None:
        assert self.before is not None
        self.log.entries.pop()
        self.params, self.before = self.before, None
        self.peer.record("undone", self.log.end)
