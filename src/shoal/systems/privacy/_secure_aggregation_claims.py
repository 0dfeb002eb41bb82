"""What is asked of secure aggregation, of its runs and of its parts."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import stats

from shoal.base import keyed
from shoal.lab.faults import FaultSetting
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario
from shoal.parts.privacy import _masked_wire as wire
from shoal.parts.privacy.mask_graph import Assumed, MaskGraph
from shoal.parts.privacy.mask_stream import add_masks
from shoal.parts.privacy.masked_sum import MaskedSum, gone_by_key
from shoal.parts.privacy.prime_field import PRIME, lagrange, matmul
from shoal.parts.privacy.sealed_shares import SEALED_BYTES, SHARE_BYTES, uniform_elements
from shoal.parts.privacy.secret_sharing import Shamir
from shoal.tensor import keyed as stacked
from shoal.wire.codec import size_of
from shoal.wire.identity import SIGNATURE_BYTES
from shoal.world.faults import Round
from shoal.world.record import Run

CELLS = 1 << 12
EVERY_S, AWAY_S = 25.0, 1.0
"""A client goes away once in so many seconds, for so long."""


def dropping(scenario: Scenario) -> Scenario:
    """Clients, drawn by key, crash at random moments and when every second round begins, and come
    back for later rounds. A round takes at most 50 s (work_s = 30, phase_s = 5), so that no more
    than four of 20 drop out of it."""
    seed, rounds = scenario.seed, scenario.rounds or 1

    def client(*words: int | str) -> tuple[int]:
        return (1 + int(keyed.uniform(seed, *words) * (scenario.peers - 1)),)

    faults = [
        FaultSetting("crash", who=client("at once", r), at=Round(r), until=Round(r + 1))
        for r in range(1, rounds - 1, 2)
    ]
    for window in range(rounds):
        at = EVERY_S * (window + keyed.uniform(seed, "when", window))
        faults.append(FaultSetting("crash", who=client(window), at=at, until=at + AWAY_S))
    return replace(scenario, faults=tuple(faults))


# Invariants of every run.


def _peers_of(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def sums_are_exact(run: Run) -> str | None:
    """Every sum that was opened is the sum of its clients' codes, by a linear check of each (runs
    with audit=true record it)."""
    told = {(row.round, row.peer): int(row.value) for row in run.series("masked")}
    for row in run.series("summed"):
        sources = _peers_of(dict(row.labels)["sources"])
        parts = [told.get((row.round, source)) for source in sources]
        if None in parts:
            return f"round {row.round}: summed {sources}, of whom some masked nothing"
        bits = int(dict(row.labels)["bits"])
        total = sum(part for part in parts if part is not None) % (1 << min(bits, 32))
        if total != int(row.value):
            return f"round {row.round}: the sum of {sources} is not that of what they masked"
    return None


def never_both_kinds(run: Run) -> str | None:
    """Of a client nobody reveals, in one round, shares of its own mask and somebody else of its
    key: the hub follows the protocol."""
    seeds: set[tuple[int, int]] = set()
    keys: set[tuple[int, int]] = set()
    for row in run.series("revealed"):
        labels, round = dict(row.labels), int(row.value)
        seeds |= {(round, peer) for peer in _peers_of(labels["seeds"])}
        keys |= {(round, peer) for peer in _peers_of(labels["keys"])}
    both = sorted(seeds & keys)
    return f"(round, client) {both[:3]}: both secrets were revealed" if both else None


def enough_are_summed(run: Run) -> str | None:
    """No sum has fewer clients than a threshold, which is 2 at least."""
    few = [row.round for row in run.series("clients") if row.value < 2]
    return f"rounds {few}: sums of one client" if few else None


# Measures of runs.


def wrong_sums(rows: Rows) -> dict[int, float]:
    """Sums of the run that are wrong, and entries of a sum of 100 clients of whom a fifth drops
    out, as many in each phase."""
    out = {}
    for seed in rows.seeds:
        run = rows.run("dropping", seed)
        if run is None or not run.series("summed"):
            out[seed] = math.nan
            continue
        out[seed] = float(sums_are_exact(run) is not None) + _wrong_entries(seed)
    return out


@lru_cache(maxsize=16)
def _wrong_entries(seed: int) -> float:
    graph = MaskGraph.of(range(100), Assumed(), seed)
    key = stacked.key_of(seed, "codes")
    codes = stacked.grid(stacked.grid(key, 100), 1000) & 0xFFFF
    gone = gone_by_key(100, 0.2, seed)
    summed = MaskedSum(graph, bits=24)(codes, gone)
    assert len(summed.peers) == 100 - sum(phase != "reveal" for phase in gone.values())
    return float((summed.total != codes[list(summed.peers)].sum(0)).sum())


def lost_rounds(rows: Rows) -> dict[int, float]:
    """Rounds whose sum could not be opened."""
    out = {}
    for seed in rows.seeds:
        run = rows.run("dropping", seed)
        out[seed] = math.nan if run is None else float(len(run.series("abandoned")))
    return out


def phases_hit(rows: Rows) -> dict[int, float]:
    """The smaller number of client-rounds that ended before and after masks were agreed on."""
    out = {}
    for seed in rows.seeds:
        run = rows.run("dropping", seed)
        if run is None:
            out[seed] = math.nan
            continue
        early = late = 0.0
        for row in run.series("clients"):
            labels = dict(row.labels)
            early += float(labels["early"])
            late += float(labels["late"])
        out[seed] = min(early, late)
    return out


def uplink(rows: Rows) -> dict[int, float]:
    """Bytes of vectors under masks over those of plain ones."""
    out = {}
    for seed in rows.seeds:
        masked, plain = rows.run("secure", seed), rows.run("plain", seed)
        if masked is None or plain is None:
            out[seed] = math.nan
        else:
            out[seed] = masked.bytes_by_kind["Masked"] / plain.bytes_by_kind["Update"]
    return out


# Measures of parts.


def chi_square(entries: np.ndarray, bits: int) -> float:
    """The p-value of entries being uniform modulo 2^bits, by their upper bits."""
    counts = np.bincount(entries >> (bits - 12), minlength=CELLS)
    return float(stats.chisquare(counts).pvalue)


@lru_cache(maxsize=16)
def _views(seed: int) -> tuple[float, float]:
    """p-values of a client's vector of equal entries, for a hub that has opened all masks that it
    shares with neighbours but one; and of what is left when that one is taken off as well."""
    graph = MaskGraph(tuple(range(6)), degree=5, threshold=3, key=(seed,))
    process = MaskedSum(graph, bits=24, secret=seed.to_bytes(32, "little"))
    peers = {me: process.peer(me) for me in graph.peers}
    sealed = {
        me: peers[me].shares({j: peers[j].advert for j in graph.neighbors(me)})
        for me in graph.peers
    }
    masks = peers[0].masks({j: sealed[j][0] for j in graph.neighbors(0)})
    codes = torch.full((1 << 18,), 12345, dtype=torch.int64, device="cpu")
    view = add_masks(codes, masks[-1:], 24)
    return chi_square(view.numpy(), 24), chi_square(add_masks(codes, (), 24).numpy(), 24)


def uniformity(rows: Rows) -> dict[int, float]:
    """With one mask left."""
    return {seed: _views(seed)[0] for seed in rows.seeds}


def uniformity_unmasked(rows: Rows) -> dict[int, float]:
    """With none left."""
    return {seed: _views(seed)[1] for seed in rows.seeds}


def secrets_left(rows: Rows) -> dict[int, float]:
    """Of 64 other secrets, the part that t - 1 shares of a secret could be shares of: through them
    and any value at 0 there is a polynomial of the right degree, and it has shares for the rest."""
    out = {}
    for seed in rows.seeds:
        drawn = uniform_elements(seed.to_bytes(32, "little"), 64 + 12)
        scheme, fits = Shamir(holders=20, threshold=11), 0
        shares = scheme.spread(drawn[:1], drawn[1:12])[:11]
        everybody = list(range(1, 21))
        for other in drawn[12:]:
            known = np.concatenate((other.reshape(1, 1), shares))
            dealt = matmul(lagrange([0, *range(1, 12)], everybody), known)
            same = bool((dealt[:11] == shares).all()) and int(other) < PRIME
            fits += same and int(scheme.reconstruct(dealt, range(20))[0]) == int(other)
        out[seed] = fits / 64
    return out


LOOKS = Assumed(corrupt=0.05, dropout=0.33, lying=False)


def fixed_bytes(assumed: Assumed, peers: int) -> tuple[float, float]:
    """(up, down): bytes of a client's keys, shares, signatures and openings in a round, headers
    included, on average over who is a witness."""
    needed = assumed.needed(peers)
    degree, threshold, signs = needed.degree, needed.threshold, assumed.lying
    near, entry = tuple(range(1, degree + 1)), wire.entry_bytes(signs=signs)
    alive = near[: max(threshold, round(0.8 * degree))]
    rest = near[len(alive) :]
    up: list[Any] = [
        wire.Advertise(0, bytes(entry)),
        wire.Deal(0, near, bytes(SEALED_BYTES * degree)),
        wire.Reveal(0, alive, rest, bytes(SHARE_BYTES * degree)),
    ]
    down: list[Any] = [
        wire.Book(0, near, bytes(entry * degree)),
        wire.Dealt(0, near, bytes(SEALED_BYTES * degree)),
    ]
    vouched = shown = 0.0
    if signs:
        survivors, witnesses = bytes(-(-peers // 8)), bytes(-(-degree // 8))
        signatures = bytes(SIGNATURE_BYTES * threshold)
        down.append(wire.Agreed(0, survivors, witnesses, signatures))
        vouched = size_of(wire.Vouched(0, bytes(SIGNATURE_BYTES))) * degree / peers
        shown = size_of(wire.Standing(0, survivors)) * degree / peers
    else:
        down.append(wire.Question(0, alive, rest))
    return vouched + sum(map(size_of, up)), shown + sum(map(size_of, down))


def growth(rows: Rows) -> dict[int, float]:
    """Bytes for 1,000,000 clients over those for 1,000."""
    few, many = (sum(fixed_bytes(LOOKS, peers)) for peers in (1_000, 1_000_000))
    return dict.fromkeys(rows.seeds, many / few)


def overhead(rows: Rows) -> dict[int, float]:
    """Over a vector of 1,000,000 float32 up and one down, for 100 clients."""
    return dict.fromkeys(rows.seeds, sum(fixed_bytes(Assumed(), 100)) / 8e6)


def degrees(rows: Rows) -> dict[str, list[tuple[float, float]]]:
    """k over the number of clients."""
    cases = {
        "hub lies, 20% corrupt, 20% drop out": Assumed(),
        "hub looks, 20% corrupt, 20% drop out": Assumed(lying=False),
        "hub looks, 5% corrupt, 33% drop out": LOOKS,
    }
    sizes = (30, 100, 300, 1_000, 10_000, 100_000, 1_000_000)
    return {
        name: [(math.log10(size), float(assumed.needed(size).degree)) for size in sizes]
        for name, assumed in cases.items()
    }
