"""What moving and adding an update of 44 MiB takes: measured processor times, and a line's speed.

On one core (medians): to put an update into shared memory, looking at every number, 9 ms; to add
one there 8 ms. By `lifl-machine`, all processes together, from a sum to the next: shared memory
10 ms, bare bytes over TCP 20 ms, with serialisation 173 ms, by way of a broker 264 ms.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.base.errors import UsageError


@dataclass(frozen=True)
class Costs:
    """Seconds of one update, and the processor seconds of all processes that take part.

    put_s: a gateway takes it in, and nothing else meanwhile; add_s: an aggregator has the next
    addend in its sum, its way from the gateway included; send_s: a node's sum goes to another node.
    """

    put_s: float = 0.0
    add_s: float = 0.0
    send_s: float = 0.0
    put_cpu_s: float = 0.0
    add_cpu_s: float = 0.0
    send_cpu_s: float = 0.0


LINE_S = 44 * 2**20 / 1.25e9
"""44 MiB between nodes at 10 Gbit/s."""

COSTS = {
    "none": Costs(),
    "shared": Costs(0.009, 0.008, LINE_S + 0.014, 0.009, 0.008, 0.014),
    "socket": Costs(0.0, 0.173, LINE_S + 0.173, 0.0, 0.173, 0.173),
    "broker": Costs(0.091, 0.173, LINE_S + 0.264, 0.091, 0.173, 0.264),
}
"""A gateway of "shared" takes an update in by one copy. With "socket" aggregators take it in
themselves. With "broker" it passes through one, which is as busy as the figures above differ."""


def costs_of(name: str) -> Costs:
    """A row of the table by name."""
    if name not in COSTS:
        raise UsageError(f"lifl: costs={name!r}; need one of {', '.join(COSTS)}")
    return COSTS[name]
