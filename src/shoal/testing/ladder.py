"""The agreement ladder: what "the same program on every engine" means, as checks.

| pair                                   | promise                                             |
|----------------------------------------|-----------------------------------------------------|
| event, twice                           | equal traces and parameters                         |
| event, batching off / lazy             | equal traces; parameters within rounding            |
| event / lockstep, faults and loss on   | equal deliveries and bytes; parameters within       |
|                                        | rounding; clocks within 10%                         |
| event (batching off) / live, no faults | parameters bit for bit                              |

Arrivals must stay away from deadlines, or the rungs compare different rounds: `margin` is checked.
So is that no peer comes back in the middle of a round, which lockstep simplifies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.engine.event import EventSettings, simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.engine.lockstep import run_lockstep
from shoal.engine.lockstep.timeline import beyond
from shoal.kernel.peer import Program
from shoal.rounds.adapter import Rounds
from shoal.rounds.method import Method
from shoal.world.network import Network
from shoal.world.record import Run

MARGIN = 0.1


def tolerance(run: Run) -> float:
    """Largest relative difference of parameters that rounding explains."""
    one = next(iter(run.final.values()), None)
    return 1e-9 if one is None or one.dtype == torch.float64 else 1e-4


def difference(a: Run, b: Run, peers: Sequence[int] | None = None) -> float:
    """Largest difference of final parameters, relative to the largest parameter."""
    common = sorted(set(a.final) & set(b.final)) if peers is None else list(peers)
    if not common:
        return 0.0
    x = torch.stack([a.final[p] for p in common]).to(torch.float64)
    y = torch.stack([b.final[p] for p in common]).to(torch.float64)
    # NaN in both is agreement: a rule that breaks down must break down everywhere.
    gap = torch.where(torch.isnan(x) & torch.isnan(y), 0.0, (x - y).abs())
    scale = torch.nan_to_num(x).abs().max().clamp(min=1e-12)
    return float(gap.max() / scale)


def check_strategy(method: Method, network: Network, *, live: bool = False) -> Run:
    """Climb the ladder with a round-based method; returns the event run.

    AssertionError names the rung. Use few rounds: differences grow with chaos, not with bugs.
    """
    reason = beyond(network.faults, method.exchange.hub)
    assert not reason, f"ladder: {reason} (move the fault, or compare events only)"
    lockstep = run_lockstep([method], [network])[0]
    margin = lockstep.settings["margin"]
    assert margin > MARGIN, (
        f"ladder: an arrival is within {margin:.1%} of a round of its deadline (change round_s)"
    )
    behind = lockstep.settings["behind"]
    assert not behind, f"ladder: {behind} peers came back into a round under way (move the fault)"
    lazy = _event(Rounds.of(method), method, network, "lazy")
    off = _event(Rounds.of(method), method, network, "off")
    same_trace(lazy, off)
    assert difference(lazy, off) <= tolerance(off), "ladder: batching changes the parameters"
    honest = [p for p in off.final if p not in method.byzantine]
    assert (lockstep.messages_sent, lockstep.messages_delivered, lockstep.dropped) == (
        off.messages_sent, off.messages_delivered, _links(off),
    ), "ladder: lockstep delivers other messages than event"  # fmt: skip
    assert lockstep.bytes_sent == off.bytes_sent, "ladder: lockstep counts other bytes than event"
    assert (lockstep.bytes_received, lockstep.messages_in_flight) == (
        off.bytes_received, off.messages_in_flight,
    ), "ladder: lockstep receives other bytes than event"  # fmt: skip
    gap = difference(lockstep, off, honest)
    assert gap <= tolerance(off), f"ladder: lockstep and event differ by {gap:.2e}"
    clock = abs(lockstep.virtual_s - off.virtual_s) / max(off.virtual_s, 1e-9)
    assert clock <= 0.1, f"ladder: the clocks of lockstep and event differ by {clock:.1%}"
    if live:
        check_live(Rounds.of(method), Rounds.of(method), method.seed, network)
    return off


def check_program(program: Program, network: Network, seed: int = 0) -> Run:
    """The rungs of a program on the event engine; returns the run without batching."""
    runs = [
        simulate(program, network, seed=seed, settings=EventSettings(batching=batching))
        for batching in ("off", "lazy", "lazy")
    ]
    same_trace(*runs)
    assert difference(runs[0], runs[1]) <= tolerance(runs[0]), "ladder: batching changes results"
    assert difference(runs[1], runs[2]) == 0.0, "ladder: the same run twice differs"
    return runs[0]


def check_live(simulated: Program, real: Program, seed: int, network: Network) -> None:
    """event without batching and live agree bit for bit (programs that wait for everybody)."""
    off = simulate(simulated, network, seed=seed, settings=EventSettings(batching="off"))
    live = run_live(real, network, seed=seed, settings=LiveSettings(horizon_s=60.0))
    assert sorted(live.final) == sorted(off.final), "ladder: live lost peers"
    for peer, params in off.final.items():
        same = torch.equal(
            live.final[peer].contiguous().view(torch.uint8), params.contiguous().view(torch.uint8)
        )
        assert same, f"ladder: live and event differ at peer {peer}"


def same_trace(*runs: Run) -> None:
    """Every delivery of every run is the same, in the same order."""
    digests = {run.trace_digest for run in runs}
    assert len(digests) == 1, f"ladder: {len(digests)} different traces"


def _event(program: Program, method: Method, network: Network, batching: str) -> Run:
    settings = EventSettings(batching=batching, strict=batching == "off")
    return simulate(program, network, seed=method.seed, settings=settings)


def _links(run: Run) -> dict[str, int]:
    """What links and crashes lost; mailboxes and closed tags come after delivery."""
    names = ("lost", "dead", "partition")
    return {name: run.dropped[name] for name in names if run.dropped.get(name)}
