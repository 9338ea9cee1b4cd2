"""How many views stage one makes of an image while it is decoded, by the memory that they take.

No number in a cache depends on it: see `stages.teacher.blocks`.
"""

from stages.errors import ConfigError
from stages.sizes import in_words
from stages.targets.memory import free_memory
from stages.teacher.job import CacheJob

MOST_VIEWS = 8
"""Views at once where none are asked for: with more, decoding is a small part of the work."""
MOST_BYTES = 4 * 2**30
"""What runs may hold where none are asked for, or a quarter of what is free if that is less."""
WAITING = 2
"""Blocks that wait to be written, at the least."""


def waiting(job: CacheJob, at_once: int) -> int:
    """How many blocks may wait to be written. On a GPU the next run is computed meanwhile."""
    return WAITING if job.device.type == "cpu" else max(WAITING, at_once)


def held_bytes(job: CacheJob, at_once: int) -> int:
    """Bytes that runs of so many views hold at most: float32 rows of the run, of the blocks that
    wait and of the one that is written, and one more where images are read in another order; and
    twice the pixels of a batch in every view, as workers sent them and put together.
    """
    block = 4 * job.num_classes * job.grid.block_rows
    channels, *sides = job.splits.train.shape
    height, width = (job.image_size or side for side in sides)
    batch = channels * height * width * min(job.config.batch_size, len(job.splits.train))
    blocks = at_once + waiting(job, at_once) + 1 + job.splits.train.in_order
    return block * blocks + 2 * batch * at_once


def views_at_once(job: CacheJob) -> int:
    """How many views of an image are made while it is decoded: those asked for, else as many as fit
    a bound; one where images are in memory. No number in a cache depends on it.

    Raises ConfigError where those asked for take more memory than is free.
    """
    asked, free = job.config.views_at_once, free_memory()
    if asked is None:
        bound = min(MOST_BYTES, free // (4 * job.ranks.world))
        most = 1 if job.splits.train.images is not None else min(MOST_VIEWS, job.config.views)
        return next((k for k in range(most, 1, -1) if held_bytes(job, k) <= bound), 1)
    at_once = min(asked, job.config.views)
    if at_once > 1 and (needed := held_bytes(job, at_once)) > free:
        fits = next((k for k in range(at_once, 1, -1) if held_bytes(job, k) <= free // 2), 1)
        raise ConfigError(
            f"{at_once} views at once hold {in_words(needed)}, {in_words(free)} are free",
            f"Give --views-at-once {fits}, or a smaller block_rows for a new cache.",
        )
    return at_once
