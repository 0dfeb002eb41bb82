"""DADAO's events in one compiled loop: what the peers compute, without messages, for long runs.

Dates come from the same keyed clocks as in the peer program, and so do the numbers: a peer's events
in the order of their dates, each on the state that the flow has carried there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from shoal.base.errors import UsageError
from shoal.parts.schedule.poisson import Poisson
from shoal.parts.topology._gossip_rates import GossipRates
from shoal.systems.training._dadao_flow import Y_FAST, Array, Constants, X, Y, Z, flow

GRADIENT = -1
"""In the place of an event's second peer: the first one takes a gradient."""


@dataclass(frozen=True, eq=False)
class Agenda:
    """Events in order: dates float64 [events], peers int64 [events]; `second` may be GRADIENT."""

    dates: Array
    first: NDArray[np.int64]
    second: NDArray[np.int64]

    @property
    def exchanges(self) -> int:
        """How many events are gossip."""
        return int((self.second != GRADIENT).sum())


def agenda(
    seed: int, rates: GossipRates, until: float, gradient_rates: Sequence[float] = (),
    peer: int | None = None,
) -> Agenda:  # fmt: skip
    """All events before `until`, or those of one peer.

    gradient_rates: of each peer's gradient clock, 1 where none are given. Raises UsageError for
    another number of rates than peers.
    """
    own = tuple(gradient_rates) or (1.0,) * rates.peers
    if len(own) != rates.peers:
        raise UsageError(
            f"dadao: {len(own)} gradient rates for {rates.peers} peers; need one each (or none)"
        )
    found: list[tuple[Array, int, int]] = []
    for each, rate in enumerate(own):
        if peer in (None, each):
            clock = Poisson(seed, ("dadao gradient", each), rate)
            found.append((clock.dates(until), each, GRADIENT))
    for (a, b), rate in rates.of().items():
        if peer in (None, a, b):
            clock = Poisson(seed, ("dadao gossip", a, b), rate)
            found.append((clock.dates(until), a, b))
    dates = np.concatenate([dates for dates, _, _ in found])
    first = np.concatenate([np.full(len(dates), a) for dates, a, _ in found])
    second = np.concatenate([np.full(len(dates), b) for dates, _, b in found])
    order = np.lexsort((second, first, dates))
    return Agenda(dates[order], first[order].astype(np.int64), second[order].astype(np.int64))


@dataclass(frozen=True, eq=False)
class Problem:
    """Quadratics as arrays: H [peers, dim, dim], c [peers, dim] and the common minimum [dim]."""

    matrices: Array
    centres: Array
    minimum: Array


@dataclass(frozen=True, eq=False)
class Played:
    """The outcome. state [peers, 6, dim]: of each peer at its last event, dated `last` [peers].

    events, gradients, exchanges, time: until the target was reached, or of all; marks, distances:
    mean squared distance to the minimum when each unit of time ends, of the states as they are.
    """

    state: Array
    last: Array
    events: int
    gradients: int
    exchanges: int
    time: float
    reached: bool
    distances: Array


def play(
    events: Agenda, constants: Constants, problem: Problem, start: Array, *, target: float = 0.0
) -> Played:
    """Run events from x = start [peers, dim] until the mean squared distance is `target`."""
    peers, dim = start.shape
    state = np.zeros((peers, 6, dim))
    state[:, X] = start
    last = np.zeros(peers)
    until = float(events.dates[-1]) if len(events.dates) else 0.0
    distances = np.full(int(until), np.nan)
    done, reached = _play(
        events.dates, events.first, events.second, state, last, constants.generator(),
        constants.gradient_jump(), constants.gossip_jump(), constants.nu,
        np.ascontiguousarray(problem.matrices), problem.centres, problem.minimum, target, distances,
    )  # fmt: skip
    exchanges = int((events.second[:done] != GRADIENT).sum())
    time = float(events.dates[done - 1]) if done else 0.0
    return Played(
        state, last, done, done - exchanges, exchanges, time, bool(reached),
        distances[: int(time)],
    )  # fmt: skip


def synchronised(played: Played, constants: Constants, date: float) -> Array:
    """All states brought to one date by the flow, [peers, 6, dim]."""
    generator = constants.generator()
    moves = [flow(generator, max(0.0, date - last)) for last in played.last]
    return np.einsum("pij,pjd->pid", np.stack(moves), played.state)


@njit(cache=True)
def _play(
    dates, first, second, state, last, generator, gradient_jump, gossip_jump, nu, matrices, centres,
    minimum, target, distances,
):  # fmt: skip
    """(events run, whether the target was reached); writes state, last and distances."""
    peers, _, dim = state.shape
    apart = np.zeros(peers)
    for peer in range(peers):
        for i in range(dim):
            apart[peer] += (state[peer, X, i] - minimum[i]) ** 2
    whole = apart.sum()
    change = np.empty(dim)
    mark = 0
    for event in range(len(dates)):
        date, a, b = dates[event], first[event], second[event]
        while mark < len(distances) and date >= mark + 1:
            distances[mark] = whole / peers
            mark += 1
        _carry(state, last, generator, a, date)
        if b < 0:
            for i in range(dim):
                slope = 0.0
                for j in range(dim):
                    slope += matrices[a, i, j] * (state[a, X, j] - centres[a, j])
                change[i] = slope - nu * state[a, X, i] - state[a, Y_FAST, i]
            for row in range(6):
                for i in range(dim):
                    state[a, row, i] += gradient_jump[row] * change[i]
        else:
            _carry(state, last, generator, b, date)
            for i in range(dim):
                own = state[a, Y, i] + state[a, Z, i]
                change[i] = own - (state[b, Y, i] + state[b, Z, i])
            for row in range(6):
                for i in range(dim):
                    state[a, row, i] += gossip_jump[row] * change[i]
                    state[b, row, i] -= gossip_jump[row] * change[i]
            whole += _moved(state, apart, minimum, b)
        whole += _moved(state, apart, minimum, a)
        # Differences of a sum that shrinks by orders of magnitude leave its first digits' rounding.
        if event % 256 == 0:
            whole = apart.sum()
        if whole <= target * peers:
            return event + 1, True
    return len(dates), False


@njit(cache=True)
def _carry(state, last, generator, peer, date):
    """Bring one peer's state to a date."""
    move = flow(generator, date - last[peer])
    dim = state.shape[2]
    moved = np.zeros((6, dim))
    for i in range(6):
        for k in range(6):
            for j in range(dim):
                moved[i, j] += move[i, k] * state[peer, k, j]
    state[peer] = moved
    last[peer] = date


@njit(cache=True)
def _moved(state, apart, minimum, peer):
    """What a peer's squared distance has changed by; `apart` keeps it."""
    now = 0.0
    for i in range(len(minimum)):
        now += (state[peer, X, i] - minimum[i]) ** 2
    change = now - apart[peer]
    apart[peer] = now
    return change
