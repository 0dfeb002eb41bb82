"""What peers and master tell each other. Each message is the sender's whole state, so that a lost
one is repaired by the next and a repeated one changes nothing."""

from __future__ import annotations

from shoal.wire.message import message

INITIATE, DONE, FAILED = 0, 1, 2
"""Phases of a peer's part in an operation: ready to begin; has the result; gave up."""

STARTED, COMMITTED, ABORTED, FEW, MISMATCH, DIVERGED = range(6)
"""What the master says of an operation."""


@message
class Vote:
    """One peer's part in the operation that it calls `label`.

    serial: counts its operations of that label; signature: what all must have in common;
    operation: the master's number once started; sent, received: pieces so far. after, epoch: the
    number of the operation of this label before and the order of the ring, where the peers do it
    without a word of the master (else 0).
    """

    label: int
    serial: int
    phase: int
    signature: str
    operation: int = 0
    sent: int = 0
    received: int = 0
    stalled: bool = False
    after: int = 0
    epoch: int = 0


@message(checked=True)
class Status:
    """A peer to the master: a heartbeat with everything it waits for.

    session: of this registration, larger than those before; number: counts its statuses; call,
    turn, detail: the joint call that it waits in ("" = none) and how many it has made.
    """

    session: int
    number: int
    group: int
    call: str
    turn: int
    detail: bytes
    votes: tuple[Vote, ...]
    leaving: bool


@message
class Word:
    """The master's word on one operation of the peer: see STARTED and the others.

    epoch: of the group when this was decided; differ: of a mismatch, who wants what else than most.
    """

    label: int
    serial: int
    operation: int
    state: int
    ring: tuple[int, ...] = ()
    epoch: int = 0
    differ: tuple[tuple[int, str], ...] = ()


@message(checked=True)
class Ruling:
    """The master to a peer: all that concerns it.

    known: False = the session is none of the master's; accepted: it is in the group. epoch, ring:
    how often its group's ring has changed, and its peers in order; world: peers of all groups;
    turn, answer, detail: of the last joint call that was answered.
    """

    session: int
    number: int
    known: bool
    accepted: bool
    epoch: int
    ring: tuple[int, ...]
    world: int
    turn: int
    answer: str
    detail: bytes
    words: tuple[Word, ...]
