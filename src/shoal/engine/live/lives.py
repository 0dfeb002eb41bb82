"""What one process of a run has reported so far, and what it leaves if it dies in the middle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shoal.engine.live import control
from shoal.engine.traffic import Traffic
from shoal.world.record import Happening, Row, Run

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.engine.live.joining import Status


@dataclass
class Life:
    """From the start of a peer's process to its end; its next process begins another."""

    peer: int
    status: Status | None = None
    run: Run | None = None
    """its last word, if it had one"""
    rows: list[Row] = field(default_factory=list)
    happenings: list[Happening] = field(default_factory=list)
    params: Tensor | None = None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def round(self) -> int:
        return -1 if self.status is None else self.status.round

    @property
    def bytes_sent(self) -> int:
        return 0 if self.status is None else self.status.bytes_sent

    @property
    def bytes_received(self) -> int:
        return 0 if self.status is None else self.status.bytes_received

    @property
    def rejoined(self) -> bool:
        return self.status is not None and self.status.rejoined

    def take(self, report: control.Report) -> None:
        if isinstance(report, control.Told):
            self.status = report.status
            self.rows += report.rows
            self.happenings += report.happenings
        elif isinstance(report, control.Observed):
            self.params = report.params
            self.traffic.note(report.round, report.time_s, [self.bytes_sent])
        elif isinstance(report, control.Done):
            self.run = report.run

    def left(self, seed: int, peers: int) -> Run:
        """The run as this process saw it; of one that was killed, as far as it had told."""
        if self.run is not None:
            return self.run
        run = Run("live", seed, peers, list(self.rows), list(self.happenings), finished=False)
        run.bytes_sent, run.bytes_received = [0] * peers, [0] * peers
        if self.status is not None:
            run.bytes_sent[self.peer] = self.status.bytes_sent
            run.bytes_received[self.peer] = self.status.bytes_received
            run.messages_sent = self.status.messages_sent
            run.messages_delivered = self.status.messages_delivered
            run.virtual_s = self.status.time_s
        if self.params is not None:
            run.final = {self.peer: self.params}
        run.rows += self.traffic.rows()
        return run
