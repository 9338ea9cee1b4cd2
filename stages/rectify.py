"""Stage two: which rows the teacher has wrong, and what they should say instead.

    pipeline rectify digits.zarr --method pairwise --temperature 4

One task a block, on threads or on a Dask cluster; each holds one block in memory. A wrong row is
one whose stored prediction (taken before any encoding) differs from the label, on that view.
Rectification replaces two of its logits, the label's and the predicted class's, and only those two
are stored.
The formulas are in `stages.objectives.rectification`, the statistics in `stages.tally`.
"""

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.encoding import check_offset, check_temperature
from stages.cache.layout import BlockId, threads_at_once
from stages.cache.lock import exclusive
from stages.cache.rectified import Rectification, RectificationSettings
from stages.cache.storage import Location, remove_half_written
from stages.calibrate import with_calibration
from stages.dask_client import existing_cluster
from stages.errors import CacheError
from stages.inputs.views import check_unmixed
from stages.objectives.rectification import rectify_rows, replaced_logits
from stages.reporting import Reporter, Silent
from stages.settings import RectifyConfig
from stages.tally import Tally

__all__ = [
    "config_of",
    "rectified_block",
    "rectify",
    "rectify_block",
    "rectify_rows",
    "settings_of",
]


def config_of(settings: RectificationSettings, **more: Any) -> RectifyConfig:
    """What makes a rectification of these settings. Raises CacheError if nothing can."""
    asked = {n: getattr(settings, n) for n in ("method", "space", "temperature")}
    try:
        above = settings.trusted_above
        rule = {} if above is None else {"wrong": f"confidence:{above!r}"}
        made = {**asked, "materialise": settings.materialised, **rule, **more}
        return msgspec.convert(made, RectifyConfig)
    except ValueError as error:  # of msgspec, or a ConfigError
        raise CacheError(
            f"its settings cannot be: {error}", "Delete the rectification and make it again."
        ) from error


def settings_of(config: RectifyConfig) -> RectificationSettings:
    """What the store keeps of a run of rectify: what decides its numbers."""
    # Swapping commutes with softmax, and the other spaces rectify before softening.
    free = config.space != "probability-T" or config.method == "swap"
    return RectificationSettings(
        method=config.method,
        space=config.space,
        temperature=config.temperature,
        temperature_free=free,
        materialised=config.materialise,
        trusted_above=config.trusted_above,
    )


def rectify(
    path: str | Path, config: RectifyConfig, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Rectify every block of a cache that is not rectified yet; return the statistics.

    Raises CacheError if the cache is incomplete, or has this name with other settings, ViewError if
    its views mix samples (mixup, cutmix): such a row has two labels.
    """
    reporter = reporter or Silent()
    cache = LogitCache.open(path, writable=True)
    config = with_calibration(config, cache)
    cache.require_labels("rectification")
    check_unmixed(cache.identity.views.policy, "rectification")
    settings = settings_of(config)
    check_temperature(cache.encoding, 1.0 if settings.temperature_free else settings.temperature)
    if settings.trusted_above is not None:
        check_temperature(cache.encoding, 1.0)
    if settings.space == "logit" and settings.method != "swap":  # swapping ignores the offset
        check_offset(cache.encoding, "the space 'logit'")
    name, views = config.chosen_name, _views(cache, config.views)
    with exclusive(cache.path):
        # 1) what is missing
        remove_half_written(cache.path)
        rectification = cache.create_rectification(name, settings)
        missing = rectification.commits.missing(views)
        if there := len(views) * cache.grid.num_blocks - len(missing):
            reporter.say(f"{there} blocks are there already")

        # 2) one task a block
        with _workers(cache, rectification, config.scheduler) as submit:
            for done in _finished([submit(at) for at in missing]):
                reporter.progress("rectify", done, len(missing), "blocks")

        # 3) what came of it, from every block's record
        rectification.commits.reread()
        rectification.commits.compact_rest()
        tally = Tally(cache.num_classes)
        for _, records in rectification.commits.each_view():
            tally.add(records)
        statistics = tally.summary(cache.identity.dataset.class_names)
        rectification.write_statistics(statistics)
    return statistics


# ---- blocks ---------------------------------------------------------------------------------


def rectify_block(cache: LogitCache, rectification: Rectification, at: BlockId) -> None:
    """Rectify and commit one block."""
    arrays, statistics = rectified_block(cache, rectification.settings, at)
    record = {"settings": rectification.settings.to_json(), "statistics": statistics}
    rectification.blocks.write(at, arrays, record)


def rectified_block(
    cache: LogitCache, settings: RectificationSettings, at: BlockId
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays of one rectified block, each (n, ...) as layout.py names them; its statistics."""
    config = config_of(settings)
    temperature = 1.0 if settings.temperature_free else settings.temperature
    rows = cache.read_encoded_block(*at)
    record = cache.commits.of_view(at.view)[at.block]
    wrong = rows.predictions != rows.labels  # never of a skipped sample
    some = wrong.nonzero().squeeze(1)
    labels, predictions = rows.labels[some], rows.predictions[some]
    # Right rows stay what they are: only a materialised rectification has to know them.
    whole = rows.logits(temperature) if settings.materialised else None
    logits = rows.logits(temperature, some) if whole is None else whole[some]
    new_label, new_predicted = replaced_logits(
        logits, labels, predictions, config.method, config.space, config.temperature
    )
    trusted = torch.zeros_like(some, dtype=torch.bool)
    if settings.trusted_above is not None:
        sharp = logits if temperature == 1 else rows.logits(1.0, some)
        trusted = _confidence(sharp, predictions) >= settings.trusted_above
        new_label[trusted] = new_predicted[trusted] = torch.nan  # no reader takes them for logits
    label_logit, predicted_logit = torch.zeros(2, len(wrong))
    label_logit[some], predicted_logit[some] = new_label, new_predicted
    arrays = {
        "wrong": wrong.index_fill(0, some[trusted], False),
        "label_logit": label_logit,
        "predicted_logit": predicted_logit,
    }
    untouched = logits[trusted]
    rectified = logits.scatter_(1, labels[:, None], new_label[:, None])
    rectified.scatter_(1, predictions[:, None], new_predicted[:, None])
    rectified[trusted] = untouched
    if whole is not None:
        whole.index_copy_(0, some, rectified)
        arrays["log_distribution"] = torch.log_softmax(whole / temperature, dim=1)
    pairs, counts = (labels * cache.num_classes + predictions).unique(return_counts=True)
    confused = torch.stack([pairs // cache.num_classes, pairs % cache.num_classes, counts], dim=1)
    statistics = {
        "rows": len(wrong) - int(cache.skipped_rows(at.block, record).sum()),
        "wrong": len(some),
        "label_is_argmax": int(((rectified.argmax(1) == labels) & ~trusted).sum()),
        "confused": confused.tolist(),
    }
    if settings.trusted_above is not None:
        statistics["trusted"] = int(trusted.sum())
    return arrays, statistics


def _confidence(logits: Tensor, predictions: Tensor) -> Tensor:
    """The probability that rows give the predicted class: float32 (n,)."""
    return torch.softmax(logits, dim=1).gather(1, predictions[:, None]).squeeze(1)


@functools.lru_cache(maxsize=1)
def _opened(path: Location, name: str, run: str) -> tuple[LogitCache, Rectification]:
    """A cache as a worker has it, opened once a run of rectify."""
    cache = LogitCache.open(path, writable=True)
    return cache, cache.rectification(name)


def _rectify_block_at(path: Location, name: str, run: str, view: int, block: int) -> None:
    """As `rectify_block`, in a process of its own."""
    rectify_block(*_opened(path, name, run), BlockId(view, block))


# ---- running --------------------------------------------------------------------------------


def _views(cache: LogitCache, wanted: int | None) -> range:
    complete = cache.complete_views
    if wanted is not None and wanted > cache.num_views:
        raise CacheError(
            f"{cache.path} has {cache.num_views} views, {wanted} were asked for",
            "Leave --views out, or run `pipeline cache-teacher` with more.",
        )
    views = range(cache.num_views if wanted is None else wanted)
    if not set(views) <= set(complete):
        leading = next(v for v in range(cache.num_views + 1) if v not in complete)
        raise CacheError(
            f"{cache.path} is not complete: {len(complete)} of {cache.num_views} views are",
            "Run `pipeline cache-teacher` again to finish it"
            + (f", or rectify what is there with --views {leading}." if leading else "."),
        )
    return views


@contextlib.contextmanager
def _workers(
    cache: LogitCache, rectification: Rectification, scheduler: str | None
) -> Iterator[Callable[[BlockId], Future[None]]]:
    """What submits a block: to threads of this process, as many as may hold a decoded block, or to
    an existing Dask cluster that sees the same path.
    """
    if scheduler is None:
        threads = threads_at_once(cache.grid, cache.num_classes, torch.get_num_threads())
        with ThreadPoolExecutor(threads) as pool:
            yield lambda at: pool.submit(rectify_block, cache, rectification, at)
        return
    path = cache.path.absolute() if isinstance(cache.path, Path) else cache.path
    with existing_cluster(scheduler) as client:
        submit = client.get_executor(pure=False).submit
        run = uuid.uuid4().hex
        yield lambda at: submit(_rectify_block_at, path, rectification.name, run, *at)


def _finished(tasks: Sequence[Future[None]]) -> Iterator[int]:
    """How many are done, after each of them. Where one fails, no other is begun."""
    try:
        for done, task in enumerate(as_completed(tasks), start=1):
            task.result()
            yield done
    finally:
        for task in tasks:
            task.cancel()
