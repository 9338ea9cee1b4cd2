"""Blocks: one shard of each array, then a commit record. Read back as its record has them."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import zarr
from torch import Tensor

from stages.cache.arrays import encode_shard, read_rows
from stages.cache.commits import CommitLog, Record
from stages.cache.layout import ArraySpec, BlockGrid, BlockId, block_key
from stages.cache.storage import write_object
from stages.cache.stores import checked, described


@dataclass(frozen=True)
class BlockGroup:
    """The arrays of one group that are written block by block: the logits, or a rectification.

    specs: those arrays, by name.
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
        self.commits.commit(at.view, at.block, whole)

    def read(
        self, names: Iterable[str], view: int, runs: Sequence[slice], block: int | None = None
    ) -> dict[str, Tensor]:
        """Some runs of rows of a view, or of one block of it, one after another: each (n, ...).

        The bytes are compared with the commit records as they are read. Raises CacheError where
        they differ.
        """
        group = checked(self.group, self.commits.objects_of(view, block))
        return {name: read_rows(group, name, view, runs) for name in names}


Item = TypeVar("Item")


class BackgroundWriter(Generic[Item]):
    """Calls `write` for every item, in order, in another thread. At most two items wait.

    A failure is raised by the next `put`, or at the end of `running`.
    """

    def __init__(self, write: Callable[[Item], None]) -> None:
        self._write = write
        self._queue: queue.Queue[Item | None] = queue.Queue(maxsize=2)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)

    def put(self, item: Item) -> None:
        """Hand over an item; waits while two others do."""
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
