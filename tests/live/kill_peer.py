"""One peer of a run that is killed at any moment, as a process: no torch, so it starts at once.

    python -c "import kill_peer; kill_peer.main()" PEER PORT FOLDER MODE AMOUNT

Every peer counts up at every other by requests with numbers of their own, commits what it was
promised and what it promised, and sends large blocks beside. What has happened goes to a journal
that a kill does not take along; `test_live_kills` reads it. MODE says when this life kills itself.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.base.errors import PeerError, ShoalError
from shoal.engine.live.join import Joining, join_live
from shoal.engine.live.settings import LiveSettings
from shoal.wire.identity import Identity
from shoal.wire.message import Packed, message
from shoal.world.network import Network

PEERS = 4
START_WITH = 3
RUN_S = 1.3
START_S = 6.0
STEP_S = 0.02
BLOCK_BYTES = 3 << 20
BLOCK_EVERY = 12


@message
class Count:
    """Request `number` of its sender: counts once, however often it comes."""

    number: int


@message
class Counted:
    number: int


@message
class Block:
    digest: bytes
    content: Packed


@message
class Books:
    """All that a peer promised and was promised; `total` counts each request that it applied."""

    acknowledged: dict[int, int]
    applied: dict[int, int]
    total: int
    life: int


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Journal:
    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __call__(self, *words: object) -> None:
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())


@dataclass(frozen=True)
class Ledger:
    """The program. `sending`: called when a block is under way."""

    journal: Callable[..., None]
    sending: Callable[[], None]

    async def run(self, peer: Any) -> None:
        stored = peer.store.get("books")
        assert stored == peer.store.get("copy"), "a commit is torn"
        none = dict.fromkeys(peer.roster, 0)
        books = stored or Books(none, none, 0, 0)
        acknowledged, applied = dict(books.acknowledged), dict(books.applied)
        total, life = books.total, books.life + 1
        self.journal("life", life, "total", total)
        for other in peer.roster:
            self.journal("restored", other, acknowledged[other], applied[other])

        async def commit() -> None:
            now = Books(dict(acknowledged), dict(applied), total, life)
            await peer.store.commit({"books": now, "copy": now})

        async def count(envelope: Any) -> Counted:
            nonlocal total
            source, number = envelope.source, envelope.message.number
            assert number <= applied[source] + 1, f"lost what {source} was promised"
            fresh = number == applied[source] + 1
            if fresh:
                applied[source] += 1
                total += 1
            await commit()
            if fresh:
                self.journal("applied", source, number)
            return Counted(number)

        async def block(envelope: Any) -> None:
            content = bytes(envelope.message.content.pack())
            right = hashlib.blake2b(content, digest_size=16).digest() == envelope.message.digest
            self.journal("block", "whole" if right else "BROKEN")

        async def ask(other: int) -> None:
            step = 0
            while peer.now() < RUN_S:
                number = acknowledged[other] + 1
                try:
                    answer = await peer.request(other, Count(number), deadline=peer.now() + 0.3)
                except PeerError:
                    await peer.sleep_until(peer.now() + STEP_S)
                    continue
                assert answer.number == number
                acknowledged[other] = number
                await commit()
                self.journal("acknowledged", other, number)
                step += 1
                if step % BLOCK_EVERY == other:
                    content = bytes([step % 256, peer.id]) * (BLOCK_BYTES // 2)
                    digest = hashlib.blake2b(content, digest_size=16).digest()
                    await peer.send(other, Block(digest, Packed(content)))
                    self.sending()
                await peer.sleep_until(peer.now() + STEP_S)

        await commit()
        peer.serve(Count, count)
        peer.serve(Block, block)
        async with peer.tasks() as group:
            for other in peer.roster:
                if other != peer.id:
                    group.start(ask(other))


def arm(mode: str, amount: float) -> Callable[[], None]:
    """Prepare the death of this life; what to call when a block is under way."""
    if mode == "time":
        timer = threading.Timer(amount, die)
        timer.daemon = True
        timer.start()
    elif mode == "commit":
        # In the middle of writing: after the bytes, before or after they are on the disk.
        fsync, left = os.fsync, [int(amount)]

        def counted(handle: int) -> None:
            left[0] -= 1
            if left[0] == 0 and amount % 1 < 0.5:
                die()
            fsync(handle)
            if left[0] == 0:
                die()

        os.fsync = counted
    blocks = [int(amount)]

    def sending() -> None:
        blocks[0] -= 1
        if mode == "block" and blocks[0] == 0:
            timer = threading.Timer(amount % 1 / 100, die)
            timer.daemon = True
            timer.start()

    return sending


def main() -> None:
    peer, port, folder, mode, amount = sys.argv[1:]
    number, place = int(peer), Path(folder)
    journal = Journal(place / f"journal-{number}")
    journal("process", os.getpid(), mode, amount)
    sending = arm(mode, float(amount))
    founder = ("127.0.0.1", int(port))
    store = place / f"store-{number}"
    store.mkdir(exist_ok=True)
    joining = Joining(
        listen=founder if number == 0 else ("127.0.0.1", 0),
        bootstrap=() if number == 0 else (founder,), peer=number, gone_s=0.6, wait_for=START_WITH,
        identity=Identity.load_or_new(store / "key"),
    )  # fmt: skip
    states: list[str] = []

    def tell(status: Any, run: Any) -> None:
        if status.state not in states:
            states.append(status.state)
            journal("state", status.state)

    try:
        run = join_live(
            Ledger(journal, sending), Network(PEERS), joining, tell=tell,
            settings=LiveSettings(store_dir=str(store), start_s=START_S, horizon_s=20.0),
        )  # fmt: skip
    except ShoalError as error:
        journal("error", type(error).__name__, error)
        raise SystemExit(3) from None
    journal("end", run.finished)
