"""Does a cache hold what stage one and stage two promised? Every byte of it is looked at.

    pipeline verify digits.zarr --live 500 --pixels

Checked: the documents (format, identity, metadata of every array), completeness, size and sha256
of every object against its commit record, the records against the arrays, rectifications against
the rows they were made from. With a teacher, also that it still says what the cache says (`live`);
with the dataset, that its pixels are still those the teacher saw (`pixels`).
"""

from stages.cache import LogitCache, metadata
from stages.cache.layout import BlockId
from stages.cache.records import ViewRecords
from stages.cache.storage import Location, location
from stages.errors import CacheError
from stages.reporting import Reporter, Silent
from stages.verify.blocks import check_blocks, logits_part, rectified_part
from stages.verify.documents import (
    document_faults,
    eval_faults,
    rectification_names,
    room_faults,
    root_faults,
    whole_array_faults,
)
from stages.verify.faults import Fault, Verified
from stages.verify.live import verify_live, verify_pixels

__all__ = ["Fault", "Verified", "verify", "verify_live", "verify_pixels"]


def verify(path: str | Location, reporter: Reporter | None = None, threads: int = 4) -> Verified:
    """Look at every object of a cache. Raises CacheError if there is none."""
    reporter, where = reporter or Silent(), location(path)
    try:
        there = metadata.exists(where)
    except CacheError:
        if metadata.copied_attributes(where) is None:
            raise
        there = True
    if not there:
        raise CacheError(f"no cache at {where}", "Make one with `pipeline cache-teacher`.")
    if faults := list(root_faults(where)):
        return Verified(faults, 0, 0)  # nothing else can be believed
    try:
        cache = LogitCache.open(where, check=False)
    except CacheError as error:
        faults = [Fault("metadata", error.cause), *document_faults(where)]
        return Verified(faults, 0, 0)

    faults = [*document_faults(where), *whole_array_faults(cache)]
    bad: set[BlockId] = set()
    intact: dict[int, ViewRecords] = {}
    parts = [logits_part(cache)]
    for name in rectification_names(cache, faults):
        try:
            rectification = cache.rectification(name)
            faults += room_faults(cache, rectification.blocks)
            parts.append(rectified_part(cache, rectification, bad))
        except CacheError as error:
            faults.append(Fault(f"rectified/{name}", error.cause))
    blocks = bytes_read = 0
    for part in parts:
        found = check_blocks(cache, part, intact, reporter, threads)
        blocks, bytes_read = blocks + found.blocks, bytes_read + found.bytes
        faults += found.faults
        if part is parts[0]:
            bad.update(fault.at for fault in found.faults if fault.at is not None)
        if found.blocks and not found.faults and not bad:
            faults += part.whole()
    faults += eval_faults(cache)
    return Verified(faults, blocks, bytes_read)
