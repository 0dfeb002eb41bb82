"""How updates get from one aggregator to the next on a real machine, and what that takes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from statistics import median
from typing import Any

import numpy as np

from shoal.base.stopwatch import Stopwatch
from shoal.parts.serving.shared_object_store import Mapped, SharedObjectStore
from shoal.parts.serving.weighted_sum import accumulate

TRANSPORTS = ("shared", "bytes", "socket", "broker")
_LOOPBACK = ("127.0.0.1", 0)
WARM_UP = 2


@dataclass(frozen=True)
class Hop:
    """wall_s, cpu_s: the median wave, the processor time of all processes; error: largest relative
    difference of the receiver's last sum from the flat weighted sum."""

    wall_s: float
    cpu_s: float
    error: float


def read_into(source: Connection, buffer: np.ndarray) -> None:
    """Fill an array from a connection's descriptor, without a copy in between."""
    octets: Any = buffer.view(np.uint8)
    view = memoryview(octets)
    while view:
        count = os.readv(source.fileno(), [view])
        if not count:
            raise EOFError
        view = view[count:]


def write_from(target: Connection, buffer: np.ndarray) -> None:
    """Write an array to a connection's descriptor, as it lies."""
    octets: Any = buffer.view(np.uint8)
    view = memoryview(octets)
    while view:
        view = view[os.writev(target.fileno(), [view]) :]


def receive(control: Connection, transport: str, size: int) -> None:
    """The receiving aggregator: adds each update to its sum, in a process of its own."""
    watch = Stopwatch()
    data: Any = None
    if transport != "shared":
        with Listener(_LOOPBACK) as listener:
            control.send(listener.address)
            data = listener.accept()
    buffer, total = np.zeros(size, np.float32), np.zeros(size, np.float32)
    with Mapped() as mapped:
        while (order := control.recv()) is not None:
            if order == "cpu":
                control.send(watch.cpu_s)
                continue
            if order == "sum":
                octets: Any = total.view(np.uint8)
                control.send_bytes(octets)
                continue
            factor, first, key = order
            if transport == "shared":
                update = mapped.view(key)
            elif transport == "bytes":
                read_into(data, buffer)
                update = buffer
            else:
                update = data.recv()
            accumulate(total, update, factor, first)
            control.send("added")


def relay(control: Connection, receiver: Any) -> None:
    """The broker: takes a message whole, then hands it on."""
    watch = Stopwatch()
    with Listener(_LOOPBACK) as listener:
        control.send(listener.address)
        inward: Any = listener.accept()
    outward: Any = Client(receiver)
    while (order := control.recv()) is not None:
        if order == "pass":
            outward.send_bytes(inward.recv_bytes())
        control.send(watch.cpu_s)


@contextmanager
def _process(target: Any, *args: Any) -> Iterator[Connection]:
    """A process that gets a connection as its first argument; told to end, it is gone."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
        ours.send(None)
        process.join(10.0)
    finally:
        ours.close()
        process.kill()
        process.join()
        process.close()


@dataclass(frozen=True, eq=False)
class _Way:
    """From this process to the receiver: control, the descriptor for numbers, and who passes on."""

    transport: str
    receiver: Connection
    data: Any = None
    broker: Connection | None = None

    def send(
        self, store: SharedObjectStore, update: np.ndarray, factor: float, first: bool
    ) -> None:
        """One update, until it is in the sum."""
        key = b""
        if self.transport == "shared":
            key = store.reserve()
            np.copyto(store.view(key), update)
        if self.broker is not None:
            self.broker.send("pass")
        self.receiver.send((factor, first, key))
        if self.transport == "bytes":
            write_from(self.data, update)
        elif self.transport != "shared":
            self.data.send(update)
        self.receiver.recv()
        if self.broker is not None:
            self.broker.recv()
        if key:
            store.release(key)

    def cpu_s(self) -> float:
        """Processor seconds of the other processes since their start."""
        used = 0.0
        for other in filter(None, (self.receiver, self.broker)):
            other.send("cpu")
            used += other.recv()
        return used


@contextmanager
def _way(transport: str, size: int) -> Iterator[_Way]:
    with _process(receive, transport, size) as receiver:
        if transport == "shared":
            yield _Way(transport, receiver)
            return
        address = receiver.recv()
        if transport != "broker":
            with Client(address) as data:
                yield _Way(transport, receiver, data)
            return
        with _process(relay, address) as broker, Client(broker.recv()) as data:
            yield _Way(transport, receiver, data, broker)


def measured(transport: str, updates: np.ndarray, times: int, waves: int = 1) -> Hop:
    """Send `times` of the updates [count, size] in turn, each when the last one is in the sum; so
    in each of `waves`. What goes from one aggregator to the next is weighted already.
    """
    count, size = updates.shape
    with _way(transport, size) as way, SharedObjectStore(size, 2) as store:
        for place in range(WARM_UP):
            way.send(store, updates[place % count], 1.0, True)
        wall_s, cpu_s = [], []
        for _ in range(waves):
            before_s, watch = way.cpu_s(), Stopwatch()
            for place in range(times):
                way.send(store, updates[place % count], 1.0, not place)
            wall_s.append(watch.wall_s)
            cpu_s.append(watch.cpu_s + way.cpu_s() - before_s)
        way.receiver.send("sum")
        total = np.frombuffer(way.receiver.recv_bytes(), np.float32)
    exact = np.zeros(size)
    for place in range(times):
        exact += updates[place % count]
    error = float(np.abs(total - exact).max() / np.abs(exact).max())
    return Hop(median(wall_s), median(cpu_s), error)
