"""Which peer is what: the coordinator, then each node's gateway and aggregators, then clients."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.base.errors import UsageError
from shoal.base.ids import PeerId


@dataclass(frozen=True)
class Layout:
    """Peer 0 coordinates; 1 to `nodes` are gateways; `each` aggregators per node; the rest clients.

    >>> layout = Layout.fitting(peers=10, nodes=2, each=None)
    >>> layout.gateway(1), layout.aggregators(2), layout.clients
    (2, (4,), (5, 6, 7, 8, 9))
    """

    peers: int
    nodes: int
    each: int

    @classmethod
    def fitting(cls, peers: int, nodes: int, each: int | None) -> Layout:
        """Fewer nodes where peers are few, and without a number of aggregators a quarter of the
        peers; UsageError when nobody is left to be a client."""
        if each is None:
            nodes = min(nodes, (peers - 2) // 2)
            each = max(1, (peers - 1 - nodes) // (4 * nodes)) if nodes else 1
        layout = cls(peers, nodes, each)
        if nodes < 1 or each < 1 or not layout.clients:
            raise UsageError(
                f"lifl: {peers} peers for a coordinator, {nodes} gateways and {each} aggregators "
                "each; need at least one of each and a client (raise peers)"
            )
        return layout

    @property
    def clients(self) -> tuple[PeerId, ...]:
        return tuple(PeerId(p) for p in range(1 + self.nodes * (1 + self.each), self.peers))

    def gateway(self, node: int) -> PeerId:
        return PeerId(1 + node)

    def aggregators(self, gateway: int) -> tuple[PeerId, ...]:
        first = 1 + self.nodes + (gateway - 1) * self.each
        return tuple(PeerId(peer) for peer in range(first, first + self.each))

    def is_client(self, peer: int) -> bool:
        return 1 + self.nodes * (1 + self.each) <= peer < self.peers

    def role(self, peer: int) -> str:
        """ "coordinator", "gateway", "aggregator" or "client"."""
        if peer == 0:
            return "coordinator"
        if peer <= self.nodes:
            return "gateway"
        return "client" if self.is_client(peer) else "aggregator"
