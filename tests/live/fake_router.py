"""A home router as a UPnP client meets it: SSDP answers, descriptions, and control over SOAP.

It is spoken to over real sockets of loopback. What it should do wrong is said by its fields.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

from aiohttp import web

HOST = "127.0.0.1"
_DEVICE = "urn:schemas-upnp-org:device:"
_SERVICE = "urn:schemas-upnp-org:service:"
_ADDING = [
    ("NewRemoteHost", "string"), ("NewExternalPort", "ui2"), ("NewProtocol", "string"),
    ("NewInternalPort", "ui2"), ("NewInternalClient", "string"), ("NewEnabled", "boolean"),
    ("NewPortMappingDescription", "string"), ("NewLeaseDuration", "ui4"),
]  # fmt: skip
_ACTIONS = {
    "GetExternalIPAddress": ([], [("NewExternalIPAddress", "string")]),
    "AddPortMapping": (_ADDING, []),
    "AddAnyPortMapping": (_ADDING, [("NewReservedPort", "ui2")]),
    "DeletePortMapping": (_ADDING[:3], []),
}


class Refusal(Exception):
    def __init__(self, code: int) -> None:
        self.code = code


@dataclass
class Router:
    """version: of the gateway; address: what it calls its outer address. taken: outer ports of
    other machines. permanent: whether it knows no leases. answers, garbage, names: whether it says
    anything, whether its descriptions are nonsense, and as whose it gives them out. opened: called
    with what is opened; gives the outer port of `AddAnyPortMapping`."""

    version: int = 1
    address: str = "8.8.4.4"
    taken: frozenset[int] = frozenset()
    permanent: bool = False
    refused: dict[str, int] = field(default_factory=dict)
    answers: bool = True
    stalls: bool = False
    garbage: bytes = b""
    names: str = HOST
    opened: Callable[[str, str, int, int], int] | None = None
    open: dict[tuple[str, int], tuple[str, int, int]] = field(default_factory=dict)
    """(protocol, outer port) -> (host, port, lease)"""
    asked: list[str] = field(default_factory=list)
    place: str = ""
    """for `LiveSettings.upnp`"""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Router]:
        app = web.Application()
        app.router.add_get("/{name}", self._describe)
        app.router.add_post("/control", self._control)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, HOST, 0)
        await site.start()
        self._http_port = runner.addresses[0][1]
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: _Ssdp(self), (HOST, 0))
        self.place = "{}:{}".format(*transport.get_extra_info("sockname"))
        try:
            yield self
        finally:
            transport.close()
            await runner.cleanup()

    @contextmanager
    def in_thread(self) -> Iterator[Router]:
        ready, ended = threading.Event(), threading.Event()

        async def run() -> None:
            async with self.running():
                ready.set()
                await asyncio.to_thread(ended.wait)

        thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        thread.start()
        assert ready.wait(10.0)
        try:
            yield self
        finally:
            ended.set()
            thread.join(10.0)

    def answer_to(self, search: bytes) -> bytes | None:
        kind = re.search(rb"^ST: *(.*InternetGatewayDevice:(\d))\r$", search, re.M | re.I)
        if not self.answers or kind is None or int(kind[2]) > self.version:
            return None
        place = f"http://{self.names}:{self._http_port}/device.xml"
        return (
            f"HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nEXT:\r\nLOCATION: {place}\r\n"
            f"SERVER: box/1 UPnP/1.1 box/1\r\nST: {kind[1].decode()}\r\n"
            f"USN: uuid:1::{kind[1].decode()}\r\n\r\n"
        ).encode()

    @property
    def _service(self) -> str:
        return f"{_SERVICE}WANIPConnection:{self.version}"

    async def _describe(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        if self.garbage:
            return web.Response(body=self.garbage, content_type="text/xml")
        if request.path == "/device.xml":
            return web.Response(text=self._device(), content_type="text/xml")
        return web.Response(text=self._actions(), content_type="text/xml")

    def _device(self) -> str:
        text = (
            f"<device><deviceType>{_DEVICE}WANConnectionDevice:1</deviceType><UDN>uuid:3</UDN>"
            f"<serviceList><service><serviceType>{self._service}</serviceType>"
            "<serviceId>urn:upnp-org:serviceId:WANIPConn1</serviceId><SCPDURL>/service.xml</SCPDURL>"
            "<controlURL>/control</controlURL><eventSubURL>/event</eventSubURL></service>"
            "</serviceList></device>"
        )
        for number, kind in ((2, "WANDevice"), (1, "InternetGatewayDevice")):
            text = (
                f"<device><deviceType>{_DEVICE}{kind}:1</deviceType><UDN>uuid:{number}</UDN>"
                f"<friendlyName>box</friendlyName><deviceList>{text}</deviceList></device>"
            )
        return f'<root xmlns="urn:schemas-upnp-org:device-1-0">{text}</root>'

    def _actions(self) -> str:
        actions, kinds = "", dict[str, str]()
        for name, (inputs, outputs) in _ACTIONS.items():
            if self.version == 1 and name == "AddAnyPortMapping":
                continue
            arguments = ""
            for way, group in (("in", inputs), ("out", outputs)):
                for argument, kind in group:
                    kinds[argument] = kind
                    arguments += (
                        f"<argument><name>{argument}</name><direction>{way}</direction>"
                        f"<relatedStateVariable>{argument}</relatedStateVariable></argument>"
                    )
            arguments = f"<argumentList>{arguments}</argumentList>"
            actions += f"<action><name>{name}</name>{arguments}</action>"
        table = "".join(
            f'<stateVariable sendEvents="no"><name>{n}</name><dataType>{k}</dataType>'
            "</stateVariable>"
            for n, k in kinds.items()
        )
        return (
            f'<scpd xmlns="urn:schemas-upnp-org:service-1-0"><actionList>{actions}</actionList>'
            f"<serviceStateTable>{table}</serviceStateTable></scpd>"
        )

    async def _control(self, request: web.Request) -> web.Response:
        name = request.headers["SOAPAction"].strip('"').rpartition("#")[2]
        words = dict(re.findall(r"<(New\w+)>([^<]*)<", await request.text()))
        self.asked.append(name)
        if self.stalls:
            await asyncio.sleep(60.0)
        try:
            if name in self.refused:
                raise Refusal(self.refused[name])
            said = getattr(self, f"_{name}")(words)
        except Refusal as error:
            return _soap(
                "<s:Fault><faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring>"
                '<detail><UPnPError xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>'
                f"{error.code}</errorCode><errorDescription>no</errorDescription></UPnPError>"
                "</detail></s:Fault>", 500,
            )  # fmt: skip
        text = "".join(f"<{key}>{escape(str(value))}</{key}>" for key, value in said.items())
        return _soap(f'<u:{name}Response xmlns:u="{self._service}">{text}</u:{name}Response>', 200)

    def _GetExternalIPAddress(self, words: dict[str, str]) -> dict[str, object]:
        return {"NewExternalIPAddress": self.address}

    def _AddPortMapping(self, words: dict[str, str]) -> dict[str, object]:
        self._enter(words, int(words["NewExternalPort"]))
        return {}

    def _AddAnyPortMapping(self, words: dict[str, str]) -> dict[str, object]:
        outer = int(words["NewExternalPort"])
        while outer in self.taken:
            outer += 1
        return {"NewReservedPort": self._enter(words, outer)}

    def _enter(self, words: dict[str, str], outer: int) -> int:
        lease, protocol = int(words["NewLeaseDuration"]), words["NewProtocol"]
        host, port = words["NewInternalClient"], int(words["NewInternalPort"])
        if lease and self.permanent:
            raise Refusal(725)
        if outer in self.taken:
            raise Refusal(718)
        if self.opened is not None:
            outer = self.opened(protocol, host, port, outer)
        self.open[protocol, outer] = host, port, lease
        return outer

    def _DeletePortMapping(self, words: dict[str, str]) -> dict[str, object]:
        if self.open.pop((words["NewProtocol"], int(words["NewExternalPort"])), None) is None:
            raise Refusal(714)
        return {}


class _Ssdp(asyncio.DatagramProtocol):
    def __init__(self, router: Router) -> None:
        self._router = router

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if data.startswith(b"M-SEARCH") and (answer := self._router.answer_to(data)) is not None:
            self._transport.sendto(answer, addr)


def _soap(text: str, status: int) -> web.Response:
    body = (
        '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>'
        f"{text}</s:Body></s:Envelope>"
    )
    return web.Response(text=body, status=status, content_type="text/xml")
