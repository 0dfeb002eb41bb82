"""An aggregator as a process: it adds objects of a shared store where they lie, keeping nothing."""

from __future__ import annotations

import signal
import struct
from multiprocessing.connection import Connection

from shoal.base.errors import ShoalError
from shoal.parts.serving.shared_object_store import KEY_BYTES, Mapped
from shoal.parts.serving.weighted_sum import accumulate

REQUEST = struct.Struct(f"<{KEY_BYTES}s{KEY_BYTES}sd?")
"""The sum's key, the addend's key, its factor, whether it is the first one."""

READY = ""
"""What a worker says as it starts: from now on silence means that it stands still."""


def serve(requests: Connection) -> None:
    """Until the other end closes, which it also does by being killed."""
    # Ctrl-C reaches the whole group; the owner decides what becomes of the sums.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Mapped() as mapped:
        try:
            requests.send(READY)
        except OSError:
            return
        while True:
            try:
                out, source, factor, first = REQUEST.unpack(requests.recv_bytes())
            except (EOFError, OSError):
                return
            problem = ""
            try:
                accumulate(mapped.view(out), mapped.view(source), factor, first)
            except ShoalError as error:
                problem = str(error)
            try:
                requests.send(problem)
            except OSError:
                return
