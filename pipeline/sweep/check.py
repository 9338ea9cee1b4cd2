"""What can be known to be wrong before the first run starts, is reported before it starts.

Each cache, dataset and model is opened once, however many runs use it. Loading the data here also
downloads it once, where that is asked for, and not in every process.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from pipeline.sweep.grid import Run, check_distinct
from stages.cache import LogitCache
from stages.data import (
    cached_policy,
    check_dataset,
    load_data,
    skips_of,
    split_digests,
)
from stages.device import choose_device
from stages.errors import CacheError, ConfigError, ModelError, PipelineError, UnansweredError
from stages.inputs.checkpoints import weights_file
from stages.inputs.models import build_model
from stages.order import ViewSchedule, held_out
from stages.reporting import Reporter, Silent
from stages.settings import DataSettings, ModelSettings, SeedSettings, StudentConfig
from stages.student_checks import check_one_stream, check_students, complete, made_from
from stages.targets.chunks import plan_slabs
from stages.targets.ensemble import teacher_top1
from stages.training.objective import Student
from stages.training.passes import check_compiler


@dataclass
class Checked:
    """Runs that can be started, and what is known about their teachers.

    teacher_top1: by run name, in [0, 1]; None where a cache has no logits of the test split.
    made_from: by run name, digests of caches and images, see `stages.training.run_folder`.
    """

    runs: list[Run]
    teacher_top1: dict[str, float | None]
    made_from: dict[str, dict[str, Any]]


def check_runs(runs: Sequence[Run], reporter: Reporter | None = None) -> Checked:
    """The runs with the names of their rectifications filled in.

    Raises the PipelineError of the first run that could not be trained, with its name.
    """
    known = _Known()
    checked = []
    for run in runs:
        if run.config.train.compile:
            with _named(run):
                check_compiler(choose_device(run.config.device))
    for run in runs:
        with _named(run):
            checked.append(replace(run, config=known.objective(run.config)))
    check_distinct(checked)
    for data in dict.fromkeys(run.config.data for run in checked):
        _check_data(
            data, [r for r in checked if r.config.data == data], known, reporter or Silent()
        )
    top1 = {run.name: known.teacher_top1(run.config) for run in checked}
    return Checked(checked, top1, known.made_from)


@dataclass
class _Known:
    """What has been opened and found to be right."""

    caches: dict[str, LogitCache] = field(default_factory=dict)
    objectives: dict[StudentConfig, StudentConfig] = field(default_factory=dict)
    top1: dict[tuple[str, ...], float | None] = field(default_factory=dict)
    made_from: dict[str, dict[str, Any]] = field(default_factory=dict)

    def cache(self, path: str) -> LogitCache:
        if path not in self.caches:
            self.caches[path] = LogitCache.open(path)
        return self.caches[path]

    def members(self, config: StudentConfig) -> list[LogitCache]:
        return [self.cache(path) for path in (config.cache, *config.also)]

    def objective(self, config: StudentConfig) -> StudentConfig:
        """The configuration, resolved; runs that differ in model and seed are looked at once."""
        alike = msgspec.structs.replace(
            config, model=ModelSettings(architecture=""), seed=SeedSettings()
        )
        if alike not in self.objectives:
            caches = self.members(config)
            student = complete(alike, caches[0])
            schedule = check_students([student], caches, cached_policy(caches[0]))
            self._check_memory(student, caches, schedule)
            self.objectives[alike] = student.config
        return msgspec.structs.replace(self.objectives[alike], model=config.model, seed=config.seed)

    def _check_memory(
        self, student: Student, caches: Sequence[LogitCache], schedule: ViewSchedule
    ) -> None:
        """Raise ConfigError where targets do not fit into memory, as `plan_slabs` does."""
        config = student.config
        fraction, seed = config.data.val_fraction, config.seed.data
        samples, _ = held_out(caches[0].num_samples, fraction, seed)
        device, reads = choose_device(config.device), int(student.loss.reads_teacher)
        plan_slabs(caches, schedule, samples, config, device, reads)

    def note_origins(self, run: Run, images: Mapping[str, str]) -> None:
        """Remember what a run is made from. images: digests of both splits."""
        self.made_from[run.name] = {**images, **made_from(run.config, self.members(run.config))}

    def teacher_top1(self, config: StudentConfig) -> float | None:
        """Test accuracy of the cache's teacher; of several, that of their mean probabilities."""
        paths = (config.cache, *config.also)
        if paths not in self.top1:
            try:
                self.top1[paths] = teacher_top1(self.members(config))
            except (CacheError, UnansweredError):
                self.top1[paths] = None
        return self.top1[paths]


def _check_data(data: DataSettings, runs: Sequence[Run], known: _Known, reporter: Reporter) -> None:
    """Images that the teachers saw, and models that exist."""
    with _named(runs[0]):
        splits = load_data(
            data, skips_of(c.skips for run in runs for c in known.members(run.config))
        )
        if not splits.tested:
            raise ConfigError(
                "a sweep compares students by their test accuracy, and there is no test split",
                "Give data.test or data.eval_dataset, or train them with train-student.",
            )
        splits = splits.with_classes(known.cache(runs[0].config.cache).identity.dataset.class_names)
    channels, classes = splits.train.shape[0], len(splits.train.class_names)
    images = split_digests(splits)
    seen: set[Any] = set()
    for run in runs:
        config, model = run.config, run.config.model
        with _named(run):
            known.note_origins(run, images)
            for cache in known.members(config):
                if (cache.path, config.accept_pixel_drift) not in seen:
                    policy, drift = cached_policy(cache), config.accept_pixel_drift
                    check_dataset(cache, splits, policy, drift, reporter)
                    seen.add((cache.path, drift))
            if (model.architecture, model.init) not in seen:
                build_model(model.architecture, classes, channels)
                _check_init(model.init)
                seen.add((model.architecture, model.init))


def _check_init(weights: str | None) -> None:
    if weights not in (None, "pretrained") and not weights_file(str(weights))[0].exists():
        raise ModelError(
            f"no weights at {weights}", "Give a run directory, a file, or 'pretrained'."
        )


@contextmanager
def _named(run: Run) -> Iterator[None]:
    """An error with the name of the run that it would happen to."""
    try:
        yield
    except PipelineError as error:
        raise type(error)(f"{run.name}: {error.cause}", error.remedy) from error


def grouped(runs: Sequence[Run], most: int | None) -> list[list[Run]]:
    """Runs that can be trained in one process from one stream of batches: in groups of at most
    `most` (None for any number), in the order of their first runs.

    Which settings they must share is known to `check_one_stream`; model, loss, bias, optimiser and
    the seed of first weights may differ.
    """
    groups: list[list[Run]] = []
    for run in runs:
        room = (g for g in groups if most is None or len(g) < most)
        fitting = next((g for g in room if _share_a_stream([*g, run])), None)
        if fitting is None:
            groups.append([run])
        else:
            fitting.append(run)
    return groups


def _share_a_stream(runs: Sequence[Run]) -> bool:
    configs = [run.config for run in runs]
    if len({config.model.image_size for config in configs}) > 1:
        return False
    try:
        check_one_stream([Student.of(config) for config in configs])
    except ConfigError:
        return False
    return True
