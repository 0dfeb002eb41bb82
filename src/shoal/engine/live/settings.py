"""How the live engine works, as opposed to what runs on it."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.base.errors import UsageError


@dataclass(frozen=True)
class LiveSettings:
    """Settings of a live run; all times in real seconds.

    horizon_s: when the run ends at the latest. host: where peers listen. store_dir: a directory
    for durable commits, "" = in memory; what it holds from an earlier run is read. start_s: how
    long processes may take to come up; stop_s: how long they may take to end. handshake_s: how
    long a connection may take to greet. backoff_s: the pause after a failed connection, doubled
    with every failure up to backoff_most_s; messages sent during a pause are dropped as "dead".

    >>> LiveSettings(horizon_s=30.0).host
    '127.0.0.1'
    """

    horizon_s: float = 3600.0
    host: str = "127.0.0.1"
    store_dir: str = ""
    start_s: float = 60.0
    stop_s: float = 10.0
    handshake_s: float = 5.0
    backoff_s: float = 0.02
    backoff_most_s: float = 0.5

    def __post_init__(self) -> None:
        for name in ("horizon_s", "start_s", "stop_s", "handshake_s", "backoff_s"):
            value = getattr(self, name)
            if not value > 0:
                raise UsageError(f"LiveSettings: {name}={value}; need a positive number of seconds")
        if not self.backoff_most_s >= self.backoff_s:
            raise UsageError(
                f"LiveSettings: backoff_most_s={self.backoff_most_s} is less than "
                f"backoff_s={self.backoff_s} (raise it)"
            )
