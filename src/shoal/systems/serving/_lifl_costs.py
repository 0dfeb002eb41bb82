"""What moving and adding an update of 44 MiB takes, as `lifl-machine` measured it here."""

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


COSTS = {
    "none": Costs(),
    "shared": Costs(0.018, 0.018, 0.1, 0.018, 0.018, 0.1),
    "socket": Costs(0.0, 0.1, 0.1, 0.0, 0.1, 0.1),
    "broker": Costs(0.1, 0.2, 0.2, 0.1, 0.2, 0.2),
}


def costs_of(name: str) -> Costs:
    """A row of the table by name."""
    if name not in COSTS:
        raise UsageError(f"lifl: costs={name!r}; need one of {', '.join(COSTS)}")
    return COSTS[name]
