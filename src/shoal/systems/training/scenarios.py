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
        name="training.flow_gaussians", peers=8, rounds=15, eval_every=3,
        task={"name": "flow_gaussians", "split": "clusters"},
        links={"name": "links", "latency_s": 0.02}, device={"name": "device", "flops_per_s": 1e9},
    ),
    # 16 peers with very unequal label mixes of real 8x8 digits, who rarely meet.
    "digits_sparse": Scenario(
        name="training.digits_sparse", peers=16, rounds=60, eval_every=2,
        task={"name": "digits", "split": "dirichlet", "alpha": 0.1, "standardise": True},
        links={"name": "links", "latency_s": 0.02}, device={"name": "device", "flops_per_s": 1e8},
    ),
    # 32 peers on a ring with unequal label mixes of real 8x8 digits.
    "digits_ring": Scenario(
        name="training.digits_ring", peers=32, rounds=60, eval_every=5, measures=("flatness",),
        task={"name": "digits", "split": "dirichlet", "alpha": 0.3, "standardise": True},
        topology={"name": "ring"}, links={"name": "links", "latency_s": 0.02},
        device={"name": "device", "flops_per_s": 1e8},
    ),
    # 32 strangers with equal shares of real 8x8 digits and a network of five layers; each hears six
    # others a round, drawn at random.
    "digits_strangers": Scenario(
        name="training.digits_strangers", peers=32, rounds=60, eval_every=1,
        task={
            "name": "digits", "split": "iid", "standardise": True, "initialise": "xavier",
            "hidden": [64, 64, 64, 64],
        },
        topology={"name": "random_peers", "degree": 6},
        links={"name": "links", "latency_s": 0.02}, device={"name": "device", "flops_per_s": 1e8},
    ),
    # 50 clients with one class of real 8x8 digits each, ten of them in each round.
    "digits_pathological": Scenario(
        name="training.digits_pathological", peers=50, rounds=150, eval_every=1, eval_peers=1,
        measures=("gradient",),
        task={
            "name": "digits", "split": "classes", "classes_per_peer": 1, "standardise": True,
            "hidden": [64],
        },
        links={"name": "links", "latency_s": 0.02}, device={"name": "device", "flops_per_s": 1e8},
    ),
    # 5 clients, the first of them the hub, each with 280 real 8x8 digits of a domain of its own.
    "digits_domains": Scenario(
        name="training.digits_domains", peers=5, rounds=50, eval_every=5, eval_peers=1,
        task={"name": "digits_domains"}, exchange={"name": "star"},
        links={"name": "links", "latency_s": 0.02}, device={"name": "device", "flops_per_s": 1e9},
    ),
    # 16 peers, each with a quadratic function of condition 30; a gradient takes 50 ms.
    "quadratics": Scenario(
        name="training.quadratics", peers=16, rounds=450, eval_every=5,
        task={"name": "quadratics", "condition": 30.0}, topology={"name": "full"},
        links={"name": "links", "latency_s": 0.01}, device={"name": "device", "overhead_s": 0.05},
    ),
    # A server and 20 clients with few kinds of digits each, softmax regression; ten steps on a
    # batch of 32 take 0.998 s.
    "digits_clients": Scenario(
        name="training.digits_clients", peers=21, seconds=60.0, eval_every=1, eval_peers=1,
        measures=("federated_loss",),
        task={"name": "digits", "split": "dirichlet", "alpha": 0.1, "hidden": []},
        links={"name": "links", "latency_s": 1e-4},
        device={"name": "device", "flops_per_s": 819200 / 0.998},
    ),
    # 10 workers with five kinds of real 8x8 digits each, and peer 0, which keeps their model.
    "digits_anarchic": Scenario(
        name="training.digits_anarchic", peers=11, rounds=400, eval_every=20,
        measures=("gradient",),
        task={
            "name": "digits", "split": "classes", "classes_per_peer": 5, "standardise": True,
            "hidden": [], "holders": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        },
        links={"name": "links", "latency_s": 0.01}, device={"name": "device", "flops_per_s": 1e8},
    ),
    # A server and 10 clients with 3 to 5 kinds of digits each, in unequal numbers; a step on a
    # batch of 32 takes 0.1 s.
    "digits_silos": Scenario(
        name="training.digits_silos", peers=11, seconds=120.0, eval_every=1, eval_peers=1,
        task={"name": "digits", "split": "uneven", "classes_per_peer": 3, "spread": 1.0},
        links={"name": "links", "latency_s": 0.005},
        device={"name": "device", "flops_per_s": 6.47168e6},
    ),
    # 5 strangers with equal shares of real 8x8 digits and a wide network.
    "digits_five": Scenario(
        name="training.digits_five", peers=5, rounds=10, eval_every=1, initial="independent",
        task={"name": "digits", "split": "iid", "standardise": True, "hidden": [256, 256]},
        topology={"name": "full"}, links={"name": "links", "latency_s": 0.02},
        device={"name": "device", "flops_per_s": 1e8},
    ),
}  # fmt: skip
