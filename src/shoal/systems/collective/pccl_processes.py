"""PCCL on real processes that are killed: what is claimed of it on one machine.

Six workers and the master are processes that speak through encrypted sockets. While they train, one
worker drawn by key gets SIGKILL every 1 to 3 seconds, and a new process takes its place: it finds
the run by an address, is let into the group between two steps and gets the state from a peer.
Beside it a Gloo group, which one kill ends.

Prime Intellect 2025 (arXiv 2505.14065), section on fault tolerance.
"""

from __future__ import annotations

from shoal.lab.card import Arm, Budget, Claim, Source, System, at_least, at_most, value
from shoal.systems.collective import _pccl_churn as measured

_TRAINING = {
    "steps": 5, "lr": 2e-3, "master_works": False, "audit": True, "heartbeat_s": 0.2,
    "timeout_s": 1.5, "patience_s": 8.0, "least": 2,
}  # fmt: skip

SYSTEM = System(
    name="pccl-processes",
    kind="program",
    title="Training in step while processes are killed and take each other's places",
    source=Source(
        "Keiblinger et al. 2025",
        "Prime Collective Communications Library - Technical Report",
        arxiv="2505.14065",
    ),
    scenario="collective.digits_processes",
    uses={"topology": None, "exchange": None},
    arms={
        "calm": Arm(system="pccl", set=_TRAINING, engine="processes"),
        "churn": Arm(
            system="pccl", set={**_TRAINING, "pace_s": 0.3}, prepare=measured.kill_list,
            engine="processes",
        ),
        "gloo": Arm(system="gloo-ring", scenario={"peers": 4, "task": None, "rounds": 1}),
    },
    claims=(
        Claim(
            "killed", "So many processes are killed", holds=at_least(10.0),
            measure=measured.killed, statistic="min", scale="full",
        ),
        Claim(
            "joined", "And so many newcomers are let in", holds=at_least(10.0),
            measure=measured.joined, statistic="min", scale="full",
        ),
        Claim(
            "survivors", "No survivor hangs or ends with an error", holds=at_most(0.0),
            measure=measured.unfinished_or_failed, statistic="max", at="section 2",
        ),
        Claim(
            "one_state", "After every step all peers that made it hold the same bits",
            holds=at_least(1.0), measure=measured.steps_with_one_state, statistic="min",
            at="section 2",
        ),
        Claim(
            "counted_once", "Every gradient in an average is in it exactly once",
            holds=at_most(0.0), measure=measured.miscounted, statistic="max",
        ),
        Claim(
            "accuracy", "The last state is within 2 points of an undisturbed run's",
            holds=at_most(0.02), measure=measured.accuracy_lost, scale="full",
        ),
        Claim(
            "gloo_fails", "After one kill a Gloo group reduces nothing any more",
            holds=at_most(0.0), metric="reduced_after", compare=value("gloo"), statistic="max",
        ),
    ),
    deviations=(
        "a new process takes the number and the data of the one that was killed, and finds its "
        "last step in its store; in the group it is a newcomer like any other",
        "steps are paced at 0.3 s, so that 200 of them fill the 60 s; the undisturbed run is not "
        "paced",
        "where processes take longer to come up than to be killed, as on a busy machine, the last "
        "member may die; the next ones then make steps again from an older store, and such a step "
        "counts as another",
        "the master is not killed: without it a group cannot go on, as published",
    ),
    small=Budget(seeds=1, scenario={"rounds": 40}),
    full=Budget(seeds=1),
)  # fmt: skip
