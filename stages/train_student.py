"""Stage three: train a student from a cache. The teacher is never loaded.

    pipeline train-student digits.zarr --dataset digits --student resnet8 --out runs/student \\
        --loss kd --bias rectify

An epoch shows one view of every sample and learns from that view's row of the cache:

    L = ce_weight * CE(z_s, y) + weight * mean_i w_i * loss(z_s, z_t)_i

where the row weights w are all 1, or those of bias elimination and rectification
(`stages.objectives.bias`); losses that couple rows say themselves what weights mean to them. With
the loss `ce` the same views are shown and no targets are read:
the fair baseline. Where the cached views mix two samples (mixup, cutmix), CE is that of both labels
by their shares, and targets are as ever: the teacher saw the mixed image. Bias elimination and
rectification need one label a row, and refuse such a cache.
"""

import functools
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.encoding import check_temperature
from stages.cache.identity import differences
from stages.device import choose_device
from stages.distributed import (
    Ranks,
    device_of_rank,
    first_rank_before_others,
    launched_ranks,
    process_group,
)
from stages.errors import CacheError, ConfigError, IdentityError
from stages.inputs.feed import Batch, pixel_probes
from stages.inputs.views import Paired, ViewPolicy, check_unmixed, known_policy
from stages.objectives.bias import BiasWeights, bias_weights
from stages.objectives.losses import TeacherRows, TemperedRows, mixed_ce
from stages.reporting import Reporter, Silent
from stages.training.assemble import Destination, Order, Planned, make_trainer
from stages.training.budget import SlabPlan, parse_bytes, plan_slabs
from stages.training.config import BiasSettings, LossSettings, RunConfig
from stages.training.ensemble import NOT_RECTIFIED, open_members
from stages.training.epoch_targets import TargetReader, Targets
from stages.training.groups import groups_of_ranks
from stages.training.objective import (
    Objective,
    rectified_at,
    resolved,
    teacher_temperatures,
    views_seen,
)
from stages.training.setup import Splits, dataset_identity, held_out, load_data
from stages.training.trainer import Outcome, Trainer


class StudentConfig(RunConfig, frozen=True, kw_only=True):
    """A run of train-student.

    also: further caches of the same views, whose probabilities are averaged with the first's; see
    `stages.training.ensemble`. views: train from the first so many views of the cache, None for
    all. slab_memory: how much memory targets may take, for example 2GB; where two views are more,
    epochs are read and shuffled in groups of chunks (`stages.training.groups`), in the same order
    for every loss. accept_pixel_drift: go on with a warning where the pixels are no longer quite
    those the teacher saw.
    """

    cache: str
    also: tuple[str, ...] = ()
    views: int | None = None
    slab_memory: str | None = None
    loss: LossSettings = LossSettings()
    bias: BiasSettings = BiasSettings()
    accept_pixel_drift: bool = False

    def __post_init__(self) -> None:
        if self.slab_memory is not None:
            parse_bytes(self.slab_memory, "slab_memory")


def train_student(
    config: StudentConfig,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    splits: Splits | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Train a student and return the run's summary; see `student_trainer`.

    Under torchrun the ranks train it together, and the first of them writes.
    """
    ranks = launched_ranks()
    with process_group(ranks, device_of_rank(ranks, config.device)):
        return student_trainer(config, out, resume, overwrite, splits, reporter, ranks).fit()


def train_together(
    configs: Sequence[StudentConfig],
    outs: Sequence[str | Path],
    resume: bool = False,
    overwrite: bool = False,
    splits: Splits | None = None,
    reporter: Reporter | None = None,
) -> list[Outcome]:
    """Train several students in one process from one stream of batches: each has the weights that
    it would have alone. The summary of every run, or the RunError of one that failed.

    They may differ in model, loss, bias, optimiser and seed.init. Raises ConfigError where they
    cannot share a stream, and what `student_trainer` raises.
    """
    students = list(zip(configs, map(Path, outs), strict=True))
    return students_trainer(students, resume, overwrite, splits, reporter).fit_all()


def student_trainer(
    config: StudentConfig,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    splits: Splits | None = None,
    reporter: Reporter | None = None,
    ranks: Ranks | None = None,
) -> Trainer:
    """As `students_trainer`, for one student."""
    return students_trainer([(config, Path(out))], resume, overwrite, splits, reporter, ranks)


def students_trainer(
    students: Sequence[tuple[StudentConfig, Path]],
    resume: bool = False,
    overwrite: bool = False,
    splits: Splits | None = None,
    reporter: Reporter | None = None,
    ranks: Ranks | None = None,
) -> Trainer:
    """Everything checked and loaded, ready for `fit`. `splits`: the dataset, if it is loaded.

    Raises IdentityError if the dataset is not the one the cache was made from, CacheError if the
    cache or the rectification is missing or incomplete, ConfigError for settings that cannot be.
    """
    reporter, ranks = reporter or Silent(), ranks or Ranks.alone()
    # 1) the cache, and what is to be learned from it
    cache = LogitCache.open(students[0][0].cache)
    configs = [check_objective(config, cache) for config, _ in students]
    check_one_stream(configs)
    config = configs[0]
    caches = open_members(cache, config.also, [c.loss.temperature or 1.0 for c in configs])
    for each in configs:
        check_rows_known(caches, each.loss)
    policy = cached_policy(cache)
    (views,) = {tuple(shared_views(caches, each)) for each in configs}
    shown = views_at_once(config, policy, views)

    # 2) images: the ones the teachers saw
    splits = splits or first_rank_before_others(ranks, lambda: load_data(config.data))
    for member in caches:
        check_dataset(member, splits, policy, config.accept_pixel_drift, reporter)

    # 3) the students and their runs
    plan, order = slab_plan(caches, config, len(views), ranks)

    @functools.cache  # students of one rectification share its targets
    def reader(rectified: str | None) -> TargetReader:
        labels = splits.train.labels.to(device_of_rank(ranks, config.device))
        seed, epochs = config.seed.data, config.train.epochs
        return TargetReader(caches, rectified, shown, plan, epochs, seed, labels)

    def planned(config: StudentConfig, out: Path) -> Planned:
        def task(labels: Tensor, _: ViewPolicy) -> CachedTask:
            return CachedTask(reader(config.bias.rectified), config, labels)

        return Planned(config, Destination(out, "student", resume, overwrite), task, len(shown[0]))

    return make_trainer(
        [planned(each, out) for each, (_, out) in zip(configs, students, strict=True)],
        splits,
        lambda _: policy,
        reporter,
        teacher_size=cache.identity.teacher.image_size,
        order=order,
        ranks=ranks,
    )


class CachedTask:
    """Learns from the cached row of the view that each epoch shows.

    targets: those of the epoch at hand, None where the loss uses none.
    """

    def __init__(self, reader: TargetReader, config: StudentConfig, labels: Tensor) -> None:
        """config: with a resolved loss. labels: int64 (N,), on the device."""
        self._reader, self._config, self._labels = reader, config, labels
        self._objective = None if config.loss.name == "ce" else Objective(config.loss)
        self.learned = None if self._objective is None else self._objective.learned
        self._weights = BiasWeights(1.0, 1.0)
        self.targets: Targets | None = None
        self._waited_before = 0.0

    def start_epoch(self, epoch: int) -> tuple[int, ...]:
        bias = self._config.bias
        self._weights = bias_weights(
            bias.mode, bias.chosen_schedule, bias.reduction, epoch, self._config.train.epochs
        )
        self._waited_before = self._reader.waited
        self.targets = None  # let go before more is read
        if self._objective is not None:
            self._objective.start_epoch(epoch)
            self.targets = self._reader.of_epoch(epoch)
        return self._reader.views_of(epoch)

    def loss_parts(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        samples, labels = batch.samples, self._labels[batch.samples]
        hard = mixed_ce(logits, *batch.hard_labels(self._labels))
        if self._objective is None or self.targets is None:
            return {"loss": hard}
        wrong = self.targets.wrong(samples)
        teacher, weights = self._teacher_rows(self.targets, samples), self._weights.rows(wrong)
        value = self._objective(logits, teacher, labels, weights)  # (B,), or () of coupled rows
        ce_weight = self._config.loss.ce_weight or 0.0
        parts = {
            "loss": ce_weight * hard + self._objective.weight * value.mean(),
            "loss_ce": hard,
            "loss_kd": value.mean(),
            "wrong_rate": wrong.float().mean(),
        }
        if value.dim():
            parts["loss_right"] = torch.where(wrong, 0, value).mean()
            parts["loss_wrong"] = torch.where(wrong, value, 0).mean()
        return parts

    def _teacher_rows(self, targets: Targets, samples: Tensor) -> TeacherRows:
        """float32 (B, C); as they are at a temperature where that makes a difference."""
        rectified = self._config.bias.rectified is not None
        read = targets.rectified_rows if rectified else targets.rows
        kept = targets.kept(samples)
        if kept is None and not self._config.also:
            return read(samples)
        return TemperedRows(lambda temperature: read(samples, temperature), kept)

    def epoch_metrics(self) -> dict[str, float]:
        return {
            "weight_right": self._weights.right,
            "weight_wrong": self._weights.wrong,
            "wait_seconds": self._reader.waited - self._waited_before,
        }


# ---- checks before the first step -----------------------------------------------------------


def check_objective(config: StudentConfig, cache: LogitCache) -> StudentConfig:
    """The configuration with the loss's defaults and the rectification's name filled in.

    Raises ConfigError or CacheError for a loss, bias mode or temperature that cannot be, ViewError
    for bias-aware losses on views that mix samples.
    """
    config = msgspec.structs.replace(config, loss=resolved(config.loss))
    loss, bias = config.loss, config.bias
    if loss.name == "ce" and bias.mode != "none":
        raise ConfigError(
            f"bias '{bias.mode}' needs a loss that uses the teacher, not 'ce'",
            "Use --loss kd, or --bias none.",
        )
    check_rows_known([cache], loss)
    if bias.mode != "none":
        check_unmixed(cache.identity.views.policy, f"bias '{bias.mode}'")
    if bias.mode == "rectify" and config.also:
        raise ConfigError(*NOT_RECTIFIED)
    if bias.mode != "rectify":
        if bias.rectified is not None:
            raise ConfigError(
                f"rectification '{bias.rectified}' is not used with bias '{bias.mode}'",
                "Add --bias rectify, or leave --rectified out.",
            )
        return config
    name = bias.rectified or _only_rectification(cache)
    if (temperature := rectified_at(loss)) is not None:
        cache.rectification(name).check_temperature(temperature)
    return msgspec.structs.replace(config, bias=msgspec.structs.replace(bias, rectified=name))


def check_rows_known(caches: Sequence[LogitCache], loss: LossSettings) -> None:
    """Raise ConfigError or CacheError where a cache keeps less of its rows than the loss reads."""
    for cache in caches:
        if loss.name != "ce" and not cache.encoding.keeps_all:
            for temperature in teacher_temperatures(loss):
                check_temperature(cache.encoding, temperature)


def _only_rectification(cache: LogitCache) -> str:
    names = cache.rectifications
    if len(names) == 1:
        return names[0]
    raise CacheError(
        f"{cache.path} has {len(names) or 'no'} rectifications"
        + (f": {', '.join(names)}" if names else ""),
        "Name one with --rectified." if names else f"Run `pipeline rectify {cache.path}` first.",
    )


def slab_plan(
    caches: Sequence[LogitCache],
    config: StudentConfig,
    num_views: int,
    ranks: Ranks | None = None,
) -> tuple[SlabPlan, Order]:
    """How targets are read, and the order of samples that goes with it.

    Raises ConfigError where slab_memory is too small, or missing.
    """
    text, cache = config.slab_memory, caches[0]
    total, batch_size = cache.num_samples, config.train.batch_size
    samples, _ = held_out(total, config.data.val_fraction, config.seed.data)
    if ranks is not None and ranks.world > 1:
        if text is not None:
            raise ConfigError(
                "several processes read their parts of a view, and no groups of them",
                "Leave --slab-memory out under torchrun.",
            )
        groups = groups_of_ranks(cache.row_of, cache.grid.chunk_rows, ranks.world)
        shown = groups.smallest(samples)
        order = Order(groups.order_of_group(ranks.rank, shown), shown)
        return SlabPlan(groups, share=ranks.rank), order
    if text is None and config.loss.name == "ce":
        return SlabPlan(), Order()  # none are read
    budget = None if text is None else parse_bytes(text, "slab_memory")
    device = choose_device(config.device)
    plan = plan_slabs(caches, num_views, budget, samples, batch_size, device)
    return plan, Order(plan.groups.order) if plan.groups else Order()


def check_one_stream(configs: Sequence[StudentConfig]) -> None:
    """Raise ConfigError unless students can be shown the same batches, all at the same time."""
    first, *others = map(_stream, configs)
    for other in others:
        if differing := differences(other, first):
            raise ConfigError(
                f"students trained together differ in {'; '.join(differing[:3])}",
                "Train them apart, or make these settings the same.",
            )


def _stream(config: StudentConfig) -> dict[str, Any]:
    """What decides which batches a student is shown."""
    train = config.train
    return {
        "cache": config.cache,
        "also": list(config.also),
        "views": config.views,
        "slab_memory": config.slab_memory,
        "data": msgspec.to_builtins(config.data),
        "device": config.device,
        "seed.data": config.seed.data,
        "train.epochs": train.epochs,
        "train.batch_size": train.batch_size,
        "train.deterministic": train.deterministic,
        "views at once": views_seen(config.loss),
    }


def views_at_once(
    config: StudentConfig, policy: ViewPolicy, views: Sequence[int]
) -> list[tuple[int, ...]]:
    """What epochs may show: a view each, or the weak and the strong view of a sample where the loss
    sees both. Raises ConfigError where the cache does not hold them in pairs.
    """
    if views_seen(config.loss) == 1:
        return [(view,) for view in views]
    name = config.loss.name
    if not isinstance(policy, Paired):
        raise ConfigError(
            f"the loss '{name}' sees a weak and a strong view of every sample, the cache holds "
            f"views of '{policy.name}'",
            "Cache both: --augment 'pad-crop-flip|pad-crop-flip+rand-augment'.",
        )
    if len(views) < 2 or config.slab_memory is not None:
        raise ConfigError(
            f"the loss '{name}' reads two whole views at a time",
            "Give it --views 2 or more, and no --slab-memory.",
        )
    return [policy.paired_views(view) for view in views[1::2]]


def shared_views(caches: Sequence[LogitCache], config: StudentConfig) -> list[int]:
    """The views to train from, which every cache must have; see `usable_views`."""
    counts = {cache.num_views for cache in caches}
    if config.views is None and len(counts) > 1:
        raise ConfigError(
            f"the caches have {' and '.join(map(str, sorted(counts)))} views",
            f"Train from those that all have with --views {min(counts)}.",
        )
    views, *_ = [usable_views(cache, config) for cache in caches]
    return views


def usable_views(cache: LogitCache, config: StudentConfig) -> list[int]:
    """The views to train from. Raises CacheError unless all of them are complete."""
    wanted = range(cache.num_views if config.views is None else config.views)
    if not 0 < len(wanted) <= cache.num_views:
        raise ConfigError(f"{config.views} views were asked for, the cache has {cache.num_views}")
    complete = set(cache.complete_views)
    stage = "cache-teacher"
    if config.bias.rectified is not None:
        commits = cache.rectification(config.bias.rectified).commits
        rectified = {v for v in complete if commits.is_complete(v)}
        stage = "cache-teacher" if rectified == complete else "rectify"
        complete = rectified
    if not complete.issuperset(wanted):
        leading = next(v for v in range(cache.num_views + 1) if v not in complete)
        offer = f", or train from what is there with --views {leading}" if leading else ""
        raise CacheError(
            f"{cache.path} is not complete: {len(complete)} of {cache.num_views} views are"
            + (" rectified" if stage == "rectify" else ""),
            f"Run `pipeline {stage}` again to finish it{offer}.",
        )
    return list(wanted)


def cached_policy(cache: LogitCache) -> ViewPolicy:
    """The policy whose views the cache holds."""
    views = cache.identity.views
    return known_policy(views.policy, views.parameters, views.version, views.seed)


def check_dataset(
    cache: LogitCache, splits: Splits, policy: ViewPolicy, accept_drift: bool, reporter: Reporter
) -> None:
    """Raise IdentityError unless the student sees the samples and pixels that the teacher saw."""
    ours = dataset_identity(splits.train)
    if differing := differences(ours, cache.identity.dataset):
        raise IdentityError(
            f"{cache.path} was made from another dataset or order: {'; '.join(differing[:3])}",
            "Give the dataset that the cache was made from, or cache this one.",
        )
    probes = pixel_probes(splits.train, policy, cache.identity.teacher.image_size)
    differ = sum(a != b for a, b in zip_longest(probes, cache.pixel_probes))
    if not differ:
        return
    if not accept_drift:
        raise IdentityError(
            f"{differ} of {len(probes)} pixel probes of {cache.path} differ: the images are not "
            "what the teacher saw",
            "Restore the images or the image libraries, or go on with --accept-pixel-drift.",
        )
    reporter.say(f"warning: {differ} of {len(probes)} pixel probes differ from the teacher's")
