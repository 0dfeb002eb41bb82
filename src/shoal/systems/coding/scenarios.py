"""Worlds with workers that are late, lost or lie."""

from shoal.lab.scenario import Scenario

SCENARIOS = {
    # A master that has all real 8x8 digits, and 16 workers beside it; rounds are gradients taken.
    "digits_workers": Scenario(
        name="coding.digits_workers", peers=17, rounds=60, eval_every=4, seconds=100_000.0,
        task={"name": "digits", "split": "iid", "holders": [0], "hidden": [16]},
        links={"name": "links", "latency_s": 0.0005},
    ),
    # A peer with all of the data and 31 workers without, which apply its model; three requests.
    "digits_inference": Scenario(
        name="coding.digits_inference", peers=32, rounds=3, eval_peers=1,
        task={"name": "digits", "split": "iid", "holders": [0]},
        links={"name": "links", "latency_s": 0.02, "uplink_bytes_per_s": 1.25e6},
        device={"name": "device", "flops_per_s": 1e8, "spread": 0.3},
    ),
    # 64 workers of which only delays are simulated; rounds are jobs after the calibration.
    "delays": Scenario(name="coding.delays", peers=64, rounds=60),
}  # fmt: skip
