"""Connections that carry a window per round trip, alone and in pools: against closed forms."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.engine.lockstep import round_seconds, run_lockstep
from shoal.parts import find
from shoal.rounds.method import Method
from shoal.wire.codec import size_of
from shoal.wire.message import message
from shoal.world.faults import Crash
from shoal.world.links import Links, Measured
from shoal.world.network import Network

WINDOW = 256 * 1024
GIGABIT = 125e6


@message(tag=("number",))
class Load:
    """Some bytes."""

    number: int
    values: torch.Tensor


def load(number: int, size: int) -> Load:
    return Load(number, torch.zeros(size, dtype=torch.uint8))


@dataclass(frozen=True)
class Sends:
    """Peer 0 sends `messages` of `size` to each target; all note when they came."""

    size: int
    messages: int = 1
    targets: tuple[int, ...] = (1,)
    came: dict[int, list[float]] = field(default_factory=dict, compare=False)

    async def run(self, peer: Any) -> None:
        if peer.id == 0:
            for number in range(self.messages):
                for target in self.targets:
                    await peer.send(target, load(number, self.size))
            await peer.flushed(self.targets[-1])
        elif peer.id in self.targets:
            for number in range(self.messages):
                await peer.recv(Load, tag=(number,), deadline=math.inf)
                self.came.setdefault(peer.id, []).append(peer.now())


def came(links: Any, program: Sends, peers: int = 3, faults: tuple[Any, ...] = ()) -> Any:
    run = simulate(
        program, Network(peers, links=links, faults=faults), settings=EventSettings(strict=True)
    )
    assert run.finished
    return program.came


@pytest.mark.parametrize("connections", [1, 2, 16, 64])
@pytest.mark.parametrize("latency_s", [0.0025, 0.02, 0.07])
def test_a_pool_carries_a_window_per_round_trip_and_connection(
    connections: int, latency_s: float
) -> None:
    """Within a few per cent of min(P W / RTT, link), latency apart."""
    links = Links(
        latency_s=latency_s, uplink_bytes_per_s=GIGABIT, downlink_bytes_per_s=GIGABIT,
        window_bytes=WINDOW, connections=connections,
    )  # fmt: skip
    size = size_of(load(0, 1 << 20))
    times = came(links, Sends(1 << 20, messages=8))[1]
    rate = min(connections * WINDOW / (2 * latency_s), GIGABIT)
    assert times[0] == pytest.approx(latency_s + size / rate, rel=1e-6)
    assert 7 * size / (times[-1] - times[0]) == pytest.approx(rate, rel=1e-6)


def test_sixteen_connections_are_sixteen_times_one_until_the_link_is_full() -> None:
    took = {}
    for connections in (1, 16):
        links = Links(latency_s=0.07, window_bytes=WINDOW, connections=connections)
        times = came(links, Sends(1 << 20, messages=4))[1]
        took[connections] = times[-1] - times[0]
    assert took[1] / took[16] == pytest.approx(16.0, rel=1e-6)


def test_a_slow_way_does_not_hold_up_others() -> None:
    """The uplink is free for the next receiver as soon as it could have sent the message."""
    matrix = ((0.0, 0.07, 0.001), (0.07, 0.0, 0.07), (0.001, 0.07, 0.0))
    links = Measured(matrix, uplink_bytes_per_s=GIGABIT, window_bytes=WINDOW)
    size = size_of(load(0, 1 << 20))
    found = came(links, Sends(1 << 20, targets=(1, 2)))
    assert found[1][0] == pytest.approx(0.07 + size / (WINDOW / 0.14), rel=1e-6)
    assert found[2][0] == pytest.approx(0.001 + 2 * size / GIGABIT, rel=1e-6)


def test_a_slow_pair_stays_slow_with_many_connections() -> None:
    links = Links(
        latency_s=0.01, window_bytes=WINDOW, connections=16, slow_pairs=0.1,
        slow_bytes_per_s=6.25e6, seed=3,
    )  # fmt: skip
    pairs = [(a, b) for a in range(40) for b in range(40) if a != b]
    slow = [pair for pair in pairs if links.path_of(*pair) == 6.25e6]
    # 1,560 draws: five standard deviations are 59.
    assert abs(len(slow) - 156) < 60
    assert {links.path_of(*pair) for pair in pairs} == {6.25e6, 16 * WINDOW / 0.02}
    assert any((b, a) not in slow for a, b in slow), "each direction is drawn by itself"
    more = dataclasses.replace(links, slow_pairs=0.3)
    assert set(slow) < {pair for pair in pairs if more.path_of(*pair) == 6.25e6}


@given(
    latency=st.floats(0.0, 0.2), spread=st.sampled_from([0.0, 0.5]),
    window=st.sampled_from([math.inf, 1e4, 1e6]), connections=st.integers(1, 64),
    share=st.sampled_from([0.0, 0.3, 1.0]), measured=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_numbers_and_tensors_agree(
    latency: float, spread: float, window: float, connections: int, share: float, measured: bool
) -> None:
    rest: dict[str, Any] = {
        "window_bytes": window, "connections": connections, "slow_pairs": share,
        "slow_bytes_per_s": 5e5, "seed": 4,
    }  # fmt: skip
    links: Any = Links(latency_s=latency, latency_spread=spread, symmetric=False, **rest)
    if measured:
        links = Measured(((0.0, latency, 0.1), (0.2, 0.0, 0.0), (latency, 0.0, 0.0)), **rest)
    peers = torch.arange(3)
    stacked = links.path_of(peers.unsqueeze(-1), peers)
    assert stacked.dtype == torch.float64
    for source in range(3):
        for target in range(3):
            one = links.path_of(source, target)
            assert stacked[source, target].item() == pytest.approx(one, rel=1e-12)
            both = links.latency_of_s(source, target) + links.latency_of_s(target, source)
            assert one <= (window * connections / both if both else math.inf)
    assert links.windowed == (window < math.inf or share > 0)


def test_a_crash_empties_the_ways() -> None:
    """What waited for its turn went with the peer; the next life finds the way free."""
    links = Links(latency_s=0.05, window_bytes=1e5)
    # 1 MB at 1 MB/s: the first message would take a second.
    program = Sends(1 << 20, messages=1)
    found = came(links, program, faults=(Crash(who=(0,), at=0.2, until=0.5),))
    assert found[1][-1] == pytest.approx(0.55 + size_of(load(0, 1 << 20)) / 1e6, rel=1e-3)


def test_a_full_queue_holds_the_sender() -> None:
    from shoal.base.limits import Limits

    links = Links(latency_s=0.05, window_bytes=1e5)
    left: list[float] = []

    @dataclass(frozen=True)
    class Fills:
        async def run(self, peer: Any) -> None:
            if peer.id == 0:
                for number in range(3):
                    await peer.send(1, load(number, 1 << 20))
                    left.append(peer.now())

    limits = Limits(queue_bytes=1 << 20)
    assert simulate(Fills(), Network(2, links=links), limits=limits).finished
    assert left[0] < 0.01
    assert left[1] == pytest.approx(1.05, rel=0.01)
    assert left[2] == pytest.approx(2.1, rel=0.01)


def method() -> Method:
    task = find("tasks", "digits")(peers=4, hidden=(8,), split="iid")
    strategy = find("strategy", "local_steps")(steps=1, batch_size=4)
    exchange = find("exchange", "gossip")(find("topology", "full")(4))
    transform = find("transform", "identity")().bind(task.spec)
    return Method(strategy, task, exchange, find("aggregate", "mean")(), transform, 2, 9.0)


def test_rounds_wait_for_slow_ways_and_lockstep_refuses_them() -> None:
    free = Network(4, links=Links(latency_s=0.05))
    slow = Network(4, links=Links(latency_s=0.05, window_bytes=1000.0))
    assert round_seconds(method(), slow) > 0.2 + round_seconds(method(), free)
    with pytest.raises(UsageError, match="windows"):
        run_lockstep([method()], [slow])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"window_bytes": 0.0}, "window_bytes=0.0"), ({"connections": 0}, "connections=0"),
        ({"slow_pairs": 1.5}, "slow_pairs=1.5"), ({"slow_bytes_per_s": -1.0}, "slow_bytes"),
    ],
)  # fmt: skip
def test_bad_settings_say_what_to_do(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Links(**wrong)
    with pytest.raises(UsageError, match=says):
        Measured(((0.0, 1.0), (1.0, 0.0)), **wrong)
