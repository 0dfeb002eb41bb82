"""How the live engine works, as opposed to what runs on it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import IPv4Address
from typing import Literal

from shoal.base.errors import UsageError
from shoal.base.limits import check_positive
from shoal.wire.identity import is_name


@dataclass(frozen=True)
class LiveSettings:
    """Settings of a live run; all times in real seconds.

    horizon_s: when the run ends at the latest. host: where peers listen. store_dir: a directory
    for durable commits, "" = in memory; what it holds from an earlier run is read. start_s: how
    long processes may take to come up; stop_s: how long they may take to end. handshake_s: how
    long a connection may take to greet, and how long a broken transfer waits to go on.
    heartbeat_s: a caller asks its peers for a sign of life so often; dead_after_s: one that is
    silent for so long is lost. stall_s: a peer that has begun a frame and sends less than 1 KiB/s
    for so long is cut off. These count only the time in which this process itself was not behind
    with its work. idle_s: a connection that carried no message for so long is closed, with nothing
    lost, and opened again when there is one; handshakes: how many of a process may be under way at
    once, so that those that have begun come to their end. connections: TCP connections to each
    peer; more than one helps where bandwidth times round trip exceeds what one may have on the way.
    checksums: every chunk of a large frame is checked (4 bytes, about 2 GB/s), for long ways
    without encryption.
    address_callers: callers that have not greeted yet, per address. backoff_s: the pause after a
    failed connection, doubled with every failure up to backoff_most_s; messages sent during a pause
    are dropped as "dead".
    carriers: how a connection that both sides open at once may go (`Paths.punch`), tried together:
    "tcp", and "quic" over the datagrams of the same socket, for boxes that let only those pass. It
    needs the package aioquic, ends when the socket is closed, and is for both sides to allow.
    upnp: whether the router of this network is asked for ports (`Socket.map_port`; by `shoal peer`
    and `join_live` also for the port where the peer listens): "off"; "auto", for whichever answers;
    HOST or HOST:PORT, for that one. What it opens lets everybody in, is leased for an hour at a
    time and taken back at the end. It needs the package async-upnp-client.

    >>> LiveSettings(horizon_s=30.0).host
    '127.0.0.1'
    """

    security: Literal["noise", "none"] = "noise"
    allow: tuple[str, ...] = ()
    horizon_s: float = 3600.0
    host: str = "127.0.0.1"
    store_dir: str = ""
    start_s: float = 60.0
    stop_s: float = 10.0
    handshake_s: float = 4.0
    heartbeat_s: float = 5.0
    dead_after_s: float = 20.0
    stall_s: float = 4.0
    idle_s: float = 60.0
    handshakes: int = 32
    connections: int = 1
    checksums: bool = False
    address_callers: int = 128
    backoff_s: float = 0.02
    backoff_most_s: float = 0.5
    carriers: tuple[Literal["tcp", "quic"], ...] = ("tcp",)
    upnp: str = "off"

    def __post_init__(self) -> None:
        if self.security not in ("noise", "none"):
            raise UsageError(
                f'LiveSettings: security={self.security!r} (use "noise", or "none" for no security)'
            )
        if self.allow and self.security == "none":
            raise UsageError(
                'LiveSettings: allow needs security="noise" (nobody proves a name in the clear)'
            )
        for name in self.allow:
            if not is_name(name):
                raise UsageError(
                    f"LiveSettings: allow has {name!r}, no peer's name (see peer_name)"
                )
        seconds = ("horizon_s", "start_s", "stop_s", "handshake_s", "heartbeat_s", "stall_s")
        check_positive("LiveSettings", self, *seconds, "idle_s", "backoff_s")
        if not self.dead_after_s >= 2 * self.heartbeat_s:
            raise UsageError(
                f"LiveSettings: dead_after_s={self.dead_after_s} is less than two heartbeats of "
                f"{self.heartbeat_s} s (raise it)"
            )
        if not 1 <= self.connections <= 64:
            raise UsageError(f"LiveSettings: connections={self.connections}; need 1 to 64")
        if self.handshakes < 1:
            raise UsageError(f"LiveSettings: handshakes={self.handshakes}; need 1 or more")
        if self.address_callers < 1:
            raise UsageError(
                f"LiveSettings: address_callers={self.address_callers}; need 1 or more"
            )
        if not self.backoff_most_s >= self.backoff_s:
            raise UsageError(
                f"LiveSettings: backoff_most_s={self.backoff_most_s} is less than "
                f"backoff_s={self.backoff_s} (raise it)"
            )
        if not self.carriers or not {"tcp", "quic"}.issuperset(self.carriers):
            raise UsageError(
                f'LiveSettings: carriers={self.carriers!r} (use "tcp", "quic" or both, in a tuple)'
            )
        if "quic" in self.carriers and find_spec("aioquic") is None:
            raise UsageError(
                'LiveSettings: carriers has "quic", which needs the package aioquic '
                "(pip install 'shoal[quic]', or use carriers=(\"tcp\",))"
            )
        if not is_router(self.upnp):
            raise UsageError(
                f'LiveSettings: upnp={self.upnp!r} (use "off", "auto", or the IPv4 address of the '
                "router, such as 192.168.1.1)"
            )
        if self.upnp != "off" and find_spec("async_upnp_client") is None:
            raise UsageError(
                f"LiveSettings: upnp={self.upnp!r} needs the package async-upnp-client "
                "(pip install 'shoal[upnp]', or use upnp=\"off\")"
            )


def is_router(text: str) -> bool:
    """Whether it says which router is asked for ports."""
    host, colon, port = text.partition(":")
    if text in ("off", "auto"):
        return True
    try:
        IPv4Address(host)
    except ValueError:
        return False
    return not colon or (port.isdigit() and 0 < int(port) < 1 << 16)
