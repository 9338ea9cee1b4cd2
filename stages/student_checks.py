"""What must hold before a student's first step: cache, objective, views, memory, dataset."""

import dataclasses
import operator
from collections.abc import Collection, Sequence
from typing import Any

import msgspec
from torch import Tensor

from stages.bias_checks import with_checked_bias
from stages.cache import LogitCache
from stages.cache.encoding import check_offset, check_temperature
from stages.cache.identity import differences
from stages.data import cached_policy, held_out, usable_views
from stages.device import choose_device
from stages.distributed import ALONE, Ranks
from stages.errors import CacheError, ConfigError
from stages.inputs.run_files import sha256
from stages.inputs.views import Paired, ViewPolicy
from stages.objectives.losses import definition_of
from stages.order import ViewSchedule
from stages.schema import settings_of
from stages.settings import LossSettings, StudentConfig
from stages.sizes import parse_bytes
from stages.targets.chunks import SlabPlan, groups_of_ranks, plan_slabs
from stages.targets.ensemble import open_members
from stages.training.objective import (
    reads_offset,
    resolved,
    teacher_temperatures,
    views_seen,
)
from stages.training.until import check_until


def check_students(
    configs: Sequence[StudentConfig], cache: LogitCache
) -> tuple[list[LogitCache], ViewSchedule]:
    """The caches that students of one stream learn from, and what epochs show of them: one view, or
    the weak and the strong view of a sample; of those of a round of epochs all.

    configs: complete, see `complete`. cache: that of the first of them. Raises CacheError,
    ConfigError or IdentityError for what cannot be trained, or not from one stream of batches.
    """
    check_one_stream(configs)
    config = configs[0]
    caches = open_members(cache, config.also, [c.loss.temperature or 1.0 for c in configs])
    for each in configs:
        check_rows_known(caches, each.loss)
        if each.loss.calibrate:
            for member in caches:
                _ = member.calibration
    views = shared_views(caches, config.views, {each.bias.rectified for each in configs})
    choices = views_at_once(config.loss, cached_policy(cache), views, config.slab_memory)
    per_decode = config.train.views_per_decode or 1
    return caches, ViewSchedule(choices, config.seed.data, config.train.epochs, per_decode)


def complete(config: StudentConfig, cache: LogitCache) -> StudentConfig:
    """The configuration with the loss's defaults and the rectification's name filled in.

    Raises ConfigError or CacheError for a loss, bias mode or temperature that cannot be, ViewError
    for bias-aware losses on views that mix samples.
    """
    loss, bias = resolved(config.loss), config.bias
    if not cache.labelled:
        loss = _without_labels(config, loss, cache)
    if bias.weighs and loss.average is not None:
        if config.loss.average == "kind":
            raise ConfigError(
                f"with bias '{bias.mode}' rows are averaged as bias.reduction says, not by "
                "loss.average=kind",
                "Leave loss.average out, or use --bias none.",
            )
        loss = msgspec.structs.replace(loss, average="batch")
    config = msgspec.structs.replace(config, loss=loss)
    check_until(config)
    if loss.name == "ce" and bias.mode != "none":
        raise ConfigError(
            f"bias '{bias.mode}' needs a loss that uses the teacher, not 'ce'",
            "Use --loss kd, or --bias none.",
        )
    if bias.weighs and not definition_of(loss.name).weighs_rows:
        raise ConfigError(
            f"bias '{bias.mode}' puts weights on rows, and the loss '{loss.name}' takes neither "
            "`reduction` nor `weights`",
            "Let it return one number a row where reduction='none', or use --bias none.",
        )
    check_rows_known([cache], loss)
    if not config.also and reads_offset(loss):  # of several teachers a loss reads probabilities
        check_offset(cache.encoding, f"the loss '{loss.name}'")
    return with_checked_bias(config, cache)


def _without_labels(config: StudentConfig, loss: LossSettings, cache: LogitCache) -> LossSettings:
    """The loss without cross-entropy, unless that was asked for. Raises CacheError for whatever
    needs labels.
    """
    if loss.name == "ce" or definition_of(loss.name).reads_labels:
        cache.require_labels(f"the loss '{loss.name}'")
    if config.loss.ce_weight:
        cache.require_labels(f"loss.ce_weight {config.loss.ce_weight:g}")
    if config.loss.until is not None:
        cache.require_labels("loss.until")
    if config.bias.mode != "none":
        cache.require_labels(f"bias '{config.bias.mode}'")
    if config.data.val_fraction:
        cache.require_labels(f"data.val_fraction {config.data.val_fraction:g}")
    return msgspec.structs.replace(loss, ce_weight=0.0)


def check_rows_known(caches: Sequence[LogitCache], loss: LossSettings) -> None:
    """Raise ConfigError or CacheError where a cache keeps less of its rows than the loss reads."""
    for cache in caches:
        if loss.calibrate and not cache.encoding.keeps_all:
            raise CacheError(
                f"{cache.path} keeps part of each row, and calibration divides all of it",
                "Leave --calibrate out, or cache with another --encoding.",
            )
        if loss.name != "ce" and not cache.encoding.keeps_all:
            for temperature in teacher_temperatures(loss):
                check_temperature(cache.encoding, temperature)


def slab_plan(
    configs: Sequence[StudentConfig],
    caches: Sequence[LogitCache],
    schedule: ViewSchedule,
    ranks: Ranks = ALONE,
    skipped: Tensor | None = None,
) -> SlabPlan:
    """How the targets of students of one stream are read, and their samples ordered. schedule: what
    epochs show. skipped: int64, samples that are left out.

    Raises ConfigError where slab_memory is too small, or missing, or where a run cannot be divided
    among the processes of a launch.
    """
    cache, config = caches[0], next((c for c in configs if c.loss.name != "ce"), configs[0])
    if ranks.world > 1:
        if (batch_size := config.train.batch_size) % ranks.world:
            raise ConfigError(
                f"a batch of {batch_size} cannot be divided among {ranks.world} processes",
                f"Give a --batch-size that is a multiple of {ranks.world}.",
            )
        if views_seen(config.loss) > 1:
            raise ConfigError(
                "a loss that sees two views of a sample at once is trained in one process",
                "Start it without torchrun, or use another loss.",
            )
        if config.slab_memory is not None:
            raise ConfigError(
                "several processes read their parts of a view, and no groups of them",
                "Leave --slab-memory out under torchrun.",
            )
        groups = groups_of_ranks(cache.row_of, cache.grid.chunk_rows, ranks.world)
        return SlabPlan(groups, share=ranks.rank)
    text, seed = config.slab_memory, config.seed.data
    if text is None and config.loss.name == "ce":
        return SlabPlan()  # none are read
    budget = None if text is None else parse_bytes(text, "slab_memory")
    samples, _ = held_out(cache.num_samples, config.data.val_fraction, seed, skipped)
    device = choose_device(config.device)
    plan = plan_slabs(caches, schedule, budget, samples, config.train.batch_size, device)
    rectified = {each.bias.rectified for each in configs} - {None}
    # Each rectification is read for itself: together they might be too much to keep.
    return dataclasses.replace(plan, resident=False) if len(rectified) > 1 else plan


def check_one_stream(configs: Sequence[StudentConfig]) -> None:
    """Raise ConfigError unless students can be shown the same batches, all at the same time."""
    rectified = {c.bias.rectified for c in configs if c.bias.rectified is not None}
    if len(rectified) > 1 and configs[0].slab_memory is not None:
        raise ConfigError(
            f"students of {' and '.join(sorted(rectified))} hold targets of each, together more "
            f"than a slab_memory of {configs[0].slab_memory}",
            "Train them apart, or leave --slab-memory out.",
        )
    first, *others = map(_stream, configs)
    for other in others:
        if differing := differences(other, first):
            raise ConfigError(
                f"students trained together differ in {'; '.join(differing[:3])}",
                "Train them apart, or make these settings the same.",
            )


def _stream(config: StudentConfig) -> dict[str, Any]:
    """What decides which batches a student is shown."""
    shared = (key for key, setting in settings_of(StudentConfig).items() if setting.shared)
    settings = {key: operator.attrgetter(key)(config) for key in shared}
    return settings | {"views at once": views_seen(config.loss)}


def views_at_once(
    loss: LossSettings, policy: ViewPolicy, views: Sequence[int], slab_memory: str | None
) -> list[tuple[int, ...]]:
    """What epochs may show: a view each, or the weak and the strong view of a sample where the loss
    sees both. Raises ConfigError where the cache does not hold them in pairs.
    """
    if views_seen(loss) == 1:
        return [(view,) for view in views]
    name = loss.name
    if not isinstance(policy, Paired):
        raise ConfigError(
            f"the loss '{name}' sees a weak and a strong view of every sample, the cache holds "
            f"views of '{policy.name}'",
            "Cache both: --augment 'pad-crop-flip|pad-crop-flip+rand-augment'.",
        )
    if len(views) < 2 or slab_memory is not None:
        raise ConfigError(
            f"the loss '{name}' reads two whole views at a time",
            "Give it --views 2 or more, and no --slab-memory.",
        )
    return [policy.paired_views(view) for view in views[1::2]]


def shared_views(
    caches: Sequence[LogitCache], views: int | None, rectified: Collection[str | None]
) -> list[int]:
    """The views to train from, which every cache must have with each of these rectifications; see
    `usable_views`.
    """
    counts = {cache.num_views for cache in caches}
    if views is None and len(counts) > 1:
        raise ConfigError(
            f"the caches have {' and '.join(map(str, sorted(counts)))} views",
            f"Train from those that all have with --views {min(counts)}.",
        )
    usable, *_ = [usable_views(cache, views, name) for name in rectified for cache in caches]
    return usable


def made_from(config: StudentConfig, caches: Sequence[LogitCache]) -> dict[str, Any]:
    """What a student reads, as digests: caches by identity and encoding, wherever they lie, how
    many of their views, and what decides the rectification's numbers.
    """
    name = config.bias.rectified
    return {
        "caches": [
            sha256(f"{cache.identity.digest()} {cache.encoding.digest()}".encode())[:32]
            for cache in caches
        ],
        "views": config.views or caches[0].num_views,
        "rectified": None if name is None else caches[0].rectification(name).settings.to_json(),
        **({"calibration": [c.calibration for c in caches]} if config.loss.calibrate else {}),
    }
