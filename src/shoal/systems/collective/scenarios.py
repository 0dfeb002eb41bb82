"""Worlds for groups that train or reduce together."""

from shoal.lab.scenario import Scenario

SCENARIOS = {
    # 8 peers that share real 8x8 digits, and peer 0 that keeps them together. Every directed pair
    # carries 6.8 kB/s, so that a ring over 4,810 numbers takes 5 s, half of twenty inner steps.
    "digits_slow": Scenario(
        name="collective.digits_slow", peers=9, rounds=36, eval_every=3, eval_peers=1,
        task={
            "name": "digits", "split": "iid", "holders": [1, 2, 3, 4, 5, 6, 7, 8],
        },
        links={
            "name": "links", "latency_s": 0.005, "slow_pairs": 1.0, "slow_bytes_per_s": 6.8e3,
        },
    ),
}  # fmt: skip
