"""How large and how long stage one would be, measured before anything is written."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.cache.encoding import encoding
from stages.cache.layout import block_grid
from stages.cache.measure import row_bytes_on_disk
from stages.cache_teacher import CacheJob, missing_blocks, open_existing, teacher_logits
from stages.errors import CacheError

MEASURED_SECONDS = 2.0


@dataclass(frozen=True)
class CachePlan:
    """What a run would do. bytes are on disk; missing_* is what is not there already."""

    samples: int
    views: int
    blocks: int
    missing_blocks: int
    encoding: str
    bytes_per_view: float
    files: int
    samples_per_second: float
    free_bytes: int
    device: str

    @property
    def missing_share(self) -> float:
        return self.missing_blocks / self.blocks

    @property
    def total_bytes(self) -> float:
        return self.bytes_per_view * self.samples * self.views

    @property
    def hours(self) -> float:
        return self.samples * self.views * self.missing_share / self.samples_per_second / 3600

    def check_fits(self, out: str | Path) -> None:
        """Raise CacheError if the disk is too small."""
        if (needed := self.total_bytes * self.missing_share) > self.free_bytes:
            raise CacheError(
                f"{out} needs {needed / 1e6:,.1f} MB more, "
                f"{self.free_bytes / 1e6:,.1f} MB are free",
                "Cache fewer --views, use --encoding float16, or choose a larger disk.",
            )


def plan_cache(job: CacheJob, out: str | Path) -> CachePlan:
    """Measure the teacher on real batches for about two seconds and extrapolate."""
    config, train = job.config, job.splits.train
    feed = job.feed(train, job.policy)
    measured: list[torch.Tensor] = []
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    parts = order.split(config.batch_size)
    teacher_logits(job, feed, parts[0], 0)  # warms up: allocations, kernels, workers
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < MEASURED_SECONDS or not measured:
        # .cpu() waits for the device
        measured.append(teacher_logits(job, feed, parts[len(measured) % len(parts)], 0).cpu())
    elapsed = time.perf_counter() - started
    logits = torch.cat(measured[: len(parts)])

    cache = open_existing(job, out)
    coding = cache.encoding if cache else encoding(config.encoding, job.num_classes)
    grid = cache.grid if cache else block_grid(len(train), job.num_classes, config.block_rows)
    blocks = config.views * grid.num_blocks
    missing = len(missing_blocks(cache, config.views)) if cache else blocks
    arrays = len(coding.arrays()) + 1  # and `prediction`
    metadata = 4 + len(coding.arrays()) + 5 + 3 + 1  # groups, arrays, whole arrays, test logits
    return CachePlan(
        samples=len(train),
        views=config.views,
        blocks=blocks,
        missing_blocks=missing,
        encoding=coding.name,
        bytes_per_view=row_bytes_on_disk(coding, logits),
        files=blocks * arrays + config.views + metadata,
        samples_per_second=sum(map(len, measured)) / elapsed,
        device=str(job.device),
        free_bytes=shutil.disk_usage(_existing(Path(out))).free,
    )


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
