"""How much memory targets may take, and how an epoch is read so that they do not take more."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.errors import ConfigError
from stages.training.groups import ChunkGroups
from stages.training.memory import free_memory

RESIDENT_BYTES = 2**30
"""Slabs of all views are kept where they take no more together; on a GPU see `resident_bytes`."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_bytes(text: str, name: str) -> int:
    """Bytes of `2GB` (10^9), `1.5GiB` (2^30), `800M`, `4096`. Raises ConfigError, naming `name`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise ConfigError(f"{name} is '{text}', not a size", "Write 2GB, 1.5GiB or 800MB.")
    number, unit, binary = match.groups()
    return round(float(number) * (_BINARY if binary else _UNITS)[unit.upper()])


def in_words(count: float) -> str:
    """A size that `parse_bytes` takes, rounded up: 25MB, 1.63GB."""
    prefix, factor = next(((p, f) for p, f in reversed(_UNITS.items()) if count >= f), ("", 1))
    return f"{math.ceil(count / factor * 100) / 100:g}{prefix.replace('K', 'k')}B"


def available_bytes(device: torch.device) -> int:
    """Memory that is free where targets are held: on the GPU, or what this process may take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def slab_bytes(caches: Sequence[LogitCache], rows: int, views: int = 1) -> int:
    """What so many rows of so many views take in memory, of all caches together: the views share
    where each sample lies and the labels.

    Counted with a rectification, whether one is used or not: the order of samples is then the same
    for every student of a cache.
    """
    index = torch.int64.itemsize * (caches[0].num_samples + rows)
    return sum(views * rows * cache.row_bytes + index for cache in caches)


def resident_bytes(device: torch.device) -> int:
    """How much the targets of all views may take and be kept. Views are read whole either way, so
    that no result depends on it.
    """
    if device.type != "cuda":
        return RESIDENT_BYTES
    return max(RESIDENT_BYTES, available_bytes(device) // 4)


@dataclass(frozen=True)
class SlabPlan:
    """How targets are read. groups: None where views are read whole. resident: all views are kept
    once they were read. share: the only group of every epoch that this process reads, as each of
    several ranks has its own.
    """

    groups: ChunkGroups | None = None
    resident: bool = False
    share: int | None = None


def plan_slabs(
    caches: Sequence[LogitCache],
    num_views: int,
    budget: int | None,
    samples: Tensor,
    batch_size: int,
    device: torch.device,
    at_once: int = 1,
) -> SlabPlan:
    """How to read `num_views` views so that targets take no more than `budget` bytes on `device`:
    the slab in use and the next.

    samples: int64, those that are trained on. at_once: how many views an epoch shows; several are
    not read in groups: `budget` is None then. Raises ConfigError, naming a budget that works, where
    the budget is too small, or where none is given and half of the available memory is. An order
    of samples that depended on the machine would not be the seed's: nobody chooses silently.
    """
    samples_of_view, held = caches[0].num_samples, min(2 * at_once, num_views)
    needed = slab_bytes(caches, samples_of_view, held)
    every, most = slab_bytes(caches, samples_of_view, num_views), resident_bytes(device)
    resident = every <= (most if budget is None else min(most, budget))
    if budget is None and needed > (half := available_bytes(device) // 2):
        raise ConfigError(
            f"the targets of {held} views take {in_words(needed)}, more than half of "
            f"the {in_words(2 * half)} that are free",
            f"Give --slab-memory {in_words(half)} to read and shuffle groups of chunks, or as much "
            "as there is."
            if at_once == 1
            else "Free memory, or use a loss that sees one view of a sample at a time.",
        )
    if resident or budget is None or needed <= budget:
        return SlabPlan(None, resident)
    return SlabPlan(_chunk_groups(caches, budget, samples, batch_size))


def _chunk_groups(
    caches: Sequence[LogitCache], budget: int, samples: Tensor, batch_size: int
) -> ChunkGroups:
    cache = caches[0]
    if any(not torch.equal(c.dataset_index, cache.dataset_index) for c in caches[1:]):
        raise ConfigError(
            "caches whose rows lie in different orders cannot be read in groups",
            "Leave --slab-memory out, or make it large enough for whole views.",
        )
    chunk_rows = cache.grid.chunk_rows

    def groups(most: int) -> ChunkGroups:
        return ChunkGroups(cache.row_of, chunk_rows, most)

    def holds_a_batch(most: int) -> bool:  # a batch may lie across two groups, never three
        return groups(most).smallest(samples) > batch_size

    empty = slab_bytes(caches, 0)
    most = (budget // 2 - empty) // (slab_bytes(caches, chunk_rows) - empty)
    if most >= 1 and holds_a_batch(most):
        return groups(most)
    chunks = next(filter(holds_a_batch, range(1, groups(1).num_chunks)), groups(1).num_chunks)
    least = 2 * slab_bytes(caches, min(chunks * chunk_rows, cache.num_samples))
    raise ConfigError(
        f"a slab memory of {in_words(budget)} is too small: two groups of whole chunks "
        f"({chunk_rows} rows each), no smaller than a batch, take {in_words(least)}",
        f"Give --slab-memory {in_words(least)} or more.",
    )
