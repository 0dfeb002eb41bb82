"""Worlds in which fabrics between peers are compared."""

from shoal.lab.scenario import Scenario

SCENARIOS = {
    # 12 peers on lines of 100 Mbit/s across a continent; a run ends by itself after half a minute.
    "fabric": Scenario(
        name="network.fabric", peers=12, seconds=600.0,
        links={
            "name": "links", "latency_s": 0.03, "latency_spread": 0.3,
            "uplink_bytes_per_s": 12.5e6, "downlink_bytes_per_s": 12.5e6,
        },
    ),
}  # fmt: skip
