"""Worlds with peers that lie, and worlds that fall apart."""

from shoal.lab.scenario import Scenario

SCENARIOS = {
    # 22 peers with unequal label mixes of real 8x8 digits, two of which attack what all send.
    "digits_attacked": Scenario(
        name="robust.digits_attacked", peers=22, rounds=300, eval_every=10, byzantine=2,
        task={"name": "digits", "split": "dirichlet", "alpha": 1.0, "hidden": [32]},
        attack={"name": "alie", "factor": "search"}, exchange={"name": "first_come"},
    ),
}  # fmt: skip
