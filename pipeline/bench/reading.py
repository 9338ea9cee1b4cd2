"""Reading targets: a slab of the cache, against the raw array and against copying memory.

Each is one epoch's worth of a view: read from disk (from the page cache, as all of them are read
before), then handed out as float32 rows, batch by batch, in one random order of the samples.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.bench.excerpt import decoded_at, excerpt_rows
from pipeline.bench.measure import Figure, Ratio, in_turns, steadily
from stages.cache import LogitCache

BATCH = 256
_ORDER = 0
"""Seed of the random order, a generator's own."""

Pass = Callable[[], object]
"""Reads a view once and hands out all rows."""


def random_order(rows: int) -> Tensor:
    """int64 (rows,): a permutation, always the same."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(_ORDER))


def slab_pass(cache: LogitCache, device: torch.device) -> Pass:
    """A slab as a student reads it: encoded, then decoded for the rows of each batch."""
    rows, view = excerpt_rows(cache), cache.complete_views[0]
    samples = cache.dataset_index[:rows][random_order(rows)].to(device)
    temperature = decoded_at(cache.encoding)
    runs = None if rows == cache.num_samples else [slice(0, rows)]

    def read() -> None:
        targets = cache.read_view(view, runs=runs).to(device)
        for part in samples.split(BATCH):
            targets.rows(part, temperature)

    return read


def raw_pass(path: Path, rows: int, device: torch.device) -> Pass:
    """np.load of a float32 array (rows, C)."""
    order = random_order(rows)

    def read() -> None:
        array = torch.from_numpy(np.load(path))
        for part in order.split(BATCH):
            array[part].to(device)

    return read


def copy_pass(array: NDArray[np.float32]) -> Pass:
    """As many bytes from memory to memory, where both lie there already: the limit."""
    target = np.empty_like(array)

    def copy() -> None:
        np.copyto(target, array)

    return copy


def decoded_view(cache: LogitCache) -> NDArray[np.float32]:
    """float32 (n, C): the rows that a pass reads, in row order."""
    rows = excerpt_rows(cache)
    targets = cache.read_view(cache.complete_views[0], runs=[slice(0, rows)])
    decoded = targets.rows(cache.dataset_index[:rows], decoded_at(cache.encoding))
    return np.ascontiguousarray(decoded.numpy())


def reading_figures(
    cache: LogitCache, folder: Path, turns: int, device: torch.device
) -> list[Ratio | Figure]:
    """A slab of this cache, as it is encoded. folder: for the raw array."""
    logits, rows = decoded_view(cache), excerpt_rows(cache)
    np.save(folder / "raw.npy", logits)
    times = in_turns(
        {
            "slab": steadily(slab_pass(cache, device), device),
            "np.load": steadily(raw_pass(folder / "raw.npy", rows, device), device),
            "memcpy": steadily(copy_pass(logits)),
        },
        turns,
    )
    slab, note = f"slab read + decode, {cache.encoding.name}", f"{rows:,} x {cache.num_classes}"
    return [
        Ratio(name=f"{slab} / {other}", ours=times["slab"], yardstick=times[other], note=note)
        for other in ("np.load", "memcpy")
    ] + [rows_per_second(slab, rows, times["slab"])]


def rows_per_second(name: str, rows: int, times: tuple[float, ...]) -> Figure:
    return Figure(name=name, value=rows / float(np.median(times)), unit="rows/s")
