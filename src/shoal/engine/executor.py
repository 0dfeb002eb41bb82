"""Where arithmetic runs. The scheduler stays one deterministic process; calls are farmed out."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from shoal.tensor import tree


class Executor(Protocol):
    """Runs a pure, module-level function; tasks are independent of each other."""

    def run(self, function: Callable[..., Any], batches: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`[function(*batch) for batch in batches]`, possibly at the same time."""
        ...

    @property
    def workers(self) -> int:
        """How many batches run at the same time; 1 means do not split for speed."""
        ...


class Local:
    """This process."""

    workers = 1

    def run(self, function: Callable[..., Any], batches: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [function(*batch) for batch in batches]


class Threads:
    """Threads of this process: torch lets go of the interpreter while it computes.

    Nothing is copied or pickled, so this is the faster way for batches whose calls take longer
    than some ten microseconds each. One intra-op thread each, or they would fight for the cores:
    set `torch.set_num_threads(1)`. Results are bit-equal to `Local` for equal batches.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self.workers)

    def run(self, function: Callable[..., Any], batches: Sequence[tuple[Any, ...]]) -> list[Any]:
        if len(batches) == 1:
            return [function(*batches[0])]
        futures = [self._pool.submit(function, *batch) for batch in batches]
        return [future.result() for future in futures]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Processes:
    """A pool of spawned processes, one intra-op thread each.

    Functions and constants travel by pickle between processes of one user on one machine, never
    over a network. Results are bit-equal to `Local` for equal batches.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or os.cpu_count() or 1
        # Threads that spin while they wait take the cores of their neighbours.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._pool = ProcessPoolExecutor(
            self.workers, multiprocessing.get_context("spawn"), initializer=_one_thread
        )

    def run(self, function: Callable[..., Any], batches: Sequence[tuple[Any, ...]]) -> list[Any]:
        if len(batches) == 1:
            return [function(*batches[0])]
        futures = [self._pool.submit(_call, function, _out(batch)) for batch in batches]
        return [_in(future.result()) for future in futures]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _out(value: Any) -> tuple[list[Any], Any]:
    # numpy arrays pickle as one buffer; torch's own reduction would open a file per tensor.
    leaves, structure = tree.flatten(value)
    return [leaf.detach().cpu().numpy() for leaf in leaves], structure


def _in(packed: tuple[list[Any], Any]) -> Any:
    arrays, structure = packed
    return tree.unflatten(structure, [torch.from_numpy(array) for array in arrays])


def _call(function: Callable[..., Any], packed: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
    return _out(function(*_in(packed)))
