"""Several students from one stream of batches: each as it would be alone, bit for bit."""

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from helpers import Words, cache_of, first, metrics, same_weights, student_of, without_times
from torch import Tensor, nn

from stages.cache import LogitCache
from stages.cache.targets import ViewTargets
from stages.data import Splits, cached_policy
from stages.errors import ConfigError, RunError
from stages.inputs.feed import Batch, ViewFeed
from stages.objectives.losses import ce
from stages.objectives.losses.mlkd import mlkd
from stages.rectify import rectify
from stages.settings import (
    BiasMode,
    BiasSettings,
    LossSettings,
    ModelSettings,
    RectifyConfig,
    SeedSettings,
    StudentConfig,
    TrainSettings,
)
from stages.student_checks import check_one_stream
from stages.train_student import student_trainer, train_student, train_together
from stages.training.cached_task import CachedTask
from stages.training.objective import Student
from stages.training.run_directory import RunDirectory

CPU = torch.device("cpu")
SAMPLES, BATCH = 96, 32


class Dropping(nn.Module):
    """A student that draws from torch's generator at every step."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(3 * 64, 32),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(32, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


class Exploding(Dropping):
    """Its weights are not finite after the first epoch."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * torch.inf


@pytest.fixture(scope="module")
def my_splits(digits: Splits) -> Splits:
    return Splits(first(digits.train, SAMPLES), first(digits.test, 30))


def make_cache(path: Path, teacher: Path, splits: Splits, augment: str) -> Path:
    cache_of(teacher, path, splits, views=4, augment=augment, encoding="float32")
    rectify(path, RectifyConfig())
    return path


@pytest.fixture(scope="module")
def my_cache(
    tmp_path_factory: pytest.TempPathFactory, teacher_run: Path, my_splits: Splits
) -> Path:
    path = tmp_path_factory.mktemp("together") / "digits.zarr"
    return make_cache(path, teacher_run, my_splits, "pad-crop:pad=2")


@pytest.fixture(scope="module")
def my_pairs(
    tmp_path_factory: pytest.TempPathFactory, teacher_run: Path, my_splits: Splits
) -> Path:
    """Weak and strong views in turn."""
    path = tmp_path_factory.mktemp("pairs") / "digits.zarr"
    return make_cache(path, teacher_run, my_splits, "pad-crop:pad=1|pad-crop:pad=2")


def student(cache: Path, **changes: Any) -> StudentConfig:
    model = ModelSettings(architecture="resnet8")
    train = TrainSettings(epochs=2, batch_size=BATCH, lr=0.02)
    return student_of(cache, **{"model": model, "train": train, **changes})


DROPPING = ModelSettings(architecture="test_together:Dropping")
STUDENTS: dict[str, dict[str, Any]] = {
    "baseline": {"loss": LossSettings(name="ce"), "model": DROPPING},
    "kd": {"model": DROPPING},
    "other-init": {"model": DROPPING, "seed": SeedSettings(init=5)},
    "rectified": {"bias": BiasSettings(mode="rectify")},
    "learned": {"loss": LossSettings(name="ctkd"), "model": DROPPING},
    "other-rate": {
        "model": DROPPING,
        "train": TrainSettings(epochs=2, batch_size=BATCH, lr=0.1, optimizer="adam"),
    },
}


@pytest.fixture(scope="module")
def my_students(my_cache: Path) -> list[StudentConfig]:
    return [student(my_cache, **changes) for changes in STUDENTS.values()]


@pytest.fixture(scope="module")
def my_group(
    tmp_path_factory: pytest.TempPathFactory, my_students: list[StudentConfig], my_splits: Splits
) -> list[Path]:
    """The run directories of all of them, trained together."""
    folder = tmp_path_factory.mktemp("group")
    outs = [folder / name for name in STUDENTS]
    outcomes = train_together(my_students, outs, splits=my_splits)
    assert all(isinstance(outcome, dict) for outcome in outcomes)
    return outs


def test_each_is_bit_for_bit_what_it_is_alone(
    my_students: list[StudentConfig], my_group: list[Path], my_splits: Splits, tmp_path: Path
) -> None:
    for config, together in zip(my_students, my_group, strict=True):
        alone = tmp_path / together.name
        train_student(config, alone, splits=my_splits)
        assert same_weights(alone, together), together.name
        assert without_times(alone) == without_times(together)
    assert not same_weights(my_group[1], my_group[2])  # the seeds do matter


def test_targets_and_images_are_read_once_and_waited_for_together(
    my_cache: Path, my_splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by those who learn from the teacher's own rows, beside one with rectified rows."""
    reads: list[int] = []
    shown: list[int] = []
    read_view, batch_of = LogitCache.read_view, ViewFeed._batch

    def counting(self: ViewFeed, samples: Tensor, *what: Any) -> Batch:
        if self.dataset.split == "train":
            shown.append(len(samples))
        return batch_of(self, samples, *what)

    def slow(self: LogitCache, view: int, *what: Any) -> ViewTargets:
        reads.append(view)
        time.sleep(0.1)
        return read_view(self, view, *what)

    monkeypatch.setattr(LogitCache, "read_view", slow)
    monkeypatch.setattr(ViewFeed, "_batch", counting)
    names = ("baseline", "kd", "rectified")
    students = [student(my_cache, **STUDENTS[name]) for name in names]
    train_together(students, [tmp_path / name for name in names], splits=my_splits)
    assert len(reads) == 2  # epochs, each of another view
    assert shown.count(BATCH) == 2 * SAMPLES / BATCH  # images are cropped once as well
    lines = [metrics(tmp_path / name)[0] for name in names]
    (waited,) = {line["wait_seconds"] for line in lines}
    assert 0.1 < 3 * waited < 5
    assert all(waited <= line["seconds"] for line in lines)


def test_several_rectifications_do_not_share_a_slab_memory(my_cache: Path) -> None:
    def of(name: str | None) -> Student:
        mode: BiasMode = "none" if name is None else "rectify"
        bias = BiasSettings(mode=mode, rectified=name)
        return Student.of(student(my_cache, slab_memory="1GB", bias=bias))

    check_one_stream([of(None), of("pairwise-T4")])
    with pytest.raises(ConfigError, match="pairwise-T4 and swap-T4 hold targets of each"):
        check_one_stream([of(None), of("pairwise-T4"), of("swap-T4")])


def test_a_stopped_group_goes_on_bit_for_bit(
    my_students: list[StudentConfig],
    my_group: list[Path],
    my_splits: Splits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped while the second of them takes its step, as a kill between checkpoints leaves it."""
    outs = [tmp_path / name for name in STUDENTS]
    trainer = student_trainer(my_students, [RunDirectory(out) for out in outs], my_splits)
    victim, others = trainer.learners[1], trainer.learners
    steps = 0

    def killed() -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            for learner in others[:2]:  # only two of them have saved
                learner.save()
            raise KeyboardInterrupt

    step = victim.step
    monkeypatch.setattr(victim, "step", lambda *what: (step(*what), killed()))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit_all()
    train_together(my_students, outs, resume=True, splits=my_splits)
    for stopped, whole in zip(outs, my_group, strict=True):
        assert same_weights(stopped, whole), stopped.name
        assert len(metrics(stopped)) == 2


def test_one_that_fails_does_not_stop_the_others(
    my_cache: Path, my_splits: Splits, my_group: list[Path], tmp_path: Path
) -> None:
    exploding = student(my_cache, model=ModelSettings(architecture="test_together:Exploding"))
    good = student(my_cache, **STUDENTS["kd"])
    outs = [tmp_path / "bad", tmp_path / "good"]
    words = Words()
    bad, fine = train_together([exploding, good], outs, splits=my_splits, reporter=words)
    assert isinstance(bad, RunError)
    assert "not finite" in str(bad)
    assert isinstance(fine, dict)
    assert same_weights(tmp_path / "good", my_group[1])
    assert not (tmp_path / "bad" / "summary.json").exists()
    assert any(line.startswith("good: epoch 2/2") for line in words.lines)


def test_students_that_cannot_share_a_stream(
    my_cache: Path, my_pairs: Path, my_splits: Splits, tmp_path: Path
) -> None:
    one = student(my_cache)
    for other, message in (
        (student(my_cache, seed=SeedSettings(data=1)), "seed.data"),
        (student(my_cache, views=2), "views"),
        (student(my_cache, train=TrainSettings(epochs=3, batch_size=BATCH)), "train.epochs"),
        (student(my_pairs), "cache"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_together([one, other], [tmp_path / "a", tmp_path / "b"], splits=my_splits)
    pairs = student(my_cache, loss=LossSettings(name="mlkd"))
    with pytest.raises(ConfigError, match="weak and a strong view"):
        train_student(pairs, tmp_path / "a", splits=my_splits)
    assert not list(tmp_path.iterdir())


# ---- two views of a sample at once ----------------------------------------------------------


def test_mlkd_sees_both_views_of_every_sample(
    my_pairs: Path, my_splits: Splits, tmp_path: Path
) -> None:
    """The first batch's loss by hand: the weak and the strong pixels, each with its own row."""
    config = student(my_pairs, loss=LossSettings(name="mlkd"))
    trainer = student_trainer([config], [RunDirectory(tmp_path / "run")], my_splits)
    learner, cache = trainer.learner, LogitCache.open(my_pairs)
    task = learner.task
    assert isinstance(task, CachedTask)
    views = learner.start_epoch()
    assert views in ((0, 1), (2, 3))
    order = trainer.stream.order(torch.arange(SAMPLES), 0, 0)[:BATCH]
    assert my_splits.train.images is not None
    images, labels = my_splits.train.images[order], my_splits.train.labels[order]
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


def test_mlkd_trains_resumes_and_weighs(my_pairs: Path, my_splits: Splits, tmp_path: Path) -> None:
    bias = BiasSettings(mode="rectify", schedule="ramp", reduction="batch")
    config = student(my_pairs, loss=LossSettings(name="mlkd", temperature=None), bias=bias)
    summary = train_student(config, tmp_path / "run", splits=my_splits)
    lines = metrics(tmp_path / "run")
    assert {line["view"] for line in lines} == {0, 2}  # each pair once
    assert summary["last"]["loss"] == lines[-1]["loss"]
    with pytest.raises(ConfigError, match=r"slab-memory|two whole views"):
        train_student(
            msgspec.structs.replace(config, slab_memory="1MB"), tmp_path / "a", splits=my_splits
        )


# ---- what the loss learns itself ------------------------------------------------------------


def test_ctkds_temperature_is_learned_and_resumed(
    my_cache: Path, my_splits: Splits, my_group: list[Path], tmp_path: Path
) -> None:
    config = student(my_cache, **STUDENTS["learned"])
    trainer = student_trainer([config], [RunDirectory(tmp_path / "run")], my_splits)
    learned = trainer.learner.task.learned
    assert learned is not None
    before = [p.detach().clone() for p in learned.parameters()]
    trainer.fit()
    assert all(not torch.equal(a, b) for a, b in zip(before, learned.parameters(), strict=True))
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["learned"]
    assert torch.equal(state["theta"], dict(learned.named_parameters())["theta"])
