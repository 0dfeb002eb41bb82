"""What a run leaves behind: measured series, counters, digests and final parameters.

Recording never draws randomness, never costs virtual time and never enters control flow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shoal.base.digest import bytes_digest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """One measured value. time_s is virtual (or, live, since the start); peer -1 = all peers."""

    name: str
    value: float
    time_s: float
    round: int = -1
    peer: int = -1
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Happening:
    """A fault that took effect, or another moment worth a mark on the time axis."""

    time_s: float
    what: str
    peers: tuple[int, ...] = ()


def digest_of(final: Mapping[int, Tensor]) -> str:
    """Digest of peers' parameters: their raw bytes in the order of the peers; '' of none."""
    if not final:
        return ""
    import torch

    rows = (final[peer].detach().contiguous().cpu().reshape(-1) for peer in sorted(final))
    return bytes_digest(*(memoryview(row.view(torch.uint8).numpy()) for row in rows))


@dataclass
class Run:
    """The outcome of one program or strategy on one scenario with one seed."""

    engine: str
    seed: int
    peers: int
    rows: list[Row] = field(default_factory=list)
    happenings: list[Happening] = field(default_factory=list)
    bytes_sent: list[int] = field(default_factory=list)
    """per peer, from the codec's exact sizes"""
    bytes_received: list[int] = field(default_factory=list)
    messages_sent: int = 0
    messages_delivered: int = 0
    messages_in_flight: int = 0
    """sent, and neither delivered nor dropped on the way when the run ended"""
    dropped: dict[str, int] = field(default_factory=dict)
    """what came to nothing, by reason. On the way: lost, dead, partition, corrupt, so that sent =
    delivered + these + in flight. At the receiver: mailbox, closed, busy, late answer, ..., and of
    datagrams filtered (its NAT box let them not in), no socket, socket full; relay limit: a relay
    did not pass it on; a datagram to an address that nobody has (no route) and a message to a peer
    behind a NAT box to which no path leads (no path) were never sent"""
    bytes_by_kind: dict[str, int] = field(default_factory=dict)
    virtual_s: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    flops: float = 0.0
    events: int = 0
    trace_digest: str = ""
    """(time_ns, source, target, kind, tag, size) of every delivery, in order; '' in lockstep"""
    state_digest: str = ""
    """of `final`, see `digest_of`"""
    final: dict[int, Tensor] = field(default_factory=dict)
    """last recorded parameters [dim] of each peer that recorded any, by peer"""
    names: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    """how a row of `params` splits into named tensors (FlatSpec)"""
    finished: bool = True
    """False when the horizon or a limit ended the run before the programs did"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """engine settings that influenced the numbers, such as the batching rule"""

    def series(self, name: str, peer: int | None = None) -> list[Row]:
        """The rows of one metric, in the order of recording."""
        return [r for r in self.rows if r.name == name and (peer is None or r.peer == peer)]
