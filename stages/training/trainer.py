"""The training loop that teachers and students share: one stream of batches, one model or several.

What is learned from is a `Task` (`learner.py`). Order of views and samples (`order.py`) is a pure
function of (seed.data, epoch), so that a run can stop after any step and go on as if it had not:
its weights then equal an uninterrupted run's. Several learners that are shown the same views share
the stream: images are cropped once, and each has the weights that it would have alone.
"""

import contextlib
import functools
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from stages.distributed import summed
from stages.errors import PipelineError, RunError, StoppedError
from stages.inputs.run_files import yaml_text
from stages.reporting import Reporter
from stages.training.history import said
from stages.training.learner import Learner
from stages.training.passes import prepare_compiler
from stages.training.stream import BatchStream

Outcome = dict[str, Any] | PipelineError
"""The summary of a run, or why it failed."""
CHECKED_EVERY = 200
"""Batches between two looks at whether the losses are finite: a look waits for the GPU."""
_AGAIN = 2.0


@dataclass
class Trainer:
    """Learners and what they are shown. Epochs and batch size are the same for all of them.

    Making one holds the run directories, until `fit` or `close` lets them go. Raises RunError where
    one of them may not be written; nothing is before `fit`.
    """

    learners: Sequence[Learner]
    stream: BatchStream
    reporter: Reporter

    def __post_init__(self) -> None:
        self.settings = self.learners[0].settings
        self._kept_at = -math.inf
        if any(learner.settings.compile for learner in self.learners):
            prepare_compiler(self.stream.device, len(self.learners))
        several = len(self.learners) > 1
        with contextlib.ExitStack() as held:  # where one cannot be had, the others are let go
            for learner in self.learners:
                learner.prepare()
                name = learner.run.path.name if several else None
                learner.say = functools.partial(_say, self.reporter, name)
                held.callback(learner.run.release)
                learner.random_state = learner.model.random_state if several else None
                self.reporter.say(yaml_text(learner.resolved()))
            held.pop_all()

    @property
    def learner(self) -> Learner:
        """The only one."""
        (learner,) = self.learners
        return learner

    def fit(self) -> dict[str, Any]:
        """As `fit_all` for the only learner: its summary. Raises its error."""
        (outcome,) = self.fit_all()
        if isinstance(outcome, PipelineError):
            raise outcome
        return outcome

    def fit_all(self) -> list[Outcome]:
        """Train to the end; go on from last.pt where there is one. A summary for each learner, or
        the RunError of one whose loss is not finite, or whose directory cannot be written.

        Raises StoppedError when stopped by SIGTERM or Ctrl-C, after saving.
        """
        use_deterministic(self.settings.deterministic)
        try:
            self._restore()
            with stop_on_signals() as stop:
                for epoch in range(self.settings.epochs):
                    self._train_epoch(epoch, stop)
            return [learner.error or _finished(learner) for learner in self.learners]
        finally:
            self.close()

    def close(self) -> None:
        """Let go the run directories, and the processes that decode images."""
        self.stream.close()
        for learner in self.learners:
            learner.run.release()

    def _restore(self) -> None:
        """All learners as their checkpoints have them; only then is anything written."""
        for learner in self.learners:
            learner.restore()
        for learner in self.learners:
            learner.begin()
            at = learner.position
            if at.epoch == self.settings.epochs:
                learner.say(f"is finished already: {at.epoch} epochs")
            elif at.epoch or at.step:
                learner.say(f"going on in epoch {at.epoch + 1}, after batch {at.step}")

    def _train_epoch(self, epoch: int, stop: "StopSignal") -> None:
        # A kill may have come between two learners' checkpoints: each goes on where it was.
        active = [x for x in self.learners if x.error is None and x.position.epoch == epoch]
        if not active:
            return
        clock = time.perf_counter()  # waiting for targets counts as well
        (views,) = {learner.start_epoch() for learner in active}
        order, within = self.stream.epoch_order(epoch), self.stream.rounds.of(epoch)
        first = min(learner.position.step for learner in active)
        batches = self.stream.batches(order, views, first, within)
        for step, batch in enumerate(batches, start=first):
            waiting = [learner for learner in active if learner.position.step == step]
            for learner in waiting:
                learner.step(batch)
            for learner in waiting:
                learner.join()
            if step % CHECKED_EVERY == CHECKED_EVERY - 1:
                active = self._still_finite(active)
                if not active:
                    return
            clock = self._share_time(waiting, clock)
            done, total = step + 1, active[0].steps
            task = f"epoch {epoch + 1}/{self.settings.epochs}"
            self.reporter.progress(task, done, total, "batches")
            if self._stopped(stop):
                for learner in active:
                    learner.save()
                raise StoppedError(
                    f"stopped by {stop.name} in epoch {epoch + 1}, after batch {done}; saved",
                    "Go on with the same command and --resume.",
                    stop.number or signal.SIGTERM,
                )
        if self.stream.device.type == "cuda":
            torch.cuda.synchronize(self.stream.device)
        self._share_time(active, clock)
        keep, shown = self._keeps(epoch), self.stream.showed(order, views, within)
        for learner in active:
            try:
                metrics = learner.finish_epoch(shown, keep)
            except RunError as error:
                learner.error = error
            else:
                learner.say(said(metrics, self.settings.epochs))

    def _keeps(self, epoch: int) -> bool:
        """Whether checkpoints are written after this epoch: after the first and the last one, and
        where the last checkpoints are old enough. The first of several ranks decides.
        """
        old = time.monotonic() - self._kept_at >= self.settings.checkpoint_seconds
        keeps = epoch + 1 == self.settings.epochs or self._decided_by_first(old)
        if keeps:
            self._kept_at = time.monotonic()
        return keeps

    def _still_finite(self, learners: Sequence[Learner]) -> list[Learner]:
        """Those whose losses are finite so far; the others are given up now, not after the epoch.

        Of several ranks each has its own losses: they agree after the epoch.
        """
        if self.stream.ranks.world > 1:
            return list(learners)
        for learner in learners:
            try:
                learner.check_losses()
            except RunError as error:
                learner.error = error
        return [learner for learner in learners if learner.error is None]

    def _share_time(self, learners: Sequence[Learner], since: float) -> float:
        """The time of learners that are trained together is divided evenly."""
        now = time.perf_counter()
        for learner in learners:
            learner.position.seconds += (now - since) / len(learners)
        return now

    def _stopped(self, stop: "StopSignal") -> bool:
        """Whether any rank was asked to stop; all of them stop after the same batch."""
        if self.stream.ranks.world == 1:
            return stop.requested
        return bool(summed(self.stream.ranks, torch.tensor(int(stop.requested))))

    def _decided_by_first(self, answer: bool) -> bool:
        """The first rank's answer, on every rank."""
        ranks = self.stream.ranks
        return bool(summed(ranks, torch.tensor(int(answer and ranks.first))))


def _say(reporter: Reporter, name: str | None, text: str) -> None:
    reporter.say(text if name is None else f"{name}: {text}")


def use_deterministic(wanted: bool) -> None:
    """Only algorithms that give the same bits again, or the fastest ones."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = not wanted


def _finished(learner: Learner) -> Outcome:
    try:
        return learner.finish()
    except RunError as error:
        return error


@dataclass
class StopSignal:
    """Which signal asked the run to stop, and when; None as long as none did."""

    number: int | None = None
    at: float = 0.0

    @property
    def requested(self) -> bool:
        return self.number is not None

    @property
    def name(self) -> str:
        number = self.number or signal.SIGTERM
        return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopSignal]:
    """Turn SIGTERM and Ctrl-C into a request; the loop answers after the batch at hand. Another
    Ctrl-C, two seconds later or more, is not waited for: a launcher may hand on the first as well.
    """
    stop = StopSignal()

    def request(number: int, _: object) -> None:
        now = time.monotonic()
        if number == stop.number == signal.SIGINT and now - stop.at > _AGAIN:
            raise KeyboardInterrupt
        if stop.number is None:
            stop.number, stop.at = number, now

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as of a shell's background job
                before[number] = signal.signal(number, request)
    except ValueError:  # not the main thread, which alone handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
