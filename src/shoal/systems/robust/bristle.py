"""Bristle: peers exchange output layers alone, and merge them class by class as own tests allow.

All peers have the same layers below, learned on a public task and frozen, so that a peer trains and
sends its output layer only. Of the layers that come it takes most of the near ones and some far
ones, tests each on samples of its own that it does not train on, and averages the column of each
class with the columns of those that do not do worse on it. Classes that it has no samples of come
from peers that do well on the classes it has. So liars get no weight, and a peer with four classes
learns all ten.

The arms compare it with plain means, the median, Krum, BRIDGE (the trimmed mean over neighbours)
and MOZI, each with the same frozen features ("head") and as published, on the whole network. With
`--set topology=one_target` a peer sends to one other at a time, a random one unless
`--set topology.choice=turns` or `ring` says otherwise. From Python,
`shoal.parts.screening.heads.Heads` is the inbox of one peer for a head of your own.

Verbraeken et al. 2021 (arXiv 2110.11006).
"""

from __future__ import annotations

from shoal.lab.card import Arm, Budget, Claim, Source, System, at_least, at_most
from shoal.systems.robust._bristle_claims import (
    baseline,
    bristle,
    bytes_per_message,
    few_over_best,
    few_over_frozen,
    few_over_published,
    iterations,
    loss_to_attacks,
    over_frozen,
    over_published,
)
from shoal.systems.robust._bristle_strategy import Bristle

SYSTEM = System(
    name="bristle",
    kind="strategy",
    title="Output layers merged class by class, as far as own tests speak for them",
    make=Bristle,
    source=Source(
        "Verbraeken et al. 2021",
        "Bristle: Decentralized Federated Learning in Byzantine, Non-i.i.d. Environments",
        arxiv="2110.11006",
    ),
    scenario="robust.digits_transfer",
    uses={"exchange": {"name": "gossip", "weighted": False}, "task.own_tests": 40},
    arms={
        "bristle fast": bristle("iid", "calm", {"eval_every": 1}, lr=1.0),
        "bristle raw": bristle(
            "iid", "calm", {"eval_every": 1, "rounds": 120, "task.standardise": False}, lr=1.0
        ),
        "dsgd fast": Arm(
            system="dpsgd",
            set={"lr": 0.3, "batch_size": 20},
            scenario={"task.frozen": False, "eval_every": 1, "rounds": 120},
        ),
        "bristle iid random": bristle("iid", "labels", {"topology": {"name": "one_target"}}),
        "bristle iid turns": bristle(
            "iid", "labels", {"topology": {"name": "one_target", "choice": "turns"}}
        ),
        "bristle iid ring": bristle(
            "iid", "labels", {"topology": {"name": "one_target", "choice": "ring"}}
        ),
        "bristle few count": bristle("few", "calm", classes="count"),
        "bristle iid calm": bristle("iid", "calm"),
        "bristle iid label": bristle("iid", "label"),
        "bristle iid labels": bristle("iid", "labels"),
        "bristle iid noise": bristle("iid", "noise"),
        "bristle iid krum": bristle("iid", "krum"),
        "bristle iid trimmed": bristle("iid", "trimmed"),
        "bristle few calm": bristle("few", "calm"),
        "bristle few labels": bristle("few", "labels"),
        "bristle few noise": bristle("few", "noise"),
        "bristle few negated": bristle("few", "negated"),
        "mean head iid calm": baseline("mean", "head", "iid", "calm"),
        "mean head iid label": baseline("mean", "head", "iid", "label"),
        "mean head iid labels": baseline("mean", "head", "iid", "labels"),
        "mean head iid noise": baseline("mean", "head", "iid", "noise"),
        "mean head iid krum": baseline("mean", "head", "iid", "krum"),
        "mean head iid trimmed": baseline("mean", "head", "iid", "trimmed"),
        "mean head few calm": baseline("mean", "head", "few", "calm"),
        "mean head few labels": baseline("mean", "head", "few", "labels"),
        "mean head few noise": baseline("mean", "head", "few", "noise"),
        "mean head few negated": baseline("mean", "head", "few", "negated"),
        "mean whole iid trimmed": baseline("mean", "whole", "iid", "trimmed"),
        "mean whole few calm": baseline("mean", "whole", "few", "calm"),
        "mean whole few labels": baseline("mean", "whole", "few", "labels"),
        "mean whole few noise": baseline("mean", "whole", "few", "noise"),
        "mean whole few negated": baseline("mean", "whole", "few", "negated"),
        "median head iid calm": baseline("median", "head", "iid", "calm"),
        "median head iid label": baseline("median", "head", "iid", "label"),
        "median head iid labels": baseline("median", "head", "iid", "labels"),
        "median head iid noise": baseline("median", "head", "iid", "noise"),
        "median head iid krum": baseline("median", "head", "iid", "krum"),
        "median head iid trimmed": baseline("median", "head", "iid", "trimmed"),
        "median head few calm": baseline("median", "head", "few", "calm"),
        "median head few labels": baseline("median", "head", "few", "labels"),
        "median head few noise": baseline("median", "head", "few", "noise"),
        "median head few negated": baseline("median", "head", "few", "negated"),
        "median whole iid trimmed": baseline("median", "whole", "iid", "trimmed"),
        "median whole few calm": baseline("median", "whole", "few", "calm"),
        "median whole few labels": baseline("median", "whole", "few", "labels"),
        "median whole few noise": baseline("median", "whole", "few", "noise"),
        "median whole few negated": baseline("median", "whole", "few", "negated"),
        "krum head iid calm": baseline("krum", "head", "iid", "calm"),
        "krum head iid label": baseline("krum", "head", "iid", "label"),
        "krum head iid labels": baseline("krum", "head", "iid", "labels"),
        "krum head iid noise": baseline("krum", "head", "iid", "noise"),
        "krum head iid krum": baseline("krum", "head", "iid", "krum"),
        "krum head iid trimmed": baseline("krum", "head", "iid", "trimmed"),
        "krum head few calm": baseline("krum", "head", "few", "calm"),
        "krum head few labels": baseline("krum", "head", "few", "labels"),
        "krum head few noise": baseline("krum", "head", "few", "noise"),
        "krum head few negated": baseline("krum", "head", "few", "negated"),
        "krum whole iid trimmed": baseline("krum", "whole", "iid", "trimmed"),
        "krum whole few calm": baseline("krum", "whole", "few", "calm"),
        "krum whole few labels": baseline("krum", "whole", "few", "labels"),
        "krum whole few noise": baseline("krum", "whole", "few", "noise"),
        "krum whole few negated": baseline("krum", "whole", "few", "negated"),
        "bridge head iid calm": baseline("bridge", "head", "iid", "calm"),
        "bridge head iid label": baseline("bridge", "head", "iid", "label"),
        "bridge head iid labels": baseline("bridge", "head", "iid", "labels"),
        "bridge head iid noise": baseline("bridge", "head", "iid", "noise"),
        "bridge head iid krum": baseline("bridge", "head", "iid", "krum"),
        "bridge head iid trimmed": baseline("bridge", "head", "iid", "trimmed"),
        "bridge head few calm": baseline("bridge", "head", "few", "calm"),
        "bridge head few labels": baseline("bridge", "head", "few", "labels"),
        "bridge head few noise": baseline("bridge", "head", "few", "noise"),
        "bridge head few negated": baseline("bridge", "head", "few", "negated"),
        "bridge whole iid trimmed": baseline("bridge", "whole", "iid", "trimmed"),
        "bridge whole few calm": baseline("bridge", "whole", "few", "calm"),
        "bridge whole few labels": baseline("bridge", "whole", "few", "labels"),
        "bridge whole few noise": baseline("bridge", "whole", "few", "noise"),
        "bridge whole few negated": baseline("bridge", "whole", "few", "negated"),
        "mozi head iid calm": baseline("mozi", "head", "iid", "calm"),
        "mozi head iid label": baseline("mozi", "head", "iid", "label"),
        "mozi head iid labels": baseline("mozi", "head", "iid", "labels"),
        "mozi head iid noise": baseline("mozi", "head", "iid", "noise"),
        "mozi head iid krum": baseline("mozi", "head", "iid", "krum"),
        "mozi head iid trimmed": baseline("mozi", "head", "iid", "trimmed"),
        "mozi head few calm": baseline("mozi", "head", "few", "calm"),
        "mozi head few labels": baseline("mozi", "head", "few", "labels"),
        "mozi head few noise": baseline("mozi", "head", "few", "noise"),
        "mozi head few negated": baseline("mozi", "head", "few", "negated"),
        "mozi whole iid trimmed": baseline("mozi", "whole", "iid", "trimmed"),
        "mozi whole few calm": baseline("mozi", "whole", "few", "calm"),
        "mozi whole few labels": baseline("mozi", "whole", "few", "labels"),
        "mozi whole few noise": baseline("mozi", "whole", "few", "noise"),
        "mozi whole few negated": baseline("mozi", "whole", "few", "negated"),
    },
    claims=(
        Claim(
            "iterations",
            "85% without attackers takes at most 0.35 times the iterations of D-SGD on the whole "
            "network (paper: 0.17)",
            at_most(0.35),
            measure=iterations,
            at="section 6",
        ),
        Claim(
            "attacks",
            "all have all classes, 8 of 20 attack: within 3 points of no attack, whichever it is",
            at_least(-0.03),
            measure=loss_to_attacks,
            at="section 6",
            scale="full",
        ),
        Claim(
            "worst-attack",
            "there, under the attack that harms it most, above every baseline as published (on the "
            "whole network) under the trimmed-mean attack",
            at_least(0.0),
            measure=over_published,
            at="section 6",
            scale="full",
        ),
        Claim(
            "worst-attack-frozen",
            "with frozen features for all, under the attack that harms each most, above every "
            "baseline",
            at_least(0.0),
            measure=over_frozen,
            scale="full",
            expected="fails",
            reason="-0.007 (-0.010 to 0.001) against MOZI, which is at 0.905 under every attack, "
            "where Bristle is at 0.897 under the trimmed-mean attack and 0.901 to 0.916 under the "
            "others: where all peers have all classes, MOZI's two filters leave out all eight "
            "attackers, and Bristle gives those that just pass a weight. The others are at 0.85 "
            "and below",
        ),
        Claim(
            "few-classes",
            "four of ten classes each, mean of no attack, flipped labels, noise and negated means: "
            "1.5 times the mean of median, Krum, BRIDGE and MOZI as published (paper: 2.3)",
            at_least(1.5),
            measure=few_over_published,
            at="section 6",
            scale="full",
        ),
        Claim(
            "few-classes-frozen",
            "not in the paper: the same with frozen features for all, which is what the choice of "
            "models and classes gains",
            at_least(1.5),
            measure=few_over_frozen,
            scale="full",
            expected="fails",
            reason="1.48 (1.47 to 1.50) over three seeds: Bristle's mean is 0.90, that of the "
            "median and BRIDGE 0.65 to 0.66, of Krum 0.59 and of MOZI 0.53. Negated means alone "
            "take the median and BRIDGE to 0.2, flipped labels to 0.62; without attackers both "
            "are at 0.89",
        ),
        Claim(
            "few-classes-best",
            "not in the paper: there it is above the best baseline with frozen features",
            at_least(0.0),
            measure=few_over_best,
            scale="full",
        ),
        Claim(
            "bytes",
            "a message has at most a tenth of the bytes",
            at_most(0.1),
            measure=bytes_per_message,
            at="section 6",
        ),
    ),
    deviations=(
        "digits of 8x8 pixels on features from letters drawn with matplotlib's fonts, and a "
        "network 64-128-64-10, in place of MNIST: the rule sees 64 features and ten columns.",
        "features are standardised over all training images, unlabelled; without that a head takes "
        "some 17 iterations in place of 3. Standardised features of layers that have learned "
        "nothing do nearly as well (0.88 in place of 0.90 after five steps of a head on 1,000 "
        "images): what counts is that they are shared and frozen.",
        "peers are judged on the classes that they announce. As recorded, the rule takes as many "
        "classes as the sender says it has; with four classes each, not the same ones, nobody then "
        "learns from anybody: 0.39 without attackers, in place of 0.91 (arm `bristle few count`).",
        "peers go in rounds, and what comes after a round's end is lost, in place of iterations "
        "whenever a peer likes.",
        "30 iterations for all, in which the whole network is far from its end (D-SGD on it takes "
        "some 55 to 85%). Learning rates: 0.5 on heads, 1.0 where speed is compared, 0.3 on whole "
        "networks.",
        "the Krum and trimmed-mean attacks take the change since zero for the last round's.",
        "attackers announce the classes that they have; a lie about them raises no weight.",
    ),
    small=Budget(
        seeds=1,
        arms=(
            "bristle fast",
            "dsgd fast",
            "bristle iid labels",
            "bristle few calm",
            "bristle few negated",
            "krum head few calm",
            "mean head few negated",
        ),
    ),
    full=Budget(seeds=3),
)
