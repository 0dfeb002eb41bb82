"""The master of sequential gradient coding: it assigns, waits as long as it must, decodes, steps.

In each round the fastest worker's time says how long the others have; who is late is cancelled by
the next round's work, if the scheme can do without, and waited for otherwise. A worker of which
nothing is heard for `patience_s` is taken to be gone: what a job would be lost without, the master
then computes itself, until the worker is heard again. After each job models and number of jobs are
committed; a master that comes back begins a new life there, with the jobs that were under way.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.parts.coding.sequential_scheme import MiniTask, SequentialScheme
from shoal.systems.coding._sequential_wire import Answer, Assign
from shoal.systems.coding._sequential_work import full_gradient, full_loss
from shoal.systems.coding._sequential_worker import gradient_of

if TYPE_CHECKING:
    from shoal.systems.coding._sequential_bound import Bound

TICK_S = 1e-6


class Master:
    """Peer 0."""

    def __init__(self, program: Bound, peer: Peer) -> None:
        self.program = program
        self.peer = peer
        stored = peer.store.get("models")
        state = peer.store.get("state")
        self.models = program.initial if stored is None else program.workload.there(stored)
        self.done, last = (0, -1) if state is None else (int(state[0]), int(state[1]))
        """Jobs that are applied."""
        # Not counted alone: a master that lost its store would begin a life that workers know, and
        # get work for the parameters of that one.
        self.life = max(last + 1, int(peer.now() * 1e6))
        self.params: dict[int, Tensor] = {}
        self.results: dict[tuple[int, int, int], Tensor] = {}
        self.gone: set[int] = set()

    async def live(self) -> None:
        """All jobs that are left; then tell everybody that it is over."""
        peer, program = self.peer, self.program
        await self._commit()
        if self.done < program.jobs:
            scheme = SequentialScheme(program.rule, program.jobs - self.done)
            self._promise(scheme)
            first = self.done
            for round in range(1, scheme.rounds + 1):
                peer.enter_round(first + round - 1)
                await self._round(scheme, round, first)
                await self._apply(scheme, first)
        peer.record("params", self.models[0])
        peer.record("finished_s", peer.now())
        last = Assign(self.life, 1 << 40, (), (), (), self.models[:1], True)
        for worker in range(program.rule.workers):
            await peer.send(PeerId(worker + 1), last)

    def _promise(self, scheme: SequentialScheme) -> None:
        """Say what this life is held to."""
        self.peer.record(
            "jobs_planned", self.program.jobs, scheme=scheme.name, delay=str(scheme.delay),
            load=repr(scheme.load),
        )  # fmt: skip

    # A round.

    async def _round(self, scheme: SequentialScheme, round: int, first: int) -> None:
        peer = self.peer
        if round <= scheme.jobs:
            self.params[round] = self.models[(first + round - 1) % len(self.models)]
        plan = scheme.plan(round)
        busy = {worker for worker, tasks in enumerate(plan) if tasks}
        begun_s = peer.now()
        for worker in sorted(busy):
            await self._assign(scheme, round, worker, (round,) if round <= scheme.jobs else ())
        heard = await self._gather(scheme, round, busy, begun_s)
        finished = busy & set(heard)
        if scheme.must_wait(round, finished):
            # Nobody else will do it.
            for worker in sorted(busy - finished):
                heard[worker] = [
                    await self._own(worker, task.job, task.part) for task in plan[worker]
                ]
                peer.record("substituted", worker)
            finished = busy
        for worker, results in heard.items():
            for task, result in zip(plan[worker], results, strict=True):
                self.results[task.job, worker, task.part] = result
        peer.record("round_s", peer.now() - begun_s)
        peer.record("late", len(busy - finished))
        scheme.observe(round, finished)

    async def _assign(
        self, scheme: SequentialScheme, round: int, worker: int, fresh: tuple[int, ...]
    ) -> None:
        tasks = scheme.plan(round)[worker]
        params = [self.params[job] for job in fresh]
        told = torch.stack(params) if params else self.models[:0]
        jobs = tuple(task.job for task in tasks)
        parts = tuple(task.part for task in tasks)
        message = Assign(self.life, round, jobs, parts, fresh, told, False)
        await self.peer.send(PeerId(worker + 1), message)

    async def _gather(
        self, scheme: SequentialScheme, round: int, busy: set[int], begun_s: float
    ) -> dict[int, list[Tensor]]:
        """The results of who came in time; of all, or all that are not gone, where it matters."""
        peer, settings = self.peer, self.program.settings
        heard: dict[int, list[Tensor]] = {}
        limit_s = begun_s + settings.patience_s
        retry_s = begun_s + settings.retry_s
        while len(heard) < len(busy):
            # A wait may end a nanosecond before its deadline as a float.
            now_s = peer.now() + TICK_S
            if heard and now_s >= limit_s:
                missing = busy - set(heard)
                if not scheme.must_wait(round, set(heard)):
                    break
                if now_s >= begun_s + settings.patience_s:
                    self.gone |= missing
                if missing <= self.gone:
                    break
            elif now_s >= begun_s + settings.patience_s:
                self.gone |= busy - set(heard)
                break
            deadline = begun_s + settings.patience_s
            deadline = min(deadline, limit_s) if now_s < limit_s else deadline
            if now_s >= retry_s:
                await self._remind(scheme, round, busy - set(heard))
                retry_s = now_s + settings.retry_s
            envelope = await peer.recv(
                Answer, tag=(self.life, round), deadline=min(deadline, retry_s)
            )
            if envelope is None:
                continue
            worker, answer = envelope.source - 1, envelope.message
            if worker not in busy or worker in heard:
                continue
            if self._broken(scheme.plan(round)[worker], answer.results):
                continue
            self.gone.discard(worker)
            if answer.lacks:
                await self._remind(scheme, round, {worker})
                continue
            if answer.results.shape != (len(scheme.plan(round)[worker]), self.models.shape[1]):
                continue
            if not heard:
                limit_s = begun_s + (1.0 + settings.mu) * (peer.now() - begun_s)
            heard[worker] = list(self.program.workload.there(answer.results))
        peer.discard(Answer, before=(self.life, round + 1))
        return heard

    def _broken(self, tasks: tuple[MiniTask, ...], results: Tensor) -> bool:
        """Whether there are numbers in the results that are none, which their work does not say: a
        worker that gives such is as good as silent."""
        known = all(bool(self.params[task.job].isfinite().all()) for task in tasks)
        return known and not bool(results.isfinite().all())

    async def _remind(self, scheme: SequentialScheme, round: int, workers: set[int]) -> None:
        """Send work again, with all parameters that it needs."""
        for worker in sorted(workers):
            jobs = tuple(sorted({task.job for task in scheme.plan(round)[worker]}))
            await self._assign(scheme, round, worker, jobs)

    async def _own(self, worker: int, job: int, part: int) -> Tensor:
        program, peer = self.program, self.peer
        mini = program.rule.task(worker, job, part)
        batch, share = program.chunked.batch(mini)
        await peer.sleep_until(peer.now() + program.settings.slope_s * program.load_of(mini))
        return await gradient_of(peer, program, self.params[job], batch, share)

    # Learning.

    async def _apply(self, scheme: SequentialScheme, first: int) -> None:
        """Step with all gradients that are there, job by job."""
        program, peer = self.program, self.peer
        task = program.workload.task
        while self.done - first < scheme.jobs and scheme.round - 1 > self.done - first:
            job = self.done - first + 1
            if not scheme.decodable(job):
                break
            gradient = scheme.decode(job, partial(self._result, job))
            model = self.done % len(self.models)
            start = self.params[job]
            if program.settings.audit:
                exact = full_gradient(start, task)
                error = float((gradient - exact).norm() / exact.norm())
                peer.record("gradient_error", error)
            loss = full_loss(start, task)
            peer.record("job_loss", loss, model=str(model), job=str(self.done + 1))
            models = self.models.clone()
            models[model] = start - program.settings.lr * gradient
            self.models = models
            self.done += 1
            peer.record("job_delay", scheme.round - 1 - job)
            self._forget(scheme, job)
            await self._commit()
            if model == 0:
                peer.record("params", self.models[0])

    def _result(self, job: int, worker: int, part: int) -> Tensor:
        return self.results[job, worker, part]

    def _forget(self, scheme: SequentialScheme, job: int) -> None:
        """What is decoded in time may still be worked on, so parameters stay a while."""
        self.results = {key: each for key, each in self.results.items() if key[0] != job}
        oldest = scheme.round - 1 - scheme.delay
        self.params = {known: each for known, each in self.params.items() if known >= oldest}

    async def _commit(self) -> None:
        state = torch.tensor([self.done, self.life], dtype=torch.int64, device="cpu")
        await self.peer.store.commit({"models": self.models, "state": state})
