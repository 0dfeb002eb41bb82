"""Worlds in which the uplink is what counts."""

from shoal.lab.scenario import Scenario

SCENARIOS = {
    # 10 clients and a hub, one of them itself; 85,002 parameters for real 8x8 digits.
    "digits_star": Scenario(
        name="compression.digits_star", peers=10, rounds=40, eval_every=2, eval_peers=1,
        task={"name": "digits", "split": "dirichlet", "alpha": 0.5, "hidden": [256, 256]},
        exchange={"name": "star"},
    ),
}  # fmt: skip
