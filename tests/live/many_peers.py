"""Many peers in one process, for a while; samples what the process holds.

    python many_peers.py PEERS SECONDS

Peers talk to four others all the time, with messages and requests, and some crash and come back.
Prints one JSON line: samples of (seconds, descriptors, resident bytes), and what was delivered.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.base.errors import PeerError
from shoal.engine.live import LiveSettings, run_live
from shoal.wire.message import Packed, message
from shoal.world.faults import Crash
from shoal.world.network import Network

EVERY_S = 0.25
STEPS = (1, 7, -1, -7)
CONTENT = bytes(2000)


@message(tag=("turn",))
class Word:
    turn: int
    content: Packed


@message
class Ask:
    turn: int


@message
class Answer:
    turn: int


@dataclass(frozen=True)
class Talks:
    peers: int
    seconds: float

    async def run(self, peer: Any) -> None:
        async def answer(envelope: Any) -> Answer:
            return Answer(envelope.message.turn)

        async def listen() -> None:
            while await peer.recv(Word, deadline=self.seconds):
                pass

        peer.serve(Ask, answer)
        others = [(peer.id + step) % self.peers for step in STEPS]
        async with peer.tasks() as group:
            group.start(listen())
            turn = 0
            while peer.now() < self.seconds:
                turn += 1
                for other in others:
                    await peer.send(other, Word(turn, Packed(CONTENT)))
                with suppress(PeerError):
                    await peer.request(
                        others[turn % len(others)], Ask(turn), deadline=peer.now() + 0.5
                    )
                await peer.sleep_until(peer.now() + 0.1)


def held() -> tuple[int, int]:
    """(open descriptors, resident bytes) of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    peers, seconds = int(sys.argv[1]), float(sys.argv[2])
    faults, at = [], 0.5
    while at < seconds - 1.0:
        victim = len(faults) * 3 % peers
        faults.append(Crash(who=(victim,), at=at, until=at + 0.4))
        at += 0.5
    samples: list[tuple[float, int, int]] = []
    done = threading.Event()

    def sample() -> None:
        begin = time.monotonic()
        while not done.wait(EVERY_S):
            gc.collect()
            samples.append((time.monotonic() - begin, *held()))

    before = held()[0]
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        run = run_live(
            Talks(peers, seconds), Network(peers, faults=tuple(faults)),
            settings=LiveSettings(horizon_s=seconds + 20.0, heartbeat_s=1.0, dead_after_s=5.0),
        )  # fmt: skip
    finally:
        done.set()
        sampler.join()
    told = {
        "samples": samples, "before": before, "after": held()[0], "crashes": len(faults),
        "delivered": run.messages_delivered, "finished": run.finished,
    }  # fmt: skip
    print(json.dumps(told))  # noqa: T201


if __name__ == "__main__":
    main()
