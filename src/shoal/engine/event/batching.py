"""Lazy batching: equal computations that are pending at the same time run as one.

A call made at t with duration d is due at t + d, and nobody can see its result before that. So it
waits, and when the first call of a group (same function, constants, shapes and types) is due, the
whole group runs on stacked arguments; the others keep their results until their own due time.

That is right only for functions that are pure and whose leading axes are batch axes. The first
batch of each function is therefore compared with its first row computed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch

from shoal.base.errors import UsageError
from shoal.base.units import to_ns
from shoal.engine.executor import Executor
from shoal.kernel.peer import Batching, Cost
from shoal.kernel.waits import Wait
from shoal.tensor import tree
from shoal.tensor.flops import count_flops

if TYPE_CHECKING:
    from shoal.engine.event.simulation import Simulation
    from shoal.kernel.runtime import Runtime

_APART = 0.1
"""How far, relative to its norm, a row of a batch may be from the same row computed alone.

Rounding differs by parts in a million, and a long computation may amplify it; a norm, mean or
maximum taken over the wrong axis is off by its own size.
"""


class _Call:
    __slots__ = ("args", "error", "group", "leaves", "ran", "result", "wait")

    def __init__(self, wait: Wait, args: tuple[Any, ...], leaves: list[torch.Tensor]) -> None:
        self.wait = wait
        self.args = args
        self.leaves = leaves
        self.group: _Group | None = None
        self.ran = False
        self.result: Any = None
        self.error: BaseException | None = None


class _Group:
    __slots__ = ("batch", "calls", "function", "key", "shapes", "static")

    def __init__(self, key: Any, function: Callable[..., Any], static: tuple[Any, ...],
                 batch: Batching, shapes: Any) -> None:  # fmt: skip
        self.key = key
        self.function = function
        self.static = static
        self.batch = batch
        self.shapes = shapes
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
        self._trusted: set[Any] = set()

    def submit(
        self, runtime: Runtime, function: Callable[..., Any], args: tuple[Any, ...],
        static: tuple[Hashable, ...], cost: Cost | None, batch: Batching,
    ) -> Wait:  # fmt: skip
        simulation = self._simulation
        if batch not in ("leading", "vmap", "never"):
            raise UsageError(f"compute: batch={batch!r}; need 'leading', 'vmap' or 'never'")
        leaves, structure = tree.flatten(args)
        shapes = tuple([(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves])
        # 1 == True == 1.0, but a function may tell them apart.
        kinds = tuple([type(constant) for constant in static])
        try:
            hash((function, static))
        except TypeError as error:
            raise UsageError(
                f"compute: static={static!r}: {error} (pass tensors as arguments, and constants as "
                "numbers, strings, tuples or frozen dataclasses)"
            ) from None
        if cost is None:
            cost = self._estimate(function, args, static, (kinds, structure, shapes))
        peer = runtime.id
        seconds = simulation.network.device.seconds(peer, cost, simulation.slow[peer])
        if not 0 <= seconds < float("inf"):
            raise UsageError(f"compute: {cost} takes {seconds} s; need a finite time >= 0")
        self.flops += cost.flops
        due = max(simulation.now_ns, self._free[peer]) + to_ns(seconds)
        self._free[peer] = due
        wait = Wait(simulation.ready)
        call = _Call(wait, args, leaves)
        shared = self._lazy and batch != "never" and leaves
        key = (function, static, kinds, batch, structure, shapes) if shared else call
        group = self._open.get(key)
        if group is None:
            group = _Group(key, function, static, batch, (structure, shapes))
            self._open[key] = group
        group.calls.append(call)
        call.group = group
        simulation.at(due, self._due, call)
        return wait

    def forget(self, peer: int) -> None:
        """A crash ends what the peer's device was doing."""
        self._free[peer] = self._simulation.now_ns

    def _due(self, call: _Call, _: Any) -> None:
        group, call.group = call.group, None
        assert group is not None
        if call.wait.done:
            # Cancelled: nobody wants the result. Leave the group if it has not run.
            if not call.ran:
                group.calls.remove(call)
                if not group.calls:
                    self._open.pop(group.key, None)
            return
        if not call.ran:
            self._run(group)
        if call.error is not None:
            call.wait.fail(call.error)
        else:
            call.wait.resolve(call.result)
        call.args = ()
        call.leaves = []
        call.result = None

    def _run(self, group: _Group) -> None:
        self._open.pop(group.key, None)
        for call in group.calls:
            call.ran = True
        calls = [call for call in group.calls if not call.wait.done]
        group.calls = []
        chunks = self._chunks(calls)
        stacked = [chunk for chunk in chunks if len(chunk) > 1]
        if stacked and not self._agrees(group, stacked[0]):
            return
        try:
            self._together(group, stacked)
        except Exception:
            # One bad call must fail alone, with its own error.
            for chunk in stacked:
                try:
                    self._together(group, [chunk])
                except Exception:
                    for call in chunk:
                        self._alone(group, call)
        for chunk in chunks:
            if len(chunk) == 1:
                self._alone(group, chunk[0])

    def _together(self, group: _Group, chunks: list[list[_Call]]) -> None:
        batches = [
            (group.function, group.batch, _stacked(group, chunk), group.static) for chunk in chunks
        ]
        results = self._executor.run(run_batch, batches) if batches else []
        rows = [split_rows(r, len(c)) for c, r in zip(chunks, results, strict=True)]
        for chunk, values in zip(chunks, rows, strict=True):
            for call, value in zip(chunk, values, strict=True):
                call.result = value

    @staticmethod
    def _alone(group: _Group, call: _Call) -> None:
        try:
            call.result = group.function(*call.args, *group.static)
        except Exception as error:
            call.error = error

    def _agrees(self, group: _Group, calls: list[_Call]) -> bool:
        """Check a function at its first batch; on a rule broken, every call of it fails."""
        key = (group.function, group.batch, group.shapes)
        if key in self._trusted:
            return True
        try:
            problem = _compare(group, calls)
        except Exception:
            # The function itself raises: `_run` finds out for whom.
            return True
        if problem is None:
            self._trusted.add(key)
            return True
        name = getattr(group.function, "__qualname__", repr(group.function))
        for call in calls:
            call.error = UsageError(f"compute: {name} {problem}")
        return False

    def _chunks(self, calls: list[_Call]) -> list[list[_Call]]:
        """Parts of a group that fit the memory bound, and one per worker at least."""
        bound = self._simulation.settings.batch_bytes
        size = sum([leaf.nbytes for leaf in calls[0].leaves]) if calls else 0
        rows = max(1, bound // max(1, size))
        if self._executor.workers > 1:
            rows = min(rows, -(-len(calls) // self._executor.workers))
        return [calls[i : i + rows] for i in range(0, len(calls), rows)]

    def _estimate(
        self, function: Callable[..., Any], args: tuple[Any, ...], static: tuple[Any, ...], at: Any
    ) -> Cost:
        """A flop count of one call, kept per function, shapes and constants.

        Bare integers among the constants (a round's number) are taken not to change the cost.
        """
        key = (function, tuple([c for c in static if type(c) is not int]), at)
        cost = self._estimates.get(key)
        if cost is None:
            cost = self._estimates[key] = Cost(flops=count_flops(function, *args, *static))
        return cost


def _stacked(group: _Group, calls: list[_Call]) -> Any:
    """The arguments of all calls with a new leading axis."""
    columns = zip(*[call.leaves for call in calls], strict=True)
    return tree.unflatten(group.shapes[0], [_column(list(column)) for column in columns])


def _column(tensors: list[torch.Tensor]) -> torch.Tensor:
    first = tensors[0]
    if all(tensor is first for tensor in tensors):
        # What everybody got from one sender needs no copies; functions do not write arguments.
        return first.expand(len(tensors), *first.shape)
    return torch.stack(tensors)


def run_batch(
    function: Callable[..., Any], batch: Batching, args: tuple[Any, ...], static: tuple[Any, ...]
) -> Any:
    """A function of one peer's arguments on stacked arguments."""
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


def split_rows(result: Any, count: int) -> list[Any]:
    """One result per call; UsageError when the leading axis was not kept."""
    leaves, _ = tree.flatten(result)
    for leaf in leaves:
        if leaf.dim() == 0 or leaf.shape[0] != count:
            raise UsageError(f"gave shape {tuple(leaf.shape)} for {count} stacked calls {_REPAIR}")
    return tree.rows(result, count)


_REPAIR = (
    "(leading axes must be batch axes: reduce over dim=-1 and the like, or pass batch='vmap' "
    "or batch='never')"
)


def _compare(group: _Group, calls: list[_Call]) -> str | None:
    """What is wrong with batching this function, if its first call shows it."""
    before = torch.random.get_rng_state()
    alone = group.function(*calls[0].args, *group.static)
    if not torch.equal(before, torch.random.get_rng_state()):
        torch.random.set_rng_state(before)
        return "draws from the global random generator (take a key from peer.key and fold it)"
    calls = calls[:3]
    stacked = _stacked(group, calls)
    try:
        result = run_batch(group.function, group.batch, stacked, group.static)
        first = split_rows(result, len(calls))[0]
    except UsageError as error:
        return str(error)
    except Exception as error:
        # Whoever raises alone, too, has an error of its own; a function that raises for stacked
        # calls only would run one by one, slowly and for ever, without a word.
        for call in calls[1:]:
            group.function(*call.args, *group.static)
        return f"raised {type(error).__name__} for stacked calls only: {error} {_REPAIR}"
    mine, structure = tree.flatten(alone)
    theirs, other = tree.flatten(first)
    if structure != other:
        return f"gave another structure for stacked calls than for one {_REPAIR}"
    for a, b in zip(mine, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return (
                f"gave {tuple(b.shape)} {b.dtype} per row of {len(calls)} stacked calls and "
                f"{tuple(a.shape)} {a.dtype} for one {_REPAIR}"
            )
        if a.is_floating_point() and _far(a, b):
            return f"gave other numbers for {len(calls)} stacked calls than for one {_REPAIR}"
    return None


def _far(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.double(), b.double()
    known = a.isfinite() & b.isfinite()
    apart = torch.where(known, a - b, 0.0).norm()
    return bool(apart > _APART * torch.where(known, a, 0.0).norm() + 1e-6)
