"""What is measured before stage one: the pace of a teacher, and that of writing a cache."""

import tempfile
import time
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.encoding import (
    Encoding,
    checked_rows,
    compare,
    fit_rows,
    views_to_fit,
)
from stages.cache.layout import BlockGrid
from stages.cache.metadata import NewCache
from stages.device import versions
from stages.inputs.probes import PROBES
from stages.teacher.job import CacheJob
from stages.teacher.logits import TeacherPass

MEASURED_SECONDS = 2.0
MOST_SECONDS = 20.0
"""The teacher is measured on the rows that encodings are fitted to, or on what it does in this."""
_SECOND_SECONDS = 5.0
"""A second view is measured where it takes no longer, for what only several views can show."""
_WRITTEN = 2**23
"""Logits that writing is timed on."""


def measured_teacher(job: CacheJob, at_once: int = 1) -> tuple[Tensor, float]:
    """Logits of the first rows of view 0, float32 (n, C), and how many rows a second there are.
    at_once: views that are made of an image while it is decoded; a row is one view of a sample.

    Runs of batches grow: what workers feed shows its pace once several batches are under way.
    """
    order, most = job.row_order, fit_rows(job.num_classes)
    batch, wanted = min(job.config.batch_size, len(order)), min(most, len(order))
    teacher, views = TeacherPass.of(job), range(at_once)
    teacher.of_views(order[: -(-batch // at_once)], views)  # warms up: allocations, workers
    kept: list[Tensor] = []
    timed: list[tuple[int, float]] = []
    done, run, began = 0, batch, time.perf_counter()
    while (spent := time.perf_counter() - began) < MOST_SECONDS:
        if done >= wanted and spent > MEASURED_SECONDS:
            break
        samples = order[torch.arange(done, done + -(-run // at_once)) % len(order)]
        started = time.perf_counter()
        logits = teacher.of_views(samples, views)  # waits for the device
        timed.append((at_once * len(samples), time.perf_counter() - started))
        if done < wanted:
            kept.append(logits[0])
        done, run = done + run, max(batch, min(2 * run, most // batch * batch))
    teacher.feed.close()
    settled = timed[len(timed) // 2 :]
    pace = sum(rows for rows, _ in settled) / sum(seconds for _, seconds in settled)
    return torch.cat(kept)[:wanted], pace


def second_view(
    job: CacheJob, rows: int, seconds: float, cache: LogitCache | None
) -> Tensor | None:
    """The first rows of view 1: float32 (n, C). None where there is one view, or where it takes
    long and the encoding that is asked for does not need it. seconds: what as many rows of view 0
    took.
    """
    asked = job.config.encoding if cache is None else cache.encoding.name
    needed = 1 in views_to_fit(asked, job.config.views)
    if not needed and (job.config.views == 1 or seconds > _SECOND_SECONDS):
        return None
    teacher = TeacherPass.of(job)
    logits = teacher.finite_logits(job.row_order[:rows], 1)
    teacher.feed.close()
    return logits


def write_seconds(
    job: CacheJob, coding: Encoding, logits: Tensor, labels: Tensor, grid: BlockGrid
) -> float:
    """What it takes to encode, check, write and commit a row: of a block that is thrown away."""
    rows = min(len(logits), grid.block_rows, max(1, _WRITTEN // job.num_classes))
    logits, labels = logits[:rows], labels[:rows]
    with tempfile.TemporaryDirectory() as folder:
        cache = _empty_cache(folder, job, coding, torch.arange(rows), labels, rows)
        cache.write_block(0, 0, logits, logits.argmax(1), {})
        started = time.perf_counter()
        cache.write_block(job.config.views - 1, 0, logits, logits.argmax(1), {})
        written = time.perf_counter() - started
    some = slice(checked_rows(job.num_classes))
    arrays = coding.encode(logits[some], labels[some])
    started = time.perf_counter()
    compare(coding, logits[some], arrays)
    checked = time.perf_counter() - started  # as much in a block of more rows
    return max(0.0, written - checked) / rows + checked / grid.block_rows


def made_empty(job: CacheJob, coding: Encoding, order: Tensor) -> tuple[int, float]:
    """Bytes and seconds of the cache without any block: it is made, and thrown away."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        labels, block_rows = job.splits.train.labels, job.config.block_rows
        _empty_cache(folder, job, coding, order, labels, block_rows)
        files = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
        return sum(files), time.perf_counter() - started


def _empty_cache(
    folder: str, job: CacheJob, coding: Encoding, order: Tensor, labels: Tensor, block_rows: int
) -> LogitCache:
    """A cache of some rows, in the form that the real one will have."""
    dataset = msgspec.structs.replace(job.identity.dataset, num_samples=len(order))
    new = NewCache(
        msgspec.structs.replace(job.identity, dataset=dataset),
        coding,
        job.config.views,
        order,
        labels,
        job.splits.test.labels,
        pixel_probes=[2**32 - 1] * PROBES,
        provenance={"config": msgspec.to_builtins(job.config), "versions": versions()},
        block_rows=block_rows,
    )
    return LogitCache.create(folder, new)
