"""The connections of one process: how many there may be, who may call now, who must go.

Every connection is one descriptor, or two when both of its ends are in this process. When they run
short, those that were not used for longest are closed, with nothing lost: a caller says its last
word when nothing of its own is on the way, and calls again when it has something to send.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

from shoal.base.errors import UsageError
from shoal.engine.live.attention import Attention
from shoal.engine.live.turns import Turns

if TYPE_CHECKING:
    from shoal.engine.live.settings import LiveSettings

LEAST = 8
"""Connections that a process must have room for, whatever runs in it."""
_RESERVED = 32
# Above this share of what there may be, connections are closed ahead of need.
_FULL = 0.9
# A handshake that takes longer waits for the other side, and does not keep this process busy.
_BUSY_S = 0.25
# After that it is not expected any more that a connection which was asked to close does.
_ASKED_S = 1.0
# How many users that cannot do without are looked at in vain.
_LOOKED_AT = 64
_RETRY_S = 0.01


class User(Protocol):
    """What uses connections, and can be asked to do without them."""

    used_s: float

    def retire(self) -> bool:
        """Begin to close them with nothing lost; False while they are needed."""
        ...


class Caller(Protocol):
    """A connection that is to be opened."""

    def start(self) -> None:
        """Take a descriptor and call."""
        ...

    def postpone(self) -> bool:
        """Give the descriptor back and ask the pool again, unless the peer has answered."""
        ...


def descriptors() -> tuple[int, int]:
    """How many descriptors this process may have, and how many it has."""
    if sys.platform == "win32":
        return 1 << 16, 64  # Sockets are no files there, and hardly limited.
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most == resource.RLIM_INFINITY:
        most = 1 << 24
    try:
        return most, len(os.listdir("/dev/fd"))
    except OSError:
        return most, 64


def room(peers: int) -> int:
    """How many connections a process may have whose peers will listen; UsageError for too few."""
    most, used = descriptors()
    left = most - used - peers - _RESERVED
    if left < LEAST:
        raise UsageError(
            f"live: {most} descriptors, of which {used} are in use; {peers} peers in one process "
            f"need {peers} to listen, {_RESERVED} for files, and {LEAST} or more for connections "
            f"(`ulimit -n {most - left + max(LEAST, 2 * peers)}`, or more processes)"
        )
    return left


class Pool:
    """The connections of one process. `attention` is the clock of its time-outs.

    most: of descriptors for connections, at first; None = no limit until the system says so.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, settings: LiveSettings, most: int | None = None
    ) -> None:
        self.attention = Attention(loop)
        self.turns = Turns(loop)
        self._most = self.most = 1 << 24 if most is None else most
        self.open = 0
        """descriptors of connections"""
        self.retired = 0
        """users that were asked to close because there was too little room"""
        self._told = False
        self._loop = loop
        self._settings = settings
        self._users: OrderedDict[User, None] = OrderedDict()
        self._leaving: dict[User, float] = {}
        self._opening: dict[Caller, float] = {}
        self._waiting: OrderedDict[Caller, None] = OrderedDict()
        self._members = 0
        self._served: asyncio.Handle | None = None
        self._retry: asyncio.TimerHandle | None = None

    # Life.

    def enter(self) -> None:
        """A transport of this process opens."""
        self._members += 1
        self.attention.begin()

    def leave(self) -> None:
        """It closes; the last one stops all timers."""
        self._members -= 1
        if self._members:
            return
        self.attention.stop()
        self.turns.stop()
        for handle in (self._served, self._retry):
            if handle is not None:
                handle.cancel()

    # Use.

    def touch(self, user: User) -> None:
        """It is in use now."""
        user.used_s = self._loop.time()
        self._users[user] = None
        self._users.move_to_end(user)

    def forget(self, user: User) -> None:
        """It has no connections any more."""
        self._users.pop(user, None)
        self._leaving.pop(user, None)

    def idle(self, now_s: float) -> None:
        """Close what was not used for `settings.idle_s`."""
        # Whatever else took the descriptors may have given them back.
        self.most = min(self._most, self.most + 1)
        while self._users:
            user = next(iter(self._users))
            if now_s - user.used_s < self._settings.idle_s:
                return
            user.retire()
            # Also one that is needed goes to the end, so that it is not asked all the time.
            self.touch(user)

    def shortage(self) -> str:
        """Once, when connections had to be closed that somebody may miss: what is short of what."""
        if self._told or not self.retired:
            return ""
        self._told = True
        return (
            f"shares {self.most} descriptors for connections with the peers of its process: those "
            "used least recently are closed and opened again (raise it with `ulimit -n`, or use "
            "more processes)"
        )

    # Descriptors.

    @property
    def has_room(self) -> bool:
        """Whether one more caller may be let in."""
        return self.open < self.most

    def took(self) -> None:
        """A descriptor was opened."""
        self.open += 1
        self._relieve()

    def gave(self) -> None:
        """A descriptor was closed."""
        self.open -= 1
        if self._waiting:
            self._serve_soon()

    def exhausted(self) -> None:
        """The system gave no descriptor, whatever was thought."""
        self.most = max(LEAST, min(self.most, self.open))
        # Calls that hold all descriptors, with none left to let them in, would wait for good.
        for caller in list(self._opening)[-(len(self._opening) + 1) // 2 :]:
            caller.postpone()
        self._relieve()

    def _relieve(self) -> None:
        """Ask as many users to close as there is too little room, least recently used first."""
        excess = self.open + len(self._opening) + len(self._waiting) - int(_FULL * self.most)
        if excess <= 0:
            return
        now_s = self._loop.time()
        for user, asked_s in list(self._leaving.items()):
            if now_s - asked_s < _ASKED_S:
                break
            del self._leaving[user]
        for _ in range(min(len(self._users), 4 * excess + _LOOKED_AT)):
            if not self._users or len(self._leaving) >= excess:
                return
            user = next(iter(self._users))
            self.touch(user)
            if user not in self._leaving and user.retire():
                self._leaving[user] = now_s
                self.retired += 1

    # Callers.

    def call(self, caller: Caller) -> None:
        """Let it start: at once, or when there is room and few others are busy with handshakes."""
        if not self._waiting and self._may_call():
            self._start(caller)
            return
        self._waiting[caller] = None
        self._relieve()
        self._serve_soon()

    def settled(self, caller: Caller) -> None:
        """It has connected, or was given up."""
        self._opening.pop(caller, None)
        self._waiting.pop(caller, None)
        if self._waiting:
            self._serve_soon()

    def again(self, caller: Caller) -> None:
        """It needs a descriptor that is not there: first in line, in a moment."""
        self._opening.pop(caller, None)
        self._waiting[caller] = None
        self._waiting.move_to_end(caller, last=False)
        self._serve_later()

    def _may_call(self) -> bool:
        """Each call needs a descriptor here, and one more if the called peer is here too."""
        if self.open + len(self._opening) + 1 >= self.most:
            return False
        now_s = self.attention.now_s
        busy = sum(now_s - began_s < _BUSY_S for began_s in self._opening.values())
        return busy < self._settings.handshakes

    def _start(self, caller: Caller) -> None:
        self._opening[caller] = self.attention.now_s
        caller.start()

    def _serve_soon(self) -> None:
        if self._served is None:
            self._served = self._loop.call_soon(self._serve)

    def _serve_later(self) -> None:
        if self._retry is None:
            self._retry = self._loop.call_later(_RETRY_S, self._retried)

    def _retried(self) -> None:
        self._retry = None
        self._serve()

    def _serve(self) -> None:
        self._served = None
        # What was needed before may not be any more.
        self._relieve()
        while self._waiting and self._may_call():
            self._start(self._waiting.popitem(last=False)[0])
        if self._waiting:
            self._serve_later()
