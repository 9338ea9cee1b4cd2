"""Which blocks exist: one small JSON record a block, written after its objects.

A block exists if and only if its record does. Records lie under commits/<part>/, one file a block
while a view is being written, one file a view once it is complete. Each is a JSON object of its
records and the sha256 of their text, so that a record cannot change unnoticed:

    commits/<part>/v00003/b00000.json   {"digest": ..., "records": [one record]}
    commits/<part>/v00003.json          {"digest": ..., "records": [all of view 3, by block]}

Compaction writes the second before it removes the first, so that a kill in between loses nothing;
readers take the union. Only complete views are compacted, so that names say which views are
complete: one listing opens a cache of any size, and a view's records are read when it is used.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from zarr.abc.store import Store

from stages.cache.layout import BlockId, Extent
from stages.cache.storage import (
    ask,
    folders,
    list_objects,
    read_object,
    read_objects,
    sizes_of,
    write_object,
)
from stages.errors import CacheError

Record = dict[str, Any]
ViewRecords = dict[int, Record]
"""The committed blocks of one view: block -> record."""

_NUMBER = r"(\d{5}|[1-9]\d{5,})"
_VIEW = re.compile(rf"v{_NUMBER}(\.json)?")
_BLOCK = re.compile(rf"v{_NUMBER}/b{_NUMBER}\.json")
_SEALED = re.compile(rb'\{"digest":"([0-9a-f]{64})","records":(\[.*\])\}', re.DOTALL)
_VIEWS_KEPT = 8
"""Views whose records are cached: those of a rectification may be large."""
_FILES_AT_ONCE = 16
"""Files of records that are asked for at the same time."""
_OBJECTS_AT_ONCE = 256
"""Objects whose sizes are asked for at the same time."""
_REPAIR = "Run `pipeline verify CACHE --repair`: it computes {} again."


def seal_records(records: list[Record]) -> bytes:
    """The bytes of a file of records."""
    text = json.dumps(records, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    return b'{"digest":"%s","records":%s}' % (digest, text)


def unsealed(content: bytes) -> list[Record]:
    """The records in a file. Raises ValueError unless it is what was written."""
    match = _SEALED.fullmatch(content)
    if match is None or hashlib.sha256(match[2]).hexdigest().encode() != match[1]:
        raise ValueError("its digest does not match")
    records: list[Record] = json.loads(match[2])
    return records


@dataclass
class CommitLog:
    """The records of one part of a cache: `logits`, `eval` or `rectified/<name>`.

    Which views there are is looked up once and kept up by `commit`; see `reread`. Whatever gives
    the records of a view raises CacheError if a file of them is damaged, or is another part's or
    another cache's. identity: the digest of the cache's; None where any will do.
    """

    store: Store
    part: str
    num_blocks: int
    identity: str | None = None
    _known: dict[int, ViewRecords] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._prefix = f"commits/{self.part}/"

    # ---- which views and blocks there are -------------------------------------------------

    @cached_property
    def _listed(self) -> dict[int, bool]:
        """The views that have a file or a folder, and whether they are compacted."""
        listed: dict[int, bool] = {}
        for name in folders(self.store, self._prefix.rstrip("/")):
            if match := _VIEW.fullmatch(name):
                view, compacted = int(match[1]), match[2] is not None
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
            records = self._read(view, read_object(self.store, self._view_key(view)))
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
            contents = read_objects(self.store, [self._view_key(view) for view in some])
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

    def files(self) -> dict[int, list[str]]:
        """By view the keys of its blocks' files of records; none of one that is compacted."""
        blocks: dict[int, list[str]] = {}
        for key in sorted(list_objects(self.store, self._prefix)):
            name = key.removeprefix(self._prefix)
            if match := _BLOCK.fullmatch(name):
                blocks.setdefault(int(match[1]), []).append(key)
            elif (match := _VIEW.fullmatch(name)) and match[2]:
                blocks.setdefault(int(match[1]), [])
        return dict(sorted(blocks.items()))

    def inspect(
        self, files: Mapping[int, list[str]] | None = None
    ) -> Iterator[tuple[int, ViewRecords, list[str]]]:
        """Of each view in `files` the records that are intact, and the keys of damaged files."""
        for view, block_keys in (self.files() if files is None else files).items():
            found, damaged = self._parsed(view, block_keys)
            yield view, found, damaged

    def block_files(self, view: int) -> list[str]:
        """The keys of a view's records that have a file a block."""
        listed = list_objects(self.store, f"{self._folder(view)}/")
        return [key for key in listed if _BLOCK.fullmatch(key.removeprefix(self._prefix))]

    def _read(self, view: int, whole: bytes | None) -> ViewRecords:
        """The records of a view; `whole` is what its one file holds, None if there is none."""
        if whole is not None:
            found, damaged = self._unpacked(view, {self._view_key(view): whole})
        else:
            found, damaged = self._parsed(view, self.block_files(view))
        if damaged:
            cause = f"commit record {damaged[0]} is not readable"
            raise CacheError(cause, _REPAIR.format("those blocks"))
        return found

    def _parsed(self, view: int, block_keys: list[str]) -> tuple[ViewRecords, list[str]]:
        """The records in these files and in the view's one file; the keys that are damaged."""
        contents = dict(zip(block_keys, read_objects(self.store, block_keys), strict=True))
        # Last: a view compacted meanwhile is then found under its one file.
        contents[self._view_key(view)] = read_object(self.store, self._view_key(view))
        return self._unpacked(view, contents)

    def _unpacked(
        self, view: int, files: Mapping[str, bytes | None]
    ) -> tuple[ViewRecords, list[str]]:
        """The records in these files, later ones first; the keys of those that are damaged."""
        found: ViewRecords = {}
        damaged: list[str] = []
        for key, content in files.items():
            if content is None:  # compacted, or removed, since it was listed
                continue
            try:
                records = {int(record["block"]): record for record in unsealed(content)}
                owner = self._owner(view).items()
                if any(record[n] != value for record in records.values() for n, value in owner):
                    raise ValueError("these are the records of something else")
                named = _BLOCK.fullmatch(key.removeprefix(self._prefix))
                if named and [*records] != [int(named[2])]:
                    raise ValueError("this is the record of another block")
            except (TypeError, KeyError, ValueError):
                damaged.append(key)
            else:
                found |= records
        return found, damaged

    def _owner(self, view: int) -> Record:
        """What each record has to say of where it belongs: part, view and cache."""
        owner: Record = {"part": self.part, "view": view}
        return owner if self.identity is None else {**owner, "identity_digest": self.identity}

    # ---- changes --------------------------------------------------------------------------

    def commit(self, at: BlockId, record: Record) -> None:
        """Make a block exist. Its objects must lie in the store already."""
        record = {**record, **self._owner(at.view), "block": at.block}
        write_object(self.store, self._block_key(at), seal_records([record]))
        if "_listed" in self.__dict__:
            self._listed.setdefault(at.view, False)
        if (known := self._known.get(at.view)) is not None:
            known[at.block] = record

    def compact(self, view: int) -> None:
        """One file for all records of a complete view. Only for the part's single writer."""
        if not self.is_complete(view):
            return
        whole = [self.of_view(view)[block] for block in range(self.num_blocks)]
        write_object(self.store, self._view_key(view), seal_records(whole))
        ask(self.store, self.store.delete_dir(self._folder(view)))
        self._listed[view] = True

    def compact_rest(self) -> None:
        """Compact the views that a killed writer had completed and not compacted."""
        for name in folders(self.store, self._prefix.rstrip("/")):
            if (match := _VIEW.fullmatch(name)) and not match[2]:
                self.compact(int(match[1]))

    def forget(self, at: BlockId) -> None:
        """Unmake a block, so that its stage computes it again. Only for the single writer."""
        found = self.of_view(at.view)
        left = {b: r for b, r in found.items() if b != at.block and b < self.num_blocks}
        for other, record in left.items():  # a file a block again, before that of the view goes
            key = self._block_key(BlockId(at.view, other))
            write_object(self.store, key, seal_records([record]))
        ask(self.store, self.store.delete(self._view_key(at.view)))
        ask(self.store, self.store.delete(self._block_key(at)))
        self._listed[at.view] = False
        self.hold(at.view, left)

    def discard(self, key: str) -> None:
        """Remove a damaged file of records: its blocks are then not there."""
        ask(self.store, self.store.delete(key))
        self.reread()

    def clear(self) -> None:
        """Forget every record, of a part that is made anew."""
        ask(self.store, self.store.delete_dir(self._prefix.rstrip("/")))
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

    def _folder(self, view: int) -> str:
        return f"{self._prefix}v{view:05d}"

    def _view_key(self, view: int) -> str:
        return f"{self._folder(view)}.json"

    def _block_key(self, at: BlockId) -> str:
        return f"{self._folder(at.view)}/b{at.block:05d}.json"


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
