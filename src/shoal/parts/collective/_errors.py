"""How a collective operation can fail, as types that a program can tell apart.

PeerError
└── CollectiveError
    ├── ConnectionLost      a peer or link failed in mid-operation; undone everywhere: retry
    ├── TooFewPeers         fewer than two peers are left
    ├── Mismatch            peers disagree on dtype, size, settings or keys
    ├── Diverged            peers wait for different things that cannot both happen
    ├── SyncFailed          a shared state did not arrive whole; nothing was changed
    ├── RevisionViolation   a revision that did not grow by exactly one: excluded
    ├── Evicted             the master holds this peer for dead: connect anew
    └── MasterLost          no word from the master
UsageError
└── PendingOperations       a joint call while operations run, or a tag that is in flight
"""

from __future__ import annotations

from shoal.base.errors import PeerError, UsageError


class CollectiveError(PeerError):
    """A collective operation that did not happen."""


class ConnectionLost(CollectiveError):
    """A participant died or could not be reached; every survivor's tensor is as it was."""


class TooFewPeers(CollectiveError):
    """Fewer than two peers are left in the group."""


class Mismatch(CollectiveError):
    """Peers called the same operation with different sizes, dtypes, settings or keys.

    peers: those who differ from more than half of them, or all where no half agrees.
    """

    def __init__(self, text: str, peers: tuple[int, ...] = ()) -> None:
        super().__init__(text)
        self.peers = peers


class Diverged(CollectiveError):
    """Peers wait for different things, none of which can happen."""


class SyncFailed(CollectiveError):
    """Some peer could not fetch the shared state; no peer's state was changed."""


class RevisionViolation(CollectiveError):
    """A shared state's revision must grow by exactly one per synchronisation."""


class Evicted(CollectiveError):
    """The master took this peer out of the group."""


class MasterLost(CollectiveError):
    """The master cannot be heard."""


class PendingOperations(UsageError):
    """The call needs an idle peer, or its tag is in use."""
