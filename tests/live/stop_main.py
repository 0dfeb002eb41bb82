"""A script that launches a run in several processes and is stopped; says who takes part.

python stop_main.py PROCESSES STOP_S [busy]
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from shoal.engine.live import LiveSettings, run_live
from shoal.wire.message import message
from shoal.world.network import Network


@message
class Never:
    pass


@dataclass(frozen=True)
class Waits:
    """Waits for what never comes; `busy` holds its loop, as no program should."""

    busy: bool

    async def run(self, peer: Any) -> None:
        os.write(1, f"peer {os.getpid()}\n".encode())
        if self.busy:
            threading.Event().wait(600.0)
        await peer.recv(Never, deadline=600.0)


def main() -> None:
    processes, stop_s = int(sys.argv[1]), float(sys.argv[2])
    try:
        run_live(
            Waits(sys.argv[3:] == ["busy"]), Network(processes), processes=processes,
            settings=LiveSettings(stop_s=stop_s),
        )  # fmt: skip
    except KeyboardInterrupt:
        os.write(1, f"stopped {time.monotonic()}\n".encode())
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
