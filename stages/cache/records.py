"""How records lie in a store: files of sealed JSON, one a block or one a view.

    commits/<part>/v00003/b00000.json   {"digest": ..., "records": [one record]}
    commits/<part>/v00003.json          {"digest": ..., "records": [all of view 3, by block]}

Each file is a JSON object of its records and the sha256 of their text, so that a record cannot
change unnoticed. `commits.py` says when which is written.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zarr.abc.store import Store

from stages.cache.layout import BlockId
from stages.cache.storage import folders, list_objects, read_object, read_objects, write_object

Record = dict[str, Any]
ViewRecords = dict[int, Record]
"""The committed blocks of one view: block -> record."""

_NUMBER = r"(\d{5}|[1-9]\d{5,})"
_VIEW = re.compile(rf"v{_NUMBER}(\.json)?")
_BLOCK = re.compile(rf"v{_NUMBER}/b{_NUMBER}\.json")
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


@dataclass
class RecordFiles:
    """The files of one part of a cache: `logits`, `eval` or `rectified/<name>`.

    identity: the digest of the cache's, which every record has to name; None where any will do.
    """

    store: Store
    part: str
    num_blocks: int
    identity: str | None = None

    @property
    def folder(self) -> str:
        """Where they lie."""
        return f"commits/{self.part}"

    def view_folder(self, view: int) -> str:
        """Where a view's records lie, a file a block."""
        return f"{self.folder}/v{view:05d}"

    def view_key(self, view: int) -> str:
        """The one file of a compacted view."""
        return f"{self.view_folder(view)}.json"

    def block_key(self, at: BlockId) -> str:
        """The file of one block."""
        return f"{self.view_folder(at.view)}/b{at.block:05d}.json"

    def named_views(self) -> list[tuple[int, bool]]:
        """The views that have a file or a folder, and which of the two: True for a file."""
        named = map(_VIEW.fullmatch, folders(self.store, self.folder))
        return [(int(match[1]), match[2] is not None) for match in named if match]

    def files(self) -> dict[int, list[str]]:
        """By view the keys of its blocks' files of records; none of one that is compacted."""
        blocks: dict[int, list[str]] = {}
        for key in sorted(list_objects(self.store, f"{self.folder}/")):
            name = self._name(key)
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
            found, damaged = self.parsed(view, block_keys)
            yield view, found, damaged

    def block_files(self, view: int) -> list[str]:
        """The keys of a view's records that have a file a block."""
        listed = list_objects(self.store, f"{self.view_folder(view)}/")
        return [key for key in listed if _BLOCK.fullmatch(self._name(key))]

    def parsed(self, view: int, block_keys: list[str]) -> tuple[ViewRecords, list[str]]:
        """The records in these files and in the view's one file; the keys that are damaged."""
        contents = dict(zip(block_keys, read_objects(self.store, block_keys), strict=True))
        # Last: a view compacted meanwhile is then found under its one file.
        contents[self.view_key(view)] = read_object(self.store, self.view_key(view))
        return self.unpacked(view, contents)

    def unpacked(
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
                owner = self.owner(view).items()
                if any(record[n] != value for record in records.values() for n, value in owner):
                    raise ValueError("these are the records of something else")
                named = _BLOCK.fullmatch(self._name(key))
                if named and [*records] != [int(named[2])]:
                    raise ValueError("this is the record of another block")
            except (TypeError, KeyError, ValueError):
                damaged.append(key)
            else:
                found |= records
        return found, damaged

    def owner(self, view: int) -> Record:
        """What each record has to say of where it belongs: part, view and cache."""
        owner: Record = {"part": self.part, "view": view}
        return owner if self.identity is None else {**owner, "identity_digest": self.identity}

    def put(self, at: BlockId, record: Record) -> None:
        """Write the file of one block."""
        write_object(self.store, self.block_key(at), seal_records([record]))

    def _name(self, key: str) -> str:
        return key.removeprefix(f"{self.folder}/")
