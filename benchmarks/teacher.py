"""The teacher: stage one against the bare forward passes that it cannot do without."""

import math
import statistics
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from benchmarks.measure import Figure, Ratio, alternately, seconds, steadily
from stages import device
from stages.cache import LogitCache
from stages.cache_teacher import cache_teacher
from stages.data import Splits
from stages.errors import ConfigError
from stages.settings import CacheConfig, Dtype
from stages.teacher.job import CacheJob, prepare
from stages.teacher.logits import TeacherPass

PASS_TARGET = 1.05
FIXED = "mostly fixed costs"
"""Note of what is too small for a ratio to say how it is at size."""
_WARM_BATCHES = 4
_LEAST_SECONDS = 1.0
"""A pass over so small a data set that it takes less appends several views at once."""


@torch.inference_mode()
def forward(job: CacheJob, pixels: Tensor, dtype: Dtype) -> Tensor:
    """The teacher's float32 logits (B, C) of uint8 pixels (B, C, H, W), on its device."""
    return device.forward(job.model.module, job.normalise(pixels), dtype)


def teacher_figures(
    config: CacheConfig,
    splits: Splits,
    folder: Path,
    turns: int,
    small: bool = False,
    target: float = PASS_TARGET,
) -> list[Ratio | Figure]:
    """Stage one appending views to a cache in `folder`, against bare forwards of the same rows;
    and how long encoding and writing keep the thread busy that does them meanwhile. small: of
    views so short that what a view costs whatever its size is most of the pass: no target. target:
    of the pass against the forwards.

    Raises ConfigError where the view policy has too few views to append any.
    """
    job, out = prepare(config, splits), folder / "passes.zarr"
    teacher, order = TeacherPass.of(job), job.row_order
    teacher.logits(order[: _WARM_BATCHES * config.batch_size], 0)  # warms up
    logits = torch.empty(0)

    def first() -> None:
        nonlocal logits
        logits = teacher.logits(order, 0)

    taken = seconds(first, job.device)
    most = math.inf if job.policy.count is None else (job.policy.count - 1) // (turns + 1)
    if most < 1:
        raise ConfigError(f"'{config.augment}' has too few views to append some in every turn")
    each = int(min(most, max(1, math.ceil(_LEAST_SECONDS / taken))))
    done = 0

    def append() -> float:
        nonlocal done
        done += each
        longer = msgspec.structs.replace(config, views=done)
        return seconds(lambda: cache_teacher(replace(job, config=longer), out))

    def bare() -> float:
        def views() -> None:
            for view in range(each):
                teacher.logits(order, view)

        return seconds(views, job.device)

    append()  # makes the cache, fits its encoding, and computes the test split
    note = f"{each} view(s) of {len(order):,}, {job.model.architecture}, {config.dtype}"
    ratio = alternately(
        "teacher pass / bare forward",
        append,
        bare,
        turns,
        target=None if small else target,
        note=f"{note}; {FIXED}" if small else note,
    )
    teacher.feed.close()
    more = (a - b for a, b in zip(ratio.ours, ratio.yardstick, strict=True))
    fixed = Figure(
        name="teacher pass, what a view costs beyond its forward",
        value=1e3 * statistics.median(more) / each,
        unit="ms",
        note=f"{FIXED}, {each} views at once",
    )
    rates = _rates(ratio, each * len(order), note)
    busy = _busy(LogitCache.open(out, writable=True), logits.cpu(), taken)
    return [ratio, *([fixed] if small else []), *rates, *busy]


def _rates(ratio: Ratio, images: int, note: str) -> list[Figure]:
    """Images a second of stage one and of bare forwards, of so many images in a turn."""
    return [
        Figure(
            name=f"{what}, training images",
            value=images / statistics.median(times),
            unit="images/s",
            note=note,
        )
        for what, times in (("stage one", ratio.ours), ("bare forward", ratio.yardstick))
    ]


def _busy(cache: LogitCache, logits: Tensor, forward_seconds: float) -> list[Ratio | Figure]:
    """Encoding and writing of one view, alone, as shares of the forward passes they overlap."""
    labels, predictions = cache.row_labels, logits.argmax(1)
    blocks = [(b, cache.grid.rows(b)) for b in range(cache.grid.num_blocks)]
    encode = steadily(lambda: [cache.encoding.encode(logits[r], labels[r]) for _, r in blocks])()

    def write() -> None:
        for number, rows in blocks:
            cache.write_block(0, number, logits[rows], predictions[rows], {})

    both = steadily(write)()
    note = "busy in a thread of its own while the next block is computed"
    return [
        Figure(
            name="encoding, share of the bare forward",
            value=encode / forward_seconds,
            unit="",
            note=note,
        ),
        Figure(
            name="measuring fidelity, compressing, writing, share of the bare forward",
            value=max(0.0, both - encode) / forward_seconds,
            unit="",
            note=note,
        ),
    ]
