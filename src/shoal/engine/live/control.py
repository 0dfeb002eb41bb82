"""What the launcher and the processes of a run say to each other.

Between processes these travel by pickle over a pipe that only a parent and its child hold; nothing
of a network ever reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shoal.base.limits import Limits
from shoal.engine.live.settings import LiveSettings
from shoal.world.network import Network
from shoal.world.record import Happening, Row, Run

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.engine.live.joining import Status

Address = tuple[str, int]


@dataclass(frozen=True)
class Plan:
    """All that a process must know: the world, and which peers are its own."""

    program: Callable[[int], Any]
    """what each peer runs"""
    network: Network
    seed: int
    settings: LiveSettings
    limits: Limits
    peers: tuple[int, ...]
    lead: bool
    """one process of a run notes faults on the report's time axis"""
    observed: bool
    counted: bool


@dataclass(frozen=True)
class ByPeer:
    """`ByPeer(programs)(peer)`: a program factory that can travel."""

    programs: tuple[Any, ...]

    def __call__(self, peer: int) -> Any:
        return self.programs[peer]


# From a process to the launcher.


@dataclass(frozen=True)
class Ready:
    """Its peers listen; `schemas` are the messages that it can read."""

    addresses: Mapping[int, Address]
    schemas: Mapping[str, str]
    keys: Mapping[int, bytes] = field(default_factory=dict)
    """its peers' public keys; none without security"""


@dataclass(frozen=True)
class Idle:
    """Whether all of its programs are done and none is still to come.

    entered: how many `Entered` of the launcher it had seen by then; older news do not count.
    """

    idle: bool
    entered: int


@dataclass(frozen=True)
class Entered:
    """The first peer entered a round; the launcher passes it on to the other processes."""

    round: int


@dataclass(frozen=True)
class Observed:
    """A peer recorded its parameters [dim]."""

    peer: int
    round: int
    time_s: float
    params: Tensor


@dataclass(frozen=True)
class Counted:
    """Events so far, for a progress display."""

    events: int


@dataclass(frozen=True)
class Told:
    """How a joined peer is doing, and what it has recorded since it told the last time."""

    status: Status
    rows: Sequence[Row]
    happenings: Sequence[Happening]


@dataclass(frozen=True)
class Failed:
    """A program or the engine raised."""

    error: BaseException


@dataclass(frozen=True)
class Done:
    """What the process adds to the run; its last word."""

    run: Run


@dataclass(frozen=True)
class Gone:
    """The process ended without a last word."""

    code: int | None


# From the launcher to a process.


@dataclass(frozen=True)
class Start:
    """Begin at a moment of this machine's wall clock."""

    addresses: Mapping[int, Address]
    digest: bytes
    unix_ns: int
    keys: Mapping[int, bytes] = field(default_factory=dict)
    """all peers' public keys"""


@dataclass(frozen=True)
class Stop:
    """Send what is queued, close everything, and report."""


Report = Ready | Idle | Entered | Observed | Counted | Told | Failed | Done | Gone
Command = Start | Entered | Stop
