"""One `Run` from what each process of it left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shoal.engine.traffic import together
from shoal.world.record import Run, digest_of

ON_THE_WAY = ("lost", "dead", "partition", "corrupt", "refused")
"""Reasons for which a message that was sent did not arrive; the others are a receiver's own."""


def merged(parts: Sequence[Run], seed: int, peers: int) -> Run:
    """Counters added up, rows and happenings by time, of each peer the last parameters.

    A process that was killed has not told of all that it sent, so the messages on their way may
    come out as fewer than none.
    """
    run = Run(engine="live", seed=seed, peers=peers)
    for name in ("bytes_sent", "bytes_received"):
        columns = [getattr(part, name) for part in parts if getattr(part, name)] or [[0] * peers]
        setattr(run, name, [sum(column) for column in zip(*columns, strict=True)])
    run.rows += together([part.series("bytes_sent", -1) for part in parts])
    for part in parts:
        run.rows += [row for row in part.rows if row.name != "bytes_sent" or row.peer >= 0]
        run.happenings += part.happenings
        run.messages_sent += part.messages_sent
        run.messages_delivered += part.messages_delivered
        run.flops += part.flops
        run.events += part.events
        run.final.update(part.final)
        run.virtual_s = max(run.virtual_s, part.virtual_s)
        _add(run.dropped, part.dropped)
        _add(run.bytes_by_kind, part.bytes_by_kind)
    on_the_way = sum(run.dropped.get(reason, 0) for reason in ON_THE_WAY)
    run.messages_in_flight = run.messages_sent - run.messages_delivered - on_the_way
    run.rows.sort(key=lambda row: row.time_s)
    run.happenings.sort(key=lambda happening: happening.time_s)
    run.final = dict(sorted(run.final.items()))
    run.state_digest = digest_of(run.final)
    return run


def _add(total: dict[str, int], part: Mapping[str, int]) -> None:
    for name, value in part.items():
        total[name] = total.get(name, 0) + value
