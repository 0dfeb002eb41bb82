"""Ports that the router of this network opens on request: UPnP Internet Gateway Device.

By the package `async-upnp-client`: the router is looked for by SSDP (UPnP Device Architecture 1.1,
section 1.3), and told over SOAP what to open (WANIPConnection:2, sections 2.5.16 and 2.5.20). A
mapping is leased, renewed after half of its lease, and taken back by `release` and `close`; one of
a process that was killed ends with its lease.

Anybody on the local network can answer for a router. What such a one learns is which port is
wanted, and what it can do is to name a wrong address: so nothing is sent to another host than the
one that answered, and whoever uses the outer address should compare it with what others see
(`Traversal` does).
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, ip_address
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientSession, ClientTimeout
from async_upnp_client.client import UpnpRequester, UpnpService
from async_upnp_client.client_factory import UpnpFactory
from async_upnp_client.const import HttpRequest, HttpResponse
from async_upnp_client.exceptions import UpnpActionError, UpnpCommunicationError
from async_upnp_client.search import SsdpSearchListener

from shoal.kernel.datagrams import Endpoint

LEASE_S = 3600
WITHIN_S = 5.0
"""How long one request to the router may take, with the search for it."""
_SSDP_PORT = 1900
_SEARCH_AGAIN_S = 1.0
_MOST_ANSWERS = 16
_MOST_BYTES = 1 << 20
"""Descriptions of real routers have some 10 KB."""
_OTHER_PORTS = 4
_GATEWAYS = tuple(f"urn:schemas-upnp-org:device:InternetGatewayDevice:{n}" for n in (1, 2))
_SERVICES = tuple(
    f"urn:schemas-upnp-org:service:{name}"
    for name in ("WANIPConnection:2", "WANIPConnection:1", "WANPPPConnection:1")
)
_NO_SUCH_MAPPING, _CONFLICT, _ONLY_PERMANENT, _OTHER_MECHANISM = 714, 718, 725, 729


class NotMapped(Exception):
    """Why there is no mapping, in words."""


@dataclass
class _Mapping:
    """One port of this machine that is open outside. asked: what the router may hold of it."""

    host: str
    port: int
    protocols: tuple[str, ...]
    asked: dict[str, int] = field(default_factory=dict)
    address: str = ""


@dataclass(frozen=True)
class _Router:
    host: str
    service: UpnpService


class Ports:
    """What a router opened for the ports of this process.

    where: "auto" looks for the router by multicast, `HOST` or `HOST:PORT` asks that one. tell: gets
    a line whenever something was not mapped, or not as well as it could be. Every request ends
    within `within_s`, one after the other.
    """

    def __init__(
        self, where: str, tell: Callable[[str], None], *, within_s: float = WITHIN_S,
        lease_s: int = LEASE_S,
    ) -> None:  # fmt: skip
        self.tell = tell
        self._where = where
        self._within_s = within_s
        self._lease_s = lease_s
        self._router: _Router | None = None
        self._turn = asyncio.Lock()
        self._mappings: dict[tuple[int, tuple[str, ...]], _Mapping] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._closed = False

    async def map(
        self, host: str, port: int, protocols: tuple[str, ...] = ("UDP", "TCP")
    ) -> Endpoint | None:
        """Open a port of this machine to everybody outside; where, or None after a line to `tell`.

        The same outer port is asked for all protocols; the first one must be had, the others need
        not.
        """
        mapping = _Mapping(host, port, protocols)
        try:
            async with self._asking():
                if self._closed:
                    return None
                self._mappings[port, protocols] = mapping
                found = await self._open(mapping)
        except NotMapped as why:
            await self.release(port, protocols)
            self.tell(f"has no port {port} of the router: {why}")
            return None
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())
        return found

    async def release(self, port: int, protocols: tuple[str, ...] = ("UDP", "TCP")) -> None:
        """Have the router close what was opened for that port."""
        if (port, protocols) not in self._mappings:
            return
        try:
            async with self._asking():
                mapping = self._mappings.pop((port, protocols), None)
                if mapping is None or not mapping.asked:
                    return
                router = await self._found()
                for protocol, outer in mapping.asked.items():
                    await self._delete(router, protocol, outer)
        except NotMapped as why:
            self.tell(f"could not close port {port} of the router: {why}")

    async def close(self) -> None:
        """Release everything; nothing of it is left in the loop."""
        self._closed = True
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        # All at once: a router that is gone keeps nobody waiting for longer than one request.
        await asyncio.gather(*(self.release(*key) for key in list(self._mappings)))

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        """One request at a time; whatever goes wrong is a `NotMapped`."""
        try:
            async with asyncio.timeout(self._within_s), self._turn:
                yield
        except NotMapped:
            raise
        except TimeoutError:
            silent = "no router answered" if self._router is None else "it did not answer"
            self._router = None
            raise NotMapped(f"{silent} in {self._within_s:g} s ({self._asked})") from None
        except Exception as error:
            # A box may answer anything, for which the library has errors of many kinds.
            self._router = None
            raise NotMapped(f"{type(error).__name__}: {error}".strip()) from error

    @property
    def _asked(self) -> str:
        return "asked by multicast" if self._where == "auto" else f"asked {self._where}"

    # Requests.

    async def _open(self, mapping: _Mapping) -> Endpoint:
        router = await self._found()
        address = await self._address(router)
        inner = _inner(mapping.host, router.host)
        first, *others = mapping.protocols
        outer = await self._add(router, mapping, first, inner)
        for protocol in others:
            try:
                await self._add_at(router, mapping, protocol, inner, outer)
            except UpnpActionError as error:
                self.tell(
                    f"has port {outer} of the router for {first} only; {protocol}: {_said(error)}"
                )
        if not mapping.address and not address.is_global:
            self.tell(
                f"has port {outer} of a router whose own address {address} is private: it is "
                "behind another router, and only peers between the two can use the port"
            )
        elif mapping.address not in ("", str(address)):
            self.tell(f"has a router whose address was {mapping.address} and is {address} now")
        mapping.address = str(address)
        return Endpoint(str(address), outer)

    async def _address(self, router: _Router) -> IPv4Address:
        answer = await router.service.action("GetExternalIPAddress").async_call()
        text = str(answer.get("NewExternalIPAddress") or "")
        try:
            address = IPv4Address(text)
        except ValueError:
            raise NotMapped(f"it says that its outer address is {text[:40]!r}") from None
        if address.is_unspecified:
            raise NotMapped("it has no outer address (is it connected?)")
        return address

    async def _add(self, router: _Router, mapping: _Mapping, protocol: str, inner: str) -> int:
        """An outer port for the inner one: the same, if it can be had."""
        if protocol in mapping.asked:
            await self._add_at(router, mapping, protocol, inner, mapping.asked[protocol])
            return mapping.asked[protocol]
        wanted, refused = mapping.port, ""
        for _ in range(1 + _OTHER_PORTS):
            try:
                return await self._add_at(router, mapping, protocol, inner, wanted)
            except UpnpActionError as error:
                refused = _said(error)
                if error.error_code not in (_CONFLICT, _OTHER_MECHANISM):
                    break
                # In use for another machine. Which port instead is nobody's secret.
                wanted = random.randrange(49152, 65536)
        raise NotMapped(f"it refuses: {refused}")

    async def _add_at(
        self, router: _Router, mapping: _Mapping, protocol: str, inner: str, outer: int
    ) -> int:
        """Ask for this outer port; which one was given."""
        known = mapping.asked.get(protocol)
        # Version 2 may give another port than the one that was asked for.
        any_port = known is None and not mapping.asked
        any_port = any_port and router.service.has_action("AddAnyPortMapping")
        name = "AddAnyPortMapping" if any_port else "AddPortMapping"
        # Before it is sent: after a request without an answer the port may be open.
        mapping.asked[protocol] = outer
        words: dict[str, Any] = {
            "NewRemoteHost": "", "NewExternalPort": outer, "NewProtocol": protocol,
            "NewInternalPort": mapping.port, "NewInternalClient": inner, "NewEnabled": True,
            "NewPortMappingDescription": "shoal", "NewLeaseDuration": self._lease_s,
        }  # fmt: skip
        try:
            try:
                answer = await router.service.action(name).async_call(**words)
            except UpnpActionError as error:
                if error.error_code != _ONLY_PERMANENT:
                    raise
                answer = await router.service.action(name).async_call(
                    **{**words, "NewLeaseDuration": 0}
                )
        except UpnpActionError as error:
            # A lease that is not renewed still lasts, unless the port is another machine's by now.
            if known is None or error.error_code == _CONFLICT:
                del mapping.asked[protocol]
            raise
        if any_port:
            outer = mapping.asked[protocol] = _port(answer)
        return outer

    async def _delete(self, router: _Router, protocol: str, outer: int) -> None:
        try:
            await router.service.action("DeletePortMapping").async_call(
                NewRemoteHost="", NewExternalPort=outer, NewProtocol=protocol
            )
        except UpnpActionError as error:
            if error.error_code != _NO_SUCH_MAPPING:
                raise NotMapped(f"it refuses: {_said(error)}") from None

    async def _renew(self) -> None:
        """Ask again for everything after half of each lease, also of a router that began anew."""
        while True:
            await asyncio.sleep(self._lease_s / 2)
            for mapping in list(self._mappings.values()):
                try:
                    async with self._asking():
                        await self._open(mapping)
                except NotMapped as why:
                    self.tell(f"could not renew port {mapping.port} of the router: {why}")

    # The search.

    async def _found(self) -> _Router:
        if self._router is None:
            self._router = await self._search()
        return self._router

    async def _search(self) -> _Router:
        """The first that answers, and has a connection to open ports of."""
        answers: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue(_MOST_ANSWERS)

        def heard(headers: Mapping[str, Any]) -> None:
            if not answers.full():
                answers.put_nowait(dict(headers.items()))

        listener = SsdpSearchListener(callback=heard, target=self._target(), timeout=1)
        await listener.async_start()
        repeating = asyncio.create_task(_repeat(listener))
        try:
            seen = set[str]()
            while True:
                answer = {str(name).lower(): value for name, value in (await answers.get()).items()}
                place = str(answer.get("location", ""))
                source = str(answer.get("_host", ""))
                if place in seen or len(seen) >= _MOST_ANSWERS:
                    continue
                seen.add(place)
                if urlsplit(place).scheme != "http" or urlsplit(place).hostname != source:
                    self.tell(f"does not ask {place[:100]!r}, which {source} named as its router")
                elif (service := await self._service(place)) is not None:
                    return _Router(source, service)
        finally:
            repeating.cancel()
            await asyncio.gather(repeating, return_exceptions=True)
            listener.async_stop()

    def _target(self) -> tuple[str, int] | None:
        if self._where == "auto":
            return None
        host, _, port = self._where.partition(":")
        return host, int(port or _SSDP_PORT)

    async def _service(self, place: str) -> UpnpService | None:
        """The connection of a device that opens ports; None where there is none."""
        try:
            device = await UpnpFactory(_Requester(), non_strict=True).async_create_device(place)
        except TimeoutError:
            raise
        except Exception as error:
            # As above: one that answers nonsense must not keep this from asking another one.
            self.tell(f"cannot read what {place[:100]!r} is: {type(error).__name__}: {error}"[:300])
            return None
        found = {each.service_type: each for each in device.all_services}
        for name in _SERVICES:
            if name in found and found[name].has_action("AddPortMapping"):
                return found[name]
        return None


async def _repeat(listener: SsdpSearchListener) -> None:
    """Search for routers of both versions; packets may be lost."""
    while True:
        for kind in _GATEWAYS:
            listener.search_target = kind
            listener.async_search()
        await asyncio.sleep(_SEARCH_AGAIN_S)


class _Requester(UpnpRequester):
    """Requests to the one host that answered, and answers of a bounded size."""

    async def async_http_request(self, http_request: HttpRequest) -> HttpResponse:
        limit = ClientTimeout(total=WITHIN_S)
        try:
            async with ClientSession(timeout=limit, trust_env=False) as session, session.request(
                http_request.method, http_request.url, headers=http_request.headers,
                data=http_request.body, allow_redirects=False,
            ) as response:  # fmt: skip
                body = bytearray()
                async for piece in response.content.iter_chunked(1 << 16):
                    body += piece
                    if len(body) > _MOST_BYTES:
                        raise UpnpCommunicationError(f"an answer of more than {_MOST_BYTES} bytes")
                text = body.decode(errors="replace")
                return HttpResponse(response.status, response.headers, text)
        except ClientError as error:
            raise UpnpCommunicationError(repr(error)) from error


def _said(error: UpnpActionError) -> str:
    return f"error {error.error_code} ({error.error_desc})"


def _port(answer: Mapping[str, Any]) -> int:
    port = int(answer.get("NewReservedPort") or 0)
    if not 0 < port < 1 << 16:
        raise NotMapped(f"it says that it opened port {port}")
    return port


def _inner(host: str, router: str) -> str:
    """Where the router reaches a port of this machine that is bound to that host."""
    if ip_address(host).is_unspecified:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((router, 9))  # Nothing is sent.
            return str(probe.getsockname()[0])
    if ip_address(host).is_loopback and not ip_address(router).is_loopback:
        raise NotMapped(f"the port is open to this machine only (listen on 0.0.0.0, not on {host})")
    return host
