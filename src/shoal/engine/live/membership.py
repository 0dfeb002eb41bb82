"""What a peer must remember to be itself again after a crash: its run, its place, the others."""

from __future__ import annotations

from pathlib import Path

from shoal.base.errors import UsageError
from shoal.engine.live.book import Record
from shoal.engine.live.store import DiskStore
from shoal.wire.message import message


@message
class Membership:
    """A peer's place in a run. start_unix_ns: the run's start, 0 before there is one."""

    run: bytes
    peer: int
    public: bytes
    version: int
    start_unix_ns: int
    records: tuple[Record, ...]


class MembershipStore:
    """The membership in a peer's store folder; "" keeps nothing."""

    def __init__(self, store_dir: str) -> None:
        self._folder = Path(store_dir) / "book" if store_dir else None
        self._disk: DiskStore | None = None

    def recall(self, public: bytes, wish: int) -> Membership | None:
        """What was kept for this key. wish: the id that the peer asks for, -1 = any."""
        for path in sorted(self._folder.glob("peer-*.store")) if self._folder is not None else ():
            peer = int(path.stem.removeprefix("peer-"))
            found = DiskStore(str(path.parent), peer).load().get("membership")
            if isinstance(found, Membership) and found.public == public:
                if wish not in (-1, found.peer):
                    raise UsageError(
                        f"store {path.parent.parent}: this key is peer {found.peer} there, not "
                        f"{wish} (use another --store, or leave --id out)"
                    )
                return found
        return None

    def keep(self, membership: Membership) -> None:
        """Durable on return; belongs to one thread at a time."""
        if self._folder is None:
            return
        if self._disk is None:
            self._disk = DiskStore(str(self._folder), membership.peer)
            self._disk.load()
        self._disk.commit({"membership": membership})
