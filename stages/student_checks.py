"""What must hold before a student's first step: cache, objective, views, memory, dataset."""

import operator
from collections.abc import Sequence
from typing import Any

import msgspec

from stages.cache import LogitCache
from stages.cache.encoding import check_offset, check_temperature
from stages.cache.identity import differences
from stages.data import usable_views
from stages.distributed import ALONE, Ranks
from stages.errors import CacheError, ConfigError
from stages.inputs.run_files import sha256
from stages.inputs.views import Paired, ViewPolicy, check_unmixed
from stages.order import ViewSchedule
from stages.schema import settings_of
from stages.settings import CALIBRATED, StudentConfig
from stages.targets.ensemble import NOT_RECTIFIED, check_members
from stages.training.objective import Student, StudentLoss, student_loss
from stages.training.until import check_until


def complete(config: StudentConfig, cache: LogitCache) -> Student:
    """The student of a configuration, with the loss's defaults and the rectification's name filled
    in.

    Raises ConfigError or CacheError for a loss, bias mode or temperature that cannot be, ViewError
    for bias-aware losses on views that mix samples.
    """
    loss, bias = student_loss(config.loss), config.bias
    if not cache.labelled:
        loss = _without_labels(config, loss, cache)
    if bias.weighs and loss.settings.average is not None:
        if config.loss.average == "kind":
            raise ConfigError(
                f"with bias '{bias.mode}' rows are averaged as bias.reduction says, not by "
                "loss.average=kind",
                "Leave loss.average out, or use --bias none.",
            )
        loss = loss.having(average="batch")
    config = msgspec.structs.replace(config, loss=loss.settings)
    check_until(config)
    if bias.mode != "none" and not loss.reads_teacher:
        raise ConfigError(
            f"bias '{bias.mode}' needs a loss that uses the teacher, not 'ce'",
            "Use --loss kd, or --bias none.",
        )
    if bias.weighs and not loss.definition.weighs_rows:
        raise ConfigError(
            f"bias '{bias.mode}' puts weights on rows, and the loss '{loss.settings.name}' takes "
            "neither `reduction` nor `weights`",
            "Let it return one number a row where reduction='none', or use --bias none.",
        )
    loss.check_rows(cache)
    if not config.also and loss.reads_offset:  # of several teachers a loss reads probabilities
        check_offset(cache.encoding, f"the loss '{loss.settings.name}'")
    return Student(_with_checked_bias(config, loss, cache), loss)


def check_students(
    students: Sequence[Student],
    caches: Sequence[LogitCache],
    policy: ViewPolicy,
    ranks: Ranks = ALONE,
) -> ViewSchedule:
    """What epochs show to students of one stream: one view, or the weak and the strong view of a
    sample; of those of a round of epochs all.

    caches: those that they learn from. policy: of the cached views. Raises CacheError, ConfigError
    or IdentityError for what cannot be trained, or not from one stream of batches.
    """
    check_one_stream(students)
    for student in students:
        for cache in caches:
            student.loss.check_rows(cache)
            if student.config.loss.calibrate:
                _ = cache.calibration
    config, at_once = students[0].config, students[0].loss.definition.views
    if at_once > 1:
        _check_pairs(config, policy, config.views or caches[0].num_views)
    if ranks.world > 1:
        _check_ranks(config, ranks, at_once)
    check_members(caches, [student.config.loss.temperature or 1.0 for student in students])
    rectified = {student.config.bias.rectified for student in students}
    views = usable_views(caches, config.views, rectified)
    choices: list[tuple[int, ...]] = [(view,) for view in views]
    if isinstance(policy, Paired) and at_once > 1:
        choices = [policy.paired_views(view) for view in views[1::2]]
    per_decode = config.train.views_per_decode or 1
    return ViewSchedule(choices, config.seed.data, config.train.epochs, per_decode)


def check_one_stream(students: Sequence[Student]) -> None:
    """Raise ConfigError unless students can be shown the same batches, all at the same time."""
    configs = [student.config for student in students]
    rectified = {c.bias.rectified for c in configs if c.bias.rectified is not None}
    if len(rectified) > 1 and configs[0].slab_memory is not None:
        raise ConfigError(
            f"students of {' and '.join(sorted(rectified))} hold targets of each, together more "
            f"than a slab_memory of {configs[0].slab_memory}",
            "Train them apart, or leave --slab-memory out.",
        )
    first, *others = map(_stream, students)
    for other in others:
        if differing := differences(other, first):
            raise ConfigError(
                f"students trained together differ in {'; '.join(differing[:3])}",
                "Train them apart, or make these settings the same.",
            )


def _stream(student: Student) -> dict[str, Any]:
    """What decides which batches a student is shown."""
    shared = (key for key, setting in settings_of(StudentConfig).items() if setting.shared)
    settings = {key: operator.attrgetter(key)(student.config) for key in shared}
    return settings | {"views at once": student.loss.definition.views}


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


# ---- details --------------------------------------------------------------------------------


def _without_labels(config: StudentConfig, loss: StudentLoss, cache: LogitCache) -> StudentLoss:
    """The loss without cross-entropy, unless that was asked for. Raises CacheError for whatever
    needs labels.
    """
    if not loss.reads_teacher or loss.definition.reads_labels:
        cache.require_labels(f"the loss '{loss.settings.name}'")
    if config.loss.ce_weight:
        cache.require_labels(f"loss.ce_weight {config.loss.ce_weight:g}")
    if config.loss.until is not None:
        cache.require_labels("loss.until")
    if config.bias.mode != "none":
        cache.require_labels(f"bias '{config.bias.mode}'")
    if config.data.val_fraction:
        cache.require_labels(f"data.val_fraction {config.data.val_fraction:g}")
    return loss.having(ce_weight=0.0)


def _check_pairs(config: StudentConfig, policy: ViewPolicy, views: int) -> None:
    """Raise ConfigError where a loss sees two views of a sample, and they are not cached in pairs,
    or not read at a time. views: how many are used.
    """
    name = config.loss.name
    if not isinstance(policy, Paired):
        raise ConfigError(
            f"the loss '{name}' sees a weak and a strong view of every sample, the cache holds "
            f"views of '{policy.name}'",
            "Cache both: --augment 'pad-crop-flip|pad-crop-flip+rand-augment'.",
        )
    if views < 2 or config.slab_memory is not None:
        raise ConfigError(
            f"the loss '{name}' reads two whole views at a time",
            "Give it --views 2 or more, and no --slab-memory.",
        )


def _check_ranks(config: StudentConfig, ranks: Ranks, at_once: int) -> None:
    """Raise ConfigError where a run cannot be divided among the processes of a launch. at_once:
    views of a sample that its loss sees.
    """
    if (batch_size := config.train.batch_size) % ranks.world:
        raise ConfigError(
            f"a batch of {batch_size} cannot be divided among {ranks.world} processes",
            f"Give a --batch-size that is a multiple of {ranks.world}.",
        )
    if at_once > 1:
        raise ConfigError(
            "a loss that sees two views of a sample at once is trained in one process",
            "Start it without torchrun, or use another loss.",
        )
    if config.slab_memory is not None:
        raise ConfigError(
            "several processes read their parts of a view, and no groups of them",
            "Leave --slab-memory out under torchrun.",
        )


def _with_checked_bias(
    config: StudentConfig, loss: StudentLoss, cache: LogitCache
) -> StudentConfig:
    """The configuration with the bias's defaults and the rectification's name filled in. config:
    its loss is complete.

    Raises ConfigError or CacheError for a bias mode or temperature that cannot be, ViewError for
    one on views that mix samples.
    """
    bias = config.bias.resolved()
    config = msgspec.structs.replace(config, bias=bias)
    if bias.mode != "none":
        check_unmixed(cache.identity.views.policy, f"bias '{bias.mode}'")
    _check_correction(config, cache)
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
    if (temperature := loss.rectified_at) is not None:
        _check_rectified_at(cache, name, temperature, config.loss.calibrate)
    return msgspec.structs.replace(config, bias=msgspec.structs.replace(bias, rectified=name))


def _check_rectified_at(cache: LogitCache, name: str, temperature: float, calibrated: bool) -> None:
    """Raise CacheError unless a rectification can be used at a temperature, of rows that are
    calibrated or as they are.
    """
    rectification = cache.rectification(name)
    if not calibrated:
        rectification.check_temperature(temperature)
        return
    settings, by = rectification.settings, cache.calibration
    named, usual = "`", f"pairwise-T{temperature:g}{CALIBRATED}"
    if usual in cache.rectifications:  # of an earlier calibration
        other = f"{usual}-{by:.4g}"
        named = f" --name {other}`, and train with --rectified {other}"
    if not settings.temperature_free and settings.temperature != temperature * by:
        raise CacheError(
            f"rectification '{name}' is of T = {settings.temperature:g}, and calibrated rows at "
            f"{temperature:g} are rows at {temperature * by:g}",
            f"Run `pipeline rectify {cache.path} --temperature {temperature:g} --calibrate{named}.",
        )


def _check_correction(config: StudentConfig, cache: LogitCache) -> None:
    """Raise ConfigError or CacheError for a corrected loss that cannot be, or settings of one that
    is not asked for.
    """
    bias = config.bias
    if bias.mode != "correct":
        given = [f"bias.{key}" for key in ("alpha", "gamma") if getattr(bias, key) is not None]
        if given:
            raise ConfigError(
                f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} not used with bias "
                f"'{bias.mode}'",
                "Add --bias correct, or leave it out.",
            )
        return
    if config.also:
        raise ConfigError(
            "bias 'correct' moves the logits of one teacher, and several are averaged",
            "Leave --also out, or use another --bias.",
        )
    check_temperature(cache.encoding, 1.0)


def _only_rectification(cache: LogitCache) -> str:
    names = cache.rectifications
    if len(names) == 1:
        return names[0]
    raise CacheError(
        f"{cache.path} has {len(names) or 'no'} rectifications"
        + (f": {', '.join(names)}" if names else ""),
        "Name one with --rectified." if names else f"Run `pipeline rectify {cache.path}` first.",
    )
