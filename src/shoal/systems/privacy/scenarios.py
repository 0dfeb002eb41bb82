"""Worlds in which a hub must not learn what a client has."""

from shoal.lab.scenario import Scenario

SCENARIOS = {
    # A hub and 100 clients with 14 real 8x8 digits each; a linear model of 650 parameters.
    "digits_clients": Scenario(
        name="privacy.digits_clients", peers=101, rounds=150, eval_every=10, eval_peers=1,
        task={"name": "digits", "split": "iid", "hidden": []},
        exchange={"name": "star"}, links="home", device={"name": "device", "flops_per_s": 1e8},
    ),
    # A hub and 20 silos with 68 or 69 real 8x8 digits each; a linear model of 650 parameters.
    "digits_silos": Scenario(
        name="privacy.digits_silos", peers=21, rounds=150, eval_every=10, eval_peers=1,
        task={"name": "digits", "split": "iid", "hidden": []},
        exchange={"name": "star", "hub_works": False}, links="home",
        device={"name": "device", "flops_per_s": 1e8},
    ),
    # Real 8x8 digits: the first peer's for training, the second's as canaries; 650 parameters.
    "digits_audit": Scenario(
        name="privacy.digits_audit", peers=2, rounds=20,
        task={"name": "digits", "split": "iid", "hidden": []},
    ),
}  # fmt: skip
