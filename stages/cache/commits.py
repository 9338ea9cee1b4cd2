"""Which blocks exist: one small JSON record a block, written after its objects.

A block exists if and only if its record does. Records have one file a block while a view is being
written, one file a view once it is complete. Compaction writes the second before it removes the
first, so that a kill in between loses nothing; readers take the union. Only complete views are
compacted, so that names say which views are complete: one listing opens a cache of any size, and a
view's records are read when it is used.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from stages.cache.layout import BlockId, Extent
from stages.cache.records import Record, RecordFiles, ViewRecords, seal_records
from stages.cache.storage import (
    ask,
    read_object,
    read_objects,
    sizes_of,
    write_object,
)
from stages.errors import CacheError

_VIEWS_KEPT = 8
"""Views whose records are cached: those of a rectification may be large."""
_FILES_AT_ONCE = 16
"""Files of records that are asked for at the same time."""
_OBJECTS_AT_ONCE = 256
"""Objects whose sizes are asked for at the same time."""
_REPAIR = "Run `pipeline verify CACHE --repair`: it computes {} again."


@dataclass
class CommitLog(RecordFiles):
    """The records of one part of a cache: `logits`, `eval` or `rectified/<name>`.

    Which views there are is looked up once and kept up by `commit`; see `reread`. Whatever gives
    the records of a view raises CacheError if a file of them is damaged, or is another part's or
    another cache's. identity: the digest of the cache's; None where any will do.
    """

    _known: dict[int, ViewRecords] = field(default_factory=dict, init=False, repr=False)

    # ---- which views and blocks there are -------------------------------------------------

    @cached_property
    def _listed(self) -> dict[int, bool]:
        """The views that have a file or a folder, and whether they are compacted."""
        listed: dict[int, bool] = {}
        for view, compacted in self.named_views():
            listed[view] = compacted or listed.get(view, False)
        return listed

    @property
    def listed(self) -> list[int]:
        """The views that have a file or a folder of records, damaged or empty ones as well."""
        return sorted(self._listed)

    @property
    def views(self) -> list[int]:
        """The views of which blocks are committed, in order."""
        return sorted(v for v, compacted in self._listed.items() if compacted or self.of_view(v))

    def is_complete(self, view: int) -> bool:
        """Whether all blocks of a view are committed. Of a compacted one nothing is read."""
        if view in self._known or self._listed.get(view) is False:
            return self.has_view(view)
        return view in self._listed

    def complete(self, num_views: int) -> list[int]:
        """Those of the first `num_views` views that are complete, in order."""
        return [view for view in self.listed if view < num_views and self.is_complete(view)]

    def has_view(self, view: int) -> bool:
        """As `is_complete`, by the records of the blocks and not by a name."""
        records = self.of_view(view)
        return all(block in records for block in range(self.num_blocks))

    def beyond(self, num_views: int) -> list[int]:
        """The views from `num_views` on of which blocks are committed."""
        later = [item for item in self._listed.items() if item[0] >= num_views]
        return [view for view, compacted in later if compacted or self.of_view(view)]

    def missing(self, views: Iterable[int]) -> list[BlockId]:
        """The blocks of these views that are not committed, in order."""
        incomplete = [view for view in views if not self.is_complete(view)]
        there = {view: self.of_view(view) for view in incomplete if view in self._listed}
        blocks = (BlockId(v, b) for v in incomplete for b in range(self.num_blocks))
        return [at for at in blocks if at.block not in there.get(at.view, {})]

    def has(self, at: BlockId) -> bool:
        """Whether one block is committed."""
        return at.block in self.of_view(at.view)

    def reread(self) -> None:
        """Look at the store when records are next asked for: others have written as well."""
        self.__dict__.pop("_listed", None)
        self._known.clear()

    # ---- records --------------------------------------------------------------------------

    def of_view(self, view: int) -> ViewRecords:
        """The committed blocks of one view."""
        records = self._known.get(view)
        if records is None:
            records = self._read(view, read_object(self.store, self.view_key(view)))
            self.hold(view, records)
        return records

    def hold(self, view: int, records: ViewRecords) -> None:
        """Take these for the records of a view, until those of other views push them out."""
        for oldest in list(self._known)[: 1 - _VIEWS_KEPT]:
            self._known.pop(oldest, None)
        self._known[view] = records

    def each_view(self, views: Iterable[int] | None = None) -> Iterator[tuple[int, ViewRecords]]:
        """The records of these views, None for all; those of a few views are in memory at once."""
        wanted = self.views if views is None else list(views)
        for start in range(0, len(wanted), _FILES_AT_ONCE):
            some = wanted[start : start + _FILES_AT_ONCE]
            contents = read_objects(self.store, [self.view_key(view) for view in some])
            for view, content in zip(some, contents, strict=True):
                known = self._known.get(view)
                yield view, self._read(view, content) if known is None else known

    @property
    def records(self) -> dict[BlockId, Record]:
        """Every committed block and its record. All are in memory: see `each_view`."""
        each = self.each_view()
        return {BlockId(v, block): found[block] for v, found in each for block in sorted(found)}

    def extent(self, views: Iterable[int] | None = None) -> Extent:
        """How much of these views is committed, None for all; also of incomplete ones."""
        records = [record for _, found in self.each_view(views) for record in found.values()]
        return Extent(
            len(records),
            sum(stop - start for start, stop in (record["rows"] for record in records)),
            sum(int(d["bytes"]) for record in records for d in record["objects"].values()),
        )

    def _read(self, view: int, whole: bytes | None) -> ViewRecords:
        """The records of a view; `whole` is what its one file holds, None if there is none."""
        if whole is not None:
            found, damaged = self.unpacked(view, {self.view_key(view): whole})
        else:
            found, damaged = self.parsed(view, self.block_files(view))
        if damaged:
            cause = f"commit record {damaged[0]} is not readable"
            raise CacheError(cause, _REPAIR.format("those blocks"))
        return found

    # ---- changes --------------------------------------------------------------------------

    def commit(self, at: BlockId, record: Record) -> None:
        """Make a block exist. Its objects must lie in the store already."""
        record = {**record, **self.owner(at.view), "block": at.block}
        self.put(at, record)
        if "_listed" in self.__dict__:
            self._listed.setdefault(at.view, False)
        if (known := self._known.get(at.view)) is not None:
            known[at.block] = record

    def compact(self, view: int) -> None:
        """One file for all records of a complete view. Only for the part's single writer."""
        if not self.is_complete(view):
            return
        whole = [self.of_view(view)[block] for block in range(self.num_blocks)]
        write_object(self.store, self.view_key(view), seal_records(whole))
        ask(self.store, self.store.delete_dir(self.view_folder(view)))
        self._listed[view] = True

    def compact_rest(self) -> None:
        """Compact the views that a killed writer had completed and not compacted."""
        for view, compacted in self.named_views():
            if not compacted:
                self.compact(view)

    def forget(self, at: BlockId) -> None:
        """Unmake a block, so that its stage computes it again. Only for the single writer."""
        found = self.of_view(at.view)
        left = {b: r for b, r in found.items() if b != at.block and b < self.num_blocks}
        for other, record in left.items():  # a file a block again, before that of the view goes
            self.put(BlockId(at.view, other), record)
        ask(self.store, self.store.delete(self.view_key(at.view)))
        ask(self.store, self.store.delete(self.block_key(at)))
        self._listed[at.view] = False
        self.hold(at.view, left)

    def discard(self, key: str) -> None:
        """Remove a damaged file of records: its blocks are then not there."""
        ask(self.store, self.store.delete(key))
        self.reread()

    def clear(self) -> None:
        """Forget every record, of a part that is made anew."""
        ask(self.store, self.store.delete_dir(self.folder))
        self.reread()

    # ---- objects --------------------------------------------------------------------------

    def objects_of(self, view: int, block: int | None = None) -> dict[str, Any]:
        """What the records of a view (or of one block of it) know of its objects, by key."""
        records = self.of_view(view)
        return _objects(view, records if block is None else {block: records[block]})

    def check_all_objects(self, views: Iterable[int] | None = None) -> None:
        """Raise CacheError if an object or a file of records of these views is not whole."""
        objects: dict[str, Any] = {}
        for view, records in self.each_view(views):
            objects |= _objects(view, records)
            if len(objects) >= _OBJECTS_AT_ONCE:
                self._check_sizes(objects)
                objects = {}
        self._check_sizes(objects)

    def _check_sizes(self, objects: Mapping[str, Any]) -> None:
        found = sizes_of(self.store, list(objects))
        for (key, known), there in zip(objects.items(), found, strict=True):
            if there != (size := known.get("bytes")):
                what = "is missing" if there is None else f"has {there} bytes, not {size}"
                cause = f"{self.store}: object {key} {what}"
                raise CacheError(cause, _REPAIR.format("that block"))


def _objects(view: int, records: ViewRecords) -> dict[str, Any]:
    """The objects of these blocks, as their records have them. Raises CacheError."""
    objects: dict[str, Any] = {}
    for block, record in sorted(records.items()):
        known = record.get("objects")
        if not isinstance(known, dict):
            cause = f"the commit record of block {block} of view {view} is not readable"
            raise CacheError(cause, _REPAIR.format("that block"))
        objects |= known
    return objects
