"""Peer programs that call each other, for both engines; importable by a spawned process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from shoal.base.errors import Cancelled, PeerError
from shoal.kernel.peer import Peer
from shoal.parts.overlay.rpc import Request, Rpc, RpcSettings
from shoal.world.record import Run

SMALL = RpcSettings(
    inline_bytes=256, piece_bytes=512, window_bytes=4096, retry_s=0.3, retry_most_s=1.0
)


def noise(size: int, seed: int) -> bytes:
    return hashlib.shake_128(seed.to_bytes(4, "big")).digest(size)


@dataclass(frozen=True)
class Calling:
    """Every peer calls others with what is theirs to change, and records what became of it.

    Each call has a number of its own; the handler counts its runs in a list that outlives crashes
    of the peer, as an outside effect would.
    """

    calls: int = 12
    gap_s: float = 0.3
    timeout_s: float = 4.0
    settle_s: float = 3.0
    settings: RpcSettings = SMALL

    async def run(self, peer: Peer) -> None:
        rpc = Rpc(peer, self.settings)

        async def add(request: Request) -> bytes:
            peer.record("ran", int.from_bytes(request.payload[:6], "big"))
            if request.payload[6] % 3 == 0:
                await peer.sleep_until(peer.now() + 0.4)
            return request.payload * (1 + request.payload[6] % 2)

        async def echo(request: Request) -> None:
            async for item in request:
                await request.send(item)

        rpc.serve("count.add", add)
        rpc.serve_stream("count.echo", echo)
        others = [p for p in peer.roster if p != peer.id]
        async with peer.tasks() as group:
            rpc.start(group)
            end_s = self.calls * self.gap_s + self.timeout_s + self.settle_s
            for number in range(int(peer.now() / self.gap_s) + 1, self.calls):
                await peer.sleep_until(max(peer.now(), number * self.gap_s))
                to = peer.choice(others, "to", number)
                group.start(self._one(peer, rpc, to, number))
            await peer.sleep_until(max(peer.now(), end_s))
            rpc.stop()
        peer.record("params", torch.zeros(1))

    async def _one(self, peer: Peer, rpc: Rpc, to: int, number: int) -> None:
        # Every life has its own numbers: a call of an earlier one is another call.
        name = (rpc.life * 64 + number) % (1 << 30) * 16 + peer.id
        size = [40, 3000, 300][number % 3]
        payload = name.to_bytes(6, "big") + bytes([number]) + noise(size, number)
        label, began_s = str(name), peer.now()
        deadline = began_s + self.timeout_s
        try:
            if number % 4 == 3:
                right = await self._stream(rpc, to, payload, deadline)
            else:
                said = await rpc.call(to, "count.add", payload, deadline=deadline)
                right = said == payload * (1 + number % 2)
                peer.record("ok", float(right), call=label)
        except PeerError as error:
            peer.record("failed", 1.0, call=label, error=type(error).__name__)
        else:
            peer.record("right", float(right))
        peer.record("late_s", max(0.0, peer.now() - deadline))

    async def _stream(self, rpc: Rpc, to: int, payload: bytes, deadline: float) -> bool:
        items = [payload[:n] for n in (0, 7, 600, len(payload))]
        heard = []
        async with rpc.stream(to, "count.echo", deadline=deadline) as stream:
            for item in items:
                await stream.send(item)
                heard.append(await stream.receive())
            await stream.end()
            heard.append(await stream.receive())
        return heard == [*items, None]


def counts(run: Run) -> dict[int, int]:
    """How often each call ran."""
    found: dict[int, int] = {}
    for row in run.series("ran"):
        found[int(row.value)] = found.get(int(row.value), 0) + 1
    return found


# Invariants.


def nothing_runs_twice(run: Run) -> str | None:
    """At most once, whatever is lost and whoever restarts."""
    twice = [name for name, count in counts(run).items() if count > 1]
    return f"call {twice[0]} ran {counts(run)[twice[0]]} times" if twice else None


def what_is_answered_ran_and_is_right(run: Run) -> str | None:
    """An answer is that of a handler that ran."""
    ran = counts(run)
    for row in run.series("ok"):
        if ran.get(int(dict(row.labels)["call"]), 0) != 1:
            return f"peer {row.peer} got an answer of a call that ran {ran} times"
    wrong = [row for row in run.series("right") if not row.value]
    return f"peer {wrong[0].peer} got a wrong answer at {wrong[0].time_s} s" if wrong else None


def no_call_outlives_its_deadline(run: Run) -> str | None:
    """Every call ends by its deadline, with an answer or an error; clocks that jump apart."""
    if any(each.what.startswith("skew") for each in run.happenings):
        return None
    late = [row for row in run.series("late_s") if row.value > 0.01]
    return f"peer {late[0].peer} waited {late[0].value} s too long" if late else None


@dataclass(frozen=True)
class Heartbeats:
    """Peer 0 sends tensors to peer 1 and calls it all the while; records how long calls take."""

    tensor_bytes: int
    tensors: int
    settings: RpcSettings = RpcSettings()  # noqa: RUF009
    compression: str = ""

    async def run(self, peer: Peer) -> None:
        rpc = Rpc(peer, self.settings)
        got: list[torch.Tensor] = []

        async def beat(request: Request) -> bytes:
            return b"alive"

        async def take(request: Request) -> bytes:
            got.append(request.payload)
            return b""

        rpc.serve("peer.beat", beat)
        rpc.serve("peer.take", take)
        tensor = torch.arange(self.tensor_bytes // 4, dtype=torch.float32, device="cpu")
        async with peer.tasks() as group:
            rpc.start(group)
            if peer.id == 0:
                beats = group.start(self._beat(peer, rpc))
                for _ in range(self.tensors):
                    await rpc.call(
                        1, "peer.take", tensor, deadline=60.0, compression=self.compression
                    )
                peer.record("sent_s", peer.now())
                beats.cancel()
                await rpc.call(1, "peer.beat", deadline=60.0)
            else:
                while len(got) < self.tensors:
                    await peer.sleep_until(peer.now() + 0.05)
                peer.record("right", float(all(torch.equal(each, tensor) for each in got)))
                await peer.sleep_until(peer.now() + 1.0)
            rpc.stop()
        peer.record("params", tensor[:4])

    async def _beat(self, peer: Peer, rpc: Rpc) -> None:
        while True:
            began_s = peer.now()
            try:
                await rpc.call(1, "peer.beat", deadline=began_s + 30.0)
            except Cancelled:
                return
            peer.record("beat_s", peer.now() - began_s)
            await peer.sleep_until(peer.now() + 0.05)
