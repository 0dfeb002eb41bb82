"""Worlds with peers that lie, and worlds that fall apart."""

from shoal.lab.scenario import Scenario

SCENARIOS = {
    # 22 peers with unequal label mixes of real 8x8 digits, two of which attack what all send.
    "digits_attacked": Scenario(
        name="robust.digits_attacked", peers=22, rounds=300, eval_every=10, byzantine=2,
        task={"name": "digits", "split": "dirichlet", "alpha": 1.0, "hidden": [32]},
        attack={"name": "alie", "factor": "search"}, exchange={"name": "first_come"},
    ),
    # 20 peers with 60 real 8x8 digits each, who learn an output layer on features that were learned
    # on letters; everybody sends to everybody. Without attackers.
    "digits_transfer": Scenario(
        name="robust.digits_transfer", peers=20, rounds=30, eval_every=5,
        task={"name": "transfer_digits"}, topology={"name": "full"},
        exchange={"name": "gossip", "weighted": False},
    ),
    # 40 peers on a random graph with very unequal label mixes of real 8x8 digits and a linear
    # model; Sybils come with the arms, and what they want is measured with and without them.
    "digits_sybils": Scenario(
        name="robust.digits_sybils", peers=40, rounds=30, eval_every=10,
        measures=("attack_success",), attack={"name": "sybils"},
        task={"name": "digits", "split": "dirichlet", "alpha": 0.1, "hidden": []},
        topology={"name": "random_regular", "degree": 5},
        links={"name": "links", "latency_s": 0.02}, device={"name": "device", "flops_per_s": 1e8},
    ),
    # A parameter server (peer 0) and 15 workers with equal shares of real 8x8 digits, three of
    # which send noise in place of gradients.
    "digits_server": Scenario(
        name="robust.digits_server", peers=16, rounds=120, eval_every=2, eval_peers=1,
        byzantine=(1, 2, 3), attack={"name": "uniform"},
        task={"name": "digits", "hidden": [32]}, exchange={"name": "star", "hub_works": False},
    ),
    # 50 peers, some of them hubs; half of them share 400 real 8x8 digits, the others relay.
    "digits_disaster": Scenario(
        name="robust.digits_disaster", peers=50, rounds=60, eval_every=5,
        task={"name": "digits", "split": "iid", "train_samples": 400, "hidden": [64]},
        topology={"name": "barabasi_albert", "attach": 2},
        links={"name": "links", "latency_s": 0.05},
        device={"name": "device", "flops_per_s": 1e8},
    ),
    # Peer 0 and six stages of a transformer on a line across a region; times are virtual.
    "pipeline": Scenario(
        name="robust.pipeline", peers=7, rounds=600, eval_every=10, seconds=100_000.0,
        links={"name": "links", "latency_s": 0.01, "uplink_bytes_per_s": 12.5e6},
        device={"name": "device", "flops_per_s": 1e9},
    ),
}  # fmt: skip
