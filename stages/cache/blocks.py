"""Blocks: one shard of each array, then a commit record. Read back as its record has them."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import zarr
from torch import Tensor

from stages.cache.arrays import encode_shard, get_array, read_rows
from stages.cache.commits import CommitLog, Record
from stages.cache.encoding import Encoding
from stages.cache.layout import ArraySpec, BlockGrid, BlockId, block_key
from stages.cache.storage import write_object
from stages.cache.stores import checked, described


@dataclass(frozen=True)
class BlockGroup:
    """The arrays of one group that are written block by block: the logits, or a rectification.

    specs: those arrays, by name. Their documents are read once.
    """

    group: zarr.Group
    commits: CommitLog
    grid: BlockGrid
    specs: Mapping[str, ArraySpec]

    def key(self, name: str, at: BlockId) -> str:
        """The object that holds a block of an array."""
        return block_key(f"{self.group.path}/{name}".lstrip("/"), self.specs[name], at)

    def write(self, at: BlockId, arrays: Mapping[str, Tensor], record: Record) -> None:
        """Write a block of every array, one shard each, then its commit record.

        A shard is made in memory and put down whole, so that its record knows its digest and
        nothing that lies there is read.
        """
        rows, objects = self.grid.rows(at.block), {}
        for name, values in arrays.items():
            shard = encode_shard(self.specs[name], self.grid, at.block, values)
            key = self.key(name, at)
            write_object(self.group.store, key, shard)
            objects[key] = described(shard, self.grid.chunks_per_block)
        whole = {**record, "rows": [rows.start, rows.stop], "objects": objects}
        self.commits.commit(at, whole)

    def read(
        self, names: Iterable[str], view: int, runs: Sequence[slice], block: int | None = None
    ) -> dict[str, Tensor]:
        """Some runs of rows of a view, or of one block of it, one after another: each (n, ...).

        The bytes are compared with the commit records as they are read. Raises CacheError where
        they differ.
        """
        objects = self.commits.objects_of(view, block)
        arrays = {name: checked(self._array(name, view), objects) for name in names}
        return {name: read_rows(array, view, runs) for name, array in arrays.items()}

    def _array(self, name: str, view: int) -> zarr.Array[Any]:
        """An array with room for a view. Its document is read again where it had none before."""
        array = self._opened.get(name)
        if array is None or view >= array.shape[0]:
            array = self._opened[name] = get_array(self.group, name)
        return array

    @cached_property
    def _opened(self) -> dict[str, zarr.Array[Any]]:
        return {}


@dataclass(frozen=True)
class Block:
    """One block as it was written: its rows in row order.

    logits: float32 (n, C), decoded. labels, predictions: int64 (n,).
    """

    logits: Tensor
    labels: Tensor
    predictions: Tensor


@dataclass(frozen=True)
class EncodedBlock:
    """As `Block`, still encoded. arrays: what the encoding stored, each (n, ...)."""

    encoding: Encoding
    arrays: Mapping[str, Tensor]
    labels: Tensor
    predictions: Tensor

    def logits(self, temperature: float, rows: Tensor | None = None) -> Tensor:
        """float32 (m, C), decoded as `Encoding.decode` says. rows: int64 (m,), None for all.

        A row decoded among others may differ in its last bit: matrix products round as they like.
        """
        some = {n: x if rows is None else x[rows] for n, x in self.arrays.items()}
        return self.encoding.decode(some, temperature)


Item = TypeVar("Item")


class BackgroundWriter(Generic[Item]):
    """Calls `write` for every item, in order, in another thread. waiting: how many items may wait.

    A failure is raised by the next `put`, or at the end of `running`.
    """

    def __init__(self, write: Callable[[Item], None], waiting: int = 2) -> None:
        self._write = write
        self._queue: queue.Queue[Item | None] = queue.Queue(maxsize=waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)

    def put(self, item: Item) -> None:
        """Hand over an item; waits while as many others do as may."""
        self._raise()
        self._queue.put(item)

    @contextmanager
    def running(self) -> Iterator["BackgroundWriter[Item]"]:
        """The writer at work; on leaving, everything handed over is written or an error raised."""
        self._thread.start()
        try:
            yield self
        finally:
            self._queue.put(None)
            self._thread.join()
        self._raise()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:  # after a failure the queue is only emptied
                try:
                    self._write(item)
                except BaseException as error:
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
