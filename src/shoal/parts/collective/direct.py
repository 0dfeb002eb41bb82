"""All-reduce of a small tensor in two steps: every chunk straight to its owner, and back from it.

The chunk that the ring finishes at a peer is that peer's here, too. All send it their parts of it;
it combines them in the ring's order (the same bits) and sends the outcome to all. As many bytes as
in the ring, 2 (n - 1) / n of the tensor per peer, and 2 messages behind each other in place of
2 (n - 1); but every pair of peers must be connected, and nothing overlaps.
"""

from __future__ import annotations

from torch import Tensor

from shoal.base.errors import WireError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.parts.collective.ring import Progress, Ring, checksum, chunk_bounds, combine
from shoal.wire.message import message


@message(tag=("after", "step"))
class Share:
    """A chunk of one peer (step 0) or of all (step 1). after: the operation before this one."""

    after: int
    step: int
    values: Tensor
    check: int


async def exchange(
    ring: Ring, peer: Peer, after: int, order: tuple[int, ...], values: Tensor, count: Progress,
    deadline: float,
) -> list[tuple[int, Tensor]]:  # fmt: skip
    """The reduction of everybody's `values` [size], as `Ring.reduce` gives it.

    after: a number that all peers agree on and use once. Raises WireError for what does not fit,
    and when not all is there by the deadline.
    """
    peers, place = len(order), order.index(peer.id)
    others = [PeerId(other) for other in order if other != peer.id]
    bounds = chunk_bounds(values.numel(), peers)
    own = (place + 1) % peers

    async def send(to: PeerId, step: int, piece: Tensor) -> None:
        check = checksum(piece, after, step) if ring.checked else 0
        await peer.send(to, Share(after, step, piece, check))
        count.sent += 1
        count.payload_bytes += piece.numel() * piece.element_size()

    async def receive(step: int, sizes: dict[int, int]) -> dict[int, Tensor]:
        expect = [PeerId(other) for other, size in sizes.items() if size]
        found = await peer.gather(Share, tag=(after, step), expect=expect, deadline=deadline)
        if len(found) < len(expect):
            raise WireError(f"direct: {len(found)} of {len(expect)} peers sent in time")
        for other, share in found.items():
            want, got = (values.dtype, (sizes[other],)), (share.values.dtype, share.values.shape)
            if want != got:
                raise WireError(f"direct: peer {other} sent {got} for {want} (same size and dtype)")
            if ring.checked and share.check != checksum(share.values, after, step):
                raise WireError(f"direct: a share of peer {other} was damaged on its way")
        count.received += len(found)
        return {int(other): share.values for other, share in found.items()}

    chunks = {order[(c - 1) % peers]: (bounds[c], bounds[c + 1]) for c in range(peers)}
    for other in others:
        start, end = chunks[other]
        if end > start:
            await send(other, 0, values[start:end].clone())
    start, end = chunks[peer.id]
    parts = await receive(0, dict.fromkeys(others, end - start))
    done = []
    if end > start:
        parts[peer.id] = values[start:end].clone()
        total = parts[order[own]]
        for step in range(1, peers):
            combine(ring.op, total, parts[order[(own + step) % peers]])
        if ring.op == "avg":
            total /= peers
        for other in others:
            await send(other, 1, total)
        done.append((start, total))
    finished = await receive(1, {other: chunks[other][1] - chunks[other][0] for other in others})
    done += [(chunks[other][0], piece) for other, piece in finished.items()]
    return done


def fits(values: Tensor, ring: Ring) -> bool:
    """Whether a tensor is small enough for this to pay."""
    size_bytes = values.numel() * values.element_size()
    return ring.quantise is None and size_bytes <= ring.direct_bytes
