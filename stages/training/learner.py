"""One model being trained: what it learns from, its optimiser, how far it is, where it is kept."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import Tensor

from stages.device import RandomState, check_precision, place
from stages.distributed import summed, take_from_first
from stages.errors import PipelineError, RunError
from stages.inputs.feed import Batch, Normalise
from stages.settings import RunConfig
from stages.training.captured import Capture, CapturedStep, check_capture
from stages.training.graphs import WaitError
from stages.training.history import EpochShown, said, selected_epoch, summarise
from stages.training.models import InitialModel, check_model
from stages.training.passes import Passes
from stages.training.run_directory import RunDirectory
from stages.training.run_folder import MADE_FROM
from stages.training.stream import BatchStream
from stages.training.task import Position, Task, TaskLookingBack, TaskToCompile
from stages.training.trained import Trained


@dataclass
class Learner:
    """A model and all that its training changes.

    made_from: digests of what it is made from, see `stages.training.run_folder`. random_state: of
    the generators, for one of several learners in a process: each then draws as if it were alone,
    None for the only one. error: why it was given up.
    """

    config: RunConfig
    model: InitialModel
    task: Task
    run: RunDirectory
    stream: BatchStream
    made_from: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.settings, self.ranks, device = self.config.train, self.stream.ranks, self.stream.device
        check_precision(device, self.settings.tf32)
        check_model(self.model, self.stream)
        self.module = place(self.model.model.module, device, self.settings.channels_last)
        if (learned := self.task.learned) is not None:
            learned.to(device)
        self.steps = self.stream.steps
        self._trained = Trained(self.module, learned, self.settings, self.steps)
        channels, last = self.model.model.channels, self.settings.channels_last
        self.normalise = Normalise(*self.model.statistics, channels, device, last)
        working = self._trained.working
        self.passes = Passes(self.module, self.normalise, self.settings, self.ranks, working)
        self._capture = self._make_capture() if self.settings.capture else None
        self.say: Callable[[str], None] = lambda _: None
        self.random_state: RandomState | None = None
        self._views, self.position = 1, Position()
        self.history: list[dict[str, Any]] = []
        self._selected: dict[str, Tensor] | None = None
        self.error: PipelineError | None = None

    def resolved(self) -> dict[str, Any]:
        """The settings of the run, with those of the model resolved: plain values."""
        config = msgspec.structs.replace(self.config, model=self.model.settings)
        return {"kind": self.config.kind, **msgspec.to_builtins(config)}

    def prepare(self) -> None:
        """Hold the run directory. Raises RunError where it may not be written."""
        recorded = {
            **self.resolved(),
            "classes": [*self.stream.feed.dataset.class_names],
            MADE_FROM: {**self.made_from, "init": self.model.init_digest},
        }
        self.run.prepare(recorded, self.ranks)

    # ---- an epoch -----------------------------------------------------------------------

    def start_epoch(self) -> tuple[int, ...]:
        """The views that the epoch at hand shows: see `Task.start_epoch`."""
        if isinstance(self.task, TaskLookingBack) and (note := self.task.look_back(self.history)):
            self._tell(note)
        views = self.task.start_epoch(self.position.epoch)
        self._views = len(views) // self.stream.rounds.of(self.position.epoch).count
        if self.settings.compile and not self.passes.compiled:
            self._compile()
        if self.position.step == 0:
            self.position.lr = self._trained.schedule.rate
        if self._capture is not None:
            rates = self._trained.schedule.upcoming(self.steps)
            if reason := self._capture.start_epoch(rates, self._views):
                self._tell(f"--capture: steps are not recorded: {reason}")
        self.module.train()
        return views

    def _make_capture(self) -> Capture:
        check_capture(self.stream.device)
        compiled, optimizer = self.settings.compile, self._trained.optimizer
        step = CapturedStep(self._learn, optimizer, self._changed, self.stream, not compiled)
        return Capture(step, self.task, self.stream, self._trained.scaler.is_enabled())

    def _compile(self) -> None:
        size = self.settings.batch_size // self.ranks.world
        if isinstance(self.task, TaskToCompile):
            self.task.compile(size)
        self.passes.compile(self._views, size)

    def step(self, batch: Batch) -> None:
        """Learn from a batch: of several views, one after the other."""
        if not self._captured(batch):
            if self.random_state is not None:
                self.random_state.restore()
            self._learn(batch)
            if self.random_state is not None:
                self.random_state = RandomState.now(self.stream.device)
        self._trained.schedule.step()
        self.position.step += 1

    def join(self) -> None:
        """What is queued on the device from now on comes after the step."""
        if self._capture is not None:
            self._capture.join()

    def _captured(self, batch: Batch) -> bool:
        """Whether the step was done as a recorded one."""
        if self._capture is None:
            return False
        try:
            return self._capture.step(batch, beside=self.random_state is not None)
        except WaitError as error:
            self._trained.rate_from_host()
            self._tell(f"--capture: steps are not recorded: {error}")
            return False

    def _tell(self, text: str) -> None:
        self.say(text)
        if self.ranks.first:
            self.run.log(text)

    def _learn(self, batch: Batch) -> None:
        """All of a step but for what the host counts."""
        parts = self.task.loss_parts(self.passes.logits(batch.pixels, self._views), batch)
        self._trained.descend(parts["loss"], self.ranks)
        self.position.add(parts, len(batch.samples))

    def _changed(self) -> dict[Hashable, Tensor]:
        """Every tensor that a step changes."""
        totals: dict[Hashable, Tensor] = {("total", n): t for n, t in self.position.totals.items()}
        return self._trained.changed() | totals

    def check_losses(self) -> None:
        """Raise RunError unless the losses of the epoch are finite so far."""
        if infinite := self.position.infinite():
            epoch, step = self.position.epoch + 1, self.position.step
            raise _not_finite(f"in epoch {epoch}, by batch {step}", infinite)

    def finish_epoch(self, shown: EpochShown, keep: bool = True) -> dict[str, Any]:
        """Measure, write and save; return the line of the epoch. shown: to this rank. keep: replace
        last.pt and the weights; else their next replacement has this epoch too.

        Raises RunError if the losses or the weights are not finite.
        """
        position = self.position
        counts = summed(self.ranks, torch.tensor([shown.images, shown.samples])).tolist()
        shown = shown._replace(images=counts[0], samples=counts[1])
        means = self._means(shown.images)
        metrics = {
            "epoch": position.epoch,
            **shown.metrics(),
            "lr": position.lr,
            **means,
            **self.task.epoch_metrics(),
            "seconds": position.seconds,
            "images_per_second": shown.images / position.seconds,
        }
        take_from_first(self.ranks, self.module.buffers())  # those that are written
        self.module.eval()
        predict, size = self.passes.predict, self.settings.batch_size
        for name, evaluation in self.stream.evaluations.items():
            top1, top5 = evaluation.accuracy(predict, self.ranks, size)
            metrics |= {f"{name}_top1": top1, f"{name}_top5": top5}
        self.history.append(metrics)
        position.next_epoch()
        if self.ranks.first:
            self._write(metrics, keep)
        # Metrics before the checkpoint: a kill in between repeats the epoch and drops the line.
        if keep:
            self.save()
        return metrics

    def _means(self, images: int) -> dict[str, float]:
        """The mean losses of the images that all ranks saw; the device is asked once.

        Raises RunError if one of them is not finite, or a weight is not.
        """
        totals = self.position.totals
        asked = [*totals.values(), self._trained.largest()]
        found = torch.stack([value.double() for value in asked])
        *sums, largest = summed(self.ranks, found).tolist()
        means = {name: total / images for name, total in zip(totals, sums, strict=True)}
        infinite = [name for name, mean in means.items() if not math.isfinite(mean)]
        if not math.isfinite(largest):
            infinite.append("weights")
        if infinite:
            raise _not_finite(f"after epoch {self.position.epoch + 1}", infinite)
        return means

    def _write(self, metrics: dict[str, Any], keep: bool) -> None:
        if self.position.epoch - 1 == selected_epoch(self.history):
            state = self.module.state_dict()
            self._selected = None if keep else {name: t.clone() for name, t in state.items()}
            if keep:
                self.run.save_weights(state)
        self.run.add_metrics(metrics)
        self.run.log(said(metrics, self.settings.epochs))

    def finish(self) -> dict[str, Any]:
        """The summary of the run, written as well."""
        summary = summarise(self.history, sum(p.numel() for p in self.module.parameters()))
        if self.ranks.first:
            self.run.save_summary(summary)
        return summary

    # ---- state --------------------------------------------------------------------------

    def save(self) -> None:
        """Replace last.pt, on the first rank; all ranks call it, to add up their losses so far."""
        totals = {name: summed(self.ranks, total) for name, total in self.position.totals.items()}
        if not self.ranks.first:
            return
        if self._selected is not None:
            self.run.save_weights(self._selected)
            self._selected = None
        random = self.random_state or RandomState.now(self.stream.device)
        states = {
            **self._trained.states(),
            "position": dataclasses.asdict(dataclasses.replace(self.position, totals=totals)),
            "history": self.history,
            **dataclasses.asdict(random),
        }
        self.run.save_checkpoint(states)
        self.run.kept_epochs = self.position.epoch

    def restore(self) -> None:
        """Go on from last.pt, where there is one. Raises RunError if it does not fit."""
        if (states := self.run.load_checkpoint(self.stream.device)) is None:
            return
        try:
            self._load(states)
        except _MISFITS as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise self.run.does_not_fit(" ".join(lines[:2])[:200]) from error
        done, epochs = self.position.epoch, self.settings.epochs
        if done > epochs or (done == epochs and self.position.step):
            raise RunError(
                f"{self.run.path} has had {done} epochs already, not {epochs}",
                f"Give --epochs {done} or more.",
            )
        self.run.kept_epochs = done

    def _load(self, states: dict[str, Any]) -> None:
        self._trained.load(states)
        random = RandomState(states["cpu_generator"].cpu(), states["cuda_generator"])
        self.position = self.position.moved_to(Position(**states["position"]))
        self.history = [dict(line) for line in states["history"]]
        if len(self.history) != self.position.epoch:
            raise ValueError(f"metrics of {len(self.history)} of {self.position.epoch} epochs")
        if self.random_state is not None:
            self.random_state = random
        else:
            random.restore()
        if not self.ranks.first:  # the first rank goes on from the losses of all
            for total in self.position.totals.values():
                total.zero_()

    def begin(self) -> None:
        """Write the run's configuration, and what is kept of it; the first rank does."""
        if not self.ranks.first:
            return
        self.run.begin(self.history)
        whole = self.history and not self.position.step
        if whole and selected_epoch(self.history) == len(self.history) - 1:
            self.run.mend_weights(self.module.state_dict())


_MISFITS = (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError)
"""What a checkpoint makes torch raise that is whole, and of another model or optimiser."""


def _not_finite(where: str, names: list[str]) -> RunError:
    return RunError(
        f"the loss or the weights are not finite {where}: {', '.join(names)}",
        "Lower train.lr, or check the teacher and the loss settings.",
    )
