"""Worlds in which methods of training are compared."""

from shoal.lab.scenario import Scenario

SCENARIOS = {
    # 100 peers with two kinds of real digits each, on lines of 25 to 100 Mbit/s across the world;
    # five steps on a batch of 8 take 10 s on the median peer, most of them 5 to 20 s.
    "digits_sampled": Scenario(
        name="training.digits_sampled", peers=100, rounds=150, eval_every=1,
        task={"name": "digits", "split": "classes", "classes_per_peer": 2},
        topology={"name": "random_regular", "degree": 10},
        links={
            "name": "wan", "latency_s": 0.08, "uplink_bytes_per_s": 6.25e6,
            "downlink_bytes_per_s": 6.25e6, "bandwidth_spread": 0.35,
        },
        device={"name": "device", "flops_per_s": 8.1e4, "spread": 0.42},
    ),
}  # fmt: skip
