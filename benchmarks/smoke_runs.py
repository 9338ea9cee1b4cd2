"""What the smoke test compares: caches and students of the digits, on one device and on another."""

import itertools
import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import load_file

from benchmarks.parts import Where
from stages.cache import LogitCache
from stages.cache_teacher import cache_teacher
from stages.data import Splits, load_data
from stages.errors import StoppedError
from stages.rectify import rectify
from stages.reporting import Silent
from stages.settings import (
    CacheConfig,
    DataSettings,
    Dtype,
    ModelSettings,
    RectifyConfig,
    StudentConfig,
    TeacherConfig,
    TeacherSettings,
    TrainSettings,
)
from stages.teacher.job import prepare
from stages.train_student import student_trainer, train_student
from stages.train_teacher import train_teacher
from stages.training.run_directory import RunDirectory
from stages.training.trainer import Trainer, use_deterministic

DIGITS = DataSettings(dataset="digits", workers=0)
VIEWS, BATCH = 2, 50
STEPS = 20
"""Of an epoch: the digits have 1,000 training images."""
CLOSE: dict[Dtype, float] = {"float32": 0.01, "bfloat16": 0.05, "float16": 0.05}
"""How far logits (their root mean square) and losses may be from the CPU's, relative to them."""


@cache
def digits(feeding: str = "auto", workers: int = 0) -> Splits:
    data = msgspec.structs.replace(DIGITS, workers=workers)
    return load_data(
        msgspec.convert({**msgspec.to_builtins(data), "feeding": feeding}, DataSettings)
    )


def teacher_run(where: Where) -> Path:
    """A resnet8 after two epochs on the CPU: right on some rows, wrong on many."""
    run = where.folder / "teacher"
    if not (run / "summary.json").exists():
        config = TeacherConfig(
            data=DIGITS,
            model=ModelSettings(architecture="resnet8"),
            augment="pad-crop:pad=2",
            train=TrainSettings(epochs=2),
            device="cpu",
        )
        train_teacher(config, run, overwrite=True, splits=digits())
    return run


def cached(where: Where, device: str, dtype: Dtype = "float32") -> LogitCache:
    """Stage one and two on a device, in float32 rows."""
    path = where.folder / f"{device.partition(':')[0]}-{dtype}.zarr"
    config = CacheConfig(
        data=DIGITS,
        teacher=TeacherSettings(weights=str(teacher_run(where))),
        views=VIEWS,
        augment="pad-crop:pad=2",
        encoding="float32",
        dtype=dtype,
        device=device,
    )
    if not LogitCache.exists(path) or not LogitCache.open(path).rectifications:
        cache_teacher(prepare(config, digits()), path)
        rectify(path, RectifyConfig())
    return LogitCache.open(path)


def student(where: Where, device: str, **changes: Any) -> StudentConfig:
    """A run on the CPU's cache. changes: sections or fields of `TrainSettings`."""
    fields = {key: changes.pop(key) for key in [*changes] if key in TrainSettings.__struct_fields__}
    train = TrainSettings(**{"epochs": 2, "batch_size": BATCH, "lr": 0.02, **fields})
    return StudentConfig(
        cache=str(cached(where, "cpu").path),
        data=DIGITS,
        model=ModelSettings(architecture="resnet8"),
        train=train,
        device=device,
        **changes,
    )


def fresh(where: Where) -> Path:
    """A folder of a run that is not there yet."""
    return next(path for n in itertools.count() if not (path := where.folder / f"run-{n}").exists())


def losses_of(trainer: Trainer) -> list[float]:
    """The loss of each of the first steps of a student."""
    learner, sums = trainer.learner, [0.0]
    try:
        views = learner.start_epoch()
        batches = trainer.stream.batches(trainer.stream.epoch_order(0), views, 0)
        for batch in itertools.islice(batches, STEPS):
            learner.step(batch)
            sums.append(float(learner.position.totals["loss"]))
    finally:
        trainer.close()
    return [(after - before) / BATCH for before, after in itertools.pairwise(sums)]


def trainer_of(where: Where, config: StudentConfig) -> Trainer:
    return student_trainer([config], [RunDirectory(fresh(where))], digits())


def trained(where: Where, config: StudentConfig, stop_after: int | None = None) -> Path:
    """The directory of a whole run. stop_after: batches after which it is stopped by a signal, and
    gone on with.
    """
    out = fresh(where)
    try:
        if stop_after is None:
            train_student(config, out, splits=digits())
            return out
        try:
            train_student(config, out, splits=digits(), reporter=StopAfter(stop_after))
        except StoppedError:
            train_student(config, out, resume=True, splits=digits())
            return out
        raise AssertionError("the signal did not stop the run")
    finally:
        use_deterministic(False)


class StopAfter(Silent):
    """Stops a run by SIGTERM, after so many batches."""

    def __init__(self, batches: int) -> None:
        self._left = batches

    def progress(self, task: str, done: float, total: float, unit: str) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def check(holds: bool, message: str) -> None:
    """Raise AssertionError with what was found unless it is as it must be."""
    if not holds:
        raise AssertionError(message)


def close(ours: list[float], cpus: list[float], dtype: Dtype, of: str) -> float:
    """The largest relative difference of some losses. Raises AssertionError where it is too large,
    or where losses are missing.
    """
    check(len(ours) == len(cpus) > 0, f"{of}: {len(ours)} losses, not {len(cpus)}")
    off = [abs(a - b) / abs(b) for a, b in zip(ours, cpus, strict=True)]
    most = max(off)
    check(all(each <= CLOSE[dtype] for each in off), f"{of}: losses differ by {most:.2%}")
    return most


def same_weights(one: Path, other: Path) -> float:
    """The largest difference of two runs' weights."""
    left, right = (load_file(run / "model.safetensors") for run in (one, other))
    return max(float((left[n].double() - right[n].double()).abs().max()) for n in left)
