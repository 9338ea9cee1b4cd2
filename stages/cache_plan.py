"""How large and how long stage one would be, measured before anything is written."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.cache.encoding import FIT_ROWS, Encoding, Measured, fit_encoding, measure_all
from stages.cache.layout import block_grid
from stages.cache.location import location
from stages.cache_job import CacheJob, check_finite, row_order, teacher_logits
from stages.cache_teacher import missing_blocks, open_existing
from stages.errors import CacheError

MEASURED_SECONDS = 2.0
MOST_SECONDS = 20.0
"""The teacher is measured on the rows that encodings are fitted to, or on what it does in this."""


@dataclass(frozen=True)
class CachePlan:
    """What a run would do. bytes are on disk; missing_* is what is not there already.

    encodings: every encoding on real rows of this teacher. free_bytes: None where there
    is no knowing, in an object store. samples_per_second: of one rank; hours: of all together.
    """

    samples: int
    views: int
    blocks: int
    missing_blocks: int
    encoding: str
    bytes_per_view: float
    files: int
    samples_per_second: float
    free_bytes: int | None
    device: str
    encodings: list[Measured]
    ranks: int = 1

    @property
    def missing_share(self) -> float:
        return self.missing_blocks / self.blocks

    @property
    def total_bytes(self) -> float:
        return self.bytes_per_view * self.samples * self.views

    @property
    def hours(self) -> float:
        longest_share = -(-self.missing_blocks // self.ranks) / self.blocks
        return self.samples * self.views * longest_share / self.samples_per_second / 3600

    def check_fits(self, out: str | Path) -> None:
        """Raise CacheError if the disk is too small."""
        needed = self.total_bytes * self.missing_share
        if self.free_bytes is not None and needed > self.free_bytes:
            raise CacheError(
                f"{out} needs {needed / 1e6:,.1f} MB more, "
                f"{self.free_bytes / 1e6:,.1f} MB are free",
                "Cache fewer --views, use a smaller --encoding, or choose a larger disk.",
            )


def plan_cache(job: CacheJob, out: str | Path) -> CachePlan:
    """Measure the teacher and all encodings on real rows, and extrapolate; on one rank.

    Raises CacheError if the encoding asked for does not hold the KL asked for.
    """
    config, train = job.config, job.splits.train
    feed = job.feed(train, job.policy)
    order = row_order(job)
    parts = order[: max(FIT_ROWS, config.batch_size)].split(config.batch_size)
    teacher_logits(job, feed, parts[0], 0)  # warms up: allocations, kernels, workers
    measured: list[torch.Tensor] = []
    started, elapsed = time.perf_counter(), 0.0
    while elapsed < MEASURED_SECONDS or (len(measured) < len(parts) and elapsed < MOST_SECONDS):
        # .cpu() waits for the device
        measured.append(teacher_logits(job, feed, parts[len(measured) % len(parts)], 0).cpu())
        elapsed = time.perf_counter() - started
    logits = torch.cat(measured[: len(parts)])[:FIT_ROWS]
    check_finite(logits, order, "view 0")
    labels = train.labels[order[: len(logits)]]

    cache = open_existing(job, out)
    if cache is not None:
        coding = cache.encoding
    else:
        coding = fit_encoding(config.encoding, logits, labels, config.max_kl)
    coding.encode(logits, labels)  # raises where a logit is out of its range
    encodings = measure_all(logits, labels, config.max_kl, more=coding)
    chosen = next(m for m in encodings if m.coding is coding)
    grid = cache.grid if cache else block_grid(len(train), job.num_classes, config.block_rows)
    blocks = config.views * grid.num_blocks
    missing = len(missing_blocks(cache, config.views)) if cache else blocks
    return CachePlan(
        samples=len(train),
        views=config.views,
        blocks=blocks,
        missing_blocks=missing,
        encoding=coding.name,
        bytes_per_view=chosen.row_bytes,
        files=count_files(coding, config.views, grid.num_blocks),
        samples_per_second=sum(map(len, measured)) / elapsed,
        device=str(job.device),
        free_bytes=_free_bytes(out),
        encodings=encodings,
        ranks=job.ranks.world,
    )


def count_files(coding: Encoding, views: int, blocks_per_view: int) -> int:
    """How many files or objects a finished cache has."""
    arrays = len(coding.arrays()) + 1  # and `prediction`
    whole = len(coding.calibration_arrays()) + 4  # one chunk each
    # documents of groups and arrays, whole arrays, the copy of the attributes, the test's record
    metadata = 3 + (arrays + whole) + whole + 1 + 1
    return views * (blocks_per_view * arrays + 1) + metadata


def _free_bytes(out: str | Path) -> int | None:
    where = location(out)
    return shutil.disk_usage(_existing(where)).free if isinstance(where, Path) else None


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
