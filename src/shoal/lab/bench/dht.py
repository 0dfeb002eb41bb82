"""Hash table: 200 nodes in one process over real sockets, all well and with half of them silent.

In the clear and encrypted, beside the `kademlia` package in the same run. Nodes join, store and
search one after the other, so a time is that of the search and not of a queue; wall time counts,
so a busy machine shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from shoal.lab.bench import _kademlia
from shoal.lab.bench._row import Note, Row, missing
from shoal.lab.bench._table import Security, figures, searched

_REASON = "the kademlia package is not installed (pip install 'shoal[bench]')"
# A search of the package among silent nodes takes seconds.
_FEWER = 10


class _Figures(NamedTuple):
    found: float
    middle_s: float
    late_s: float


def measure(tiny: bool, note: Note) -> Iterator[Row]:
    nodes, keys, gets = (30, 10, 16) if tiny else (200, 100, 200)
    theirs: list[_Figures] | None = None
    if _kademlia.installed():
        note("the kademlia package")
        phases = _kademlia.searched(nodes, keys, (gets, max(4, gets // _FEWER)))
        theirs = [_of(took) for took in phases]
    modes: tuple[tuple[Security, str], ...] = (("none", "in the clear"), ("noise", "encrypted"))
    for security, how in modes:
        note(f"{nodes} nodes, {how}")
        run = searched(nodes, keys, gets, security)
        calm, silent = (_of(figures(run, phase)) for phase in (0, 1))
        name = f"dht: {nodes} nodes, {how}"
        yield Row.of(f"{name}: get, median", calm.middle_s * 1e3, "ms", bound="<= 10")
        yield Row.of(f"{name}: found", calm.found, "share", bound=">= 0.99")
        yield Row.of(f"{name}, half silent: get, median", silent.middle_s * 1e3, "ms")
        yield Row.of(f"{name}, half silent: get, p95", silent.late_s, "s", bound="<= 1")
        yield Row.of(f"{name}, half silent: found", silent.found, "share", bound=">= 0.99")
        for part, value, unit, column in (
            ("get, median", calm.middle_s * 1e3, "ms", "calm"),
            ("half silent: get, p95", silent.late_s, "s", "late"),
            ("half silent: found", silent.found, "share", "found"),
        ):
            row = f"{name}, {part}, beside kademlia"
            if theirs is None:
                yield missing(row, _REASON)
                continue
            other = {
                "calm": theirs[0].middle_s * 1e3, "late": theirs[1].late_s,
                "found": theirs[1].found,
            }[column]  # fmt: skip
            yield Row.of(row, value, unit, against=("kademlia 2.2.3", other))


def _of(took: list[tuple[bool, float]]) -> _Figures:
    """From (found, seconds) of each search."""
    times = sorted(seconds for _, seconds in took)
    share = sum(found for found, _ in took) / len(took)
    return _Figures(share, median(times), times[min(len(times) - 1, int(0.95 * len(times)))])
