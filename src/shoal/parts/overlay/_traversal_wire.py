"""What two peers tell each other to open a path, see `shoal.parts.overlay.traversal`."""

from __future__ import annotations

from shoal.wire.message import message


@message
class Hello:
    """The caller wants a path; `number` is its own for it, `token` as in `Connect`."""

    number: int
    token: bytes


@message
class Connect:
    """CONNECT: how its sender looks from outside.

    reachable: strangers get in; public: there is no box at all; token: what punches to it must
    carry, so that only who was told can open the path.
    """

    number: int
    attempt: int
    calling: bool
    reachable: bool
    public: bool
    host: str
    port: int
    token: bytes


@message
class Sync:
    """Dial now."""

    number: int
    attempt: int


@message
class Punch:
    """Opens the way, and keeps it open; `back` says that the other one's came through."""

    peer: int
    number: int
    calling: bool
    back: bool
    token: bytes


def signed_text(source: int, target: int, data: bytes) -> bytes:
    """What a peer signs of what it tells another one over the relay."""
    return f"shoal call {source} {target} ".encode() + data
