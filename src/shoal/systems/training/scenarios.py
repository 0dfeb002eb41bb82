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
    # 8 peers that each have a cluster of samples of a mixture of Gaussians in the plane.
    "flow_gaussians": Scenario(
        name="training.flow_gaussians", peers=8, rounds=30, eval_every=5,
        task={"name": "flow_gaussians", "split": "clusters"},
        links={"name": "links", "latency_s": 0.02}, device={"name": "device", "flops_per_s": 1e9},
    ),
    # 32 peers on a ring with unequal label mixes of real 8x8 digits.
    "digits_ring": Scenario(
        name="training.digits_ring", peers=32, rounds=60, eval_every=5, measures=("flatness",),
        task={"name": "digits", "split": "dirichlet", "alpha": 0.3, "standardise": True},
        topology={"name": "ring"}, links={"name": "links", "latency_s": 0.02},
        device={"name": "device", "flops_per_s": 1e8},
    ),
    # 16 peers, each with a quadratic function of condition 30; a gradient takes 50 ms.
    "quadratics": Scenario(
        name="training.quadratics", peers=16, rounds=450, eval_every=5,
        task={"name": "quadratics", "condition": 30.0}, topology={"name": "full"},
        links={"name": "links", "latency_s": 0.01}, device={"name": "device", "overhead_s": 0.05},
    ),
    # A server and 20 clients with few kinds of digits each, softmax regression; ten steps on a batch
    # of 32 take 0.998 s.
    "digits_clients": Scenario(
        name="training.digits_clients", peers=21, seconds=60.0, eval_every=1, eval_peers=1,
        measures=("federated_loss",),
        task={"name": "digits", "split": "dirichlet", "alpha": 0.1, "hidden": []},
        links={"name": "links", "latency_s": 1e-4},
        device={"name": "device", "flops_per_s": 819200 / 0.998},
    ),
}  # fmt: skip
