"""What the peers of one process have committed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from shoal.engine.live.store import DiskStore
from shoal.engine.live.worker import Worker
from shoal.kernel.waits import Wait
from shoal.wire.codec import is_tensor

if TYPE_CHECKING:
    from shoal.engine.live.driver import Driver


class Memory:
    """Stores by peer. With a directory, a commit returns when the disk has it.

    Writing takes a thread of its own: a commit must neither stop the loop nor wait for a long
    computation.
    """

    def __init__(self, driver: Driver, directory: str, peers: Collection[int]) -> None:
        self._driver = driver
        self._disks = {peer: DiskStore(directory, peer) for peer in peers} if directory else {}
        self._items: dict[int, dict[str, Any]] = {peer: {} for peer in peers}
        for peer, disk in self._disks.items():
            self._items[peer] = disk.load()
            if disk.repaired:
                driver.closed(peer, f"lost the end of its store: {disk.repaired}")
        self._worker = Worker(driver.loop, "store") if directory else None

    def get(self, peer: int, key: str) -> Any:
        value: Any = self._items[peer].get(key)
        # The reader owns what it gets; what is durable must not change with it.
        return value.clone() if is_tensor(value) else value

    def commit(self, peer: int, items: Mapping[str, Any]) -> Wait:
        wait = Wait(self._driver.ready)
        frozen = {key: value.clone() if is_tensor(value) else value for key, value in items.items()}
        if self._worker is None:
            self._driver.loop.call_soon(self._kept, peer, wait, frozen)
        else:
            disk = self._disks[peer]
            self._worker.submit(
                lambda: disk.commit(frozen),
                # A crash before the write began: nothing of it becomes durable.
                lambda: not wait.done,
                lambda _, error, seconds: self._written(peer, wait, frozen, error),
            )
        return wait

    def lose(self, peer: int) -> None:
        """Forget everything that a peer committed."""
        self._items[peer] = {}
        if self._worker is not None:
            disk = self._disks[peer]
            self._worker.submit(disk.clear, lambda: True, lambda *_: self._items[peer].clear())

    def when_written(self, action: Callable[[], None]) -> None:
        """Call `action` once no commit is on its way any more."""
        if self._worker is None:
            action()
        else:
            self._worker.submit(lambda: None, lambda: True, lambda *_: action())

    def stop(self, timeout_s: float) -> None:
        if self._worker is not None:
            self._worker.stop(timeout_s)

    def _kept(self, peer: int, wait: Wait, items: dict[str, Any]) -> None:
        if not wait.done:
            self._items[peer].update(items)
            wait.resolve(None)
            self._driver.settle()

    def _written(
        self, peer: int, wait: Wait, items: dict[str, Any], error: BaseException | None
    ) -> None:
        if error is None:
            self._items[peer].update(items)
            wait.resolve(None)
        else:
            wait.fail(error)
        self._driver.settle()
