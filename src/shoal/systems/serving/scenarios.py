"""Worlds in which many clients are served."""

from shoal.lab.scenario import Scenario

SCENARIOS = {
    # A coordinator, 5 nodes of a gateway and 12 aggregators each, 100 clients with real 8x8 digits;
    # a model of a few hundred numbers stands for one of 44 MiB.
    "five_nodes": Scenario(
        name="serving.five_nodes", peers=166, rounds=50, eval_every=10, eval_peers=1,
        task={"name": "digits", "split": "sizes", "hidden": [8]},
        links={"name": "links", "latency_s": 0.0005},
        device={"name": "device", "flops_per_s": 1e9},
    ),
    # A coordinator, a gateway and 3 aggregators, 4 clients, as processes of one machine.
    "one_machine": Scenario(
        name="serving.one_machine", peers=9, rounds=100, eval_every=10, eval_peers=1,
        task={"name": "digits", "split": "iid", "hidden": [2048], "holders": [5, 6, 7, 8]},
    ),
}  # fmt: skip
