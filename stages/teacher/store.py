"""The cache that a job goes on with, compared with what the job is of; or a new one."""

import math
from pathlib import Path

import msgspec
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.encoding import Encoding, is_encoding
from stages.cache.identity import differences
from stages.cache.layout import BlockId
from stages.cache.metadata import NewCache
from stages.cache.storage import remove_half_written
from stages.data import skipped_samples
from stages.device import device_name, versions
from stages.errors import IdentityError
from stages.inputs.probes import pixel_probes
from stages.sizes import budget_in_words
from stages.teacher.job import CacheJob
from stages.teacher.logits import TeacherPass

Blocks = dict[BlockId, Tensor]
"""(view, block) -> float32 logits (n, C)."""


def opened(teacher: TeacherPass, out: str | Path) -> tuple[LogitCache, Blocks]:
    """The cache, with room for all views; and the blocks that fitting its encoding has computed.

    Raises IdentityError if it was made otherwise, CacheError if it cannot be written.
    """
    job, fitted = teacher.job, Blocks()
    cache = open_existing(job, out)
    if cache is None:
        fitted, coding = teacher.fitted_encoding()
        cache = LogitCache.create(out, _new_cache(job, coding))
    _check_skips(job, cache)
    if job.ranks.first:
        remove_half_written(cache.path)
        cache.add_skips(skipped_samples(job.splits))
        cache.grow(job.config.views)
    return cache, fitted


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


def _new_cache(job: CacheJob, coding: Encoding) -> NewCache:
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
            "device": device_name(job.device),
            "versions": versions(),
            "normalisation": job.normalised,
        },
        block_rows=job.config.block_rows,
    )


def _check_skips(job: CacheJob, cache: LogitCache) -> None:
    """Raise IdentityError unless the samples left out are those of the cache, or more of them where
    it is not finished.
    """
    ours = {(skip.split, skip.sample) for skip in skipped_samples(job.splits)}
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
