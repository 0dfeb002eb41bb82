"""Lazy batching: equal computations that are pending at the same time run as one.

A call made at t with duration d is due at t + d, and nobody can see its result before that. So it
waits, and when the first call of a group (same function, constants, shapes and types) is due, the
whole group runs on stacked arguments; the others keep their results until their own due time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from shoal.base.errors import UsageError
from shoal.base.units import to_ns
from shoal.engine.executor import Executor
from shoal.kernel.peer import Batching, Cost
from shoal.kernel.waits import Wait
from shoal.tensor import tree

if TYPE_CHECKING:
    from shoal.engine.event.simulation import Simulation
    from shoal.kernel.runtime import Runtime


class _Call:
    __slots__ = ("args", "bytes", "error", "group", "peer", "ran", "result", "wait")

    def __init__(self, peer: int, wait: Wait, args: tuple[Any, ...], size_bytes: int) -> None:
        self.peer = peer
        self.wait = wait
        self.args = args
        self.bytes = size_bytes
        self.group: _Group | None = None
        self.ran = False
        self.result: Any = None
        self.error: BaseException | None = None


class _Group:
    __slots__ = ("batch", "calls", "function", "key", "static")

    def __init__(self, key: Any, function: Callable[..., Any], static: tuple[Any, ...],
                 batch: Batching) -> None:  # fmt: skip
        self.key = key
        self.function = function
        self.static = static
        self.batch = batch
        self.calls: list[_Call] = []


class Batcher:
    """All pending computations of a run. Each peer's device works on one call at a time."""

    def __init__(self, simulation: Simulation, executor: Executor) -> None:
        self.flops = 0.0
        self._simulation = simulation
        self._executor = executor
        self._lazy = simulation.settings.batching == "lazy"
        self._open: dict[Any, _Group] = {}
        self._free = [0] * simulation.network.peers
        self._estimates: dict[Any, Cost] = {}

    def submit(
        self, runtime: Runtime, function: Callable[..., Any], args: tuple[Any, ...],
        static: tuple[Hashable, ...], cost: Cost | None, batch: Batching,
    ) -> Wait:  # fmt: skip
        simulation = self._simulation
        if batch not in ("leading", "vmap", "never"):
            raise UsageError(f"compute: batch={batch!r}; need 'leading', 'vmap' or 'never'")
        leaves, structure = tree.flatten(args)
        shapes = tuple([(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves])
        if cost is None:
            cost = self._estimate(function, args, static, (structure, shapes))
        self.flops += cost.flops
        peer = runtime.id
        seconds = simulation.network.device.seconds(peer, cost) * simulation.slow[peer]
        due = max(simulation.now_ns, self._free[peer]) + to_ns(seconds)
        self._free[peer] = due
        wait = Wait(simulation.ready)
        call = _Call(peer, wait, args, sum(leaf.nbytes for leaf in leaves))
        shared = self._lazy and batch != "never" and leaves
        key = (function, static, batch, structure, shapes) if shared else call
        group = self._open.get(key)
        if group is None:
            group = self._open[key] = _Group(key, function, static, batch)
        group.calls.append(call)
        call.group = group
        simulation.at(due, self._due, call)
        return wait

    def forget(self, peer: int) -> None:
        """A crash ends what the peer's device was doing."""
        self._free[peer] = self._simulation.now_ns

    def _due(self, call: _Call, _: Any) -> None:
        if call.wait.done:
            # Cancelled: nobody wants the result. Leave the group if it has not run.
            group = call.group
            if group is not None and not call.ran:
                group.calls.remove(call)
                if not group.calls:
                    self._open.pop(group.key, None)
            return
        if not call.ran:
            assert call.group is not None
            self._run(call.group)
        call.group = None
        if call.error is not None:
            call.wait.fail(call.error)
        else:
            call.wait.resolve(call.result)

    def _run(self, group: _Group) -> None:
        self._open.pop(group.key, None)
        for call in group.calls:
            call.ran = True
        calls = [call for call in group.calls if not call.wait.done]
        group.calls = []
        chunks = self._chunks(calls)
        stacked = [c for c in chunks if len(c) > 1]
        if stacked:
            batches = [
                (group.function, group.batch, tree.stack([c.args for c in chunk]), group.static)
                for chunk in stacked
            ]
            try:
                results = self._executor.run(_batched, batches)
            except Exception:
                # One bad call must fail alone, with its own error.
                chunks = [[call] for call in calls]
            else:
                for chunk, result in zip(stacked, results, strict=True):
                    for call, row in zip(chunk, tree.rows(result, len(chunk)), strict=True):
                        call.result = row
        for chunk in chunks:
            if len(chunk) == 1:
                call = chunk[0]
                try:
                    call.result = group.function(*call.args, *group.static)
                except Exception as error:
                    call.error = error

    def _chunks(self, calls: list[_Call]) -> list[list[_Call]]:
        """Parts of a group that fit the memory bound, and one per worker at least."""
        bound = self._simulation.settings.batch_bytes
        rows = max(1, bound // max(1, calls[0].bytes))
        if self._executor.workers > 1:
            rows = min(rows, -(-len(calls) // self._executor.workers))
        return [calls[i : i + rows] for i in range(0, len(calls), rows)]

    def _estimate(
        self, function: Callable[..., Any], args: tuple[Any, ...], static: tuple[Any, ...], at: Any
    ) -> Cost:
        """A flop count of one call, kept per function, shapes and constants.

        Bare integers among the constants (a round's number) are taken not to change the cost.
        """
        key = (function, tuple(c for c in static if type(c) is not int), at)
        cost = self._estimates.get(key)
        if cost is None:
            counter = FlopCounterMode(display=False)
            with counter:
                function(*args, *static)
            cost = self._estimates[key] = Cost(flops=float(counter.get_total_flops()))
        return cost


def _batched(
    function: Callable[..., Any], batch: Batching, args: tuple[Any, ...], static: tuple[Any, ...]
) -> Any:
    if batch == "leading":
        return function(*args, *static)
    leaves, structure = tree.flatten(args)
    out: list[Any] = []

    def flat(*row: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result, made = tree.flatten(function(*tree.unflatten(structure, row), *static))
        out[:] = [made]
        return tuple(result)

    results = torch.vmap(flat, randomness="error")(*leaves)
    return tree.unflatten(out[0], results)
