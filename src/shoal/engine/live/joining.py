"""How a peer takes part in a run that it does not launch, and how it is doing."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.base.errors import UsageError
from shoal.base.limits import check_positive
from shoal.engine.live.control import Address
from shoal.wire.identity import Identity


@dataclass(frozen=True, kw_only=True)
class Joining:
    """How a peer takes part in a run that it does not launch.

    listen: where it listens; port 0 = any free one. advertise: where others reach it, if that is
    elsewhere (a router or container in between). bootstrap: addresses of other peers; () founds the
    run. peer: the id to have, None = the first free one. allow: names of those who may take part
    (`peer_name` of their keys), None = any. program: 16 bytes that stand for what is run; all peers
    must agree on them.
    wait_for: with how many peers the founder starts, None = all that do not join later by the fault
    list. kept: this peer leaves the ids below this one to those that ask for them by number, as
    somebody is still to start these. gone_s: for how long a peer that is done waits for one that
    does not answer any more.

    >>> Joining(bootstrap=(("127.0.0.1", 7000),)).listen
    ('127.0.0.1', 0)
    """

    listen: Address = ("127.0.0.1", 0)
    advertise: Address | None = None
    bootstrap: tuple[Address, ...] = ()
    peer: int | None = None
    identity: Identity = field(default_factory=Identity.new)
    allow: frozenset[str] | None = None
    program: bytes = bytes(16)
    wait_for: int | None = None
    kept: int = 0
    gone_s: float = 10.0

    def __post_init__(self) -> None:
        check_positive("Joining", self, "gone_s")
        if self.wait_for is not None and self.wait_for < 1:
            raise UsageError(f"Joining: wait_for={self.wait_for}; need at least 1 peer")
        if self.kept < 0:
            raise UsageError(f"Joining: kept={self.kept}; need 0 or more ids")
        if self.allow is not None and self.identity.name not in self.allow:
            raise UsageError(
                f"Joining: this peer's own key {self.identity.name} is not among those allowed "
                "(add it, so that all peers can use the same list)"
            )


@dataclass(frozen=True)
class Status:
    """How a joined peer is doing. state: "looking" for the run, "waiting" for its start, "running",
    "done" (its program has ended; it stays for the others), "stopping"."""

    peer: int
    state: str
    address: Address
    known: int
    round: int
    time_s: float
    messages_sent: int
    messages_delivered: int
    bytes_sent: int
    bytes_received: int
    rejoined: bool
    """whether it found itself in its store"""
