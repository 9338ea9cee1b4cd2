"""Reading targets: a slab of the cache, against the raw array and against copying memory.

Each is one epoch's worth of a view: read from disk (from the page cache, as all of them are read
before), then handed out as float32 rows, batch by batch, in one random order of the samples.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.excerpt import decoded_at, excerpt_rows
from benchmarks.measure import Figure, Ratio, in_turns, steadily
from stages.cache import LogitCache, arrays

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


def hashing_ratio(cache: LogitCache, turns: int) -> Ratio:
    """A view as a student reads it, every byte compared with its record, against the same arrays
    read by Zarr alone.
    """
    rows, view = excerpt_rows(cache), cache.complete_views[0]
    runs, names = [slice(0, rows)], list(cache.blocks.specs)
    works: dict[str, Pass] = {
        "hashed": lambda: cache.read_view(view, runs=runs),
        "plain": lambda: [
            arrays.read_rows(arrays.get_array(cache.group, name), view, runs) for name in names
        ],
    }
    on_cpu = torch.device("cpu")
    times = in_turns({name: steadily(work, on_cpu) for name, work in works.items()}, turns)
    return Ratio(
        name=f"a view read and hashed, {cache.encoding.name} / read by Zarr alone",
        ours=times["hashed"],
        yardstick=times["plain"],
        note=f"{rows:,} x {cache.num_classes}, nothing decoded to logits",
    )


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
    caches: Sequence[LogitCache],
    folder: Path,
    turns: int,
    device: torch.device,
    others: Mapping[str, Callable[[], float]] | None = None,
    others_note: str = "",
) -> list[Ratio | Figure]:
    """Slabs of caches of the same rows in different encodings. folder: for the raw array. others:
    further ways, that answer with the seconds of as many rows; the first cache is compared with
    them.
    """
    logits, rows = decoded_view(caches[0]), excerpt_rows(caches[0])
    np.save(folder / "raw.npy", logits)
    passes = {
        **{f"slab, {c.encoding.name}": slab_pass(c, device) for c in caches},
        "np.load of the raw array": raw_pass(folder / "raw.npy", rows, device),
        "memcpy": copy_pass(logits),
    }
    works = {name: steadily(work, device) for name, work in passes.items()}
    times = in_turns(works | dict(others or {}), turns)
    note = f"{rows:,} x {logits.shape[1]}"
    slabs, rest = list(times)[: len(caches)], list(times)[len(caches) :]
    pairs = [*((slab, rest[0]) for slab in slabs), *((slabs[0], other) for other in rest[1:])]
    notes = dict.fromkeys(others or {}, f"{note}; {others_note}")
    return [
        *(
            Ratio(name=f"{a} / {b}", ours=times[a], yardstick=times[b], note=notes.get(b, note))
            for a, b in pairs
        ),
        *(hashing_ratio(cache, turns) for cache in caches),
        *(rows_per_second(name, rows, taken) for name, taken in times.items()),
    ]


def rows_per_second(name: str, rows: int, times: tuple[float, ...]) -> Figure:
    return Figure(name=name, value=rows / float(np.median(times)), unit="rows/s")
