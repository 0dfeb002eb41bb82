"""Shoal: decentralised AI. Write a peer program once, simulate thousands of peers, run it for real.

    import shoal

    world = shoal.Scenario(peers=100, rounds=50, task="digits", topology="ring")
    run = shoal.run("dpsgd", world)

How the package is laid out, each layer resting on those before it:

    base, tensor, wire    errors, keyed randomness, flat parameters, messages and their bytes
    kernel                what a peer program may touch: effects, tasks, mailbox, store
    world                 what surrounds peers: links, devices, faults, clocks; what a run leaves
    rounds                contracts of round-based methods: Strategy, Exchange, Aggregator, ...
    parts                 algorithms by role, one method per file, found by name
    engine                `event` (virtual time), `lockstep` (all peers as one tensor), `live`
    lab                   scenarios, experiments, claims, reports
    systems               the catalogue: published systems, one file each
    cli                   the `shoal` command

The names below are the public face; they load on first use, so `import shoal` imports no torch.
What they are made of is public too, by its module.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.base.errors import ShoalError, UsageError
    from shoal.kernel.peer import Envelope, Peer, Program
    from shoal.lab.card import (
        Arm,
        Budget,
        Claim,
        Source,
        System,
        at_least,
        at_most,
        between,
        difference,
        ratio,
        value,
    )
    from shoal.lab.discover import load
    from shoal.lab.experiment import Experiment
    from shoal.lab.faults import FaultSetting, Round
    from shoal.lab.report import Report
    from shoal.lab.rows import Rows
    from shoal.lab.run import run
    from shoal.lab.scenario import Part, Scenario
    from shoal.lab.store import Store
    from shoal.rounds.strategy import Heard, Parcel, Step, Strategy
    from shoal.tensor.flat import FlatSpec
    from shoal.wire.message import Message, message
    from shoal.world.record import Run

_PLACES = {
    "base.errors": ("ShoalError", "UsageError"),
    "kernel.peer": ("Envelope", "Peer", "Program"),
    "lab.card": (
        "Arm", "Budget", "Claim", "Source", "System", "at_least", "at_most", "between",
        "difference", "ratio", "value",
    ),
    "lab.discover": ("load",),
    "lab.experiment": ("Experiment",),
    "lab.faults": ("FaultSetting", "Round"),
    "lab.report": ("Report",),
    "lab.rows": ("Rows",),
    "lab.run": ("run",),
    "lab.scenario": ("Part", "Scenario"),
    "lab.store": ("Store",),
    "rounds.strategy": ("Heard", "Parcel", "Step", "Strategy"),
    "tensor.flat": ("FlatSpec",),
    "wire.message": ("Message", "message"),
    "world.record": ("Run",),
}  # fmt: skip
_WHERE = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [
    "Arm",
    "Budget",
    "Claim",
    "Envelope",
    "Experiment",
    "FaultSetting",
    "FlatSpec",
    "Heard",
    "Message",
    "Parcel",
    "Part",
    "Peer",
    "Program",
    "Report",
    "Round",
    "Rows",
    "Run",
    "Scenario",
    "ShoalError",
    "Source",
    "Step",
    "Store",
    "Strategy",
    "System",
    "UsageError",
    "__version__",
    "at_least",
    "at_most",
    "between",
    "difference",
    "load",
    "message",
    "ratio",
    "run",
    "value",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from shoal.lab.environment import version

        return version()
    place = _WHERE.get(name)
    if place is None:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"shoal.{place}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
