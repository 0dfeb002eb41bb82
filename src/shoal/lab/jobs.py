"""Cells in spawned processes. Never forked: a fork after torch is imported is slow or hangs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from shoal.base.errors import ShoalError, UsageError
from shoal.lab.cell import Cell, Launcher, execute, gone
from shoal.lab.store import Store, decode_run, encode_run, save_params
from shoal.world.record import Run


@dataclass(frozen=True)
class Outcome:
    """A cell with its run, or with the error that it ended in."""

    cell: Cell
    run: Run | None
    error: str = ""
    key: str | None = None


def in_processes(
    waiting: list[tuple[Cell, str | None]], launcher: Launcher, store: Store | None, jobs: int
) -> Iterator[Outcome]:
    """Outcomes in the order in which they finish. Leaving the loop early ends the processes."""
    _check_picklable(waiting, launcher)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(jobs, len(waiting)), multiprocessing.get_context("spawn"), _start_worker
    )
    try:
        futures = {}
        for cell, key in waiting:
            path = store.params_path(key) if store is not None and key is not None else None
            futures[pool.submit(_work, cell, launcher, path)] = (cell, key)
        for future in as_completed(futures):
            cell, key = futures[future]
            try:
                data, error = future.result()
            except BrokenProcessPool:
                raise ShoalError(
                    f"a worker process died while {cell.arm}, seed {cell.seed} or a cell beside "
                    "it ran (out of memory? lower --jobs); what had finished is stored"
                ) from None
            if data is not None and store is not None and key is not None:
                store.put_encoded(key, cell, data)
            yield Outcome(cell, decode_run(data) if data is not None else None, error, key)
        pool.shutdown()
    except BaseException:
        # A cell may have minutes to go; Ctrl-C means now. What is stored is whole.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise


def _check_picklable(waiting: list[tuple[Cell, str | None]], launcher: Launcher) -> None:
    try:
        pickle.dumps(([cell for cell, _ in waiting], launcher))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"jobs: a live object cannot be sent to another process: {error} "
            "(define its class at the top of a module, or use jobs=1)"
        ) from None


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal's group; the parent decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Processes share the cores, so each gets one thread; torch reads this when it is imported.
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A parent that was killed cannot end its workers, and they would wait for it for good."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(cell: Cell, launcher: Launcher, params: Path | None) -> tuple[bytes | None, str]:
    """In the worker: run a cell, save its parameters, return the encoded run or the error."""
    try:
        run = execute(cell, launcher, None)
    except UsageError:
        raise
    except ShoalError as error:
        return None, f"{type(error).__name__}: {error}"
    if params is not None and run.final:
        save_params(run, params, gone(cell))
    return encode_run(run), ""
