"""The training loop: what it shows, what it measures, what it reports, when it stops."""

import itertools
import math
import os
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import AtBatch, cut, metrics, teacher_of
from torch import Tensor, nn

from stages.data import Splits
from stages.errors import RunError, StoppedError
from stages.inputs.feed import Batch, Normalise, ViewFeed, plain_view
from stages.inputs.views import view_policy
from stages.objectives.losses import ce
from stages.order import sample_order
from stages.reporting import Silent
from stages.training.history import selected_epoch, summarise
from stages.training.learner import Learner
from stages.training.models import build
from stages.training.run_directory import RunDirectory
from stages.training.stream import Evaluation, Showing, open_stream
from stages.training.task import Task
from stages.training.trainer import Trainer, stop_on_signals

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def my_splits(digits: Splits) -> Splits:
    return cut(digits, 210, 100)


class SpyTask:
    """Hard labels; view e + 1 in epoch e. Remembers samples and pixels of every batch."""

    learned = None

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        self.batches: list[Tensor] = []
        self.pixels: list[Tensor] = []

    def start_epoch(self, epoch: int) -> tuple[int, ...]:
        return (epoch + 1,)

    def loss_parts(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        samples = batch.samples
        self.batches.append(samples)
        self.pixels.append(batch.pixels.clone())
        loss = ce(logits, None, self.labels[samples])
        return {"loss": loss, "mean_sample": samples.float().mean()}

    def epoch_metrics(self) -> dict[str, float]:
        return {"batches_so_far": float(len(self.batches))}


MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def my_trainer(my_splits: Splits, tmp_path: Path) -> MakeTrainer:
    """Makes trainers of a small student from its settings."""
    number = itertools.count()

    def make(task: Task | None = None, samples: Tensor | None = None, **train: Any) -> Trainer:
        given = {f"train__{n}": v for n, v in ({"epochs": 1, "batch_size": 105} | train).items()}
        config = teacher_of(model__architecture="helpers:plain", **given)
        every = my_splits.train.shown if samples is None else samples
        policy, showing = view_policy("pad-crop:pad=2"), Showing(every, every[:0])
        stream = open_stream(config, my_splits, policy, None, showing, CPU)
        (model,) = build([config], my_splits.train, None, Silent(), CPU)
        run = RunDirectory(tmp_path / f"run-{next(number)}")
        learner = Learner(config, model, task or SpyTask(stream.labels), run, stream)
        return Trainer([learner], stream, Silent())

    return make


@pytest.fixture
def my_spy(my_splits: Splits) -> SpyTask:
    return SpyTask(my_splits.train.labels)


def lines(trainer: Trainer) -> list[dict[str, Any]]:
    return metrics(trainer.learner.run.path)


@pytest.mark.parametrize(("batch_size", "sizes"), [(64, [64, 64, 64, 18]), (19, [19] * 10 + [20])])
def test_every_epoch_shows_every_sample_once_in_its_order(
    my_trainer: MakeTrainer, my_spy: Any, my_splits: Splits, batch_size: int, sizes: list[int]
) -> None:
    """In the task's view; a last batch of one joins the one before."""
    my_trainer(my_spy, epochs=2, batch_size=batch_size).fit()
    assert [len(batch) for batch in my_spy.batches] == sizes * 2
    shown = torch.cat(my_spy.batches).view(2, 210)
    images, policy = my_splits.train.images, view_policy("pad-crop:pad=2")
    assert images is not None
    for epoch in (0, 1):
        assert torch.equal(shown[epoch], sample_order(torch.arange(210), 0, epoch))
        of_epoch = slice(epoch * len(sizes), (epoch + 1) * len(sizes))
        expected = policy.apply(images[shown[epoch]], shown[epoch], epoch + 1)
        assert torch.equal(torch.cat(my_spy.pixels[of_epoch]), expected)


def test_metrics_are_means_over_samples_not_batches(my_trainer: MakeTrainer) -> None:
    trainer = my_trainer(batch_size=200)  # batches of 200 and of 10
    trainer.fit()
    (line,) = lines(trainer)
    assert line["mean_sample"] == pytest.approx(np.arange(210).mean(), rel=1e-5)


def test_a_line_says_epoch_view_rate_and_the_tasks_numbers(my_trainer: MakeTrainer) -> None:
    trainer = my_trainer(epochs=2, lr=0.2)
    trainer.fit()
    found = lines(trainer)
    assert [(line["epoch"], line["view"]) for line in found] == [(0, 1), (1, 2)]
    assert [line["lr"] for line in found] == pytest.approx([0.2, 0.1])  # cosine, half-way
    assert [line["batches_so_far"] for line in found] == [2, 4]
    for line in found:
        assert line["images_per_second"] == pytest.approx(210 / line["seconds"])
        assert 0 <= line["test_top1"] <= line["test_top5"] <= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(my_trainer: MakeTrainer, dtype: Any) -> None:
    losses = []
    for chosen in ("float32", dtype):
        trainer = my_trainer(samples=torch.arange(48), batch_size=16, lr=0.05, dtype=chosen)
        trainer.fit()
        losses.append(lines(trainer)[0]["loss"])
        assert {p.dtype for p in trainer.learner.module.parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"epochs": 3, "batch_size": 32, "lr": 1e25}, "loss, weights"),
        # one batch an epoch: its loss is finite, what it leaves behind is not
        ({"batch_size": 300, "lr": 1e38, "weight_decay": 1e3}, "weights"),
    ],
)
def test_what_is_not_finite_ends_the_run(
    my_trainer: MakeTrainer, settings: dict[str, Any], named: str
) -> None:
    trainer = my_trainer(**settings)
    with pytest.raises(RunError, match="not finite after epoch 1") as stopped:
        trainer.fit()
    assert stopped.value.cause.endswith(f": {named}")
    assert "train.lr" in stopped.value.remedy
    left = {path.name for path in trainer.learner.run.path.iterdir()}
    assert left == {"config.yaml", "metrics.jsonl"}
    assert lines(trainer) == []


@pytest.mark.parametrize("classes", [3, 10])
def test_evaluate_is_numpys_accuracy(my_splits: Splits, classes: int) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(64, 10), nn.Dropout(0.5), nn.Linear(10, classes)
    module = nn.Sequential(nn.Flatten(), *layers).eval()
    samples, labels = torch.arange(5, 90), my_splits.test.labels % classes
    evaluation = Evaluation(ViewFeed(my_splits.test, plain_view(None, None), CPU), samples, labels)
    normalise = Normalise((0.3,), (0.4,), 1, CPU)
    hits = evaluation.hits(lambda pixels: module(normalise(pixels)), samples, 7)
    top1, top5 = (hits / len(samples)).tolist()

    assert my_splits.test.images is not None
    pixels = my_splits.test.images.numpy()[5:90].reshape(85, 64) / 255
    weights = [p.detach().double().numpy() for p in module.parameters()]
    logits = ((pixels - 0.3) / 0.4 @ weights[0].T + weights[1]) @ weights[2].T + weights[3]
    ranked, truth = np.argsort(-logits, axis=1), labels.numpy()[5:90, None]
    assert top1 == pytest.approx((ranked[:, :1] == truth).any(1).mean())
    assert top5 == pytest.approx((ranked[:, :5] == truth).any(1).mean())
    assert 0.01 < top1 < 0.9  # the comparison means something


def history(*epochs: tuple[float, float | None]) -> list[dict[str, Any]]:
    """Lines with these (test_top1, val_top1)."""
    return [
        {"epoch": i, "test_top1": test, "test_top5": 1.0, "loss": 1.0 / (i + 1)}
        | {"seconds": 2.0, "wait_seconds": 0.5}
        | ({} if val is None else {"val_top1": val})
        for i, (test, val) in enumerate(epochs)
    ]


@pytest.mark.parametrize(
    ("lines", "last", "best", "selected"),
    [
        (history((0.5, None), (0.9, None), (0.7, None)), 2, 1, 2),
        (history((0.5, 0.8), (0.9, 0.6), (0.7, 0.7)), 2, 1, 0),
        (history((0.9, 0.8), (0.9, 0.8)), 1, 0, 0),
    ],
    ids=["no-val", "val", "ties-go-to-the-first"],
)
def test_summary(lines: list[dict[str, Any]], last: int, best: int, selected: int) -> None:
    assert selected_epoch(lines) == selected
    summary = summarise(lines, parameters=12)
    for name, epoch in (("last", last), ("best", best), ("selected", selected)):
        line = lines[epoch]
        assert summary[name] == {k: line[k] for k in line if "seconds" not in k}
    assert (summary["epochs"], summary["parameters"]) == (len(lines), 12)
    assert summary["train_seconds"] == pytest.approx(2.0 * len(lines))
    assert summary["wait_share"] == pytest.approx(0.25)


def test_the_first_epoch_warms_up_and_is_not_in_the_time_of_one() -> None:
    lines = history(*[(0.5, 0.5)] * 4)
    for line, seconds in zip(lines, (32, 1, 3, 2), strict=True):
        line["seconds"] = seconds
    assert summarise(lines, 1)["epoch_seconds"] == 2
    assert summarise(lines[:1], 1)["epoch_seconds"] == 32


# ---- stopped by a signal --------------------------------------------------------------------


SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.usefixtures("interruptible")
def test_a_signal_is_a_request_and_the_handler_comes_back() -> None:
    """A second Ctrl-C that comes later is not waited for."""
    for number in SIGNALS:
        before = signal.getsignal(number)
        with stop_on_signals() as stop:
            assert stop.number is None
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a launcher hands on what its terminal sent as well
            assert stop.number == number
        assert signal.getsignal(number) is before
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        stop.at -= 10
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_background_jobs_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_leaves_signals_to_their_owner() -> None:
    def work() -> bool:
        with stop_on_signals() as stop:
            return stop.requested

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(work).result() is False


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "name"), [(SIGNALS[0], "SIGTERM"), (SIGNALS[1], "Ctrl-C")])
def test_a_signal_saves_and_says_how_to_go_on(
    my_trainer: MakeTrainer, number: signal.Signals, name: str
) -> None:
    trainer = my_trainer(epochs=3, batch_size=64)
    trainer.reporter = AtBatch(6, lambda: os.kill(os.getpid(), number))
    with pytest.raises(StoppedError, match=f"{name} in epoch 2, after batch 2; saved") as stopped:
        trainer.fit()
    assert "--resume" in stopped.value.remedy
    assert stopped.value.exit_code == 128 + number
    assert pickle.loads(pickle.dumps(stopped.value)).exit_code == 128 + number
    state = torch.load(trainer.learner.run.path / "last.pt", weights_only=True)
    assert (state["position"]["epoch"], state["position"]["step"]) == (1, 2)
    assert state["position"]["lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi / 3)) / 2)
