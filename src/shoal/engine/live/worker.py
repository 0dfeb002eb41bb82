"""A thread that works while the loop keeps answering."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from time import perf_counter
from typing import Any

from shoal.tensor.threads import one_thread

Done = Callable[[Any, BaseException | None, float], None]


class Worker:
    """Runs jobs one after the other and hands each outcome to the loop.

    `then(result, error, seconds)` is called in the loop's thread. A job whose `wanted()` is False
    when its turn comes is skipped, and its `then` is not called. The thread is a daemon: a job that
    never ends cannot keep the process alive.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._loop = loop
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Callable[[], bool], Done] | None] = (
            SimpleQueue()
        )
        self._thread = threading.Thread(target=self._work, name=f"shoal {name}", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], Any], wanted: Callable[[], bool], then: Done) -> None:
        self._jobs.put((job, wanted, then))

    def stop(self, timeout_s: float) -> bool:
        """Finish the job at hand and end; whether that took at most `timeout_s`."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        with one_thread():
            while (task := self._jobs.get()) is not None:
                job, wanted, then = task
                if wanted():
                    self._do(job, then)
                del task, job, wanted, then  # or an idle thread would keep the last tensors alive

    def _do(self, job: Callable[[], Any], then: Done) -> None:
        result, error = None, None
        begin = perf_counter()
        try:
            result = job()
        except BaseException as raised:
            # The thread's edge: whoever waits for the job gets whatever it raised.
            error = raised
        seconds = perf_counter() - begin
        try:
            self._loop.call_soon_threadsafe(then, result, error, seconds)
        except RuntimeError:
            # The loop is closed: the run is over and nobody waits.
            return
