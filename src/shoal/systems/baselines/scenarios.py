"""Small worlds in which any method can be tried."""

from shoal.lab.scenario import Scenario

SCENARIOS = {
    # 32 peers with unequal label mixes of real 8x8 digits on home lines: seconds on one core.
    "digits_home": Scenario(
        name="baselines.digits_home", peers=32, rounds=40, eval_every=5,
        task={"name": "digits", "split": "dirichlet", "alpha": 0.3},
        topology={"name": "random_regular", "degree": 6}, links="home",
        device={"name": "device", "flops_per_s": 1e8, "spread": 0.5},
    ),
    "digits_tiny": Scenario(
        name="baselines.digits_tiny", peers=6, rounds=3, eval_every=1,
        task={"name": "digits", "split": "iid", "hidden": [16]},
        topology={"name": "ring"}, links={"name": "links", "latency_s": 0.02},
        device={"name": "device", "flops_per_s": 1e8},
    ),
}  # fmt: skip
