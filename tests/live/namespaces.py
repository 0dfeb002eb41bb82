"""Networks of this machine's own: Linux network namespaces, joined by a bridge, with NAT between.

Needs root, `ip` and `nft`; `missing()` says what is not there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

WAN = "203.0.113"
"""TEST-NET-3 (RFC 5737)."""

_RULES = """
table ip nat {{
  chain out {{
    type nat hook postrouting priority 100;
    oifname "wan" masquerade {masquerade}
  }}
}}
table ip guard {{
  chain input {{
    type filter hook input priority 0;
    iifname "wan" drop
  }}
  chain forward {{
    type filter hook forward priority 0;
    iifname "wan" ct state new drop
  }}
}}
"""
MASQUERADE = {"port-restricted": "", "symmetric": "random,fully-random"}
"""Linux keeps the inner port where it can, and lets in exact answers; "fully-random" draws a port
per destination. A home router drops what nobody asked for, so that it does not answer with RST."""


def sh(*words: str, stdin: str | None = None) -> str:
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@dataclass
class Lan:
    """Where a peer lives: the namespace, and its own address."""

    namespace: str
    host: str


@dataclass
class World:
    lans: list[Lan] = field(default_factory=list)

    def command(self, peer: int, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.lans[peer].namespace, *words]


@contextmanager
def world(*kinds: str) -> Iterator[World]:
    """A namespace per peer: "public" ones on the bridge, others behind a router of their own."""
    prefix = f"sh{os.getpid()}"
    with ExitStack() as stack:
        wide = _namespace(stack, f"{prefix}w")
        sh("ip", "-n", wide, "link", "add", "name", "bridge", "type", "bridge")
        sh("ip", "-n", wide, "link", "set", "bridge", "up")
        made = World()
        for number, kind in enumerate(kinds):
            inner = _namespace(stack, f"{prefix}p{number}")
            outer = inner if kind == "public" else _namespace(stack, f"{prefix}r{number}")
            _plug(wide, outer, f"b{number}", f"{WAN}.{10 + number}")
            if outer != inner:
                _cable(outer, "lan", f"10.{number}.0.1", inner, "eth", f"10.{number}.0.2")
                sh("ip", "-n", inner, "route", "add", "default", "via", f"10.{number}.0.1")
                sh("ip", "netns", "exec", outer, "sysctl", "-qw", "net.ipv4.ip_forward=1")
                rules = _RULES.format(masquerade=MASQUERADE[kind])
                sh("ip", "netns", "exec", outer, "nft", "-f", "-", stdin=rules)
            host = f"{WAN}.{10 + number}" if outer == inner else f"10.{number}.0.2"
            made.lans.append(Lan(inner, host))
        yield made


def _namespace(stack: ExitStack, name: str) -> str:
    sh("ip", "netns", "add", name)
    stack.callback(sh, "ip", "netns", "del", name)
    sh("ip", "-n", name, "link", "set", "lo", "up")
    return name


def _plug(wide: str, outer: str, port: str, host: str) -> None:
    sh("ip", "-n", wide, "link", "add", port, "type", "veth", "peer", "name", "wan", "netns", outer)
    sh("ip", "-n", wide, "link", "set", port, "master", "bridge")
    sh("ip", "-n", wide, "link", "set", port, "up")
    sh("ip", "-n", outer, "addr", "add", f"{host}/24", "dev", "wan")
    sh("ip", "-n", outer, "link", "set", "wan", "up")


def _cable(one: str, name: str, host: str, other: str, its_name: str, its_host: str) -> None:
    sh("ip", "-n", one, "link", "add", name, "type", "veth",
       "peer", "name", its_name, "netns", other)  # fmt: skip
    for namespace, link, address in ((one, name, host), (other, its_name, its_host)):
        sh("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", link)
        sh("ip", "-n", namespace, "link", "set", link, "up")


def missing() -> str:
    """Why there can be no such networks here; "" when there can."""
    if not hasattr(os, "geteuid") or os.geteuid():
        return "needs root, for network namespaces"
    for program in ("ip", "nft"):
        if shutil.which(program) is None:
            return f"needs the program {program!r}"
    try:
        with world("public", "symmetric"):
            return ""
    except (OSError, subprocess.SubprocessError) as error:
        return f"this kernel has no namespaces with NAT: {error}"
