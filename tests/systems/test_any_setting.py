"""Any strategy of the catalogue in any setting: it runs, or says what does not go together."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_catalogue import less

import shoal
from shoal.base.errors import UsageError
from shoal.lab import discover
from shoal.lab.cell import setting_hints
from shoal.lab.launch import launch
from shoal.parts import find, names

PEERS, ROUNDS = 6, 2
STRATEGIES = [
    name for name in discover.names()
    if discover.find(name).kind == "strategy" and discover.load(name).make is not None
]  # fmt: skip

FAULTS: list[list[dict[str, Any]]] = [
    [], [{"kind": "crash", "fraction": 0.3, "at": {"round": 1}}],
    [{"kind": "crash", "fraction": 0.3, "at": 0.5, "until": 2.0}],
    [{"kind": "loss", "fraction": 1.0, "at": 0.0, "probability": 0.3}],
    [{"kind": "slow", "fraction": 0.5, "at": 0.0, "factor": 10.0}],
    [{"kind": "partition", "fraction": 0.5, "at": {"round": 1}}],
    [{"kind": "join", "count": 2, "at": {"round": 1}}],
]  # fmt: skip


def parts(role: str) -> st.SearchStrategy[dict[str, Any] | None]:
    """Nothing, or a part with one of its example settings."""
    found = [
        {"name": name, **example}
        for name in names(role)
        for example in getattr(find(role, name), "examples", ({},))
    ]
    plain = [{k: v for k, v in each.items() if k != "peers"} for each in found]
    return st.sampled_from([None, *plain])


SETTINGS = st.fixed_dictionaries(
    {
        "split": st.sampled_from(["iid", "dirichlet", "classes", "sizes"]),
        "topology": st.sampled_from(
            [{"name": "ring"}, {"name": "full"}, {"name": "exponential"}, {"name": "star"},
             {"name": "random_peers", "degree": 2}, {"name": "torus", "sides": [2, 3]}]
        ),
        "exchange": st.sampled_from(
            [None, {"name": "gossip"}, {"name": "gossip", "steps": 2}, {"name": "star"},
             {"name": "star", "sample": 3}, {"name": "isolated"}, {"name": "first_come"},
             {"name": "gossip", "participation": 0.5}]
        ),
        "transform": parts("transform"),
        "aggregator": parts("aggregate"),
        "attack": parts("attack"),
        "initial": st.sampled_from(["common", "independent"]),
        "faults": st.sampled_from(FAULTS),
        "engine": st.sampled_from(["lockstep", "event"]),
    }
)  # fmt: skip


@pytest.mark.parametrize("name", STRATEGIES)
@given(chosen=SETTINGS)
@settings(
    max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True,
    phases=[Phase.generate],
)  # fmt: skip
def test_it_runs_or_says_what_does_not_go_together(name: str, chosen: dict[str, Any]) -> None:
    card = discover.load(name)
    world: dict[str, Any] = {
        "peers": PEERS, "rounds": ROUNDS, "round_s": 1.0, "topology": chosen["topology"],
        "task": {"name": "digits", "split": chosen["split"], "hidden": [6], "train_samples": 90},
        "links": {"name": "links", "latency_s": 0.02}, "initial": chosen["initial"],
        "device": {"name": "device", "flops_per_s": 1e8}, "faults": chosen["faults"],
        **card.uses,
    }  # fmt: skip
    for role in ("exchange", "transform", "aggregator", "attack"):
        if chosen[role] is not None:
            world[role] = chosen[role]
    world["byzantine"] = 1 if chosen["attack"] else 0
    hints = setting_hints(card)
    small = {"steps": 1, "batch_size": 4, "epochs": None, "local_steps": 1}
    made: Any = less(card) | {key: value for key, value in small.items() if key in hints}
    if "epochs" in made and hints["epochs"] is int:
        del made["epochs"]
    assert card.make is not None
    try:
        scenario = shoal.Scenario().with_settings(world)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = launch(card.make(**made), scenario, seed=1, engine=chosen["engine"])
    except UsageError:
        # A sentence with a reason, not a crash somewhere inside.
        return
    assert run.final
    if not chosen["attack"]:
        assert all(bool(torch.isfinite(each).all()) for each in run.final.values())
