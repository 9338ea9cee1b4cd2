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
from stages.errors import CacheError, ConfigError, IdentityError
from stages.inputs.feed import Batch, pixel_probes
from stages.inputs.views import ViewPolicy, check_unmixed, known_policy
from stages.objectives.bias import BiasWeights, bias_weights
from stages.objectives.losses import TeacherRows, TemperedRows, mixed_ce
from stages.reporting import Reporter, Silent
from stages.training.budget import SlabPlan, parse_bytes, plan_slabs
from stages.training.config import BiasSettings, LossSettings, RunConfig
from stages.training.ensemble import NOT_RECTIFIED, open_members
from stages.training.epoch_targets import TargetReader, Targets
from stages.training.objective import Objective, rectified_at, resolved, teacher_temperatures
from stages.training.setup import (
    Destination,
    Splits,
    dataset_identity,
    held_out,
    load_data,
    make_trainer,
)
from stages.training.trainer import Trainer, sample_order


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
    """Train a student and return the run's summary; see `student_trainer`."""
    return student_trainer(config, out, resume, overwrite, splits, reporter).fit()


def student_trainer(
    config: StudentConfig,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    splits: Splits | None = None,
    reporter: Reporter | None = None,
) -> Trainer:
    """Everything checked and loaded, ready for `fit`. `splits`: the dataset, if it is loaded.

    Raises IdentityError if the dataset is not the one the cache was made from, CacheError if the
    cache or the rectification is missing or incomplete, ConfigError for settings that cannot be.
    """
    reporter = reporter or Silent()
    # 1) the cache, and what is to be learned from it
    cache = LogitCache.open(config.cache)
    config = check_objective(config, cache)
    caches = open_members(cache, config.also, config.loss.temperature or 1.0)
    check_rows_known(caches, config.loss)
    views = shared_views(caches, config)

    # 2) images: the ones the teachers saw
    splits = splits or load_data(config.data)
    policy = cached_policy(cache)
    for member in caches:
        check_dataset(member, splits, policy, config.accept_pixel_drift, reporter)

    # 3) the student and its run
    plan = slab_plan(caches, config, len(views))

    def task(labels: Tensor, _: ViewPolicy) -> CachedTask:
        seed, epochs = config.seed.data, config.train.epochs
        targets = TargetReader(caches, config.bias.rectified, views, plan, epochs, seed, labels)
        return CachedTask(targets, config, labels)

    return make_trainer(
        config,
        splits,
        lambda _: policy,
        task,
        Destination(Path(out), "student", resume, overwrite),
        reporter,
        teacher_size=cache.identity.teacher.image_size,
        order=plan.groups.order if plan.groups else sample_order,
    )


class CachedTask:
    """Learns from the cached row of the view that each epoch shows.

    targets: those of the epoch at hand, None where the loss uses none.
    """

    def __init__(self, reader: TargetReader, config: StudentConfig, labels: Tensor) -> None:
        """config: with a resolved loss. labels: int64 (N,), on the device."""
        self._reader, self._config, self._labels = reader, config, labels
        self._objective = None if config.loss.name == "ce" else Objective(config.loss)
        self._weights = BiasWeights(1.0, 1.0)
        self.targets: Targets | None = None
        self._waited_before = 0.0

    def start_epoch(self, epoch: int) -> int:
        bias = self._config.bias
        self._weights = bias_weights(
            bias.mode, bias.chosen_schedule, bias.reduction, epoch, self._config.train.epochs
        )
        self._waited_before = self._reader.waited
        self.targets = None  # let go before more is read
        if self._objective is not None:
            self._objective.start_epoch(epoch)
            self.targets = self._reader.of_epoch(epoch)
        return self._reader.view_of(epoch)

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


def slab_plan(caches: Sequence[LogitCache], config: StudentConfig, num_views: int) -> SlabPlan:
    """How targets are read. Raises ConfigError where slab_memory is too small, or missing."""
    if config.slab_memory is None and config.loss.name == "ce":
        return SlabPlan()  # none are read
    text, total = config.slab_memory, caches[0].num_samples
    budget = None if text is None else parse_bytes(text, "slab_memory")
    samples, _ = held_out(total, config.data.val_fraction, config.seed.data)
    device = choose_device(config.device)
    return plan_slabs(caches, num_views, budget, samples, config.train.batch_size, device)


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
