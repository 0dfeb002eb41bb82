"""Worlds in which the uplink is what counts."""

from shoal.lab.scenario import Scenario

SCENARIOS = {
    # 10 clients and a hub, one of them itself; 85,002 parameters for real 8x8 digits.
    "digits_star": Scenario(
        name="compression.digits_star", peers=10, rounds=40, eval_every=2, eval_peers=1,
        task={"name": "digits", "split": "dirichlet", "alpha": 0.5, "hidden": [256, 256]},
        exchange={"name": "star"},
    ),
    # 8 machines that share turned digits, for a model of 4,810 parameters that knows upright ones.
    "rotated_digits": Scenario(
        name="compression.rotated_digits", peers=8, rounds=3000, eval_every=100, eval_peers=1,
        task={"name": "rotated_digits", "split": "iid"},
        links={"name": "links", "latency_s": 0.02},
        device={"name": "device", "flops_per_s": 1e8},
    ),
}  # fmt: skip
