"""Who lies, how many liars a peer hears, and what a rule that asks for their number is told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.lab.build import build, make
from shoal.lab.scenario import Part, Scenario

COUNTS = ("byzantine", "trim")
"""Settings in which rules take a number of liars."""

ROUNDS_SEEN = 10
"""Where neighbours change with the rounds, this many of them are looked at."""


@dataclass(frozen=True)
class Hearing:
    """What honest peers have in hand when they combine: own vectors included.

    liars: the most liars' vectors that one of them hears; rows: the fewest vectors in all; width:
    how many a rule is given room for, absent ones included.
    """

    liars: int
    rows: int
    width: int


def liars(scenario: Scenario, count: int) -> tuple[int, ...]:
    """The peers that lie when `count` do, drawn by the seed; more are these and others.

    A hub is none of them: everybody would take its word, and no rule could help.
    """
    hub = exchange_of(scenario).hub
    order = sorted(
        (peer for peer in range(scenario.peers) if peer != hub),
        key=lambda peer: (keyed.uniform(scenario.seed, "byzantine", peer), peer),
    )
    return tuple(sorted(order[:count]))


def most_liars(scenario: Scenario) -> int:
    """How many may lie at most: all but one that does work, and the hub."""
    return scenario.peers - (1 if exchange_of(scenario).hub is None else 2)


def exchange_of(scenario: Scenario) -> Any:
    """Who hears whom, as the engines will have it."""
    return _exchange(_bare(scenario))


def _bare(scenario: Scenario) -> Scenario:
    """What decides who hears whom."""
    return replace(
        scenario, task=None, aggregator=None, transform=None, attack=None, links=None, device=None,
        faults=(),
    )  # fmt: skip


@lru_cache(maxsize=64)
def _exchange(scenario: Scenario) -> Any:
    from shoal.parts import find

    pieces = build(scenario)
    if pieces.exchange is not None:
        return pieces.exchange
    topology = pieces.topology or find("topology", "full")(scenario.peers)
    return find("exchange", "gossip")(topology)


def hearing(scenario: Scenario) -> Hearing:
    """What the honest peers of a scenario hear, whose liars are ids."""
    return _hearing(_bare(scenario))


@lru_cache(maxsize=256)
def _hearing(scenario: Scenario) -> Hearing:
    import torch

    exchange = _exchange(scenario)
    hub = -1 if exchange.hub is None else exchange.hub
    bad = torch.zeros(scenario.peers, dtype=torch.bool, device="cpu")
    bad[list(scenario.byzantine_peers())] = True
    most, least, width, last = 0, scenario.peers, 1, ()
    for round in range(min(scenario.rounds or 1, ROUNDS_SEEN)):
        hops = exchange.hops(round, scenario.seed)
        active = exchange.active(round, scenario.seed)
        if len(last) == len(hops) and all(a.same(b) for a, b in zip(hops, last, strict=True)):
            continue
        last = hops
        for hop in hops:
            peers = torch.arange(scenario.peers, device="cpu")
            receivers = peers if hop.receivers is None else hop.receivers
            here = hop.sources >= 0
            sources = hop.sources.clamp(min=0)
            here &= active[sources]
            if hop.taken is not None:
                here &= hop.taken
            lies = (here & bad[sources]).sum(-1)
            rows = here.sum(-1) + active[receivers]
            # Only what honest peers make of it matters; an idle hub is one of them.
            fair = ~bad[receivers] & (active[receivers] | (receivers == hub))
            if fair.any():
                most = max(most, int(lies[fair].max()))
                least = min(least, int(rows[fair].min()))
                width = max(width, hop.sources.shape[-1] + 1)
    return Hearing(most, least, width)


def asks(rule: Part) -> bool:
    """Whether a rule wants to be told how many lie, and its settings do not say it already."""
    return told_of(rule, 0) != rule


def told_of(rule: Part, count: int) -> Part:
    """The rule told of so many liars, if it asks."""
    from shoal.parts import find

    known = {field.name for field in dataclasses.fields(find("aggregate", rule.name))}
    given = dict(rule.settings)
    missing = [name for name in COUNTS if name in known and name not in given]
    return Part(rule.name, {**given, **dict.fromkeys(missing, count)})


def check_rule(rule: Part) -> None:
    """UsageError if a rule cannot be made, whatever it is told."""
    try:
        _made(rule, 0)
    except UsageError:
        _made(rule, 1)


@lru_cache(maxsize=1024)
def refusal(rule: Part, count: int, rows: int, width: int) -> str:
    """Why a rule cannot be told of `count` liars among `rows` vectors; empty if it can.

    Refused is what the rule refuses by itself, and a number at which its promise ends although it
    makes one for other numbers. A rule that never promises anything, and one that does not ask,
    may show what it can do.
    """
    if not asks(rule):
        return ""
    try:
        made = _made(rule, count)
        _try(made, width)
    except UsageError as error:
        return str(error)
    if not count or _stands(rule, count, rows) or not _stands(rule, count, 100 * (count + 1)):
        return ""
    most = next(n for n in range(count - 1, -1, -1) if n == 0 or _stands(rule, n, rows))
    return f"{rule.name} cannot stand {count} liars among {rows} vectors; {most} at most"


def _made(rule: Part, count: int) -> Any:
    return make("aggregator", told_of(rule, count), {})


def _stands(rule: Part, count: int, rows: int) -> bool:
    try:
        return _made(rule, count).tolerates(rows) >= count
    except UsageError:
        return False


def _try(rule: Any, width: int) -> None:
    """Rules may refuse when they see how many vectors there are."""
    import torch

    if not hasattr(rule, "bind"):
        x = torch.linspace(0.0, 1.0, width, device="cpu").unsqueeze(-1)
        mask = torch.ones(width, dtype=torch.bool, device="cpu")
        rule(x, mask=mask, center=x[0])
