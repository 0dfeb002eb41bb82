"""DP-BREM+ beside DP-BREM: the same clients, records and noise, summed in the two ways."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from shoal.parts.privacy.prime_field import decode
from shoal.parts.privacy.secret_sharing import Shamir
from shoal.parts.strategy.private_momentum import PrivateMomentum
from shoal.parts.strategy.secure_momentum import SecureMomentum
from shoal.parts.tasks.digits import Digits
from shoal.rounds.strategy import Heard, Step
from shoal.tensor import keyed


@dataclass(frozen=True)
class Compared:
    """gap: largest distance of the two models over how far they have moved; rejected: whom the
    norm check found when one client in the last round sent a vector 1% longer than the clip;
    short: whom it found when it sent one of exactly that length."""

    gap: float
    rejected: tuple[int, ...]
    short: tuple[int, ...]


@lru_cache(maxsize=16)
def compared(
    seed: int, rounds: int = 5, clients: int = 7, threshold: int = 2, bits: int = 12
) -> Compared:
    """Both methods moved by hand; the hub's noise is opened afterwards for the plain one."""
    task = Digits(peers=clients, seed=seed, hidden=())
    secure = SecureMomentum(
        lr=3.0, sampling=0.1, client_clip=0.2, noise=0.1, threshold=threshold, bits=bits
    )
    plain = PrivateMomentum(lr=3.0, sampling=0.1, client_clip=0.2, noise=0.1)
    start = task.init(keyed.key_of(seed, "init"))
    everybody = torch.arange(clients, device=start.device)
    ours = theirs = plain.init(start)
    mine = his = plain.init(start.expand(clients, -1))
    mask = torch.ones(clients, dtype=torch.bool, device=start.device)
    unit = secure.adder.unit(secure.deviation)
    dim, gap, sent = len(start), 0.0, torch.zeros_like(mine.params)
    for round in range(rounds):
        keys = keyed.fold(keyed.key_of(seed, "clients"), everybody, round)
        step = Step(round, task, task.shard(everybody), keys, mask)
        hub_key = keyed.key_of(seed, "hub", round)
        at_hub = Step(round, task, task.shard(0), hub_key, mask[0])

        # Without anybody who is trusted.
        down = {"center": ours.center.expand(clients, -1)}
        mine = secure.adopt(mine, ours.params.expand(clients, -1), replace(step, given=down))
        mine, parcel = secure.local(mine, step)
        sent = parcel.vector
        heard = secure.combine(ours, sent, mask, mask.double() / clients, {}, at_hub)
        ours = secure.apply(ours, heard, at_hub)

        # With a hub that sees everything and adds the same noise.
        shares = secure.adder.noise(clients, dim, keyed.fold(hub_key, "secure"))
        noise = decode(Shamir(clients, threshold).reconstruct(shares, range(clients))) * unit
        given = torch.from_numpy(noise).to(start)
        down = {"center": theirs.center.expand(clients, -1)}
        his = plain.adopt(his, theirs.params.expand(clients, -1), replace(step, given=down))
        his, parcel = plain.local(his, step)
        total = plain.noisy_sum(theirs.center, parcel.vector, mask, given)
        combined = Heard(theirs.center + total / clients, mask.sum(-1))
        theirs = plain.apply(theirs, combined, at_hub)
        moved = torch.linalg.vector_norm(theirs.params - start)
        gap = max(gap, float(torch.linalg.vector_norm(ours.params - theirs.params) / moved))

    def found(length: float) -> tuple[int, ...]:
        vectors = sent.double().cpu().numpy().copy()
        vectors[2] *= length / np.linalg.norm(vectors[2])
        key = keyed.key_of(seed, "one too long")
        return secure.adder(vectors, secure.client_clip, secure.deviation, key).rejected

    return Compared(gap, found(1.01 * secure.client_clip), found(secure.client_clip))
