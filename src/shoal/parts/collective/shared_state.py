"""State that all peers of a group must hold bit for bit: the vote on what it is."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

import msgspec
import torch
from torch import Tensor

from shoal.base.errors import UsageError

STRATEGIES = ("enforce_popular", "send_only", "receive_only")


@dataclass
class SharedState:
    """Named tensors with a revision that grows by exactly one per synchronisation.

    Tensors are written in place when the group agrees on other content; `revision` then becomes the
    agreed one. may_differ: names whose content is not compared; a peer whose revision is behind
    still receives them.

    >>> SharedState({"weights": torch.zeros(3)}, revision=1).may_differ
    frozenset()
    """

    tensors: dict[str, Tensor]
    revision: int = 0
    may_differ: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.may_differ = frozenset(self.may_differ)
        if self.revision < 0:
            raise UsageError(f"shared state: revision={self.revision}; need 0 or more")
        for name, tensor in self.tensors.items():
            if not (tensor.is_contiguous() and tensor.is_cpu):
                raise UsageError(f"shared state: {name!r} is no contiguous CPU tensor (copy it)")
        if missing := sorted(self.may_differ - set(self.tensors)):
            raise UsageError(f"shared state: may_differ names {missing[0]!r}, which is no tensor")

    def offer(self, strategy: str) -> Offer:
        """What this peer tells the master."""
        if strategy not in STRATEGIES:
            raise UsageError(f"sync: strategy={strategy!r}; need one of {', '.join(STRATEGIES)}")
        return Offer(
            strategy, self.revision,
            tuple(
                (name, f"{tensor.dtype} {tuple(tensor.shape)}", digest(tensor),
                 name in self.may_differ)
                for name, tensor in sorted(self.tensors.items())
            ),
        )  # fmt: skip


def digest(tensor: Tensor) -> bytes:
    """BLAKE2b-128 of the raw bytes. It finds errors; it is not meant to stop an attacker."""
    flat = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(flat.data, digest_size=16).digest()


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """A peer's content: (name, dtype and shape, digest, whether it may differ) by name."""

    strategy: str
    revision: int
    keys: tuple[tuple[str, str, bytes, bool], ...]

    def content(self) -> tuple[tuple[str, bytes], ...]:
        """What is put to the vote."""
        return tuple((name, hash_) for name, _, hash_, free in self.keys if not free)

    def layout(self) -> tuple[tuple[str, str, bool], ...]:
        """What must be equal everywhere."""
        return tuple((name, kind, free) for name, kind, _, free in self.keys)


class Plan(msgspec.Struct, frozen=True, array_like=True):
    """The master's answer: the agreed revision, whom to fetch from (-1 = nobody), and what."""

    revision: int
    source: int
    fetch: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Outcome:
    """Answers by peer, those whose revision broke the rule, and the election that comes next."""

    answers: dict[int, tuple[str, bytes]]
    violators: tuple[int, ...]
    election: Election


@dataclass(frozen=True)
class Election:
    """The master's book of one group's revisions. Content wins by popularity.

    Only peers at the expected revision vote, which is one more than the last agreed one; before the
    first it is the one that most of them offer (ties: the higher). A peer that is behind receives;
    one that is ahead, or that repeats a revision when nobody is at the expected one, violates the
    rule. Ties between contents go to the content of the smallest peer.
    """

    revision: int | None = None
    pending: int | None = field(default=None)
    failures: int = 0

    def committed(self) -> Election:
        """All peers have the content of the last election."""
        return Election(self.pending)

    def failed(self) -> Election:
        """Somebody could not fetch it: next time others give it, if there are any."""
        return replace(self, failures=self.failures + 1)

    def held(self, offers: Mapping[int, bytes]) -> Outcome:
        """offers: an encoded `Offer` by peer."""
        found = {peer: _decode_offer(data) for peer, data in offers.items()}
        if differ := dissenters({peer: offer.layout() for peer, offer in found.items()}):
            answers = dict.fromkeys(found, ("mismatch", msgspec.msgpack.encode(differ)))
            return Outcome(answers, (), self)
        voters = {p: o for p, o in found.items() if o.strategy != "receive_only"}
        expected = self._expected(voters)
        heirs = {p: o for p, o in voters.items() if o.revision == expected}
        ahead = [p for p, o in found.items() if o.revision > expected]
        if not heirs:
            ahead = list(found)
        answers: dict[int, tuple[str, bytes]] = dict.fromkeys(ahead, ("revision", b""))
        if not heirs:
            return Outcome(answers, tuple(ahead), self)
        votes = Counter(offer.content() for offer in heirs.values())
        most = max(votes.values())
        first = min(p for p, o in heirs.items() if votes[o.content()] == most)
        chosen = found[first]
        holders = [p for p, o in heirs.items() if o.content() == chosen.content()]
        turn = self.failures
        for peer, offer in found.items():
            if peer in answers:
                continue
            behind = offer.revision < expected
            have = {name: hash_ for name, _, hash_, _ in offer.keys}
            fetch = tuple(
                (name, b"" if free else hash_)
                for name, _, hash_, free in chosen.keys
                if (behind if free else have[name] != hash_)
            )
            source = -1
            if fetch and offer.strategy != "send_only":
                # Holders take turns, so that no single one serves all newcomers.
                source, turn = holders[turn % len(holders)], turn + 1
            plan = Plan(expected, source, fetch if source >= 0 else ())
            answers[peer] = ("ok", msgspec.msgpack.encode(plan))
        return Outcome(answers, tuple(ahead), replace(self, pending=expected))

    def _expected(self, voters: Mapping[int, Offer]) -> int:
        if self.revision is not None:
            return self.revision + 1
        offered = Counter(offer.revision for offer in voters.values())
        return max(offered, key=lambda revision: (offered[revision], revision), default=0)


def dissenters(said: Mapping[int, Hashable]) -> tuple[int, ...]:
    """Who says something else than more than half do; where no half agrees, everybody.

    >>> dissenters({1: "a", 2: "a", 3: "b"}), dissenters({1: "a", 2: "b"}), dissenters({1: "a"})
    ((3,), (1, 2), ())
    """
    ((common, count),) = Counter(said.values()).most_common(1) if said else ((None, 0),)
    agreed = 2 * count > len(said)
    return tuple(peer for peer, each in said.items() if not agreed or each != common)


_differ = msgspec.msgpack.Decoder(tuple[int, ...])
_offers = msgspec.msgpack.Decoder(Offer)
_plans = msgspec.msgpack.Decoder(Plan)


def _decode_offer(data: bytes) -> Offer:
    try:
        return _offers.decode(data)
    except msgspec.DecodeError:
        # A peer that sends nonsense agrees with nobody, which the others are told.
        return Offer("receive_only", 0, ())


def read_plan(data: bytes) -> Plan:
    """The master's answer to `sync`."""
    return _plans.decode(data)


def read_dissenters(data: bytes) -> tuple[int, ...]:
    """The master's answer to a `sync` of different layouts."""
    return _differ.decode(data)


def encode_offer(offer: Offer) -> bytes:
    """An offer as the detail of the call."""
    return msgspec.msgpack.encode(offer)
