"""The `kademlia` package (2.2.3, over UDP) at the same work, as the yardstick."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import socket
from time import perf_counter
from typing import Any

from shoal.base.keyed import fold

_HOST = "127.0.0.1"
_SEED = 1


def installed() -> bool:
    return importlib.util.find_spec("kademlia") is not None


def searched(nodes: int, keys: int, gets: tuple[int, int]) -> list[list[tuple[bool, float]]]:
    """(found, seconds) of each search: with all nodes well, and with the even ones silent, which
    keep their sockets open and answer nothing."""
    for name in ("kademlia", "rpcudp"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return asyncio.run(_searched(nodes, keys, gets))


def _drawn(below: int, *path: Any) -> int:
    return fold(_SEED, *path) % below


async def _searched(nodes: int, keys: int, gets: tuple[int, int]) -> list[list[tuple[bool, float]]]:
    from kademlia.network import Server  # pyright: ignore[reportMissingImports]

    ports = _free_ports(nodes)
    servers = [Server() for _ in range(nodes)]
    try:
        for number, server in enumerate(servers):
            await server.listen(ports[number], _HOST)
            if number:
                known = {_drawn(number, "contact", number, turn) for turn in range(3)}
                await server.bootstrap([(_HOST, ports[each]) for each in sorted(known)])
        for key in range(keys):
            await servers[key % nodes].set(f"key {key}", f"value {key}")
        phases = []
        for phase, count in enumerate(gets):
            if phase:
                for server in servers[::2]:
                    vars(server.protocol)["datagram_received"] = _nothing
            phases.append([await _get(servers, keys, phase, turn) for turn in range(count)])
        return phases
    finally:
        for server in servers:
            server.stop()
        # What is under way ends in its time-out, which nobody waits for.
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


async def _get(servers: list[Any], keys: int, phase: int, turn: int) -> tuple[bool, float]:
    key = _drawn(keys, "key", phase, turn)
    began = perf_counter()
    found = await servers[(2 * turn + 1) % len(servers)].get(f"key {key}")
    return found == f"value {key}", perf_counter() - began


def _nothing(data: bytes, address: Any) -> None:
    """What a silent node does with what it hears."""


def _free_ports(count: int) -> list[int]:
    """The package wants a number: ports that were free a moment ago."""
    held = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(count)]
    try:
        for each in held:
            each.bind((_HOST, 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()
