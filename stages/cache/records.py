"""Files of commit records: what they hold, sealed, so that a record cannot change unnoticed.

{"digest": sha256 of the records' text, "records": [one, or all of a view]}
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from stages.errors import CacheError

Record = dict[str, Any]
ViewRecords = dict[int, Record]
"""The committed blocks of one view: block -> record."""


_OF_A_BLOCK = re.compile(r"/b(\d+)\.json$")
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


def unpacked(
    owner: Mapping[str, Any], files: Mapping[str, bytes | None]
) -> tuple[ViewRecords, list[str]]:
    """The records of a view in some files, later ones first; the keys of those that are damaged.

    owner: what each record has to say of where it belongs: part and view, and of which cache.
    """
    found: ViewRecords = {}
    damaged: list[str] = []
    for key, content in files.items():
        if content is None:  # compacted, or removed, since it was listed
            continue
        try:
            records = {int(record["block"]): record for record in unsealed(content)}
            if any(record[name] != owner[name] for record in records.values() for name in owner):
                raise ValueError("these are the records of something else")
            if (named := _OF_A_BLOCK.search(key)) and [*records] != [int(named[1])]:
                raise ValueError("this is the record of another block")
        except (TypeError, KeyError, ValueError):
            damaged.append(key)
        else:
            found |= records
    return found, damaged


def object_sizes(view: int, blocks: Iterable[int], records: ViewRecords) -> dict[str, int]:
    """The objects of committed blocks and their sizes."""
    sizes: dict[str, int] = {}
    for block in blocks:
        try:
            objects = records[block]["objects"]
            sizes |= {key: described["bytes"] for key, described in objects.items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise CacheError(
                f"the commit record of block {block} of view {view} is not readable: {error!r}",
                "Run `pipeline verify CACHE --repair`: it computes that block again.",
            ) from error
    return sizes
