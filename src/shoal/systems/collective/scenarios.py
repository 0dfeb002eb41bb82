"""Worlds for groups that train or reduce together."""

from shoal.lab.scenario import Scenario

REGION_TRIP_S = (
    (0.005, 0.040, 0.090),
    (0.040, 0.005, 0.140),
    (0.090, 0.140, 0.005),
)
"""Round trips within and between three regions."""


def region_of(peer: int) -> int:
    """Peer 0 (the master) and peers 1 to 4 are in region 0, 5 to 8 in 1, 9 to 12 in 2."""
    return max(0, peer - 1) // 4


def _one_way() -> list[list[float]]:
    regions = [region_of(peer) for peer in range(13)]
    return [[REGION_TRIP_S[a][b] / 2 for b in regions] for a in regions]


THREE_REGIONS = {
    "name": "measured", "matrix": _one_way(), "uplink_bytes_per_s": 125e6,
    "downlink_bytes_per_s": 125e6, "window_bytes": 262144.0, "connections": 16, "slow_pairs": 0.1,
    "slow_bytes_per_s": 6.25e6,
}  # fmt: skip
"""1 Gbit/s at every peer, windows of 256 KiB per connection, a tenth of the directed pairs limited
to 50 Mbit/s whatever the number of connections."""

SCENARIOS = {
    # 8 peers that share real 8x8 digits, and peer 0, which can keep them together and has no data.
    "digits": Scenario(
        name="collective.digits", peers=9, rounds=36, eval_every=3, eval_peers=1,
        task={"name": "digits", "split": "iid", "holders": [1, 2, 3, 4, 5, 6, 7, 8]},
        links={"name": "links", "latency_s": 0.02, "uplink_bytes_per_s": 1.25e6},
        device={"name": "device", "flops_per_s": 1e8},
    ),
    # 12 peers in three regions, 5 ms apart inside and 40 to 140 ms between them.
    "three_regions": Scenario(
        name="collective.three_regions", peers=13, seconds=600.0, links=THREE_REGIONS
    ),
    # 6 peers and the master as processes of one machine; 60 s at a step every 0.3 s.
    "digits_processes": Scenario(
        name="collective.digits_processes", peers=7, rounds=200, eval_every=20, eval_peers=2,
        task={"name": "digits", "split": "iid", "holders": [1, 2, 3, 4, 5, 6]},
    ),
}  # fmt: skip
