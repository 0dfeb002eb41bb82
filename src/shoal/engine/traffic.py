"""The series "bytes_sent": what all peers together had sent when a model was recorded.

Reports plot every metric over it, so all engines that go peer by peer keep it here.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.world.record import Row

_MOST = 256


class Traffic:
    """One point per round; outside rounds one per moment, thinned to a few hundred.

    >>> traffic = Traffic()
    >>> traffic.note(0, 1.0, [5, 6])
    >>> traffic.note(0, 2.0, [5, 9])
    >>> [(row.time_s, row.value) for row in traffic.rows()]
    [(2.0, 14.0)]
    """

    def __init__(self) -> None:
        self._rounds: dict[int, tuple[float, int]] = {}
        self._moments: dict[float, int] = {}
        self._step_s = 0.0
        self._next_s = 0.0

    def note(self, round: int, time_s: float, bytes_sent: Sequence[int]) -> None:
        """A peer recorded its model now."""
        if round >= 0:
            self._rounds[round] = (time_s, sum(bytes_sent))
        elif time_s >= self._next_s:
            self._moments[time_s] = sum(bytes_sent)
            self._next_s = time_s + self._step_s
            if len(self._moments) > _MOST:
                # Every second point goes, and new ones come half as often.
                self._moments = dict(list(self._moments.items())[::2])
                self._step_s = max(2 * self._step_s, time_s / _MOST)

    def rows(self) -> list[Row]:
        """In order of time."""
        points = [(time_s, total, round) for round, (time_s, total) in self._rounds.items()]
        points += [(time_s, total, -1) for time_s, total in self._moments.items()]
        return [Row("bytes_sent", float(total), at, round) for at, total, round in sorted(points)]


def together(parts: Sequence[Sequence[Row]]) -> list[Row]:
    """The series of a run whose peers were spread over processes, from the series of each.

    At each point of any part, all parts' latest values are added up; of a round the last point
    stays, which is when the last of its peers recorded a model.

    >>> one, other = [Row("bytes_sent", 5.0, 1.0, 0)], [Row("bytes_sent", 7.0, 1.5, 0)]
    >>> [(row.time_s, row.value, row.round) for row in together([one, other])]
    [(1.5, 12.0, 0)]
    """
    latest = [0.0] * len(parts)
    points: dict[object, Row] = {}
    every = [(row.time_s, part, row) for part, rows in enumerate(parts) for row in rows]
    for time_s, part, row in sorted(every, key=lambda entry: entry[:2]):
        latest[part] = max(latest[part], row.value)
        key = row.round if row.round >= 0 else ("moment", time_s)
        points[key] = Row("bytes_sent", sum(latest), time_s, row.round)
    return sorted(points.values(), key=lambda row: row.time_s)
