"""The log of a run in bytes, and the model that follows from it: a checkpoint of bytes per step.

An entry is what one iteration applied: whose numbers, and the numbers' bytes. Together with the
initial weights and the rule the log determines the model, bit for bit.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from shoal.base import keyed
from shoal.base.errors import DecodeError, UsageError
from shoal.parts.zeroth_order.noise import descend_along
from shoal.parts.zeroth_order.scalars import OneByte, ScalarCodec
from shoal.tensor.types import Key, Vector

_MANY, _PART, _GROUP = 64, 1, 2
_COUNT = struct.Struct("<H")


@dataclass(frozen=True)
class Entry:
    """What one iteration applied.

    group: who was a member, ascending; machines: whose numbers these are, ascending, some of the
    group; codes: `samples` numbers of each, machine after machine. Duplicates are a UsageError:
    every number is applied once.
    """

    group: tuple[int, ...]
    machines: tuple[int, ...]
    codes: bytes

    def __post_init__(self) -> None:
        for name in ("group", "machines"):
            ids = getattr(self, name)
            if any(a >= b for a, b in pairwise(ids)):
                raise UsageError(f"Entry: {name}={ids}; need ids that ascend, each once")
        if not set(self.machines) <= set(self.group):
            raise UsageError(f"Entry: machines={self.machines} are not all in group={self.group}")

    def pack(self, before: tuple[int, ...]) -> bytes:
        """As bytes, after an entry whose group was `before`: one byte more than the codes, as long
        as the group stays and all of it contributes."""
        flags, head = 0, b""
        if self.group != before:
            flags |= _GROUP
            head += _COUNT.pack(len(self.group)) + b"".join(map(_COUNT.pack, self.group))
        if self.machines != self.group:
            flags |= _PART
            there = set(self.machines)
            bits = sum(1 << i for i, machine in enumerate(self.group) if machine in there)
            head += bits.to_bytes(-(-len(self.group) // 8), "little")
        return bytes((flags,)) + head + self.codes


@dataclass(frozen=True)
class Rule:
    """How numbers become a step: theta - lr / N * g * z, summed over the N numbers of an iteration.

    run: the word from which all noise follows; samples: numbers per machine and iteration; mean:
    divide by N, else by its square root (which is what the published code does).
    """

    run: int
    lr: float
    samples: int = 1
    codec: ScalarCodec = field(default_factory=OneByte)
    mean: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf") or self.samples < 1:
            raise UsageError(
                f"Rule: lr={self.lr}, samples={self.samples}; need a learning rate above 0 and at "
                "least one sample"
            )

    @cached_property
    def root(self) -> int:
        """The word that all keys are folded from."""
        return keyed.fold(0, self.run, "zeroth order")

    def machine_keys(self, iteration: int, machines: int) -> Key:
        """Keys [machines] of their perturbations in an iteration; `fold(key, a)` is sample a's."""
        words = [keyed.fold(self.root, iteration, machine) for machine in range(machines)]
        return _tensor(words)

    def steps(self, iteration: int, entry: Entry) -> tuple[Key, Tensor]:
        """Keys [k] and scales [k] for `descend_along`, in the order in which all apply them."""
        count = len(entry.machines) * self.samples
        if len(entry.codes) != count * self.codec.width:
            raise UsageError(
                f"Rule: {len(entry.codes)} bytes for {len(entry.machines)} machines x "
                f"{self.samples} samples of {self.codec.width} bytes; need {count} numbers"
            )
        # Numbers, not tensors: of the few words here each costs a microsecond.
        own = [keyed.fold(self.root, iteration, machine) for machine in entry.machines]
        words = [keyed.fold(word, sample) for word in own for sample in range(self.samples)]
        share = self.lr / (count if self.mean else math.sqrt(count)) if count else 0.0
        return _tensor(words), torch.from_numpy(share * self.codec.decode(entry.codes))


def _tensor(words: Sequence[int]) -> Key:
    return torch.tensor([keyed.signed(word) for word in words], dtype=torch.int64, device="cpu")


@dataclass
class Log:
    """Entries of consecutive iterations; the first of them is iteration `first`."""

    rule: Rule
    founders: tuple[int, ...]
    first: int = 0
    entries: list[Entry] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The iteration after the last entry."""
        return self.first + len(self.entries)

    @property
    def group(self) -> tuple[int, ...]:
        """Who is a member after the last entry."""
        return self.entries[-1].group if self.entries else self.founders

    def from_iteration(self, iteration: int) -> Sequence[Entry]:
        """The entries of an iteration and those after it."""
        return self.entries[iteration - self.first :]

    def group_before(self, iteration: int) -> tuple[int, ...]:
        """Who was a member before that iteration's entry."""
        place = iteration - self.first
        return self.entries[place - 1].group if place > 0 else self.founders

    def pack(self, start: int | None = None) -> bytes:
        """Entries from iteration `start` on (default: all), for `unpack`."""
        begin = self.first if start is None else start
        return pack(self.from_iteration(begin), self.group_before(begin))

    def replay(self, initial: Vector) -> Vector:
        """The model [..., dim] after the last entry, from that before the first one.

        >>> log = Log(Rule(run=1, lr=0.1), founders=(0, 1))
        >>> log.entries.append(Entry((0, 1), (0, 1), OneByte().encode([1.0, -2.0])))
        >>> log.replay(torch.zeros(4)).shape
        torch.Size([4])
        """
        return apply(initial, self.rule, self.first, self.entries)


def apply(params: Vector, rule: Rule, iteration: int, entries: Sequence[Entry]) -> Vector:
    """The model after some entries, of which the first is that of `iteration`."""
    for start in range(0, len(entries), _MANY):
        keys, scales = joined(rule, iteration + start, entries[start : start + _MANY])
        params = descend_along(params, keys.to(params.device), scales.to(params.device))
    return params


def joined(rule: Rule, iteration: int, entries: Iterable[Entry]) -> tuple[Key, Tensor]:
    """Keys and scales of consecutive entries, one after the other."""
    found = [rule.steps(iteration + i, entry) for i, entry in enumerate(entries)]
    return torch.cat([keys for keys, _ in found]), torch.cat([scales for _, scales in found])


def pack(entries: Iterable[Entry], before: tuple[int, ...]) -> bytes:
    """Consecutive entries as bytes; `before`: the group before the first of them."""
    parts = []
    for entry in entries:
        parts.append(entry.pack(before))
        before = entry.group
    return b"".join(parts)


def unpack(data: bytes | memoryview, before: tuple[int, ...], number_bytes: int) -> list[Entry]:
    """Inverse of `pack`; number_bytes: what one machine adds to an iteration.

    DecodeError for bytes that are no entries.
    """
    view, place, entries = memoryview(data), 0, []
    while place < len(view):
        entry, place = _unpack_one(view, place, before, number_bytes)
        entries.append(entry)
        before = entry.group
    return entries


def _unpack_one(
    view: memoryview, place: int, before: tuple[int, ...], number_bytes: int
) -> tuple[Entry, int]:
    def take(count: int) -> memoryview:
        nonlocal place
        if place + count > len(view):
            raise DecodeError(f"log: {len(view)} bytes end within an entry")
        place += count
        return view[place - count : place]

    flags = take(1)[0]
    if flags & ~(_PART | _GROUP):
        raise DecodeError(f"log: an entry begins with {flags}")
    group = machines = before
    if flags & _GROUP:
        (count,) = _COUNT.unpack(take(2))
        group = machines = tuple(n for (n,) in _COUNT.iter_unpack(take(2 * count)))
    if flags & _PART:
        bits = int.from_bytes(take(-(-len(group) // 8)), "little")
        machines = tuple(machine for i, machine in enumerate(group) if bits >> i & 1)
    codes = bytes(take(len(machines) * number_bytes))
    try:
        return Entry(group, machines, codes), place
    except UsageError as error:
        raise DecodeError(f"log: {error}") from error
