"""Ports that a router opens on request, asked over real sockets of loopback."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
from fake_router import HOST, Router
from nat_boxes import Behind, Box, Inside, boxes
from traversal_programs import Cross, outcomes

from shoal.base.errors import UsageError
from shoal.engine.live import LiveSettings, run_live
from shoal.engine.live import settings as settings_module
from shoal.engine.live.join import join_live
from shoal.engine.live.joining import Joining, Status
from shoal.engine.live.upnp import Ports
from shoal.kernel.datagrams import Endpoint
from shoal.world.nat import NatBox
from shoal.world.network import Network

pytestmark = pytest.mark.live
BOTH = ("UDP", "TCP")


def asked(
    router: Router, what: Callable[[Ports, list[str]], Coroutine[Any, Any, None]], **more: Any
) -> list[str]:
    """What was told while `what` had its ports opened; the router has nothing left open after."""
    said: list[str] = []

    async def run() -> None:
        async with router.running():
            ports = Ports(router.place, said.append, **more)
            try:
                await what(ports, said)
            finally:
                await ports.close()

    asyncio.run(run())
    return said


@pytest.mark.parametrize("version", [1, 2])
def test_a_port_is_opened_for_both_protocols_and_closed_again(version: int) -> None:
    router = Router(version)

    async def what(ports: Ports, said: list[str]) -> None:
        assert await ports.map(HOST, 4001) == Endpoint("8.8.4.4", 4001)
        assert router.open == {(p, 4001): (HOST, 4001, 3600) for p in BOTH}
        assert await ports.map("0.0.0.0", 4002) == Endpoint("8.8.4.4", 4002)
        assert router.open["UDP", 4002] == (HOST, 4002, 3600)
        await ports.release(4001)
        assert list(router.open) == [(p, 4002) for p in BOTH]

    assert asked(router, what) == []
    assert router.open == {}
    assert ("AddAnyPortMapping" in router.asked) == (version == 2)
    # One search and one description serve all requests.
    assert router.asked.count("/device.xml") == 1


@pytest.mark.parametrize("version", [1, 2])
def test_a_port_that_another_machine_has_is_had_under_another_number(version: int) -> None:
    router = Router(version, taken=frozenset({4001}))

    async def what(ports: Ports, said: list[str]) -> None:
        found = await ports.map(HOST, 4001)
        assert found is not None
        assert found.port != 4001
        assert router.open == {(p, found.port): (HOST, 4001, 3600) for p in BOTH}

    assert asked(router, what) == []
    assert router.open == {}


def test_when_every_port_is_taken_it_says_so() -> None:
    router = Router(taken=frozenset(range(1 << 16)))

    async def what(ports: Ports, said: list[str]) -> None:
        assert await ports.map(HOST, 4001) is None

    assert asked(router, what) == ["has no port 4001 of the router: it refuses: error 718 (no)"]
    assert router.asked.count("AddPortMapping") == 5


@pytest.mark.parametrize("version", [1, 2])
def test_a_router_that_knows_no_leases_is_asked_for_good(version: int) -> None:
    router = Router(version, permanent=True)

    async def what(ports: Ports, said: list[str]) -> None:
        assert await ports.map(HOST, 4001) == Endpoint("8.8.4.4", 4001)
        assert router.open == {(p, 4001): (HOST, 4001, 0) for p in BOTH}

    assert asked(router, what) == []
    assert router.open == {}


@pytest.mark.parametrize(
    ("router", "why"),
    [
        (Router(answers=False), "no router answered in 0.5 s (asked 127.0.0.1:"),
        (Router(stalls=True), "it did not answer in 0.5 s (asked 127.0.0.1:"),
        (Router(refused={"AddPortMapping": 606}), "it refuses: error 606 (no)"),
        (Router(refused={"GetExternalIPAddress": 501}), "UpnpActionResponseError: "),
        (Router(address="0.0.0.0"), "it has no outer address (is it connected?)"),
        (Router(address="<b>&amp;"), "it says that its outer address is '<b>&amp;'"),
    ],
)
def test_it_says_why_nothing_was_opened(router: Router, why: str) -> None:
    async def what(ports: Ports, said: list[str]) -> None:
        assert await ports.map(HOST, 4001) is None
        # And it may be asked again.
        assert await ports.map(HOST, 4001) is None

    said = asked(router, what, within_s=0.5)
    assert len(said) == 2
    assert all(each.startswith(f"has no port 4001 of the router: {why}") for each in said), said
    assert router.open == {}


BOMB = (
    b'<?xml version="1.0"?><!DOCTYPE r [<!ENTITY a "' + b"x" * 1000 + b'">'
    + b"".join(b'<!ENTITY %c "%s">' % (97 + n, b"&%c;" % (96 + n) * 100) for n in range(1, 9))
    + b"]><root>&i;</root>"
)  # fmt: skip


@pytest.mark.parametrize(
    "garbage", [b"<root", b"\xff\xfe\0", b"<a/>", BOMB, b"<r>" + bytes(2 << 20)],
    ids=["cut", "binary", "other", "bomb", "long"],
)  # fmt: skip
def test_nonsense_is_no_router(garbage: bytes) -> None:
    router = Router(garbage=garbage)

    async def what(ports: Ports, said: list[str]) -> None:
        assert await ports.map(HOST, 4001) is None

    said = asked(router, what, within_s=0.5)
    assert said[-1].startswith("has no port 4001 of the router: no router answered"), said
    assert said[0].startswith("cannot read what 'http://127.0.0.1:"), said
    assert all(len(each) <= 300 for each in said)


def test_who_names_another_host_as_its_router_is_not_followed() -> None:
    router = Router(names="127.0.0.2")

    async def what(ports: Ports, said: list[str]) -> None:
        assert await ports.map(HOST, 4001) is None

    said = asked(router, what, within_s=0.5)
    assert said[0].endswith("which 127.0.0.1 named as its router"), said
    assert router.asked == []


@pytest.mark.parametrize("address", ["192.168.7.2", "10.0.0.9", "100.64.3.1"])
def test_a_router_behind_another_one_is_found_out(address: str) -> None:
    async def what(ports: Ports, said: list[str]) -> None:
        assert await ports.map(HOST, 4001) == Endpoint(address, 4001)

    (line,) = asked(Router(address=address), what)
    assert "is private: it is behind another router" in line


def test_without_tcp_there_are_datagrams() -> None:
    router = Router(2, refused={"AddPortMapping": 718})

    async def what(ports: Ports, said: list[str]) -> None:
        assert await ports.map(HOST, 4001) == Endpoint("8.8.4.4", 4001)
        assert list(router.open) == [("UDP", 4001)]

    assert asked(router, what) == [
        "has port 4001 of the router for UDP only; TCP: error 718 (no)"
    ]  # fmt: skip


def test_leases_are_renewed_also_when_the_router_began_anew() -> None:
    router = Router(taken=frozenset({4001}))

    async def what(ports: Ports, said: list[str]) -> None:
        found = await ports.map(HOST, 4001)
        before, router.open = router.open, {}
        router.address = "8.8.8.8"
        for _ in range(200):
            if len(router.open) == len(before):
                break
            await asyncio.sleep(0.05)
        assert router.open == before == {(p, found.port): (HOST, 4001, 2) for p in BOTH}  # type: ignore[union-attr]
        router.refused = {"AddPortMapping": 606}
        for _ in range(200):
            if len(said) == 2:
                break
            await asyncio.sleep(0.05)

    said = asked(router, what, lease_s=2)
    assert said[0] == "has a router whose address was 8.8.4.4 and is 8.8.8.8 now"
    assert said[1].startswith("could not renew port 4001 of the router: "), said
    assert router.open == {}


def test_a_port_of_this_machine_only_is_not_opened() -> None:
    """A router elsewhere could not reach it."""
    from shoal.engine.live.upnp import NotMapped, _inner

    with pytest.raises(NotMapped, match=r"listen on 0\.0\.0\.0"):
        _inner("127.0.0.1", "192.168.1.1")
    assert _inner("192.168.1.5", "192.168.1.1") == "192.168.1.5"


# In runs.


@dataclass(frozen=True)
class Opens:
    """A peer that opens a port, and ends with the socket open, closed, or closed too early."""

    how: str = "open"

    async def run(self, peer: Any) -> None:
        socket = peer.datagrams.open()
        if self.how == "early":
            async with peer.tasks() as group:
                group.start(self._map(peer, socket), isolate=True)
                await peer.sleep_until(peer.now() + 0.001)
                socket.close()
            return
        await self._map(peer, socket)
        if self.how == "closed":
            socket.close()
            await peer.sleep_until(peer.now() + 0.5)

    async def _map(self, peer: Any, socket: Any) -> None:
        found = await socket.map_port()
        peer.record("port", -1 if found is None else found.port)
        peer.record("same", found == Endpoint("8.8.4.4", socket.local.port))


@pytest.mark.parametrize("how", ["open", "closed", "early"])
def test_a_run_leaves_nothing_open(how: str) -> None:
    with Router().in_thread() as router:
        settings = LiveSettings(horizon_s=20.0, upnp=router.place)
        run = run_live(Opens(how), Network(1), settings=settings)
    assert [row.value for row in run.series("same")] == [1.0]
    assert router.asked.count("DeletePortMapping") == 2
    assert router.open == {}


def test_nobody_is_asked_unless_a_setting_says_so() -> None:
    with Router().in_thread() as router:
        run = run_live(Opens(), Network(1), settings=LiveSettings(horizon_s=20.0))
    assert [row.value for row in run.series("port")] == [-1.0]
    assert router.asked == []


def test_why_there_is_no_port_is_in_the_report() -> None:
    with Router(refused={"AddPortMapping": 606}).in_thread() as router:
        settings = LiveSettings(horizon_s=20.0, upnp=router.place)
        run = run_live(Opens(), Network(1), settings=settings)
    assert [row.value for row in run.series("port")] == [-1.0]
    assert any("it refuses: error 606" in each.what for each in run.happenings)


@dataclass(frozen=True)
class Nothing:
    async def run(self, peer: Any) -> None:
        await peer.sleep_until(0.8)


@pytest.mark.parametrize("address", ["8.8.4.4", "192.168.7.2"])
def test_who_joins_tells_others_the_port_that_the_router_opened(address: str) -> None:
    seen: list[Status] = []
    with Router(address=address).in_thread() as router:
        settings = LiveSettings(horizon_s=20.0, upnp=router.place)
        run = join_live(Nothing(), Network(1), Joining(), settings=settings,
                        tell=lambda status, _: seen.append(status))  # fmt: skip
    assert [name for name in router.asked if name == "AddPortMapping"] == ["AddPortMapping"]
    # A private one leads nowhere from outside.
    host = seen[-1].address[0]
    assert host == ("8.8.4.4" if address == "8.8.4.4" else HOST)
    assert any(f"of the router at {address}" in each.what for each in run.happenings)
    assert router.open == {}


@dataclass(frozen=True)
class Boxed:
    program: Cross
    behind: dict[int, Box]

    async def run(self, peer: Any) -> None:
        inside = Behind if peer.id < 2 else Inside
        await self.program.run(inside(peer, self.behind[peer.id]))


@pytest.mark.skipif(sys.platform != "linux", reason="needs the whole of 127.0.0.0/8")
@pytest.mark.parametrize("upnp", [True, False])
def test_boxes_that_let_nobody_meet_do_when_the_router_opens_a_port(upnp: bool) -> None:
    """Two symmetric boxes; the one before peer 2 is a router that opens ports."""
    behind = {p: Box(None, f"127.9.6.{1 + p}") for p in range(2)}
    for peer in (2, 3):
        kind = NatBox.classic("symmetric", (peer,), upnp=peer == 2)
        behind[peer] = Box(kind, f"127.9.6.{1 + peer}")
    program = Cross(("127.9.6.1", "127.9.6.2"), (((3, 2),),), begin_s=3.5, slot_s=4.5)
    router = Router(2, address="127.9.6.3", opened=behind[2].opens)
    with router.in_thread(), boxes(*behind.values()):
        settings = LiveSettings(
            horizon_s=40.0, carriers=("quic",), upnp=router.place if upnp else "off"
        )
        run = run_live(Boxed(program, behind), Network(4), settings=settings)
    found = outcomes(run)
    assert found["path", 3, "2"] == found["messages", 3, "2"] == upnp
    assert found["reachable", 2, ""] == upnp
    # Peer 3 is given the port too, of a box that is not its own: others see it elsewhere.
    assert found["answered", 3, "2"] == found["asked back", 2, "3"] == 1
    assert router.open == {}


def test_settings_that_name_no_router_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("", "on", "router", "192.168.1", "192.168.1.1:", "192.168.1.1:x", "1.1.1.1:0"):
        with pytest.raises(UsageError, match="upnp="):
            LiveSettings(upnp=wrong)
    for right in ("off", "auto", "192.168.1.1", "192.168.1.1:1900"):
        LiveSettings(upnp=right)
    monkeypatch.setattr(settings_module, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"shoal\[upnp\]"):
        LiveSettings(upnp="auto")
