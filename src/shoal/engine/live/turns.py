"""Whose connection is read next: those who send little first, the others one after the other."""

from __future__ import annotations

import asyncio
from typing import Protocol

_SHARE = 16


class Reader(Protocol):
    """What can be read for a bounded time."""

    def go_on(self) -> None:
        """Take one turn; join the line again for more."""
        ...


class Turns:
    """The line of the connections that used up their last turn.

    One of them, or a 16th of a long line, is served after each time that the loop has looked for
    news, so whoever did not use up its turn waits for one turn of a flood, though many connections
    flood this process. A line grows long when all have too little time, floods or not; it must not
    take a look for each of them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._line: dict[Reader, None] = {}
        self._next: asyncio.Handle | None = None

    def join(self, reader: Reader) -> None:
        """Wait in line, once."""
        self._line[reader] = None
        if self._next is None:
            self._after_news()

    def waits(self, reader: Reader) -> bool:
        """Whether it is in line."""
        return reader in self._line

    def stop(self) -> None:
        """Serve nobody any more."""
        self._line.clear()
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _after_news(self) -> None:
        # Not `call_soon`: the loop calls that before what it finds when it looks for news, and
        # timers that are due after it.
        self._next = self._loop.call_later(0.0, self._serve)

    def _serve(self) -> None:
        self._next = None
        line = self._line
        for _ in range(-(-len(line) // _SHARE)):
            if not line:
                break
            reader = next(iter(line))
            del line[reader]
            reader.go_on()
        if line and self._next is None:
            self._after_news()
