"""How long a message takes and whether it arrives: formulas and settings, no engine.

The formulas work on Python numbers (one message, the event engine) and on tensors (all messages of
a round, lockstep) alike; indices and message keys broadcast. Every draw is keyed, so both engines
see the same link, the same jitter and the same loss, in whatever order they ask.

A message from `source` to `target` leaves after its turn on the sender's uplink, travels
`latency_of_s + jitter_of_s`, and takes its turn on the receiver's downlink; `fifo_finish` is the
turn-taking. Where connections are limited (`windowed`), it also takes its turn on the way to that
receiver, which carries `path_of`: it leaves no faster than the uplink and the way both allow, while
the uplink is free for others as soon as it could have been done. Loss is per message, after the
sender has paid for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from shoal.base import keyed
from shoal.base.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class LinkModel(Protocol):
    """What an engine asks of the links.

    Peers and message keys are ints, or int64 tensors `[...]` that broadcast; the answer is then a
    float (or bool), or a float64 (or bool) tensor of the broadcast shape. A message key is the 64
    bits that stand for a message's kind and tag; signed and unsigned forms draw the same.
    """

    @property
    def sharing(self) -> bool:
        """Whether messages of one peer wait for each other (any finite bandwidth)."""
        ...

    @property
    def plain(self) -> bool:
        """One constant latency and nothing else: engines may skip the per-message formulas."""
        ...

    @property
    def windowed(self) -> bool:
        """Whether messages of one ordered pair wait for each other (any finite `path_of`)."""
        ...

    def latency_of_s(self, source: Any, target: Any) -> Any: ...

    def jitter_of_s(self, source: Any, target: Any, message_key: Any) -> Any: ...

    def uplink_of(self, peer: Any) -> Any: ...

    def downlink_of(self, peer: Any) -> Any: ...

    def path_of(self, source: Any, target: Any) -> Any: ...

    def lost(self, source: Any, target: Any, message_key: Any, extra: Any = 0.0) -> Any: ...


def draw_uniform(seed: int, name: str, *words: Any) -> Any:
    """A draw from [0, 1) for each index: the same bits from numbers and from tensors.

    >>> import torch
    >>> draw_uniform(3, "loss", torch.arange(9), 4)[7].item() == draw_uniform(3, "loss", 7, 4)
    True
    """
    like = _tensor_among(words)
    if like is None:
        return keyed.unit(keyed.fold(_folded(seed, name, words[:-1]), words[-1]))
    from shoal.tensor import keyed as stacked

    return stacked.uniform(stacked.key_of(seed, name, device=like.device), *words)


@lru_cache(maxsize=1 << 18)
def _folded(seed: int, name: str, words: tuple[int, ...]) -> int:
    # Messages of one link share all words of their draws but the last, so most of the folding too.
    return keyed.fold(0, seed, name, *words)


def draw_normal(seed: int, name: str, *words: Any) -> Any:
    """A standard normal draw, float64, for each index.

    Numbers and tensors agree up to the last bits of the two libraries' logarithm and cosine
    (relative 1e-14), which is far below a nanosecond of any latency.
    """
    like = _tensor_among(words)
    if like is None:
        return keyed.normal(seed, name, *words)
    import torch

    from shoal.tensor import keyed as stacked

    key = stacked.key_of(seed, name, device=like.device)
    return stacked.normal(key, *words, dtype=torch.float64)


def log_normal(sigma: float, seed: int, name: str, *words: Any) -> Any:
    """A factor of median 1 whose logarithm has standard deviation `sigma`, per index."""
    if _tensor_among(words) is None:
        return _log_normal_number(sigma, seed, name, words)
    return (draw_normal(seed, name, *words) * sigma).exp()


@lru_cache(maxsize=1 << 18)
def _log_normal_number(sigma: float, seed: int, name: str, words: tuple[int, ...]) -> float:
    # The event engine asks for the same pair with every message; a draw costs microseconds.
    return math.exp(sigma * keyed.normal(seed, name, *words))


def _tensor_among(words: tuple[Any, ...]) -> Tensor | None:
    # Not `isinstance(word, Tensor)`: the event engine must not pay for importing torch.
    for word in words:
        if not isinstance(word, (int, float, str)):
            return word
    return None


def _filled(value: float, *words: Any) -> Any:
    """`value` as a number, or in the shape to which the tensors among `words` broadcast."""
    like = _tensor_among(words)
    if like is None:
        return value
    import numpy as np
    import torch

    # Not torch's own, which loads sympy.
    shape = np.broadcast_shapes(*(word.shape for word in words if isinstance(word, torch.Tensor)))
    return torch.full(shape, value, dtype=torch.float64, device=like.device)


@dataclass(frozen=True)
class Links:
    """Links drawn from a key: log-normal latencies over pairs, log-normal bandwidths over peers.

    latency_s: median one-way delay of a pair, in seconds; latency_spread: sigma of its logarithm
    over ordered pairs (over unordered ones when `symmetric`); jitter_s: mean of an exponential
    added per message; uplink/downlink_bytes_per_s: median capacity of a peer, inf = unlimited;
    bandwidth_spread: sigma of the logarithm of a peer's capacity, one draw for both directions;
    loss: probability that a message never arrives.

    window_bytes: what may be on the way per connection before an answer comes back, which limits
    it to a window per round trip; connections: how many of them an ordered pair uses at once, every
    message spread over all (a pool). slow_pairs: this share of the ordered pairs, drawn by key,
    carries no more than slow_bytes_per_s, however many connections there are.

    Breaks where pairs are far from independent: latencies here obey no triangle inequality and no
    geography; use `Measured` for those.

    >>> Links(latency_s=0.05).latency_of_s(3, 4)
    0.05
    >>> Links(latency_s=0.05).plain, Links(loss=0.1).plain, Links(uplink_bytes_per_s=1e6).sharing
    (True, False, True)
    >>> Links(latency_s=0.07, window_bytes=262144.0, connections=16).path_of(0, 1)
    29959314.285714284
    """

    latency_s: float = 0.0
    latency_spread: float = 0.0
    symmetric: bool = True
    jitter_s: float = 0.0
    uplink_bytes_per_s: float = math.inf
    downlink_bytes_per_s: float = math.inf
    bandwidth_spread: float = 0.0
    loss: float = 0.0
    seed: int = 0
    window_bytes: float = math.inf
    connections: int = 1
    slow_pairs: float = 0.0
    slow_bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        for name in ("latency_s", "latency_spread", "jitter_s", "bandwidth_spread"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise UsageError(
                    f"Links: {name}={value}; need a finite number >= 0 (0 switches it off)"
                )
        rates = ("uplink_bytes_per_s", "downlink_bytes_per_s", "window_bytes", "slow_bytes_per_s")
        for name in rates:
            value = getattr(self, name)
            if not value > 0.0:
                raise UsageError(f"Links: {name}={value}; need > 0 (inf = unlimited)")
        if not 0.0 <= self.loss <= 1.0:
            raise UsageError(f"Links: loss={self.loss}; need a probability from 0 to 1")
        if not 0.0 <= self.slow_pairs <= 1.0:
            raise UsageError(f"Links: slow_pairs={self.slow_pairs}; need a share from 0 to 1")
        if self.connections < 1:
            raise UsageError(f"Links: connections={self.connections}; need at least 1")

    @property
    def windowed(self) -> bool:
        """Whether messages of one ordered pair wait for each other."""
        slow = self.slow_pairs > 0 and self.slow_bytes_per_s < math.inf
        return self.window_bytes < math.inf or slow

    @property
    def sharing(self) -> bool:
        """Whether messages of one peer wait for each other."""
        return min(self.uplink_bytes_per_s, self.downlink_bytes_per_s) < math.inf

    @property
    def plain(self) -> bool:
        """Whether every message takes exactly `latency_s` and arrives."""
        drawn = (self.latency_spread, self.jitter_s, self.loss)
        return not any(drawn) and not self.sharing and not self.windowed

    def latency_of_s(self, source: Any, target: Any) -> Any:
        """One-way delay of an empty message, in seconds; constant over a run."""
        if not self.latency_spread:
            return _filled(self.latency_s, source, target)
        if self.symmetric:
            source, target = _ascending(source, target)
        factor = log_normal(self.latency_spread, self.seed, "latency", source, target)
        return factor * self.latency_s

    def jitter_of_s(self, source: Any, target: Any, message_key: Any) -> Any:
        """What this message is delayed beyond the link's latency, in seconds."""
        if not self.jitter_s:
            return _filled(0.0, source, target, message_key)
        unit = draw_uniform(self.seed, "jitter", source, target, message_key)
        # 1 - u lies in (0, 1], so the logarithm is finite.
        logarithm = math.log1p(-unit) if isinstance(unit, float) else (-unit).log1p()
        return logarithm * -self.jitter_s

    def uplink_of(self, peer: Any) -> Any:
        """What the peer can send, in bytes per second."""
        return self._capacity(self.uplink_bytes_per_s, peer)

    def downlink_of(self, peer: Any) -> Any:
        """What the peer can receive, in bytes per second."""
        return self._capacity(self.downlink_bytes_per_s, peer)

    def path_of(self, source: Any, target: Any) -> Any:
        """What an ordered pair's connections carry together, in bytes per second; inf = all."""
        return self.path_at(source, target, self.latency_of_s)

    def path_at(self, source: Any, target: Any, latency_of_s: Callable[[Any, Any], Any]) -> Any:
        """`path_of` with other latencies than one's own."""
        trip_s = latency_of_s(source, target) + latency_of_s(target, source)
        rate = _quotient(self.window_bytes * self.connections, trip_s)
        if not self.slow_pairs or self.slow_bytes_per_s == math.inf:
            return rate
        slow = draw_uniform(self.seed, "slow pair", source, target) < self.slow_pairs
        if isinstance(slow, bool):
            return min(rate, self.slow_bytes_per_s) if slow else rate
        import torch

        return torch.where(slow, rate.clamp(max=self.slow_bytes_per_s), rate)

    def _capacity(self, median: float, peer: Any) -> Any:
        if not self.bandwidth_spread or median == math.inf:
            return _filled(median, peer)
        return log_normal(self.bandwidth_spread, self.seed, "bandwidth", peer) * median

    def lost(self, source: Any, target: Any, message_key: Any, extra: Any = 0.0) -> Any:
        """Whether the message vanishes; `extra` is the probability of a further, independent cause.

        One draw decides, so raising `extra` only ever adds losses.
        """
        chance = 1.0 - (1.0 - self.loss) * (1.0 - extra)
        if isinstance(chance, float) and chance <= 0.0:
            return _filled(0.0, source, target, message_key) > 0.0
        return draw_uniform(self.seed, "loss", source, target, message_key) < chance


def _quotient(amount: float, seconds: Any) -> Any:
    """amount / seconds, infinity for no time at all."""
    if isinstance(seconds, float):
        return amount / seconds if seconds > 0 else math.inf
    import torch

    return torch.where(seconds > 0, amount / seconds, math.inf)


def _ascending(first: Any, second: Any) -> tuple[Any, Any]:
    like = _tensor_among((first, second))
    if like is None:
        return (first, second) if first <= second else (second, first)
    import torch

    first, second = (torch.as_tensor(word, device=like.device) for word in (first, second))
    return torch.minimum(first, second), torch.maximum(first, second)


def lan(seed: int = 0) -> Links:
    """Machines in one room: 0.25 ms one way, 1 Gbit/s both ways.

    0.5 ms is the usual round trip within a data centre (Dean, LADIS 2009, "Numbers everyone should
    know"; re-measured by Jones 2021, evanjones.ca/network-latencies-2021.html, as about the 80th
    percentile); 1 Gbit/s is IEEE 802.3ab. Jitter of a tenth of the latency is our choice.
    """
    return Links(
        latency_s=0.25e-3, jitter_s=0.025e-3,
        uplink_bytes_per_s=125e6, downlink_bytes_per_s=125e6, seed=seed,
    )  # fmt: skip


def wan(seed: int = 0) -> Links:
    """Well-connected machines on several continents: 75 ms one way, 1 Gbit/s both ways.

    150 ms is the round trip California - Netherlands (Dean, LADIS 2009). The spread of 0.5 puts two
    thirds of the pairs between 45 and 124 ms; it, the 2 ms of jitter and the rented gigabit line
    are our choices. Messages travel over a reliable transport, so none is lost.
    """
    return Links(
        latency_s=0.075, latency_spread=0.5, jitter_s=2e-3,
        uplink_bytes_per_s=125e6, downlink_bytes_per_s=125e6, seed=seed,
    )  # fmt: skip


def home(seed: int = 0) -> Links:
    """Household lines in one part of the world: 21 ms one way, 20 Mbit/s up, 100 Mbit/s down.

    20 and 100 Mbit/s are the fixed broadband benchmark of the FCC (Section 706 Report, March 2024).
    21 ms is the mean round trip of a fixed line to a nearby server (Speedtest Global Index,
    September 2020); a message between two households crosses two such access networks, half a round
    trip each. Spreads (0.5 each) and 5 ms of jitter are our choices. Reliable transport: no loss.
    """
    return Links(
        latency_s=0.021, latency_spread=0.5, jitter_s=5e-3, bandwidth_spread=0.5,
        uplink_bytes_per_s=2.5e6, downlink_bytes_per_s=12.5e6, seed=seed,
    )  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Links whose latencies were measured; all else as in `Links`.

    matrix: one-way seconds from row to column, [peers, peers], as a tuple of tuples or the path of
    an .npy file (halve round trips before saving). The diagonal is not used. Peers beyond the
    matrix are an error.

    >>> Measured(((0.0, 0.010), (0.012, 0.0))).latency_of_s(1, 0)
    0.012
    """

    matrix: tuple[tuple[float, ...], ...] | str
    jitter_s: float = 0.0
    uplink_bytes_per_s: float = math.inf
    downlink_bytes_per_s: float = math.inf
    bandwidth_spread: float = 0.0
    loss: float = 0.0
    seed: int = 0
    window_bytes: float = math.inf
    connections: int = 1
    slow_pairs: float = 0.0
    slow_bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        if not isinstance(self.matrix, str):
            # Settings read from JSON arrive as lists, which would not hash.
            object.__setattr__(self, "matrix", tuple(tuple(map(float, r)) for r in self.matrix))
        if not self._table.size:
            raise UsageError("Measured: matrix is empty; need at least one peer (give a row each)")
        _ = self._rest  # checks the other settings now rather than at the first message

    @cached_property
    def _table(self) -> np.ndarray:
        return _read_matrix(self.matrix)

    @cached_property
    def _rest(self) -> Links:
        return Links(
            jitter_s=self.jitter_s, uplink_bytes_per_s=self.uplink_bytes_per_s,
            downlink_bytes_per_s=self.downlink_bytes_per_s, bandwidth_spread=self.bandwidth_spread,
            loss=self.loss, seed=self.seed, window_bytes=self.window_bytes,
            connections=self.connections, slow_pairs=self.slow_pairs,
            slow_bytes_per_s=self.slow_bytes_per_s,
        )  # fmt: skip

    @property
    def peers(self) -> int:
        """How many peers the matrix covers."""
        return len(self._table)

    @property
    def sharing(self) -> bool:
        """As `Links.sharing`."""
        return self._rest.sharing

    @property
    def windowed(self) -> bool:
        """As `Links.windowed`."""
        return self._rest.windowed

    @property
    def plain(self) -> bool:
        """Never: latencies differ from pair to pair."""
        return False

    def latency_of_s(self, source: Any, target: Any) -> Any:
        """One-way delay of an empty message, in seconds; a tensor may hold -1 as padding."""
        table = self._table
        like = _tensor_among((source, target))
        if like is not None:
            import torch

            return torch.from_numpy(table).to(like.device)[source, target]
        if not (0 <= source < len(table) and 0 <= target < len(table)):
            raise UsageError(
                f"Measured: no latency from peer {source} to {target}; the matrix covers "
                f"{len(table)} peers (measure more, or simulate fewer)"
            )
        return table.item(source, target)

    def jitter_of_s(self, source: Any, target: Any, message_key: Any) -> Any:
        """As `Links.jitter_of_s`."""
        return self._rest.jitter_of_s(source, target, message_key)

    def uplink_of(self, peer: Any) -> Any:
        """As `Links.uplink_of`."""
        return self._rest.uplink_of(peer)

    def downlink_of(self, peer: Any) -> Any:
        """As `Links.downlink_of`."""
        return self._rest.downlink_of(peer)

    def path_of(self, source: Any, target: Any) -> Any:
        """As `Links.path_of`, with the measured round trips."""
        return self._rest.path_at(source, target, self.latency_of_s)

    def lost(self, source: Any, target: Any, message_key: Any, extra: Any = 0.0) -> Any:
        """As `Links.lost`."""
        return self._rest.lost(source, target, message_key, extra)


def _read_matrix(matrix: tuple[tuple[float, ...], ...] | str) -> np.ndarray:
    import numpy as np

    if isinstance(matrix, str):
        try:
            table = np.load(matrix, allow_pickle=False)
        except (OSError, ValueError) as problem:
            raise UsageError(
                f"Measured: matrix={matrix!r} cannot be read as .npy: {problem} "
                "(save it with numpy.save)"
            ) from problem
        table = np.ascontiguousarray(table, dtype=np.float64)
    else:
        widths = {len(row) for row in matrix} | {len(matrix)}
        if len(widths) > 1:
            raise UsageError(
                f"Measured: matrix has {len(matrix)} rows of lengths {sorted(widths)}; need a "
                "square matrix (one row and one column per peer)"
            )
        table = np.array(matrix, dtype=np.float64).reshape(len(matrix), len(matrix))
    if table.ndim != 2 or table.shape[0] != table.shape[1]:
        raise UsageError(
            f"Measured: matrix has shape {table.shape}; need [peers, peers] (one row and one "
            "column per peer)"
        )
    bad = ~(np.isfinite(table) & (table >= 0.0))
    np.fill_diagonal(bad, False)
    if bad.any():
        source, target = (int(i) for i in np.argwhere(bad)[0])
        raise UsageError(
            f"Measured: latency from peer {source} to {target} is {table[source, target]}; need "
            "finite seconds >= 0 (fill gaps before use)"
        )
    return table


def fifo_finish(
    arrive: Tensor, service: Tensor, mask: Tensor | None = None, ready: Tensor | None = None
) -> Tensor:
    """When each message has passed a queue that serves one at a time, first come first served.

    arrive: seconds [..., k]; service: seconds [..., k] >= 0 that each one occupies the server;
    mask: bool [..., k], False = no such message (its result is inf); ready: seconds [..., k] before
    which its service cannot begin, None = when it arrived. Result [..., k]:
    finish = max(ready, finish of the one before) + service in order of arrival, ties by index.
    Lindley's recursion (1952), unrolled to a running maximum: finish_i = S_i + max over j <= i of
    (ready_j - S_{j-1}) with S the running sum of service. Use float64: sums grow with k.

    >>> import torch
    >>> fifo_finish(torch.tensor([0.0, 5.0, 1.0]), torch.tensor([2.0, 2.0, 2.0]))
    tensor([2., 7., 4.])
    """
    import torch

    arrive, service = torch.broadcast_tensors(arrive, service)
    if mask is not None:
        arrive = torch.where(mask, arrive, math.inf)
        service = torch.where(mask, service, 0.0)
    came, order = torch.sort(arrive, dim=-1, stable=True)
    if ready is not None:
        came = torch.where(came == math.inf, math.inf, ready.expand_as(arrive).gather(-1, order))
    total = service.gather(-1, order).cumsum(-1)
    before = torch.cat((torch.zeros_like(total[..., :1]), total[..., :-1]), -1)
    # inf - inf would be nan: what never arrives must not look served after an endless service.
    lead = torch.where(came == math.inf, math.inf, came - before)
    finish = total + lead.cummax(-1).values
    return torch.empty_like(finish).scatter_(-1, order, finish)
