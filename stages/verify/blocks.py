"""Every block against its record: its objects by their sha256, its arrays by what they say."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from zarr.abc.store import Store

from stages.cache import LogitCache
from stages.cache.blocks import BlockGroup
from stages.cache.commits import CommitLog
from stages.cache.layout import ANCHOR, BlockId, threads_at_once
from stages.cache.records import Record, ViewRecords
from stages.cache.rectified import Rectification
from stages.cache.storage import read_object
from stages.errors import AnchorError, CacheError
from stages.rectify import config_of, rectified_block, settings_of
from stages.reporting import Reporter
from stages.tally import Tally
from stages.verify.faults import Fault, Verified

_VIEWS_AT_ONCE = 4
"""Whose records are in memory, and whose blocks the threads share."""

_MISSING_NAMED = 1000
"""Blocks of a view that are not there, and those of views without records; of more, how many."""


@dataclass(frozen=True)
class Part:
    """Logits, or one rectification: what its blocks should be.

    views: those that have to be complete, None for those that have any block. consistent: what is
    wrong between a record and its arrays. count: takes the records of a view without faults; whole:
    what is then wrong with all of them together.
    """

    blocks: BlockGroup
    views: range | None
    consistent: Callable[[BlockId, Record], Iterator[str]]
    count: Callable[[ViewRecords], object]
    whole: Callable[[], list[Fault]]

    @property
    def commits(self) -> CommitLog:
        """The records of its blocks."""
        return self.blocks.commits


# ---- what they should be --------------------------------------------------------------------


def logits_part(cache: LogitCache) -> Part:
    """The teacher's logits of all views."""

    def consistent(at: BlockId, record: Record) -> Iterator[str]:
        try:
            rows = cache.read_block(*at)
        except AnchorError:  # told of the block that is damaged
            return
        if not bool(torch.isfinite(rows.logits).all()):
            yield "decodes to logits that are not finite"
        if not cache.labelled:
            return
        right = rows.predictions == rows.labels
        unseen = cache.skipped_rows(at.block, record)
        if not bool(right[unseen].all()) or int(right[~unseen].sum()) != record.get("right"):
            yield "its predictions are not those its record counted"

    def whole() -> list[Fault]:
        if cache.fidelity is None:
            return [Fault("fidelity", "is not declared: stage one has not finished")]
        return []

    views = range(cache.num_views)
    return Part(cache.blocks, views, consistent, lambda _: None, whole)


def rectified_part(cache: LogitCache, rectification: Rectification, bad: set[BlockId]) -> Part:
    """bad: blocks whose logits are damaged, which say nothing about what was made from them."""
    name, settings = f"rectified/{rectification.name}", rectification.settings
    if settings_of(config_of(settings)) != settings:
        raise CacheError("its settings contradict each other", f"Delete {name} and rectify again.")

    def consistent(at: BlockId, record: Record) -> Iterator[str]:
        of_anchor = cache.blocks.has_anchor(at.view) and BlockId(ANCHOR, at.block) in bad
        if at in bad or of_anchor:
            return
        made, statistics = rectified_block(cache, settings, at)
        if _plain(statistics) != _plain(record.get("statistics")):
            yield "its statistics are not those of its rows"
        rows = [cache.grid.rows(at.block)]
        stored = rectification.blocks.read(made, at.view, rows, at.block)
        for array, values in made.items():
            found = stored[array].float()
            if not torch.allclose(found, values.float(), 1e-3, 1e-3, equal_nan=True):
                yield f"{array} is not what the rows give"

    tally = Tally(cache.num_classes)

    def whole() -> list[Fault]:
        summary = tally.summary(cache.identity.dataset.class_names)
        if _plain(rectification.statistics) != _plain(summary):
            return [Fault(name, "its statistics are not those of its blocks")]
        return []

    def count(records: ViewRecords) -> None:
        if not bad:  # else not all have been looked at
            tally.add(records)

    return Part(rectification.blocks, None, consistent, count, whole)


def _plain(value: Any) -> Any:
    """JSON has no tuples and no floats that are integers."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


# ---- what they are --------------------------------------------------------------------------


def check_blocks(
    cache: LogitCache,
    part: Part,
    intact: dict[int, ViewRecords],
    reporter: Reporter,
    threads: int,
) -> Verified:
    """Every block of a part, several at a time; the records of a few views are in memory.

    threads: at the most; fewer where blocks are large. intact: what is left of the logits' records
    in views where some are damaged. They are faults here, and no reason to stop.
    """
    files = part.commits.files()
    total, blocks, size = len(files) * cache.grid.num_blocks, 0, 0
    faults = _missing_views(cache, part, files)
    inspected = part.commits.inspect(files)
    with ThreadPoolExecutor(threads_at_once(cache.grid, cache.num_classes, threads)) as pool:
        while some := list(islice(inspected, _VIEWS_AT_ONCE)):
            for view, found, damaged in some:
                faults += [Fault(key, "the record is damaged", key=key) for key in damaged]
                faults += _missing(cache, part, view, found)
                if damaged and part.commits is cache.commits:
                    intact[view] = found
                part.commits.hold(view, found)
                if view in intact:
                    cache.commits.hold(view, intact[view])
            where = [(BlockId(v, block), r) for v, found, _ in some for block, r in found.items()]
            for read, wrong in pool.map(lambda item: _block_faults(cache, part, *item), where):
                size, blocks = size + read, blocks + 1
                faults += wrong
                reporter.progress(f"verify {part.commits.part}", blocks, total, "blocks")
            if not faults:
                for _, found, _ in some:
                    part.count(found)
    return Verified(faults, blocks, size)


def _missing_views(cache: LogitCache, part: Part, files: Mapping[int, object]) -> list[Fault]:
    """The blocks of views that should have records and have none; many are reported together."""
    missing = [view for view in part.views or () if view not in files]
    named = missing[: max(1, _MISSING_NAMED // cache.grid.num_blocks)]
    faults = [fault for view in named for fault in _missing(cache, part, view, {})]
    if rest := len(missing) - len(named):
        faults.append(Fault(part.commits.part, f"{rest} more views are not there"))
    return faults


def _missing(cache: LogitCache, part: Part, view: int, found: ViewRecords) -> list[Fault]:
    """The blocks that should have a record and have none; many are reported together."""
    if not (found if part.views is None else view in part.views):
        return []
    name, blocks = part.commits.part, cache.grid.num_blocks
    missing = islice((b for b in range(blocks) if b not in found), _MISSING_NAMED)
    faults = [
        Fault(f"{name}, view {view}, block {block}", "is not there", name, BlockId(view, block))
        for block in missing
    ]
    there = sum(0 <= block < blocks for block in found)
    if rest := blocks - there - len(faults):
        faults.append(Fault(f"{name}, view {view}", f"{rest} more blocks are not there"))
    return faults


def _block_faults(
    cache: LogitCache, part: Part, at: BlockId, record: Record
) -> tuple[int, list[Fault]]:
    """Bytes read, and the faults of one block."""
    name = f"{part.commits.part}, view {at.view}, block {at.block}"

    def faults(whats: list[str]) -> list[Fault]:
        return [Fault(name, what, part.commits.part, at) for what in whats]

    if not (0 <= at.view < cache.num_views and 0 <= at.block < cache.grid.num_blocks):
        return 0, faults(["is outside the arrays"])
    keys = {part.blocks.key(array, at) for array in part.blocks.names(at.view)}
    rows, size = cache.grid.rows(at.block), 0
    try:
        size, whats = object_faults(cache.group.store, record, keys)
        if record.get("rows") != [rows.start, rows.stop]:
            whats.append("its record speaks of other rows")
        whats = whats or list(part.consistent(at, record))
    except CacheError as error:
        whats = [error.cause]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        whats = [f"its record cannot be read: {error!r}"]
    return size, faults(whats)


def object_faults(store: Store, record: Record, keys: set[str]) -> tuple[int, list[str]]:
    """Bytes read, and which objects are not what the record says."""
    objects = record.get("objects", {})
    if set(objects) != keys:
        return 0, ["its record speaks of other objects"]
    size, faults = 0, []
    for key, known in objects.items():
        content = read_object(store, key)
        if content is None:
            faults.append(f"{key} is missing")
            continue
        size += len(content)
        if len(content) != known["bytes"]:
            faults.append(f"{key} has {len(content)} bytes, not {known['bytes']}")
        elif hashlib.sha256(content).hexdigest() != known["sha256"]:
            faults.append(f"{key} has another sha256")
    return size, faults
