"""What surrounds the peers: graph, links, devices, faults and NAT boxes, as one value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shoal.base.errors import UsageError
from shoal.world.device import Device
from shoal.world.faults import Fault, check
from shoal.world.links import Links
from shoal.world.nat import NatBox
from shoal.world.nat import check as check_nats

if TYPE_CHECKING:
    from shoal.world.topology import Topology


@dataclass(frozen=True)
class Network:
    """Everything around `peers` peers. Without a topology everybody is everybody's neighbour.

    NAT boxes concern datagrams, and messages where they say so; a peer behind none is public.
    """

    peers: int
    topology: Topology | None = None
    links: Links = field(default_factory=Links)
    device: Device = field(default_factory=Device)
    faults: tuple[Fault, ...] = ()
    nats: tuple[NatBox, ...] = ()

    def __post_init__(self) -> None:
        if self.peers < 1:
            raise UsageError(f"Network: peers={self.peers}; need at least 1")
        if self.topology is not None and self.topology.peers != self.peers:
            raise UsageError(
                f"Network: the topology has {self.topology.peers} peers and the network "
                f"{self.peers} (give both the same number)"
            )
        object.__setattr__(self, "faults", check(self.faults, self.peers))
        object.__setattr__(self, "nats", check_nats(self.nats, self.peers))
