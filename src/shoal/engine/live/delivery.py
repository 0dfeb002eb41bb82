"""From `send` to a connection: encoding, counting, and the faults of links on the way."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import TYPE_CHECKING

from shoal.base.errors import MessageTooLarge, UsageError
from shoal.base.limits import Limits
from shoal.engine.live.proxy import Proxy
from shoal.kernel.mailbox import require_message
from shoal.kernel.runtime import Runtime
from shoal.kernel.waits import Wait
from shoal.wire import codec
from shoal.wire.message import Message, message_key
from shoal.world.faults import Fault

if TYPE_CHECKING:
    from shoal.engine.live.driver import Driver


def _too_large(kind: str, size: int, head: int, limits: Limits) -> MessageTooLarge:
    """What a receiver would refuse is refused where somebody can repair it."""
    if size > limits.frame_bytes:
        return MessageTooLarge(
            f"send: {kind} of {size} bytes; limit {limits.frame_bytes} (split it, or raise "
            "Limits.frame_bytes)"
        )
    return MessageTooLarge(
        f"send: {kind} has {head - codec.PREFIX.size} bytes outside of tensors; limit "
        f"{limits.header_bytes} (put bulk data into tensors or Packed)"
    )


class Delivery:
    """What the peers of one process send."""

    def __init__(self, driver: Driver) -> None:
        self.proxy = Proxy(driver.network.links, driver.plan.seed, driver.limits)
        self._driver = driver
        self._held: list[tuple[Fault, Runtime, int, int, bytearray]] = []

    def transmit(self, runtime: Runtime, to: int, message: Message, request: int) -> Wait | None:
        require_message(message.__class__)
        frame = codec.encode(message, request)
        driver = self._driver
        try:
            target = operator.index(to)
        except TypeError:
            target = -1
        if not 0 <= target < driver.network.peers:
            raise UsageError(f"send: no peer {to!r}; there are 0..{driver.network.peers - 1}")
        result, limits, kind = driver.result, driver.limits, message.__class__.__name__
        size = head = len(frame[0])
        for segment in frame[1:]:
            size += len(segment)
        if size > limits.frame_bytes or head - codec.PREFIX.size > limits.header_bytes:
            raise _too_large(kind, size, head, limits)
        result.messages_sent += 1
        result.bytes_sent[runtime.id] += size
        result.bytes_by_kind[kind] = result.bytes_by_kind.get(kind, 0) + size
        if self.proxy.quiet or target == runtime.id:
            return self._pass(runtime, target, frame)
        return self._through_faults(runtime, target, message, frame)

    def flush(self, runtime: Runtime, to: int) -> Wait | None:
        return self._driver.transports[runtime.id].flush(to)

    def _through_faults(
        self, runtime: Runtime, to: int, message: Message, frame: list[codec.Buffer]
    ) -> Wait | None:
        source, key = runtime.id, message_key(message.code, message.tag)
        if reason := self.proxy.stopped(source, to, key):
            self._driver.drop(reason)
            return None
        changed = self.proxy.flipped(source, key, frame)
        if changed is None:
            self._driver.drop("corrupt")
            return None
        fault = self.proxy.holding(source, to)
        if fault is None:
            return self._pass(runtime, to, changed)
        # Copied: whoever sent it may write to its tensors once `flushed` returns.
        copy = bytearray(b"".join(changed))
        self._held.append((fault, runtime, runtime.incarnation, to, copy))
        return None

    def _pass(self, runtime: Runtime, to: int, frame: list[codec.Buffer]) -> Wait | None:
        if to != runtime.id:
            return self._driver.transports[runtime.id].send(to, frame)
        copy = bytearray(b"".join(frame))
        self._driver.loop.call_soon(self._to_itself, runtime, runtime.incarnation, copy)
        return None

    def _to_itself(self, runtime: Runtime, incarnation: int, frame: bytearray) -> None:
        driver = self._driver
        if runtime.incarnation != incarnation:
            driver.drop("dead")
            return
        message, request = codec.decode(frame, driver.limits)
        driver.arrived(runtime.id, runtime.id, message, request, len(frame))
        driver.settle()

    def release(self, fault: Fault) -> None:
        """A hold ends: what it kept back goes on its way, or into another hold."""
        held, self._held = self._held, []
        for entry in held:
            kept_by, runtime, incarnation, to, frame = entry
            if kept_by is not fault:
                self._held.append(entry)
            elif runtime.incarnation != incarnation:
                self._driver.drop("dead")
            elif (other := self.proxy.holding(runtime.id, to)) is not None:
                self._held.append((other, runtime, incarnation, to, frame))
            else:
                self._pass(runtime, to, [frame])

    def forget(self, peers: Collection[int]) -> None:
        """Messages that are kept back for peers that crash are lost with them."""
        kept = [entry for entry in self._held if entry[3] not in peers]
        for _ in range(len(self._held) - len(kept)):
            self._driver.drop("dead")
        self._held = kept
