"""The pieces of the experiment: what there is of them, and how each is made."""

import dataclasses
from functools import cached_property
from pathlib import Path

import msgspec

from pipeline.config import read_config
from pipeline.console import Console
from pipeline.sweep.directory import Result, SweepDirectory, as_lines
from pipeline.sweep.grid import Run, expand, read_sweep
from pipeline.sweep.table import table_markdown
from results.cifar100.gpu.carry import finished
from results.cifar100.gpu.plan import Size
from stages.cache import LogitCache
from stages.cache_teacher import cache_teacher, prepare
from stages.data import Splits, load_data
from stages.device import choose_device
from stages.errors import PipelineError
from stages.inputs.datasets import ImageDataset
from stages.inputs.run_files import read_summary
from stages.rectify import rectify
from stages.settings import CacheConfig, DataSettings, RectifyConfig, StudentConfig, TeacherConfig
from stages.train_student import student_trainer
from stages.train_teacher import train_teacher
from stages.training.history import Summary
from stages.training.run_directory import RunDirectory

HERE = Path(__file__).parent
_SMALL_SPLITS = 300, 100


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that is made, in `work`. size: None while only what is done is asked for."""

    work: Path
    dataset: str
    device: str
    seeds: int
    small: bool
    console: Console
    size: Size | None = None

    # ---- what there is ------------------------------------------------------------------

    @property
    def samples(self) -> tuple[int, int]:
        """Images of both splits."""
        return _SMALL_SPLITS if self.small else (50_000, 10_000)

    @property
    def full_epochs(self) -> int:
        """Of the full recipe."""
        return 2 if self.small else 240

    @cached_property
    def splits(self) -> Splits:
        splits = load_data(DataSettings(dataset=self.dataset))
        if not self.small:
            return splits
        train, test = map(_first, (splits.train, splits.test), _SMALL_SPLITS)
        return Splits(train, test)

    @property
    def directory(self) -> SweepDirectory:
        return SweepDirectory(self.work / "students")

    @cached_property
    def runs(self) -> list[Run]:
        """Every student; which are done does not depend on the size."""
        sweep = read_sweep(
            HERE / "students.yaml", out=str(self.work / "students"), seeds=[*range(self.seeds)]
        )
        base = sweep.base | self._changes(None if self.size is None else self.size.students)
        base["cache"] = str(self.work / "cache.zarr")
        return expand(msgspec.structs.replace(sweep, base=base))

    def _changes(self, epochs: int | None) -> dict[str, object]:
        """What the files of this folder do not say, by dotted keys."""
        changes: dict[str, object] = {"data.dataset": self.dataset, "device": self.device}
        if epochs is not None:
            changes["train.epochs"] = epochs
        if choose_device(self.device).type != "cuda":
            changes["train.capture"] = False
        if self.small:
            changes |= {"model.architecture": "resnet8", "train.dtype": "float32"}
        return changes

    @property
    def left(self) -> dict[int, int]:
        """How many students of each seed are not done."""
        every = dict.fromkeys(range(self.seeds), 0)
        for run in self._unfinished:
            every[run.config.seed.data] += 1
        return every

    @property
    def _unfinished(self) -> list[Run]:
        return [run for run in self.runs if not finished(self.directory.run(run.name))]

    def done(self, piece: str) -> bool:
        if piece in ("teacher", "full"):
            return finished(self.work / piece)
        if piece == "cache":
            return LogitCache.exists(self.work / "cache.zarr") and bool(
                LogitCache.open(self.work / "cache.zarr").rectifications
            )
        return not self.left[int(piece.split()[1])]

    # ---- the pieces ---------------------------------------------------------------------

    def make(self, piece: str) -> None:
        """Make a piece, or the rest of it, and write down what there is."""
        assert self.size is not None
        if piece == "teacher":
            flags = self._changes(self.size.teacher)
            teacher = read_config(TeacherConfig, str(HERE / "teacher.yaml"), flags, [])
            train_teacher(teacher, self.work / "teacher", True, False, self.splits, self.console)
        elif piece == "cache":
            self._cache(self.size.views)
        elif piece == "full":
            flags = self._changes(self.full_epochs)
            flags["cache"] = str(self.work / "cache.zarr")
            config = read_config(StudentConfig, str(HERE / "full.yaml"), flags, [])
            self._train([config], [self.work / "full"])
        else:
            self._students(int(piece.split()[1]))

    def _cache(self, views: int) -> None:
        flags: dict[str, object] = {
            "data.dataset": self.dataset,
            "teacher.weights": str(self.work / "teacher"),
            "views": views,
            "device": self.device,
            "dtype": "float32" if self.small else None,
        }
        config = read_config(CacheConfig, str(HERE / "cache.yaml"), flags, [])
        cache_teacher(prepare(config, self.splits), self.work / "cache.zarr", self.console)
        rectify(self.work / "cache.zarr", RectifyConfig(), self.console)

    def _students(self, seed: int) -> None:
        mine = [run for run in self._unfinished if run.config.seed.data == seed]
        self.directory.progress(self.runs)  # raises where they were trained otherwise
        with self.directory.held():
            self.directory.record((HERE / "students.yaml").read_text(), self.runs)
            folders = [self.directory.run(run.name) for run in mine]
            failed = self._train([run.config for run in mine], folders)
            self._write({run.name: why for run, why in zip(mine, failed, strict=True) if why})

    def _train(self, configs: list[StudentConfig], folders: list[Path]) -> list[str]:
        """Train students together; why each of them failed, or nothing."""
        runs = [RunDirectory(folder, resume=True) for folder in folders]
        outcomes = student_trainer(configs, runs, self.splits, self.console).fit_all()
        return [o.cause if isinstance(o, PipelineError) else "" for o in outcomes]

    def _write(self, failed: dict[str, str]) -> None:
        """table.md and results.jsonl of all students that have ended."""
        teacher = read_summary(self.work / "teacher")
        top1 = None if teacher is None else msgspec.convert(teacher, Summary).last.test_top1
        results = []
        for run in self.runs:
            summary = read_summary(self.directory.run(run.name))
            if summary is not None or run.name in failed:
                results.append(Result(run, top1, summary, failed.get(run.name)))
        baseline = {"loss.name": "kd", "bias.mode": "none"}
        self.directory.write("results.jsonl", as_lines(results))
        self.directory.write("table.md", table_markdown(results, baseline))


def _first(dataset: ImageDataset, size: int) -> ImageDataset:
    """The first images of a dataset that is held in memory."""
    assert dataset.images is not None
    images, labels = dataset.images[:size], dataset.labels[:size]
    return dataclasses.replace(dataset, labels=labels, images=images, load=images.__getitem__)
