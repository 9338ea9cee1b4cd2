"""The cache of a job, for all ranks of a launch: opened and compared with the job, or made."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stages.cache import LogitCache
from stages.cache.encoding import Encoding, is_encoding
from stages.cache.identity import SkippedSample, differences
from stages.cache.layout import BlockId
from stages.cache.lock import exclusive, joined
from stages.cache.metadata import NewCache
from stages.cache.records import Record
from stages.cache.storage import location, remove_half_written
from stages.data import skipped_samples
from stages.device import device_name, versions
from stages.distributed import first_rank_does, first_rank_first
from stages.errors import CacheError, IdentityError, refusals
from stages.inputs.probes import pixel_probes
from stages.sizes import budget_in_words
from stages.teacher.checks import teacher_warnings
from stages.teacher.job import CacheJob
from stages.teacher.logits import Blocks, FirstRows, TeacherPass
from stages.teacher.memory import views_at_once


@dataclass(frozen=True)
class OpenedCache:
    """A cache and what is to be done with it; all ranks have the same `missing`, `left` and
    `at_once`.

    fitted: the blocks that fitting its encoding has computed here. missing: those that are not
    committed; left: of these, those that are not computed. at_once: views that are made of a
    decoded image. record: what the record of each block has of its maker. warnings: whether the
    teacher fits the dataset.
    """

    cache: LogitCache
    fitted: Blocks
    missing: list[BlockId]
    left: list[BlockId]
    at_once: int
    record: Record
    warnings: list[str]


@contextlib.contextmanager
def opened(teacher: TeacherPass, out: str | Path) -> Iterator[OpenedCache]:
    """The cache at `out`, made if there is none, with room for all views; the ranks of this launch
    hold it until the end.

    Raises IdentityError if it was made otherwise, CacheError if it cannot be written or is held by
    another launch.
    """
    job = teacher.job
    where = location(out)
    record: Record = {"device": device_name(job.device), "versions": versions()}
    with contextlib.ExitStack() as held:

        def hold() -> None:
            if isinstance(where, Path):
                with refusals(CacheError, f"cannot make {where}", "Choose another --out."):
                    where.mkdir(parents=True, exist_ok=True)
            held.enter_context(exclusive(where, shared=job.ranks.world > 1))

        first_rank_does(job.ranks, hold)
        if not job.ranks.first:
            held.enter_context(joined(where))
        with first_rank_first(job.ranks):
            cache, fitted, warnings = _made_or_open(teacher, out, record)

        def look() -> tuple[list[BlockId], list[BlockId], int]:
            cache.commits.extent()  # reads all records: damage is reported before hours of work
            missing = cache.commits.missing(range(job.config.views))
            return missing, [at for at in missing if at not in fitted], views_at_once(job)

        missing, left, at_once = first_rank_does(job.ranks, look)
        yield OpenedCache(cache, fitted, missing, left, at_once, record, warnings)


def _made_or_open(
    teacher: TeacherPass, out: str | Path, record: Record
) -> tuple[LogitCache, Blocks, list[str]]:
    """The cache; of a new one the blocks that were computed to fit its encoding, and warnings."""
    job = teacher.job
    fitted = Blocks()
    warnings: list[str] = []
    cache = open_existing(job, out)
    if cache is None:
        fitted = teacher.first_blocks()
        first = FirstRows.of_blocks(job, fitted)
        cache = LogitCache.create(out, _new_cache(job, first.fitted(job.config), record))
        warnings = teacher_warnings(first.rows, first.labels, job.splits.train.class_names)
    skips = skipped_samples(job.splits)
    _check_skips(job, cache, skips)
    if job.ranks.first:
        remove_half_written(cache.path)
        cache.add_skips(skips)
        cache.grow(job.config.views)
    return cache, fitted, warnings


def open_existing(job: CacheJob, out: str | Path) -> LogitCache | None:
    """The cache at `out` if there is one. Raises IdentityError if it was made otherwise."""
    if not LogitCache.exists(out):
        return None
    cache = LogitCache.open(out, writable=True)
    if differing := differences(job.identity, cache.identity):
        raise IdentityError(
            f"{out} was made from something else: {'; '.join(differing[:3])}",
            "Use the settings it was made with, or another --out.",
        )
    if not is_encoding(job.config.encoding, cache.encoding):
        known = ", ".join(f"{k}={v}" for k, v in cache.encoding.shown.items())
        raise IdentityError(
            f"{out} is encoded as {cache.encoding.name}{f' ({known})' if known else ''}, "
            f"not {job.config.encoding}",
            "Leave --encoding out, or choose another --out.",
        )
    budget, fidelity = job.config.budget, cache.fidelity
    if budget is not None and fidelity is not None and not fidelity.holds(budget):
        known = budget_in_words(
            {t: float(f"{fidelity.known_kl(t) or math.nan:.2g}") for t in budget}
        )
        raise IdentityError(
            f"{out} holds a mean KL of {known}, not {budget_in_words(budget)}",
            "Leave --max-kl out, or choose another --out.",
        )
    return cache


def _new_cache(job: CacheJob, coding: Encoding, record: Record) -> NewCache:
    return NewCache(
        identity=job.identity,
        coding=coding,
        num_views=job.config.views,
        dataset_index=job.row_order,
        labels=job.splits.train.labels,
        eval_labels=job.splits.test.labels,
        pixel_probes=pixel_probes(job.splits.train, job.policy, job.image_size),
        provenance={  # what was used and does not decide which numbers are right
            "config": msgspec.to_builtins(
                msgspec.structs.replace(job.config, views_at_once=None)  # shows in no byte
            ),
            **record,
            "normalisation": job.normalised,
        },
        block_rows=job.config.block_rows,
    )


def _check_skips(job: CacheJob, cache: LogitCache, skips: list[SkippedSample]) -> None:
    """Raise IdentityError unless the samples left out are those of the cache, or more of them where
    it is not finished.
    """
    ours = {(skip.split, skip.sample) for skip in skips}
    theirs = {(skip.split, skip.sample) for skip in cache.skips}
    if theirs - ours:
        raise IdentityError(
            f"{cache.path} leaves out {len(theirs)} samples, this job {len(theirs - ours)} fewer",
            "Prepare the job with begun=begun_at(path).",
        )
    views = job.config.views
    if (
        ours - theirs
        and not cache.commits.missing(range(views))
        and (cache.eval_commits.is_complete(0) or not cache.tested)
    ):
        raise IdentityError(
            f"{cache.path} is finished: {len(ours - theirs)} more samples cannot be left out of it",
            "Leave --skip out; give it to train-student where its images are broken now.",
        )
