"""Stage two: which rows the teacher has wrong, and what they should say instead.

    pipeline rectify digits.zarr --method pairwise --temperature 4

Runs on Dask, one task a block; each holds one block in memory. A wrong row is one whose stored
prediction (taken before any encoding) differs from the label, on that view. Rectification replaces
two of its logits, the label's and the predicted class's, and only those two are stored.
The formulas are in `stages.objectives.rectification`, the statistics in `stages.tally`.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import msgspec
import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.encoding import check_offset, check_temperature
from stages.cache.layout import threads_at_once
from stages.cache.lock import exclusive
from stages.cache.rectified import Rectification, RectificationSettings
from stages.cache.storage import Location, remove_half_written
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
        made = {**asked, "materialise": settings.materialised, **more}
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
    check_unmixed(cache.identity.views.policy, "rectification")
    settings = settings_of(config)
    check_temperature(cache.encoding, 1.0 if settings.temperature_free else settings.temperature)
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
        tasks = (
            _run_on_threads(cache, rectification, missing)
            if config.scheduler is None
            else _run_on_cluster(cache, rectification, missing, config.scheduler)
        )
        for done, _ in enumerate(tasks, start=1):
            reporter.progress("rectify", done, len(missing), "blocks")

        # 3) what came of it, from every block's record
        rectification = cache.rectification(name)  # reads the records afresh
        rectification.commits.compact_rest()
        tally = Tally(cache.num_classes)
        for _, records in rectification.commits.each_view():
            tally.add(records)
        statistics = tally.summary(cache.identity.dataset.class_names)
        rectification.write_statistics(statistics)
    return statistics


# ---- blocks ---------------------------------------------------------------------------------


def rectify_block(cache: LogitCache, rectification: Rectification, view: int, block: int) -> None:
    """Rectify and commit one block: a Dask task."""
    arrays, statistics = rectified_block(cache, rectification.settings, view, block)
    record = {"settings": msgspec.to_builtins(rectification.settings), "statistics": statistics}
    rectification.write_block(view, block, arrays, record)


def rectified_block(
    cache: LogitCache, settings: RectificationSettings, view: int, block: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays of one rectified block, each (n, ...) as layout.py names them; its statistics."""
    config = config_of(settings)
    temperature = 1.0 if settings.temperature_free else settings.temperature
    rows = cache.read_encoded_block(view, block)
    record = cache.commits.of_view(view)[block]
    wrong = rows.predictions != rows.labels  # never of a skipped sample
    at = wrong.nonzero().squeeze(1)
    labels, predictions = rows.labels[at], rows.predictions[at]
    # Right rows stay what they are: only a materialised rectification has to know them.
    whole = rows.logits(temperature) if settings.materialised else None
    logits = rows.logits(temperature, at) if whole is None else whole[at]
    new_label, new_predicted = replaced_logits(
        logits, labels, predictions, config.method, config.space, config.temperature
    )
    label_logit, predicted_logit = torch.zeros(2, len(wrong))
    label_logit[at], predicted_logit[at] = new_label, new_predicted
    arrays = {"wrong": wrong, "label_logit": label_logit, "predicted_logit": predicted_logit}
    rectified = logits.scatter_(1, labels[:, None], new_label[:, None])
    rectified.scatter_(1, predictions[:, None], new_predicted[:, None])
    if whole is not None:
        whole.index_copy_(0, at, rectified)
        arrays["log_distribution"] = torch.log_softmax(whole / temperature, dim=1)
    pairs, counts = (labels * cache.num_classes + predictions).unique(return_counts=True)
    confused = torch.stack([pairs // cache.num_classes, pairs % cache.num_classes, counts], dim=1)
    statistics = {
        "rows": len(wrong) - int(cache.skipped_rows(block, record).sum()),
        "wrong": len(at),
        "label_is_argmax": int((rectified.argmax(1) == labels).sum()),
        "confused": confused.tolist(),
    }
    return arrays, statistics


def _rectify_block_at(path: Location, name: str, view: int, block: int) -> None:
    """As `rectify_block`, in a process of its own."""
    cache = LogitCache.open(path, writable=True)
    rectify_block(cache, cache.rectification(name), view, block)


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


def _run_on_threads(
    cache: LogitCache, rectification: Rectification, blocks: list[tuple[int, int]]
) -> Iterator[None]:
    """One task a block on this machine's cores, so many blocks at a time; yields after each."""
    threads = threads_at_once(cache.grid, cache.num_classes, torch.get_num_threads())
    # As a partial: Dask would take the arguments apart.
    task = dask.delayed(functools.partial(rectify_block, cache, rectification))
    for start in range(0, len(blocks), threads):
        tasks = [task(*block) for block in blocks[start:][:threads]]
        dask.compute(*tasks, scheduler="threads", num_workers=threads, optimize_graph=False)
        yield from (None for _ in tasks)


def _run_on_cluster(
    cache: LogitCache, rectification: Rectification, blocks: list[tuple[int, int]], address: str
) -> Iterator[None]:
    """One task a block on an existing Dask cluster that sees the same path."""
    from distributed import as_completed

    with existing_cluster(address) as client:
        path = cache.path.absolute() if isinstance(cache.path, Path) else cache.path
        tasks = [
            client.submit(_rectify_block_at, path, rectification.name, *b, pure=False)
            for b in blocks
        ]
        for task in as_completed(tasks, loop=client.loop):
            task.result()
            yield
