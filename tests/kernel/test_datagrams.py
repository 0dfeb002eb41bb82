"""Datagrams on the virtual network: they take the way of messages, and boxes decide who gets in."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_programs import By

from shoal.base.errors import MessageTooLarge, UsageError
from shoal.engine.event.simulation import EventSettings, simulate
from shoal.kernel.datagrams import DATAGRAM_BYTES, Endpoint
from shoal.world.faults import Corrupt, Crash, Hold, Loss, Partition
from shoal.world.links import Links
from shoal.world.nat import NatBox
from shoal.world.network import Network
from shoal.world.record import Run

PORT = 7000


def run(*runs: Any, nats: Any = (), faults: Any = (), links: Any = None, **settings: Any) -> Run:
    network = Network(len(runs), links=links or Links(latency_s=0.1), nats=nats, faults=faults)
    return simulate(By(runs), network, settings=EventSettings(**settings))


def balanced(run: Run) -> bool:
    lost = sum(run.dropped.get(why, 0) for why in ("lost", "dead", "partition", "corrupt"))
    return run.messages_sent == run.messages_delivered + lost + run.messages_in_flight


def listener(heard: list[Any], until_s: float = 5.0) -> Any:
    async def listens(peer: Any) -> None:
        socket = peer.datagrams.open(PORT)
        while (found := await socket.recv_from(until_s)) is not None:
            heard.append((round(peer.now(), 6), *found))

    return listens


def sender(to: Endpoint, *moments_s: float, data: bytes = b"hello") -> Any:
    async def sends(peer: Any) -> None:
        socket = peer.datagrams.open(PORT)
        for moment_s in moments_s:
            await peer.sleep_until(moment_s)
            await socket.send_to(data, to)

    return sends


HOST_0, HOST_1, BOX = (Endpoint(f"198.18.0.{n}", PORT) for n in (0, 1, 2))


@pytest.mark.parametrize("strict", [False, True])
def test_a_datagram_arrives_after_the_latency_and_its_bytes_count(strict: bool) -> None:
    heard: list[Any] = []
    done = run(listener(heard), sender(HOST_0, 1.0), strict=strict)
    assert heard == [(1.1, b"hello", HOST_1)]
    assert done.bytes_sent == [0, 28 + 5]
    assert done.bytes_received == [28 + 5, 0]
    assert done.bytes_by_kind == {"Datagram": 33}
    assert balanced(done)


def test_the_trace_tells_datagrams_and_repeats() -> None:
    runs = [run(listener([]), sender(HOST_0, at)) for at in (1.0, 1.0, 2.0)]
    assert runs[0].trace_digest == runs[1].trace_digest != runs[2].trace_digest


def test_what_nobody_listens_to_or_routes_is_counted() -> None:
    done = run(listener([]), sender(Endpoint("198.18.0.0", PORT + 1), 1.0))
    assert done.dropped == {"no socket": 1}
    done = run(listener([]), sender(Endpoint("8.8.8.8", PORT), 1.0))
    assert done.dropped == {"no route": 1}
    assert balanced(done)


def test_a_box_shows_its_own_address_and_lets_only_answers_in() -> None:
    heard: list[Any] = []
    box = NatBox((1,))

    async def inside(peer: Any) -> None:
        socket = peer.datagrams.open(PORT)
        assert socket.local.host.startswith("10.")
        await peer.sleep_until(1.0)
        await socket.send_to(b"out", HOST_0)
        heard.append(await socket.recv_from(5.0))
        heard.append(await socket.recv_from(5.0))

    async def outside(peer: Any) -> None:
        socket = peer.datagrams.open(PORT)
        other = peer.datagrams.open(PORT + 1)
        data, source = await socket.recv_from(5.0)
        assert (data, source.host) == (b"out", BOX.host)
        await other.send_to(b"stranger", source)
        await socket.send_to(b"answer", source)

    done = run(outside, inside, nats=(box,))
    assert heard == [(b"answer", HOST_0), None]
    assert done.dropped == {"filtered": 1}


def test_inner_addresses_mean_something_behind_the_same_box_only() -> None:
    heard: list[Any] = []

    async def finds(peer: Any) -> None:
        socket = peer.datagrams.open()
        await peer.sleep_until(1.0)
        await socket.send_to(b"hello", Endpoint("10.0.0.1", PORT))

    run(listener(heard), finds, nats=(NatBox((0, 1)),))
    assert [data for _, data, _ in heard] == [b"hello"]
    apart = run(listener([]), finds, nats=(NatBox((0,)), NatBox((1,))))
    assert apart.dropped == {"no route": 1}


@pytest.mark.parametrize("hairpin", [False, True])
def test_peers_behind_one_box_meet_by_outer_endpoints_only_with_hairpin(hairpin: bool) -> None:
    seen: list[Endpoint] = []
    heard: list[Any] = []

    async def reflects(peer: Any) -> None:
        found = await peer.datagrams.open(PORT).recv_from(5.0)
        seen.append(found[1])

    async def mapped(peer: Any) -> None:
        socket = peer.datagrams.open(PORT)
        await socket.send_to(b"me", HOST_0)
        heard.append(await socket.recv_from(5.0))

    async def beside(peer: Any) -> None:
        await peer.sleep_until(1.0)
        await peer.datagrams.open().send_to(b"hello", seen[0])

    box = NatBox.classic("full cone", who=(1, 2), hairpin=hairpin)
    run(reflects, mapped, beside, nats=(box,))
    assert (heard[0] is not None) == hairpin
    assert not hairpin or heard[0][1].host == seen[0].host


def test_a_crash_closes_sockets_and_a_restart_may_open_them_again() -> None:
    heard: list[Any] = []
    done = run(
        listener(heard), sender(HOST_0, 0.5, 1.5, 2.5),
        faults=(Crash(who=(0,), at=1.0, until=2.0),),
    )  # fmt: skip
    assert [at for at, _, _ in heard] == [0.6, 2.6]
    assert done.dropped == {"dead": 1}
    assert balanced(done)


@pytest.mark.parametrize(
    "fault",
    [Partition(who=(0,), at=1.0, until=2.0), Loss(who=(0,), at=1.0, until=2.0, probability=1.0),
     Corrupt(who=(1,), at=1.0, until=2.0, probability=1.0)],
)  # fmt: skip
def test_faults_of_links_hold_for_datagrams(fault: Any) -> None:
    heard: list[Any] = []
    done = run(listener(heard), sender(HOST_0, 0.5, 1.5, 2.5), faults=(fault,))
    assert (0.6, b"hello", HOST_1) in heard
    assert (1.6, b"hello", HOST_1) not in heard
    assert (2.6, b"hello", HOST_1) in heard
    assert balanced(done)


def test_a_hold_keeps_them_back() -> None:
    heard: list[Any] = []
    run(listener(heard), sender(HOST_0, 1.5), faults=(Hold(who=(0,), at=1.0, until=3.0),))
    assert [at for at, _, _ in heard] == [3.0]


def test_equal_datagrams_are_lost_each_by_its_own_draw() -> None:
    heard: list[Any] = []
    done = run(
        listener(heard, 100.0), sender(HOST_0, *(0.1 * n for n in range(1, 401))),
        links=Links(latency_s=0.1, loss=0.25),
    )  # fmt: skip
    # Binomial(400, 0.25): 100 with a spread of 8.7.
    assert 65 <= done.dropped["lost"] <= 135
    assert len(heard) == 400 - done.dropped["lost"]


def test_a_socket_nobody_reads_forgets_what_comes_late() -> None:
    async def sleeps(peer: Any) -> None:
        peer.datagrams.open(PORT)
        await peer.sleep_until(60.0)

    done = run(
        sleeps, sender(HOST_0, *(0.1 * n for n in range(1, 301)), data=bytes(DATAGRAM_BYTES))
    )
    assert done.dropped == {"socket full": 300 - 212_992 // DATAGRAM_BYTES}


def test_misuse_is_refused() -> None:
    async def misuses(peer: Any) -> None:
        socket = peer.datagrams.open(PORT)
        with pytest.raises(UsageError, match="taken"):
            peer.datagrams.open(PORT)
        with pytest.raises(UsageError, match="port=70000"):
            peer.datagrams.open(70000)
        with pytest.raises(MessageTooLarge, match="limit 1472"):
            await socket.send_to(bytes(DATAGRAM_BYTES + 1), HOST_1)
        socket.close()
        with pytest.raises(UsageError, match="closed"):
            await socket.send_to(b"", HOST_1)
        assert peer.datagrams.open(PORT).local == HOST_0

    run(misuses)
