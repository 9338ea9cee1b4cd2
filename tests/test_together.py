"""Several students from one stream of batches: each as it would be alone, bit for bit."""

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    Runs,
    Words,
    assert_same_runs,
    cache_of,
    changed,
    cut,
    metrics,
    same_weights,
)
from torch import Tensor, nn

from stages.cache import LogitCache
from stages.cache.targets import ViewTargets
from stages.data import Splits, cached_policy
from stages.errors import ConfigError, RunError
from stages.inputs.feed import Batch, ViewFeed
from stages.objectives.losses import ce
from stages.objectives.losses.mlkd import mlkd
from stages.rectify import rectify
from stages.settings import BiasSettings, RectifyConfig, StudentConfig
from stages.student_checks import check_one_stream
from stages.train_student import student_trainer, train_together
from stages.training.cached_task import CachedTask
from stages.training.objective import Student
from stages.training.run_directory import RunDirectory

CPU = torch.device("cpu")
SAMPLES, BATCH = 96, 32


class Dropping(nn.Sequential):
    """A student that draws from torch's generator at every step."""

    def __init__(self, num_classes: int = 10) -> None:
        head = nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, num_classes)
        super().__init__(nn.Flatten(), nn.Linear(3 * 64, 32), *head)


class Exploding(Dropping):
    """Its weights are not finite after the first epoch."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * torch.inf


@pytest.fixture(scope="module")
def my_runs(
    tmp_path_factory: pytest.TempPathFactory, teacher_run: Path, digits: Splits
) -> list[Runs]:
    """Students of plain views, and of weak and strong ones in turn."""
    splits, found = cut(digits, SAMPLES, 30), []
    base = {"model__architecture": "helpers:normed", "train__lr": 0.02, "train__batch_size": BATCH}
    for augment in ("pad-crop:pad=2", "pad-crop:pad=1|pad-crop:pad=2"):
        folder = tmp_path_factory.mktemp("together")
        path = folder / "digits.zarr"
        cache_of(teacher_run, path, splits, views=4, augment=augment, encoding="float32")
        rectify(path, RectifyConfig())
        found.append(Runs(path, splits, folder, **base))
    return found


@pytest.fixture(scope="module")
def runs(my_runs: list[Runs]) -> Runs:
    return my_runs[0]


@pytest.fixture(scope="module")
def pairs(my_runs: list[Runs]) -> Runs:
    return my_runs[1]


DROPPING = {"model__architecture": "test_together:Dropping"}
STUDENTS: dict[str, dict[str, Any]] = {
    "baseline": {"loss__name": "ce", **DROPPING},
    "kd": DROPPING,
    "other-init": {**DROPPING, "seed__init": 5},
    "rectified": {"bias__mode": "rectify"},
    "learned": {"loss__name": "ctkd", **DROPPING},
    "other-rate": {**DROPPING, "train__lr": 0.1, "train__optimizer": "adam"},
}


@pytest.fixture(scope="module")
def my_students(runs: Runs) -> list[StudentConfig]:
    return [runs.student(**changes) for changes in STUDENTS.values()]


@pytest.fixture(scope="module")
def my_group(runs: Runs, my_students: list[StudentConfig]) -> list[Path]:
    """The runs of all of them, trained together."""
    return runs.together(my_students)


def test_each_is_bit_for_bit_what_it_is_alone(
    runs: Runs, my_students: list[StudentConfig], my_group: list[Path]
) -> None:
    for config, together in zip(my_students, my_group, strict=True):
        assert_same_runs(runs.trained(config), together)
    assert not same_weights(my_group[1], my_group[2])  # the seeds do matter


def test_targets_and_images_are_read_once_and_waited_for_together(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by those who learn from the teacher's own rows, beside one with rectified rows."""
    reads: list[int] = []
    shown: list[int] = []
    read_view, batch_of = LogitCache.read_view, ViewFeed._batch

    def counting(self: ViewFeed, samples: Tensor, *what: Any) -> Batch:
        shown.append(len(samples))
        return batch_of(self, samples, *what)

    def slow(self: LogitCache, view: int, *what: Any) -> ViewTargets:
        reads.append(view)
        time.sleep(0.1)
        return read_view(self, view, *what)

    monkeypatch.setattr(LogitCache, "read_view", slow)
    monkeypatch.setattr(ViewFeed, "_batch", counting)
    students = [runs.student(**STUDENTS[name]) for name in ("baseline", "kd", "rectified")]
    lines = [metrics(run)[0] for run in runs.together(students)]
    assert len(reads) == 2  # epochs, each of another view
    assert shown.count(BATCH) == 2 * SAMPLES / BATCH  # images are cropped once as well
    (waited,) = {line["wait_seconds"] for line in lines}
    assert 0.1 < 3 * waited < 5
    assert all(waited <= line["seconds"] for line in lines)


def test_a_stopped_group_goes_on_bit_for_bit(
    runs: Runs,
    my_students: list[StudentConfig],
    my_group: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped while the second of them takes its step, as a kill between checkpoints leaves it."""
    outs = [runs.new() for _ in my_students]
    trainer = student_trainer(my_students, [RunDirectory(out) for out in outs], runs.splits)
    saved, victim = trainer.learners[:2]
    step, steps = victim.step, itertools.count(1)

    def killed(*what: Any) -> None:
        step(*what)
        if next(steps) == 5:
            saved.save()  # only two of them have
            victim.save()
            raise KeyboardInterrupt

    monkeypatch.setattr(victim, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit_all()
    runs.together(my_students, outs=outs, resume=True)
    for stopped, whole in zip(outs, my_group, strict=True):
        assert same_weights(stopped, whole), stopped
        assert len(metrics(stopped)) == 2


def test_one_that_fails_does_not_stop_the_others(runs: Runs, my_group: list[Path]) -> None:
    exploding = runs.student(model__architecture="test_together:Exploding")
    good, words = runs.student(**STUDENTS["kd"]), Words()
    outs = [runs.folder / "bad", runs.folder / "good"]
    bad, fine = train_together([exploding, good], outs, splits=runs.splits, reporter=words)
    assert isinstance(bad, RunError)
    assert "not finite" in str(bad)
    assert isinstance(fine, dict)
    assert same_weights(outs[1], my_group[1])
    assert not (outs[0] / "summary.json").exists()
    assert any(line.startswith("good: epoch 2/2") for line in words.lines)


def test_students_that_cannot_share_a_stream(runs: Runs, pairs: Runs) -> None:
    outs = [runs.new(), runs.new()]
    for other, message in (
        (runs.student(seed__data=1), "seed.data"),
        (runs.student(views=2), "views"),
        (runs.student(train__epochs=3), "train.epochs"),
        (pairs.student(), "cache"),
    ):
        with pytest.raises(ConfigError, match=message):
            runs.together([runs.student(), other], outs=outs)
    names = (None, "pairwise-T4", "swap-T4")
    biases = [BiasSettings(mode="rectify" if name else "none", rectified=name) for name in names]
    of = [Student.of(runs.student(slab_memory="1GB", bias=bias)) for bias in biases]
    check_one_stream(of[:2])
    with pytest.raises(ConfigError, match="pairwise-T4 and swap-T4 hold targets of each"):
        check_one_stream(of)
    with pytest.raises(ConfigError, match="weak and a strong view"):
        runs.trained(runs.student(loss__name="mlkd"), outs[0])
    assert not any(out.exists() for out in outs)


def test_mlkd_sees_both_views_of_every_sample(pairs: Runs) -> None:
    """The first batch's loss by hand: the weak and the strong pixels, each with its own row."""
    trainer, train = pairs.trainer(pairs.student(loss__name="mlkd")), pairs.splits.train
    learner, cache = trainer.learner, LogitCache.open(pairs.cache)
    task = learner.task
    assert isinstance(task, CachedTask)
    views = learner.start_epoch()
    assert views in ((0, 1), (2, 3))
    order = trainer.stream.order(torch.arange(SAMPLES), 0, 0)[:BATCH]
    assert train.images is not None
    images, labels = train.images[order], train.labels[order]
    pixels = [cached_policy(cache).apply(images, order, view) for view in views]
    learner.module.train()
    student_rows = torch.cat([learner.module(learner.normalise(p)) for p in pixels]).detach()
    rows = torch.cat([cache.read_view(view).rows(order) for view in views])
    twice = labels.repeat(2)
    expected = 0.2 * ce(student_rows, None, twice) + 0.9 * mlkd(
        student_rows.unflatten(0, (2, -1)), rows, twice
    )
    batch = Batch(order.repeat(2), torch.cat(pixels))
    assert float(task.loss_parts(student_rows, batch)["loss"]) == pytest.approx(float(expected))


def test_mlkd_shows_each_pair_once(pairs: Runs) -> None:
    bias = BiasSettings(mode="rectify", schedule="ramp", reduction="batch")
    config = pairs.student(loss__name="mlkd", bias=bias)
    assert {line["view"] for line in metrics(pairs.trained(config))} == {0, 2}
    with pytest.raises(ConfigError, match=r"slab-memory|two whole views"):
        pairs.trained(changed(config, slab_memory="1MB"))


def test_ctkds_temperature_is_learned_and_kept(runs: Runs) -> None:
    run = runs.new()
    trainer = runs.trainer(runs.student(**STUDENTS["learned"]), run)
    learned = trainer.learner.task.learned
    assert learned is not None
    before = [p.detach().clone() for p in learned.parameters()]
    trainer.fit()
    assert all(not torch.equal(a, b) for a, b in zip(before, learned.parameters(), strict=True))
    state = torch.load(run / "last.pt", weights_only=True)["learned"]
    assert torch.equal(state["theta"], dict(learned.named_parameters())["theta"])
