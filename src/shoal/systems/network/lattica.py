"""Lattica: a fabric for models between peers on any network, with no central intermediary.

Four parts that stand alone and meet in `Node`. Paths: peers behind NAT boxes find out how they look
from outside, punch through both boxes at once, and stay on a relay where that cannot work. State: a
store of CRDTs whose every change is signed and names what it follows, kept equal by gossip and
anti-entropy. Content: blobs named by their hash, found in a Kademlia table and fetched from many
peers, every block checked. Calls: unary and streaming, at most once, with deadlines and flow
control. On top, models: a trainer writes a checkpoint's identifier into the shared registry, and
workers fetch the blocks that changed from each other.

`work` names what the peers do: the fabric as a whole, or one of the paper's parts alone. The same
program runs in virtual time and on sockets.

Yang et al. 2025 (arXiv 2510.00183).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.base.errors import UsageError
from shoal.kernel.peer import Peer
from shoal.lab.card import Arm, Budget, Claim, Source, System, at_least, at_most, between
from shoal.lab.chart import Chart
from shoal.systems.network import _lattica_charts as charts
from shoal.systems.network import _lattica_claims as measured
from shoal.systems.network import _lattica_models as models
from shoal.systems.network import _lattica_paths as ways
from shoal.systems.network import _lattica_state as state

Work = Literal[
    "all", "paths", "replicas", "broadcast", "table", "swarm", "server", "copies", "calls"
]  # fmt: skip


@dataclass(frozen=True)
class Lattica:
    """What the peers do; see the module's text.

    all: everything at once, small; liars (the last peers) forge deltas and serve damaged blocks.
    paths: each of the peers calls `pairs` others through NAT boxes; the last two relay. attempts:
    of hole punching, 0 = none; reversal: whether a caller that strangers can reach is dialled back.
    replicas: everybody makes `ops` changes of shared state until `quiet_s`, among liars; broadcast:
    the same with a map that is told to everybody once.
    table: everybody stores and searches, before and after a departure.
    swarm, server, copies: two versions of a model of `blob_bytes` to all, over lines of
    `bytes_per_s`.
    calls: between two peers, as fast as they go; share: of the usual number.
    """

    work: Work = "all"
    liars: int = 1
    pairs: int = 5
    attempts: int = 3
    reversal: bool = True
    ops: int = 85
    quiet_s: float = 60.0
    blob_bytes: int = 40 << 20
    block_bytes: int = models.BLOCK_BYTES
    bytes_per_s: float = 6.25e6
    share: float = 1.0

    def __post_init__(self) -> None:
        if min(self.pairs, self.ops, self.blob_bytes, self.block_bytes) < 1 or self.liars < 0:
            raise UsageError(
                f"lattica: pairs={self.pairs}, ops={self.ops}, blob_bytes={self.blob_bytes}, "
                f"block_bytes={self.block_bytes}, liars={self.liars}; need at least 1, and no "
                "negative number of liars"
            )
        if min(self.quiet_s, self.bytes_per_s, self.share) <= 0:
            raise UsageError(
                f"lattica: quiet_s={self.quiet_s}, bytes_per_s={self.bytes_per_s}, share="
                f"{self.share}; need positive numbers"
            )

    async def run(self, peer: Peer) -> None:
        match self.work:
            case "all":
                await models.everything(peer, self.liars)
            case "paths":
                await ways.paths(peer, self.pairs, self.attempts, self.reversal)
            case "replicas":
                await state.replicate(peer, self.ops, self.quiet_s, self.liars)
            case "broadcast":
                await state.broadcast(peer, self.ops, self.quiet_s)
            case "table":
                await state.look_up(peer)
            case "calls":
                await ways.calls(peer, self.share)
            case work:
                run = {"swarm": models.swarm, "server": models.server, "copies": models.copies}
                await run[work](peer, self.blob_bytes, self.bytes_per_s, self.block_bytes)


INVARIANTS = (
    measured.nothing_forged_is_accepted,
    measured.only_verified_blobs,
    measured.nothing_is_invented,
    measured.replicas_agree_once_it_is_quiet,
    measured.keys_are_found_once_it_is_quiet,
    measured.models_arrive_once_it_is_quiet,
)
"""What every run keeps, whatever its faults: for fault fuzzing."""

_WIDE = {"name": "links", "latency_s": 0.03, "latency_spread": 0.5}
_LOSSY = {"name": "links", "latency_s": 0.05, "loss": 0.3}
_LINES = {
    "name": "links", "latency_s": 0.03, "uplink_bytes_per_s": 6.25e6,
    "downlink_bytes_per_s": 6.25e6,
}  # fmt: skip
_BOXES = {"full cone": 40, "restricted": 60, "port-restricted": 200, "symmetric": 100}
_NAT = {"peers": 402, "links": _WIDE, "nats": _BOXES}
_REPLICAS = {"peers": 64, "links": _LOSSY}
_MODELS = {"peers": 33, "links": _LINES, "seconds": 3000.0}

SYSTEM = System(
    name="lattica",
    kind="program",
    title="A fabric for models without a centre: paths, shared state, content, calls",
    make=Lattica,
    source=Source(
        "Yang et al. 2025",
        "Lattica: A Decentralized Cross-NAT Communication Framework for Scalable AI Inference and "
        "Training",
        arxiv="2510.00183",
    ),
    scenario="network.fabric",
    arms={
        "punching": Arm(set={"work": "paths"}, scenario=_NAT),
        "public only": Arm(
            set={"work": "paths", "attempts": 0, "reversal": False}, scenario=_NAT
        ),
        "reversal": Arm(set={"work": "paths", "attempts": 0}, scenario=_NAT),
        "replicas": Arm(
            set={"work": "replicas", "liars": 5}, scenario=_REPLICAS, prepare=measured.partitioned
        ),
        "broadcast": Arm(
            set={"work": "broadcast", "ops": 20}, scenario=_REPLICAS, prepare=measured.partitioned
        ),
        "table": Arm(
            set={"work": "table"},
            scenario={"peers": 1000, "links": {**_WIDE, "latency_s": 0.05}},
            prepare=measured.departed,
        ),
        "swarm": Arm(set={"work": "swarm"}, scenario=_MODELS),
        "server": Arm(set={"work": "server"}, scenario=_MODELS),
        "copies": Arm(set={"work": "copies"}, scenario=_MODELS),
        "calls": Arm(
            set={"work": "calls"}, scenario={"peers": 2, "engine.processes": 2}, engine="live"
        ),
    },
    claims=(
        Claim(
            "direct", "Of 2,000 random pairs behind NAT boxes of the published mix, 68.75% connect "
            "directly, within 3 points",
            between(0.6575, 0.7175), measure=measured.direct_rate, at="section 3",
        ),
        Claim(
            "matrix", "and exactly those that mapping and filtering allow: no pair is otherwise",
            at_most(0.0), measure=measured.pairs_not_as_predicted, statistic="max",
        ),
        Claim(
            "reachable", "With a relay to fall back on every pair is reached",
            at_least(1.0), measure=measured.reached, statistic="min", at="section 3",
        ),
        Claim(
            "without-punching", "Without punching only full cones are: a tenth of the pairs",
            between(0.07, 0.13), measure=measured.direct_of_public_only,
        ),
        Claim(
            "with-reversal", "and with connection reversal 19%",
            between(0.16, 0.22), measure=measured.direct_of_reversal,
        ),
        Claim(
            "converged", "59 honest replicas among 5 liars, 30% loss and two partitions of 20 s: "
            "one state hash within 3 anti-entropy periods x log2(64) of the healing",
            at_most(18.0), measure=measured.converged_periods, at="section 4",
        ),
        Claim(
            "no-forgery", "and no forged change is accepted by anybody",
            at_most(0.0), measure=measured.forged, statistic="max", at="section 4",
        ),
        Claim(
            "broadcast-diverges", "A map that is told once, without anti-entropy, stays apart",
            at_least(2.0), measure=measured.states_of_broadcast, statistic="min",
        ),
        Claim(
            "hops", "1,000 nodes: half of the searches find a holder within 4 rounds of queries",
            at_most(4.0), measure=measured.median_hops, at="section 4",
        ),
        Claim(
            "hops-95", "and 95% of them within 6",
            at_most(6.0), measure=measured.late_hops,
        ),
        Claim(
            "found", "99% of what was stored is found",
            at_least(0.99), measure=measured.found_before,
        ),
        Claim(
            "found-after", "and 95% right after a fifth of the nodes left at once",
            at_least(0.95), measure=measured.found_after,
        ),
        Claim(
            "swarm-time", "A 40 MiB model is with 32 peers in a fifth of the time of one server",
            at_most(0.2), measure=measured.time_over_server, at="section 5",
        ),
        Claim(
            "update-bytes", "A version of which a tenth has changed moves 13% of its bytes or less",
            at_most(0.13), measure=measured.bytes_of_update, at="section 5",
        ),
        Claim(
            "copies-bytes", "where sending copies moves all of them again",
            at_least(1.0), measure=measured.bytes_of_copies,
        ),
        Claim(
            "call-rate", "Two processes over loopback sockets, encrypted: 1,500 calls of 128 B per "
            "second",
            at_least(1500.0), measure=measured.small_calls, at="section 6",
        ),
        Claim(
            "little", "With answers held back for 150 ms, throughput follows Little's law, calls "
            "at once over round trip, within 15%",
            at_most(0.15), measure=measured.off_little, statistic="max",
        ),
    ),
    charts=(
        Chart(
            "Share of direct paths, by kinds of NAT box", "grid", charts.pairs_by_kind,
            "called peer", "caller",
        ),
        Chart(
            "Different states among honest replicas after the last partition", "curves",
            charts.states_after_healing, "seconds after the healing", "states",
        ),
        Chart(
            "Searches by rounds of queries, before and after a fifth of the nodes left", "bars",
            charts.searches_by_hops, "rounds until a holder answered", "searches",
        ),
        Chart(
            "Peers that have all of a 40 MiB model", "curves", charts.peers_with_model,
            "seconds after its publication", "peers",
        ),
    ),
    deviations=(
        "which CRDTs the paper uses is not stated in what could be read; counters, registers, "
        "maps, sets and leases cover its uses",
        "NAT boxes are tables with the behaviours of RFC 4787; the mix of kinds is chosen so that "
        "the published rate of about 70% follows from the rules",
        "hops are rounds of three parallel queries until the first holder answers; a search for "
        "the 20 closest nodes takes about 8 such rounds and is not held to this",
        "the delay of 20 and 150 ms between real processes is made by the handler, which holds "
        "its answer back; rates of `calls` are wall-clock measurements of the machine at hand",
        "one server: 32 clients ask it for the next block as soon as one came, two at a time",
    ),
    small=Budget(seeds=1),
    full=Budget(seeds=1),
)  # fmt: skip
