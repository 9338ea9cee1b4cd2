"""Plain functions that several files of tests share."""

import contextlib
import dataclasses
import fnmatch
import io
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from pipeline.cli import main
from stages.cache_teacher import CacheJob, cache_teacher, prepare
from stages.data import Splits
from stages.errors import CacheError, PipelineError, UnansweredError
from stages.inputs.datasets import ImageDataset
from stages.inputs.feed import Batch
from stages.reporting import Silent
from stages.schema import Settings
from stages.settings import (
    CacheConfig,
    DataSettings,
    ModelSettings,
    StudentConfig,
    TeacherConfig,
    TeacherSettings,
    TrainSettings,
)
from stages.train_student import student_trainer, train_student, train_together
from stages.training.cached_task import CachedTask
from stages.training.run_directory import RunDirectory
from stages.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
SHARED_DATA = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""Data that is too large for the repository; tests that use it are skipped where it is missing."""
DIGITS = DataSettings(dataset="digits", workers=0)
RUN_FILES = {
    "config.yaml",
    "last.pt",
    "log.txt",
    "metrics.jsonl",
    "model.safetensors",
    "summary.json",
}


def plain(num_classes: int) -> nn.Module:
    """The smallest student, of any input size: `helpers:plain`."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, num_classes))


def smooth(seed: int, height: int, width: int) -> Image.Image:
    """A photograph as far as JPEGs are concerned: neighbours are alike."""
    few = np.random.default_rng(seed).integers(0, 256, (3, 5, 7), dtype=np.uint8)
    pixels = tv.resize(torch.from_numpy(few), [height, width], antialias=True)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def write_shard(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar file with these members: name -> content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members_of(files: Sequence[Path], labels: Sequence[int]) -> dict[str, bytes]:
    """What a shard holds of image files of these classes, in their order."""
    found: dict[str, bytes] = {}
    for i, (file, label) in enumerate(zip(files, labels, strict=True)):
        found |= {f"{i:04}{file.suffix}": file.read_bytes(), f"{i:04}.cls": str(label).encode()}
    return found


def save_table(path: Path, files: Sequence[Path], labels: Sequence[int]) -> None:
    """The same as a dataset of Hugging Face's; skips the test where the package is missing."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    image, label = datasets.Image(), datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"image": image, "label": label})
    rows = {"image": [*map(str, files)], "label": [*labels]}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=table).save_to_disk(str(path))


def normed(num_classes: int) -> nn.Module:
    """The smallest student with batch norm, whose statistics a step changes, of 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, num_classes),
    )


def naive_softmax(row: Sequence[float], temperature: float = 1.0) -> list[float]:
    """A number at a time, in double precision."""
    powers = [math.exp((z - max(row)) / temperature) for z in row]
    return [power / sum(powers) for power in powers]


def naive_ece(logits: Tensor, right: Sequence[bool], bins: int = 15) -> float:
    """The expected calibration error of Guo et al. (2017), a row at a time."""
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, hit in zip(logits.double().tolist(), right, strict=True):
        confidence = max(naive_softmax(row))
        (at,) = (m for m in range(bins) if m / bins < confidence <= (m + 1) / bins)
        members[at].append((confidence, bool(hit)))
    total = sum(abs(sum(c for c, _ in one) - sum(h for _, h in one)) for one in members)
    return total / len(logits)


class Words:
    """A reporter that remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: list[float] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, task: str, done: float, total: float, unit: str) -> None:
        self.done.append(done / total)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
    ) -> None: ...


class AtBatch(Silent):
    """Does something at the n-th batch."""

    def __init__(self, batches: int, act: Callable[[], object]) -> None:
        self.left, self.act = batches, act

    def progress(self, task: str, done: float, total: float, unit: str) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class Answer:
    """What a command has left. text: all it said, without the line breaks of tables."""

    code: int | str | None
    out: str
    err: str

    @property
    def text(self) -> str:
        return " ".join((self.out + self.err).split())


def outside(
    *words: str, folder: Path = ROOT, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """python with these words, as a process of its own. environment: more variables."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def imported(message: str) -> set[str]:
    """The packages that `python -X importtime` says were imported."""
    return {line.split("|")[-1].strip().split(".")[0] for line in message.splitlines()}


Command = Callable[[str | Sequence[str]], Answer]
"""Runs `pipeline` with these words in this process: the fixture `command`."""


def answer_to(
    words: Sequence[str], patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Answer:
    """Run `pipeline` with these words in this process, to the end that the interpreter gives it."""
    patch.setattr(sys, "path", [*sys.path])
    patch.setattr(sys, "argv", ["pipeline", *words])
    code: int | str | None = 0
    try:
        main()
    except SystemExit as left:
        code = left.code or 0
    except Exception:
        traceback.print_exc()
        code = 1
    return Answer(code, *capsys.readouterr())


Config = TypeVar("Config", bound=Settings)


def changed(config: Config, **changes: Any) -> Config:
    """The same settings but for these; `train__lr` is one of a section."""
    sections: dict[str, dict[str, Any]] = {}
    for key in [key for key in changes if "__" in key]:
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = changes.pop(key)
    for section, given in sections.items():
        assert section not in changes, f"{section} is given whole and in part"
        changes[section] = msgspec.structs.replace(getattr(config, section), **given)
    return msgspec.structs.replace(config, **changes)


def student_of(cache: str | Path, **changes: Any) -> StudentConfig:
    """Two epochs of a small student of the digits. changes: as of `changed`."""
    config = StudentConfig(
        cache=str(cache),
        data=DIGITS,
        model=ModelSettings(architecture="helpers:plain"),
        train=TrainSettings(epochs=2, batch_size=100, lr=0.05),
        device="cpu",
    )
    return changed(config, **changes)


def student_of_photographs(data: DataSettings, folder: Path) -> StudentConfig:
    """A cache of two views of photographs, FOLDER/cache.zarr, and a student that has learned from
    it, FOLDER/run: its settings.
    """
    torch.manual_seed(0)
    config = CacheConfig(
        data=data,
        teacher=TeacherSettings(architecture="helpers:plain"),
        views=2,
        augment="resized-crop-flip",
        device="cpu",
    )
    cache_teacher(prepare(config), folder / "cache.zarr")
    of = {"data": data, "train__epochs": 1, "train__batch_size": 4}
    student = student_of(folder / "cache.zarr", **of)
    train_student(student, folder / "run")
    return student


def teacher_of(**changes: Any) -> TeacherConfig:
    """Two epochs of a resnet8 of the digits. changes: as of `changed`."""
    config = TeacherConfig(
        data=DIGITS,
        model=ModelSettings(architecture="resnet8"),
        augment="pad-crop:pad=2",
        train=TrainSettings(epochs=2),
        device="cpu",
    )
    return changed(config, **changes)


class SeenBatch(NamedTuple):
    """What a task was given: dataset indices int64 (B,), and a copy of the student's logits."""

    task: CachedTask
    samples: Tensor
    logits: Tensor


def seen_batches(patch: pytest.MonkeyPatch) -> list[SeenBatch]:
    """Every batch that students of a cache learn from from now on."""
    seen, loss_parts = list[SeenBatch](), CachedTask.loss_parts

    def spy(task: CachedTask, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        seen.append(SeenBatch(task, batch.samples, logits.detach().clone()))
        return loss_parts(task, logits, batch)

    patch.setattr(CachedTask, "loss_parts", spy)
    return seen


@contextlib.contextmanager
def refused(error: type[PipelineError], cause: str, *remedies: str) -> Iterator[None]:
    """Inside, one error of at most three lines, whose cause and remedy have these words."""
    with pytest.raises(error) as raised:
        yield
    assert cause in raised.value.cause
    assert all(remedy in raised.value.remedy for remedy in remedies), raised.value.remedy
    assert len(str(raised.value).splitlines()) <= 3


def refusal(work: Callable[[], object]) -> str:
    """The text of the error of a cache that some work ends in; empty if it comes through."""
    try:
        work()
    except (CacheError, UnansweredError) as error:
        return str(error)
    return ""


def cache_config_of(teacher: str | Path, **changes: Any) -> CacheConfig:
    """Two views of the digits. teacher: its run; changes: as of `changed`."""
    config = CacheConfig(
        data=DIGITS,
        teacher=TeacherSettings(weights=str(teacher)),
        views=2,
        augment="pad-crop:pad=2",
        device="cpu",
    )
    return changed(config, **changes)


def job_of(teacher: str | Path, splits: Splits | None = None, **changes: Any) -> CacheJob:
    """Stage one as `cache_config_of` says."""
    return prepare(cache_config_of(teacher, **changes), splits)


def cache_of(
    teacher: str | Path, path: str | Path, splits: Splits | None = None, **changes: Any
) -> Path:
    """A cache as `job_of` says. Returns its path."""
    cache_teacher(job_of(teacher, splits, **changes), path)
    return Path(path)


def first(dataset: ImageDataset, size: int) -> ImageDataset:
    """The first `size` images of a dataset that is held in memory."""
    assert dataset.images is not None
    images, labels = dataset.images[:size], dataset.labels[:size]
    return dataclasses.replace(dataset, labels=labels, images=images, load=images.__getitem__)


def cut(splits: Splits, train: int, test: int) -> Splits:
    """The first samples of both splits."""
    return Splits(first(splits.train, train), first(splits.test, test))


def resized(job: CacheJob, train: int, test: int, **changes: Any) -> CacheJob:
    """The same teacher's job over the first samples. changes: of its configuration."""
    return prepare(msgspec.structs.replace(job.config, **changes), cut(job.splits, train, test))


def committed(cache: Path, part: str = "logits") -> int:
    """Number of committed blocks, by the records alone; also while others write to the cache.

    A view that is compacted meanwhile has its blocks in two files or in one that was just made,
    and the others vanish: each block counts once, and a count may be too low for a moment.
    """
    blocks: set[tuple[int, int]] = set()
    for folder, _, names in os.walk(cache / "commits" / part):  # does not mind a folder that goes
        for name in fnmatch.filter(names, "*.json"):
            with contextlib.suppress(FileNotFoundError):
                records = json.loads((Path(folder) / name).read_text())["records"]
                blocks |= {(record["view"], record["block"]) for record in records}
    return len(blocks)


def metrics(run: Path) -> list[dict[str, Any]]:
    """A run's epochs, as metrics.jsonl has them."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(run: Path) -> list[dict[str, Any]]:
    """The same without what no two runs have in common."""
    times = {"seconds", "wait_seconds", "images_per_second"}
    return [{key: line[key] for key in line if key not in times} for line in metrics(run)]


def weights(run: Path) -> dict[str, Tensor]:
    """What a run keeps in model.safetensors."""
    found: dict[str, Tensor] = load_file(run / "model.safetensors")
    return found


def assert_same_runs(one: Path, other: Path) -> None:
    """They ended with the same bits, and every epoch had the same numbers."""
    assert same_weights(one, other)
    assert without_times(one) == without_times(other)


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same bits."""
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


class Runs:
    """Students of one cache in run directories of their own. base: as of `changed`."""

    def __init__(self, cache: Path, splits: Splits, folder: Path, **base: Any) -> None:
        self.cache, self.splits, self.folder, self.base = cache, splits, folder, base
        self._plain: dict[StudentConfig, Path] = {}

    def student(self, **changes: Any) -> StudentConfig:
        return student_of(changes.pop("cache", self.cache), **{**self.base, **changes})

    def new(self) -> Path:
        """Where no run is yet."""
        return Path(mkdtemp(dir=self.folder)) / "run"

    def plain(self, config: StudentConfig) -> Path:
        """The run of a student; made once, and read only."""
        if config not in self._plain:
            self._plain[config] = self.trained(config)
        return self._plain[config]

    def trained(self, config: StudentConfig, out: Path | None = None, **more: Any) -> Path:
        """A run of one's own. more: arguments of `train_student`."""
        out = out or self.new()
        train_student(config, out, **{"splits": self.splits, **more})
        return out

    def together(self, configs: Sequence[StudentConfig], **more: Any) -> list[Path]:
        """Their runs, all of them finished. more: arguments of `train_together`."""
        outs = more.pop("outs", None) or [self.new() for _ in configs]
        ends = train_together(configs, outs, splits=self.splits, **more)
        assert all(isinstance(end, dict) for end in ends), ends
        return outs

    def trainer(self, config: StudentConfig, out: Path | None = None, **ways: bool) -> Trainer:
        """A trainer that has not begun. ways: resume or overwrite."""
        return student_trainer([config], [RunDirectory(out or self.new(), **ways)], self.splits)


def prepared(path: Path, config: Mapping[str, Any], **ways: bool) -> RunDirectory:
    """A run directory that is held. ways: resume or overwrite."""
    run = RunDirectory(path, **ways)
    run.prepare(config)
    return run
