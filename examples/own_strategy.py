"""A strategy of one's own, against D-PSGD, under a crash, with a report.

Run: python examples/own_strategy.py
"""

from __future__ import annotations

from dataclasses import dataclass

import shoal
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import descend


@dataclass(frozen=True)
class Shy:
    """A peer follows its neighbourhood the less, the more it has moved by itself.

    Vectors are [..., dim]: the same lines run one peer over sockets and thousands in simulation.
    """

    lr: float = 0.1
    steps: int = 5
    shyness: float = 0.5

    def init(self, params):
        return params

    def local(self, state, step):
        sgd = SGD(self.lr)
        params, _ = descend(step.task, sgd, state, sgd.init(state), step, steps=self.steps)
        # The state stays where the round began; `step.sent` is what came of it.
        return state, shoal.Parcel(params)

    def apply(self, state, heard, step):
        moved = (step.sent - state).norm(dim=-1, keepdim=True)
        apart = (heard.vector - step.sent).norm(dim=-1, keepdim=True)
        pull = apart / (apart + self.shyness * moved + 1e-12)
        return step.sent + pull * (heard.vector - step.sent)

    def params(self, state):
        return state


def main(rounds: int = 40) -> shoal.Report:
    """Three seeds of both methods; the report is written to .shoal/reports."""
    world = shoal.Scenario(
        "own_strategy", peers=24, rounds=rounds, eval_every=5, links="home",
        task={"name": "digits", "split": "dirichlet", "alpha": 0.3},
        topology={"name": "random_regular", "degree": 4},
        faults=[{"kind": "crash", "fraction": 0.25, "at": {"round": rounds // 2}}],
    )  # fmt: skip
    arms = {"shy": Shy(), "dpsgd": shoal.Arm("dpsgd", set={"steps": 5})}
    return shoal.Experiment(arms, world, seeds=3, title="A shy strategy").run()


if __name__ == "__main__":
    report = main()
    print(report.to_markdown())
    print(report.save(".shoal/reports"))
