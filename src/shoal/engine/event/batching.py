"""Lazy batching: equal computations that are pending at the same time run as one.

A call made at t with duration d is due at t + d, and nobody can see its result before that. So it
waits, and when the first of equal calls (same function, constants, shapes and types) is due, all of
them run on stacked arguments; the others keep their results until their own due time.

That is right only for functions that are pure and whose leading axes are batch axes. The first
batch of each function is therefore compared with its first row computed alone.

What a batch made stays one tensor, of which each peer gets a row. Arguments that are such rows are
taken as they lie, and all loops over peers here are place by place in the arguments, not peer by
peer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
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
    """A pending computation of one peer. Its arguments are taken apart when that is needed."""

    __slots__ = ("args", "error", "group", "kind", "leaves", "peer", "ran", "result", "wait")

    def __init__(self, wait: Wait, peer: int, args: tuple[Any, ...]) -> None:
        self.wait = wait
        self.peer = peer
        self.args = args
        self.leaves: list[torch.Tensor] = []
        self.kind: Any = None
        self.group: _Group | None = None
        self.ran = False
        self.result: Any = None
        self.error: BaseException | None = None

    def alike(self) -> Any:
        """Structure and shapes: what must be equal in calls that run as one."""
        if self.kind is None:
            self.leaves, structure = tree.flatten(self.args)
            self.kind = (structure, _shapes(self.leaves))
        return self.kind


class _Chunk:
    """Calls that run as one: their arguments place by place, and what these have in common."""

    __slots__ = ("alike", "calls", "columns")

    def __init__(self, calls: list[_Call], columns: list[tree.Column], alike: Any) -> None:
        self.calls = calls
        self.columns = columns
        self.alike = alike

    def args(self) -> Any:
        """The arguments of all calls with a new leading axis. Not to be written into: what lies in
        one tensor already is not copied."""
        return tree.unflatten(self.alike[0], tree.stack_columns(self.columns))

    def begin(self, count: int) -> _Chunk:
        """The first calls only."""
        return _Chunk(self.calls[:count], [c[:count] for c in self.columns], self.alike)


class _Group:
    """Calls of one function with the same constants that have not run."""

    __slots__ = ("batch", "calls", "function", "key", "static")

    def __init__(
        self, key: Any, function: Callable[..., Any], static: tuple[Any, ...], batch: Batching
    ) -> None:
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
        self._trusted: set[Any] = set()

    def submit(
        self, runtime: Runtime, function: Callable[..., Any], args: tuple[Any, ...],
        static: tuple[Hashable, ...], cost: Cost | None, batch: Batching,
    ) -> Wait:  # fmt: skip
        simulation = self._simulation
        if batch not in ("leading", "vmap", "never"):
            raise UsageError(f"compute: batch={batch!r}; need 'leading', 'vmap' or 'never'")
        peer = runtime.id
        wait = Wait(simulation.ready)
        call = _Call(wait, peer, args)
        shared = self._lazy and batch != "never"
        # 1 == True == 1.0, but a function may tell them apart.
        kinds = tuple(map(type, static))
        key = (function, static, kinds, batch) if shared else call
        try:
            group = self._open.get(key)
            if not shared:
                hash((function, static))
        except TypeError as error:
            raise UsageError(
                f"compute: static={static!r}: {error} (pass tensors as arguments, and constants as "
                "numbers, strings, tuples or frozen dataclasses)"
            ) from None
        if cost is None:
            cost = self._estimate(function, args, static, (kinds, *call.alike()))
        seconds = simulation.network.device.seconds(peer, cost, simulation.slow[peer])
        if not 0 <= seconds < float("inf"):
            raise UsageError(f"compute: {cost} takes {seconds} s; need a finite time >= 0")
        self.flops += cost.flops
        due = max(simulation.now_ns, self._free[peer]) + to_ns(seconds)
        self._free[peer] = due
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
            self._run(group, call)
        if call.error is not None:
            call.wait.fail(call.error)
        else:
            call.wait.resolve(call.result)
        call.args = ()
        call.leaves = []
        call.result = None

    def _run(self, group: _Group, due: _Call) -> None:
        """Run the call that is due, and whatever in its group is like it."""
        calls, columns, alike = self._taken(group, due)
        rows = self._rows_at_once(columns, len(calls))
        chunks = [
            _Chunk(calls[i : i + rows], [column[i : i + rows] for column in columns], alike)
            for i in range(0, len(calls), rows)
        ]
        stacked = [chunk for chunk in chunks if len(chunk.calls) > 1]
        if stacked and not self._agrees(group, stacked[0], calls):
            return
        try:
            self._together(group, stacked)
        except Exception:
            # One bad call must fail alone, with its own error.
            for chunk in stacked:
                try:
                    self._together(group, [chunk])
                except Exception:
                    for call in chunk.calls:
                        self._alone(group, call)
        for chunk in chunks:
            if len(chunk.calls) == 1:
                self._alone(group, chunk.calls[0])

    def _taken(self, group: _Group, due: _Call) -> tuple[list[_Call], list[tree.Column], Any]:
        """Take the calls that run now out of the group, in the order of their peers.

        With the tensors of each place of their arguments, and what these have in common.
        """
        # In the order of peers, arguments are often the rows of one result, as they lie there.
        waiting = sorted([call for call in group.calls if not call.wait.done], key=_peer)
        found = _flat(waiting)
        columns: list[tree.Column]
        if found is not None:
            calls, (columns, structure) = waiting, found
            alike = (structure, _shapes([column[0] for column in columns]))
        elif len(waiting) == 1:
            calls, columns, alike = waiting, [], None
        else:
            calls, alike = [due], _alike(due)
            if due.leaves:
                calls = [call for call in waiting if call is due or _alike(call) == alike]
            columns = [*zip(*[call.leaves for call in calls], strict=True)]
        for call in calls:
            call.ran = True
        # Those that were cancelled stay until they are due, which is when they leave.
        group.calls = [call for call in group.calls if not call.ran]
        if not group.calls:
            self._open.pop(group.key, None)
        return calls, columns, alike

    def _together(self, group: _Group, chunks: list[_Chunk]) -> None:
        batches = [(group.function, group.batch, chunk.args(), group.static) for chunk in chunks]
        results = self._executor.run(run_batch, batches) if batches else []
        rows = [split_rows(r, len(c.calls)) for c, r in zip(chunks, results, strict=True)]
        for chunk, values in zip(chunks, rows, strict=True):
            for call, value in zip(chunk.calls, values, strict=True):
                call.result = value

    @staticmethod
    def _alone(group: _Group, call: _Call) -> None:
        try:
            # `live` refuses arguments that are no tree, so that nothing works here alone.
            tree.flatten(call.args)
            call.result = group.function(*call.args, *group.static)
        except Exception as error:
            call.error = error

    def _agrees(self, group: _Group, chunk: _Chunk, calls: list[_Call]) -> bool:
        """Check a function at its first batch; on a rule broken, every call of it fails."""
        key = (group.function, group.batch, chunk.alike)
        if key in self._trusted:
            return True
        try:
            problem = _compare(group, chunk)
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

    def _rows_at_once(self, columns: list[tree.Column], count: int) -> int:
        """As many calls as fit the memory bound, and a part for each worker at least."""
        bound = self._simulation.settings.batch_bytes
        rows = max(1, bound // max(1, sum([column[0].nbytes for column in columns])))
        if self._executor.workers > 1:
            rows = min(rows, -(-count // self._executor.workers))
        return rows

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


def _peer(call: _Call) -> int:
    return call.peer


def _alike(call: _Call) -> Any:
    try:
        return call.alike()
    except UsageError:
        # Fails when it runs, alone.
        return call


def _shapes(leaves: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    return tuple([(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves])


def _flat(calls: list[_Call]) -> tuple[list[tree.Column], Any] | None:
    """The arguments of all calls place by place; None when they are not alike."""
    if len(calls) == 1:
        return None
    try:
        found = tree.flatten_all([call.args for call in calls])
    except UsageError:
        return None
    return found if found is not None and found[0] else None


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


def _compare(group: _Group, chunk: _Chunk) -> str | None:
    """What is wrong with batching this function, if its first call shows it."""
    before = torch.random.get_rng_state()
    chunk = chunk.begin(3)
    calls = chunk.calls
    leaves = [column[0] for column in chunk.columns]
    versions = [leaf._version for leaf in leaves]
    alone = group.function(*calls[0].args, *group.static)
    if versions != [leaf._version for leaf in leaves]:
        return "writes into its arguments (other peers may hold them: work on a clone)"
    if not torch.equal(before, torch.random.get_rng_state()):
        torch.random.set_rng_state(before)
        return "draws from the global random generator (take a key from peer.key and fold it)"
    try:
        result = run_batch(group.function, group.batch, chunk.args(), group.static)
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
