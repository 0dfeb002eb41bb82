"""One's own module on one's own tensors: peers learn two half moons, each sees mostly one of them.

Run: python examples/own_module.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import make_moons
from torch import nn

import shoal
from shoal.parts.tasks import Split, shards_of, task_of


class Net(nn.Module):
    """Any module whose samples do not mix: a wide layer, a narrow one, their sum."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(2, 32), nn.Linear(2, 8)
        self.head = nn.Linear(40, 2)

    def forward(self, x):
        return self.head(torch.cat((torch.tanh(self.wide(x)), torch.sin(self.narrow(x))), -1))


def main(peers: int = 8, rounds: int = 40) -> shoal.Report:
    """D-PSGD on a ring against every peer alone."""
    x, y = make_moons(1200, noise=0.2, random_state=0)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    mine = Split("dirichlet", alpha=0.2).parts(y[:1000].numpy(), peers, seed=0)
    shards = shards_of(mine)
    task = task_of(Net(), "cross_entropy", (x[:1000], y[:1000]), (x[1000:], y[1000:]), shards)
    world = shoal.Scenario("own_module", peers=peers, rounds=rounds, eval_every=5, task=task,
                           topology="ring", links="home")  # fmt: skip
    arms = {
        "ring": shoal.Arm("dpsgd", set={"lr": 0.3, "steps": 5}),
        "alone": shoal.Arm("local-only", set={"lr": 0.3, "steps": 5}),
    }
    return shoal.Experiment(arms, world, title="Two half moons").run()


if __name__ == "__main__":
    report = main()
    print(report.to_markdown())
    print(report.save(".shoal/reports"))
