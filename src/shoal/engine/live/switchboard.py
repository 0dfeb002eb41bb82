"""What a relay keeps: who can be rung, which calls wait for an answer, and what pairs have used."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass

from shoal.engine.live import introduction
from shoal.engine.live.introduction import ERRORS, Ring
from shoal.engine.live.line import PIECE_BYTES, Pipe
from shoal.kernel.paths import RelayLimits

_CALLS_PER_PLACE = 4


@dataclass(eq=False)
class Guest:
    """A peer with a reservation, and the connection on which it is rung."""

    peer: int
    pipe: Pipe


@dataclass(eq=False)
class _Used:
    began_s: float
    used: int = 0


class Switchboard:
    """Connects callers to guests within limits; everything it keeps is bounded."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: RelayLimits, answer_s: float):
        self._loop = loop
        self._limits = limits
        self._answer_s = answer_s
        self._guests: dict[int, Guest] = {}
        self._waiting: dict[int, tuple[int, asyncio.Future[Pipe]]] = {}
        self._pairs: dict[tuple[int, int], _Used] = {}
        self._connected: set[Pipe] = set()

    def close(self) -> None:
        for guest in self._guests.values():
            guest.pipe[1].transport.abort()
        for _, future in self._waiting.values():
            future.cancel()
        for pipe in self._connected:
            pipe[1].transport.abort()
        self._guests.clear()

    # Guests.

    def has(self, peer: int) -> bool:
        return peer in self._guests

    def has_room(self, peer: int) -> bool:
        return peer in self._guests or len(self._guests) < self._limits.reservations

    def enter(self, peer: int, pipe: Pipe) -> Guest:
        """A reservation; the peer's earlier one ends (it proved who it is)."""
        earlier = self._guests.get(peer)
        if earlier is not None:
            earlier.pipe[1].transport.abort()
        guest = self._guests[peer] = Guest(peer, pipe)
        return guest

    async def stay(self, guest: Guest) -> None:
        """Until the guest is gone: it says nothing, and whatever it says ends it."""
        try:
            with suppress(OSError):
                await guest.pipe[0].read(1)
        finally:
            guest.pipe[1].transport.abort()
            if self._guests.get(guest.peer) is guest:
                del self._guests[guest.peer]

    # Calls.

    async def ring(self, caller: int, peer: int) -> Pipe | None:
        """A connection that the guest opens for this caller; None when it does not, or may not."""
        guest = self._guests.get(peer)
        places = _CALLS_PER_PLACE * self._limits.reservations
        pair = (min(caller, peer), max(caller, peer))
        busy = len(self._waiting) >= places or len(self._connected) >= 2 * places
        if guest is None or busy or self._room(pair) is None:
            return None
        call = int.from_bytes(os.urandom(7), "little")
        future: asyncio.Future[Pipe] = self._loop.create_future()
        self._waiting[call] = (peer, future)
        try:
            async with asyncio.timeout(self._answer_s):
                await introduction.say(guest.pipe, Ring(call, caller))
                return await future
        except ERRORS:
            return None
        finally:
            del self._waiting[call]

    def answered(self, peer: int, call: int, pipe: Pipe) -> bool:
        """The guest opened a connection for a call; False when nobody waits for it."""
        expected, future = self._waiting.get(call, (-1, None))
        if future is None or expected != peer or future.done():
            return False
        future.set_result(pipe)
        return True

    # Circuits.

    def _room(self, pair: tuple[int, int]) -> _Used | None:
        """What the pair has used; None when it may not talk now."""
        limits, now_s = self._limits, self._loop.time()
        while self._pairs:
            oldest = next(iter(self._pairs))
            if self._pairs[oldest].began_s >= now_s - 2 * limits.circuit_s:
                break
            del self._pairs[oldest]
        used = self._pairs.get(pair)
        if used is None:
            if len(self._pairs) >= limits.reservations * limits.reservations:
                return None
            used = self._pairs[pair] = _Used(now_s)
        over = now_s > used.began_s + limits.circuit_s or used.used >= limits.circuit_bytes
        return None if over else used

    async def connect(self, pair: tuple[int, int], one: Pipe, other: Pipe) -> None:
        """Pass bytes on both ways until either side ends it or the pair's limits are reached."""
        used = self._room((min(pair), max(pair)))
        self._connected |= {one, other}
        try:
            if used is None:
                return
            left_s = used.began_s + self._limits.circuit_s - self._loop.time()
            ways = [
                self._loop.create_task(self._pass(one[0], other[1], used)),
                self._loop.create_task(self._pass(other[0], one[1], used)),
            ]
            try:
                await asyncio.wait(ways, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
        finally:
            self._connected -= {one, other}
            for _, writer in (one, other):
                writer.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, used: _Used
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(PIECE_BYTES):
                used.used += len(data)
                if used.used > self._limits.circuit_bytes:
                    return
                writer.write(data)
                await writer.drain()
