"""Which blocks exist: one small JSON record a block, written after its objects.

A block exists if and only if its record does. Records lie under commits/<part>/, one file a block
while a view is being written, one file a view once it is complete. Each is a JSON object of its
records and the sha256 of their text, so that a record cannot change unnoticed:

    commits/<part>/v00003/b00000.json   {"digest": ..., "records": [one record]}
    commits/<part>/v00003.json          {"digest": ..., "records": [all of view 3, by block]}

Compaction writes the second before it removes the first, so that a kill in between loses nothing;
readers take the union.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype

from stages.cache.location import ask
from stages.errors import CacheError

Record = dict[str, Any]
_KEY = re.compile(r"v(\d+)(?:/b(\d+))?\.json$")


def read_object(store: Store, key: str) -> bytes | None:
    """An object's bytes, None if there is none."""
    value = ask(store, store.get(key, default_buffer_prototype()))
    return None if value is None else value.to_bytes()


def write_object(store: Store, key: str, content: bytes) -> None:
    """Write an object whole: temporary file and rename on disk, one PUT in an object store."""
    ask(store, store.set(key, default_buffer_prototype().buffer.from_bytes(content)))


def list_objects(store: Store, prefix: str) -> list[str]:
    """The keys under a prefix that ends in a slash."""

    async def collect() -> list[str]:
        return [key async for key in store.list_prefix(prefix)]

    return ask(store, collect())


def first_object(store: Store) -> str | None:
    """The key of some object, None if there is none at all."""

    async def first() -> str | None:
        async for key in store.list_prefix(""):
            return key
        return None

    return ask(store, first())


def folders(store: Store, folder: str) -> list[str]:
    """The names right under a folder, but for documents and what a killed writer left."""

    async def collect() -> list[str]:
        return [name async for name in store.list_dir(folder)]

    return sorted(n for n in ask(store, collect()) if not n.endswith(("zarr.json", ".partial")))


def described(content: bytes) -> dict[str, Any]:
    """Size and sha256 of an object, as a record keeps them."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@dataclass
class CommitLog:
    """The records of one part of a cache: `logits`, or `rectified/<name>`."""

    store: Store
    part: str
    num_blocks: int

    @property
    def _prefix(self) -> str:
        return f"commits/{self.part}/"

    @cached_property
    def records(self) -> dict[tuple[int, int], Record]:
        """Every committed block, (view, block) -> record. Read once, kept up by `commit`.

        Raises CacheError if a file of records is damaged.
        """
        records, damaged = self.readable()
        if damaged:
            raise CacheError(
                f"commit record {damaged[0]} is not readable",
                "Run `pipeline verify --repair`: it computes those blocks again.",
            )
        return records

    def readable(self) -> tuple[dict[tuple[int, int], Record], list[str]]:
        """The records that are intact, and the keys of the files that are not."""
        found: dict[tuple[int, int], Record] = {}
        damaged: list[str] = []
        # Longer keys first: a view compacted meanwhile is then found under its one file.
        for key in sorted(list_objects(self.store, self._prefix), key=len, reverse=True):
            match = _KEY.fullmatch(key.removeprefix(self._prefix))
            content = None if match is None else read_object(self.store, key)
            if content is None:  # not ours, or compacted since it was listed
                continue
            try:
                for record in unsealed(content):
                    found[int(record["view"]), int(record["block"])] = record
            except (TypeError, KeyError, ValueError):
                damaged.append(key)
        return found, damaged

    def discard(self, key: str) -> None:
        """Remove a damaged file of records: its blocks are then not there."""
        ask(self.store, self.store.delete(key))
        self.reread()

    def reread(self) -> None:
        """Look at the store when records are next asked for: others have written as well."""
        self.__dict__.pop("records", None)

    def has(self, view: int, block: int) -> bool:
        """Whether one block is committed, without reading all records."""
        if "records" in self.__dict__:
            return (view, block) in self.records
        keys = (self._block_key(view, block), self._view_key(view))
        return any(ask(self.store, self.store.exists(key)) for key in keys)

    def commit(self, view: int, block: int, record: Record) -> None:
        """Make a block exist. Its objects must lie in the store already."""
        record = {"view": view, "block": block, **record}
        write_object(self.store, self._block_key(view, block), seal_records([record]))
        if "records" in self.__dict__:
            self.records[view, block] = record

    def is_complete(self, view: int) -> bool:
        return all((view, block) in self.records for block in range(self.num_blocks))

    def compact(self, view: int) -> None:
        """One file for all records of a complete view. Only for the part's single writer."""
        if not self.is_complete(view):
            return
        whole = [self.records[view, block] for block in range(self.num_blocks)]
        write_object(self.store, self._view_key(view), seal_records(whole))
        ask(self.store, self.store.delete_dir(f"{self._prefix}v{view:05d}"))

    def compact_rest(self) -> None:
        """Compact the views that a killed writer had completed and not compacted."""
        for name in folders(self.store, self._prefix.rstrip("/")):
            if re.fullmatch(r"v\d+", name):
                self.compact(int(name[1:]))

    def check_objects(self, view: int, block: int | None = None) -> None:
        """Raise CacheError if an object of a committed view (or of one block of it) is missing or
        of another size: Zarr would give zeros for a missing one.
        """
        blocks = range(self.num_blocks) if block is None else [block]
        for key_block in blocks:
            for key, size in self._sizes(view, key_block).items():
                try:
                    found = ask(self.store, self.store.getsize(key))
                except FileNotFoundError:
                    found = 0
                if found != size:
                    raise CacheError(
                        f"{self.store}: object {key} has {found} bytes, not {size}",
                        "Run `pipeline verify --repair`: it computes that block again.",
                    )

    def _sizes(self, view: int, block: int) -> dict[str, int]:
        """The objects of a committed block and their sizes."""
        try:
            objects = self.records[view, block]["objects"]
            return {key: described["bytes"] for key, described in objects.items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise CacheError(
                f"the commit record of block {block} of view {view} is not readable: {error!r}",
                "Run `pipeline verify --repair`: it computes that block again.",
            ) from error

    def forget(self, view: int, block: int) -> None:
        """Unmake a block, so that its stage computes it again. Only for the single writer."""
        left = [
            self.records[view, b]
            for b in range(self.num_blocks)
            if b != block and (view, b) in self.records
        ]
        for record in left:  # one file a block again, before the file of the view goes
            write_object(self.store, self._block_key(view, record["block"]), seal_records([record]))
        ask(self.store, self.store.delete(self._view_key(view)))
        ask(self.store, self.store.delete(self._block_key(view, block)))
        self.records.pop((view, block), None)

    def clear(self) -> None:
        """Forget every record, of a part that is made anew."""
        ask(self.store, self.store.delete_dir(self._prefix.rstrip("/")))
        self.reread()

    def _view_key(self, view: int) -> str:
        return f"{self._prefix}v{view:05d}.json"

    def _block_key(self, view: int, block: int) -> str:
        return f"{self._prefix}v{view:05d}/b{block:05d}.json"

    def bytes_of_view(self, view: int) -> int:
        """Size of the committed objects of a view."""
        return sum(
            int(described["bytes"])
            for (v, _), record in self.records.items()
            if v == view
            for described in record["objects"].values()
        )


_SEALED = re.compile(rb'\{"digest":"([0-9a-f]{64})","records":(\[.*\])\}', re.DOTALL)


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
