"""Local work: one call at a time in one thread, exactly `function(*args, *static)`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

from shoal.base.errors import UsageError
from shoal.engine.live.worker import Worker
from shoal.kernel.peer import Batching, Cost
from shoal.kernel.waits import Wait

if TYPE_CHECKING:
    from shoal.engine.live.driver import Driver


class Compute:
    """The computations of the peers of one process. Their duration is real; `cost` is only counted.

    A result that nobody waits for any more is discarded, and a call that was cancelled before its
    turn does not run.
    """

    def __init__(self, driver: Driver) -> None:
        self.flops = 0.0
        self._driver = driver
        self._worker = Worker(driver.loop, "compute")
        self._free_s: dict[int, float] = {}

    def submit(
        self, peer: int, function: Callable[..., Any], args: tuple[Any, ...],
        static: tuple[Hashable, ...], cost: Cost | None, batch: Batching,
    ) -> Wait:  # fmt: skip
        if batch not in ("leading", "vmap", "never"):
            raise UsageError(f"compute: batch={batch!r}; need 'leading', 'vmap' or 'never'")
        from shoal.tensor import (
            tree,  # has torch, which a program without computations need not load
        )

        tree.flatten(args)  # arguments that could not be batched in simulation are refused here too
        if cost is not None:
            self.flops += cost.flops
        wait = Wait(self._driver.ready)
        self._worker.submit(
            partial(function, *args, *static),
            lambda: not wait.done,
            partial(self._computed, peer, wait),
        )
        return wait

    def forget(self, peer: int) -> None:
        """A crash ends what the peer's device was doing."""
        self._free_s.pop(peer, None)

    def stop(self, timeout_s: float) -> bool:
        return self._worker.stop(timeout_s)

    def _computed(
        self, peer: int, wait: Wait, result: Any, error: BaseException | None, seconds: float
    ) -> None:
        extra_s = (self._driver.slow.get(peer, 1.0) - 1.0) * seconds
        now = self._driver.loop.time()
        free = self._free_s.get(peer, 0.0)
        if extra_s <= 0.0 and free <= now:
            self._hand_over(wait, result, error)
            return
        # A slow device serves its calls one after the other, and so do its delays.
        due = max(now, free) + max(extra_s, 0.0)
        self._free_s[peer] = due
        self._driver.loop.call_at(due, self._hand_over, wait, result, error)

    def _hand_over(self, wait: Wait, result: Any, error: BaseException | None) -> None:
        self._driver.events += 1
        if error is not None:
            wait.fail(error)
        else:
            wait.resolve(result)
        self._driver.settle()
