"""The training loop that teachers and students share.

What is learned from is a `Task`: it says which view an epoch shows and what the loss of a batch
is. Order of views and samples is a pure function of (seed.data, epoch), so that a run can stop
after any step and go on as if it had not: its weights then equal an uninterrupted run's.
"""

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stages.device import autocast, place
from stages.errors import RunError
from stages.inputs.counter_hash import permute
from stages.inputs.feed import Batch, Normalise, ViewFeed, num_batches
from stages.inputs.models import logits_of
from stages.reporting import Reporter
from stages.training.config import SeedSettings, TrainSettings
from stages.training.optimise import make_optimizer, make_schedule
from stages.training.run_directory import RunDirectory

_SAMPLE_ORDER, _VIEW_ORDER = 1, 2  # separate streams of one seed

SampleOrder = Callable[[Tensor, int, int], Tensor]
"""(samples, seed.data, epoch) -> the samples in the order of that epoch; see `sample_order`."""


class Task(Protocol):
    """What an epoch shows and what its loss is."""

    def start_epoch(self, epoch: int) -> int:
        """Get ready; return the view that this epoch shows."""

    def loss_parts(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """float32 logits (B, C) and the batch they are of -> named scalars.

        `loss` is what is minimised; the others are reported.
        """

    def epoch_metrics(self) -> dict[str, float]:
        """Numbers about the epoch that has just ended, for metrics.jsonl."""


@dataclass(frozen=True)
class Evaluation:
    """A set of samples that a model is measured on, on the clean view."""

    feed: ViewFeed
    samples: Tensor
    labels: Tensor


@dataclass
class Position:
    """How far a run is: `step` batches into `epoch`, with the sums of its losses so far."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    totals: dict[str, Tensor] = field(default_factory=dict)

    def next_epoch(self) -> None:
        self.epoch, self.step, self.seconds, self.totals = self.epoch + 1, 0, 0.0, {}


@dataclass
class Trainer:
    """Everything a run needs. `samples`: int64, the training samples (all, or without the held-out
    ones). `evaluations` by name: `test`, and `val` where samples are held out.
    """

    module: nn.Module
    normalise: Normalise
    task: Task
    feed: ViewFeed
    samples: Tensor
    evaluations: dict[str, Evaluation]
    settings: TrainSettings
    seeds: SeedSettings
    run: RunDirectory
    reporter: Reporter
    device: torch.device
    order: SampleOrder = field(default_factory=lambda: sample_order)

    def __post_init__(self) -> None:
        use_deterministic(self.settings.deterministic)
        place(self.module, self.device, self.settings.channels_last)
        self._steps = num_batches(len(self.samples), self.settings.batch_size)
        self._optimizer = make_optimizer(self.module, self.settings)
        self._schedule = make_schedule(self._optimizer, self.settings, self._steps)
        half = self.settings.dtype == "float16"
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=half)

    def fit(self) -> dict[str, Any]:
        """Train to the end and return the summary; go on from last.pt where there is one.

        Raises RunError when stopped by SIGTERM (after saving) or when the loss is not finite.
        """
        position = self._restore()
        history = self.run.keep_metrics(position.epoch)
        try:
            with stop_on_sigterm() as stop:
                while position.epoch < self.settings.epochs:
                    metrics = self._train_epoch(position, stop)
                    history.append(metrics)
                    self._finish_epoch(position, metrics, history)
        finally:
            for feed in (self.feed, *(e.feed for e in self.evaluations.values())):
                feed.close()
        summary = summarise(history, sum(p.numel() for p in self.module.parameters()))
        self.run.save_summary(summary)
        return summary

    # ---- one epoch ----------------------------------------------------------------------

    def _train_epoch(self, position: Position, stop: "StopSignal") -> dict[str, Any]:
        settings, epoch = self.settings, position.epoch
        view = self.task.start_epoch(epoch)
        if position.step == 0:
            position.lr = float(self._schedule.get_last_lr()[0])
        order = self.order(self.samples, self.seeds.data, epoch)
        self.module.train()
        started = time.perf_counter() - position.seconds
        for batch in self.feed.batches(order, view, settings.batch_size, skip=position.step):
            parts = self._step(batch)
            for name, value in parts.items():
                total = value.detach() * len(batch.samples)
                position.totals[name] = position.totals.get(name, 0) + total
            position.step += 1
            position.seconds = time.perf_counter() - started
            self.reporter.progress(
                f"epoch {epoch + 1}/{settings.epochs}", position.step, self._steps, "batches"
            )
            if stop.requested:
                self._save(position)
                raise RunError(
                    f"stopped by SIGTERM in epoch {epoch + 1}, after batch {position.step}; saved",
                    "Go on with the same command and --resume.",
                )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - started
        means = {name: float(total) / len(order) for name, total in position.totals.items()}
        finite = all(bool(torch.isfinite(p).all()) for p in self.module.parameters())
        if not (finite and all(map(math.isfinite, means.values()))):
            raise RunError(
                f"the loss or the weights are not finite after epoch {epoch + 1}: {means}",
                "Lower train.lr, or check the teacher and the loss settings.",
            )
        return {
            "epoch": epoch,
            "view": view,
            "lr": position.lr,
            **means,
            **self.task.epoch_metrics(),
            "seconds": seconds,
            "images_per_second": len(order) / seconds,
        }

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        images = self.normalise(batch.pixels)
        with autocast(self.device, self.settings.dtype):
            logits = logits_of(self.module(images))
        parts = self.task.loss_parts(logits.float(), batch)
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(parts["loss"]).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._schedule.step()
        return parts

    def _finish_epoch(
        self, position: Position, metrics: dict[str, Any], history: list[dict[str, Any]]
    ) -> None:
        for name, evaluation in self.evaluations.items():
            top1, top5 = evaluate(
                self.module, self.normalise, evaluation, self.settings, self.device
            )
            metrics |= {f"{name}_top1": top1, f"{name}_top5": top5}
        position.next_epoch()
        if position.epoch - 1 == selected_epoch(history):
            self.run.save_model(self.module)
        # Metrics before the checkpoint: a kill in between repeats the epoch and drops the line.
        self.run.add_metrics(metrics)
        self._save(position)
        line = (
            f"epoch {position.epoch}/{self.settings.epochs}  view {metrics['view']}  "
            f"loss {metrics['loss']:.4f}  test top-1 {metrics['test_top1']:.2%}  "
            f"{metrics['seconds']:.1f} s"
        )
        self.run.log(line)
        self.reporter.say(line)

    # ---- state --------------------------------------------------------------------------

    def _save(self, position: Position) -> None:
        states = {
            "model": self.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "position": dataclasses.asdict(position),
            "cpu_generator": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            states["cuda_generator"] = torch.cuda.get_rng_state(self.device)
        self.run.save_checkpoint(states)

    def _restore(self) -> Position:
        states = self.run.load_checkpoint(self.device)
        if states is None:
            return Position()
        self.module.load_state_dict(states["model"])
        self._optimizer.load_state_dict(states["optimizer"])
        self._schedule.load_state_dict(states["schedule"])
        self._scaler.load_state_dict(states["scaler"])
        torch.set_rng_state(states["cpu_generator"].cpu())
        if "cuda_generator" in states:
            torch.cuda.set_rng_state(states["cuda_generator"].cpu(), self.device)
        position = Position(**states["position"])
        self.reporter.say(f"going on in epoch {position.epoch + 1}, after batch {position.step}")
        return position


def sample_order(samples: Tensor, seed: int, epoch: int) -> Tensor:
    """The training samples in the order of an epoch: int64, a permutation of `samples`."""
    positions = torch.arange(len(samples))
    return samples[permute(positions, len(samples), seed, epoch, _SAMPLE_ORDER)]


def view_order(seed: int, epoch: int, num_views: int) -> int:
    """Which of `num_views` views an epoch shows: a fresh permutation each time round."""
    turn, position = divmod(epoch, num_views)
    return int(permute(torch.tensor([position]), num_views, seed, turn, _VIEW_ORDER))


@torch.inference_mode()
def evaluate(
    module: nn.Module,
    normalise: Normalise,
    evaluation: Evaluation,
    settings: TrainSettings,
    device: torch.device,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy on the clean view, in [0, 1]."""
    module.eval()
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    labels = evaluation.labels.to(device)
    batch_size = max(256, settings.batch_size)
    for batch in evaluation.feed.batches(evaluation.samples, 0, batch_size):
        images = normalise(batch.pixels)
        with autocast(device, settings.dtype):
            logits = logits_of(module(images)).float()
        best = logits.topk(min(5, logits.shape[1])).indices == labels[batch.samples, None]
        hits += torch.stack([best[:, 0].sum(), best.any(1).sum()])
    top1, top5 = (hits / len(evaluation.samples)).tolist()
    return top1, top5


def selected_epoch(history: list[dict[str, Any]]) -> int:
    """The epoch whose weights are kept: the best on held-out samples, or else the last."""
    if "val_top1" in history[-1]:
        return max(range(len(history)), key=lambda e: history[e]["val_top1"])
    return len(history) - 1


def summarise(history: list[dict[str, Any]], parameters: int) -> dict[str, Any]:
    """Last, best and selected epoch. `best` is by test top-1, as the literature reports it."""
    picked = ("epoch", "test_top1", "test_top5", "val_top1", "loss")
    best = max(range(len(history)), key=lambda e: history[e]["test_top1"])
    chosen = {"last": len(history) - 1, "best": best, "selected": selected_epoch(history)}
    seconds = sum(line["seconds"] for line in history)
    waited = sum(line.get("wait_seconds", 0.0) for line in history)
    return {
        **{
            name: {key: history[epoch][key] for key in picked if key in history[epoch]}
            for name, epoch in chosen.items()
        },
        "epochs": len(history),
        "parameters": parameters,
        "train_seconds": seconds,
        "wait_share": waited / seconds,
    }


def use_deterministic(wanted: bool) -> None:
    """Only algorithms that give the same bits again, or the fastest ones."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = not wanted


@dataclass
class StopSignal:
    """Whether somebody asked the run to stop."""

    requested: bool = False


@contextmanager
def stop_on_sigterm() -> Iterator[StopSignal]:
    """Turn SIGTERM into a request; the loop answers after the batch at hand."""
    stop = StopSignal()

    def request(*_: object) -> None:
        stop.requested = True

    try:
        before = signal.signal(signal.SIGTERM, request)
    except ValueError:  # not the main thread: whoever owns the process handles its signals
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
