"""Does a cache hold what stage one and stage two promised? Every byte of it is looked at.

    pipeline verify digits.zarr --live 500 --pixels

Checked: the documents (format, identity, metadata of every array), completeness, size and sha256
of every object against its commit record, the records against the arrays, rectifications against
the rows they were made from. With a teacher, also that it still says what the cache says (`live`);
with the dataset, that its pixels are still those the teacher saw (`pixels`).
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec
import torch
from zarr.abc.store import Store

from stages.cache import LogitCache, root
from stages.cache.arrays import get_array, open_group, read_array
from stages.cache.commits import CommitLog
from stages.cache.create import all_arrays
from stages.cache.documents import is_canonical
from stages.cache.encoding import row_kl
from stages.cache.layout import ArraySpec, block_key
from stages.cache.location import Location, location
from stages.cache.objects import folders, read_object
from stages.cache.records import Record, ViewRecords, unsealed
from stages.cache.rectified import Rectification
from stages.cache_teacher import CacheJob, teacher_logits
from stages.errors import CacheError, IdentityError, UnansweredError
from stages.inputs.datasets.dataset import digest
from stages.rectify import RectifyConfig, rectified_block
from stages.reporting import Reporter, Silent
from stages.tally import Tally
from stages.training.setup import Splits
from stages.training.student_checks import cached_policy, check_dataset

_NOISE = {"float32": 1e-4}
"""Mean KL at T=1 that a teacher may differ by from itself: other batches, other kernels."""
_NOISE_HALF = 5e-3
_VIEWS_AT_ONCE = 16
"""Whose records are in memory, and whose blocks the threads share."""


@dataclass(frozen=True)
class Fault:
    """What is wrong, and where.

    part, view, block: the block that repair computes again, where it is one. key: the object that
    repair removes first. Anything else repair writes again.
    """

    where: str
    what: str
    part: str | None = None
    view: int = -1
    block: int = -1
    key: str | None = None


@dataclass(frozen=True)
class Verified:
    """What was looked at: blocks of logits and of rectifications, bytes of their objects."""

    faults: list[Fault]
    blocks: int
    bytes: int


def verify(path: str | Location, reporter: Reporter | None = None, threads: int = 4) -> Verified:
    """Look at every object of a cache. Raises CacheError if there is none."""
    reporter, where = reporter or Silent(), location(path)
    try:
        there = root.exists(where)
    except UnansweredError:
        raise
    except CacheError:
        if root.copied_attributes(where) is None:
            raise
        there = True
    if not there:
        raise CacheError(f"no cache at {where}", "Make one with `pipeline cache-teacher`.")
    if faults := list(_root_faults(where)):
        return Verified(faults, 0, 0)  # nothing else can be believed
    try:
        cache = LogitCache.open(where)
    except UnansweredError:
        raise
    except CacheError as error:
        faults = [Fault("metadata", error.cause), *_document_faults(where)]
        return Verified(faults, 0, 0)

    faults = [*_document_faults(where), *_whole_array_faults(cache)]
    bad: set[tuple[int, int]] = set()
    intact: dict[int, ViewRecords] = {}
    parts = [_logits_part(cache)]
    for name in _rectification_names(cache, faults):
        try:
            parts.append(_rectified_part(cache, cache.rectification(name), bad))
        except UnansweredError:
            raise
        except CacheError as error:
            faults.append(Fault(f"rectified/{name}", error.cause))
    blocks = bytes_read = 0
    for part in parts:
        checked = _checked(cache, part, intact, reporter, threads)
        blocks, bytes_read = blocks + checked.blocks, bytes_read + checked.bytes
        faults += checked.faults
        if part is parts[0]:
            bad.update((fault.view, fault.block) for fault in checked.faults)
        if checked.blocks and not checked.faults and not bad:
            faults += part.whole()
    faults += _eval_faults(cache)
    return Verified(faults, blocks, bytes_read)


def verify_live(cache: LogitCache, job: CacheJob, pairs: int, seed: int = 0) -> list[Fault]:
    """Run the teacher on random (view, sample) pairs: does it say what the cache says?

    The mean KL at T=1 between its rows and the decoded ones may be twice what `fidelity` declares,
    and the noise of another batch or device on top.
    """
    generator = torch.Generator().manual_seed(seed)
    views = cache.complete_views
    pairs = min(pairs, len(views) * cache.num_samples)
    if cache.fidelity is None or not views:
        return [Fault("fidelity", "nothing is declared: the cache is not finished")]
    which = torch.randint(len(views), (pairs,), generator=generator)
    samples = torch.randint(cache.num_samples, (pairs,), generator=generator)
    feed = job.feed(job.splits.train, job.policy)
    divergences = []
    for position in which.unique().tolist():
        asked = samples[which == position]
        live = teacher_logits(job, feed, asked, views[position]).cpu()
        stored = cache.read_view(views[position]).rows(asked)
        divergences.append(row_kl(live, stored, 1.0))
    found = float(torch.cat(divergences).mean())
    noise = _NOISE.get(cache.identity.compute_dtype, _NOISE_HALF)
    allowed = 2 * (cache.fidelity.known_kl(1.0) or 0.0) + noise
    if found <= allowed:
        return []
    return [
        Fault(
            "live teacher",
            f"mean KL {found:.2g} to the cached rows over {pairs} pairs, {allowed:.2g} is allowed",
        )
    ]


def verify_pixels(cache: LogitCache, splits: Splits) -> list[Fault]:
    """Are these the samples and the pixels that the teacher saw?"""
    try:
        check_dataset(cache, splits, cached_policy(cache), accept_drift=False, reporter=Silent())
    except IdentityError as error:
        return [Fault("pixels", error.cause)]
    return []


# ---- documents and whole arrays -------------------------------------------------------------


def _root_faults(where: Location) -> Iterator[Fault]:
    """Of the root's attributes, without which nothing else can be judged; and of their copy."""
    try:
        group = open_group(where)
        root.read_attributes(where, group.attrs.asdict())
    except UnansweredError:
        raise
    except CacheError as error:
        yield Fault("root attributes", error.cause)
        return
    try:
        (copy,) = unsealed(read_object(group.store, root.COPY) or b"")
        if copy != group.attrs.asdict():
            yield Fault(root.COPY, "is not a copy of the root's attributes")
    except ValueError:
        yield Fault(root.COPY, "is damaged")


def _document_faults(where: Location) -> list[Fault]:
    """Documents that Zarr would not have written so."""
    store = open_group(where).store
    faults = [
        Fault(key, "the document is damaged")
        for key in _document_keys(store)
        if not is_canonical(read_object(store, key) or b"")
    ]
    faults += [
        Fault(f"{folder}/zarr.json", "the document is not what was written")
        for folder in ("commits", "rectified")
        if read_object(store, f"{folder}/zarr.json") != _EMPTY_GROUP
    ]
    return faults


def _document_keys(store: Store) -> Iterator[str]:
    yield "zarr.json"
    rectified = [f"rectified/{name}" for name in folders(store, "rectified")]
    for folder in [*folders(store, ""), *rectified]:
        yield f"{folder}/zarr.json"
    for folder in rectified:
        for name in folders(store, folder):
            yield f"{folder}/{name}/zarr.json"


_EMPTY_GROUP = b'{\n  "attributes": {},\n  "zarr_format": 3,\n  "node_type": "group"\n}'


def _whole_array_faults(cache: LogitCache) -> Iterator[Fault]:
    """Of the arrays that do not grow with the views, and of how many views the others have."""
    identity = cache.identity.dataset
    for name, spec in all_arrays(cache.num_classes, cache.encoding).items():
        room = get_array(cache.group, name).shape[0]
        if spec.by_block and room != cache.num_views:
            yield Fault(name, f"has room for {room} views, not {cache.num_views}")
    try:
        if not torch.equal(cache.dataset_index.sort().values, torch.arange(cache.num_samples)):
            yield Fault("dataset_index", "is not a permutation of the samples")
        elif digest([cache.labels.to(torch.int32).numpy().tobytes()]) != identity.labels:
            yield Fault("label", "the labels are not those of the identity")
        read_array(cache.group, "eval_label")
    except UnansweredError:
        raise
    except CacheError as error:
        yield Fault("whole arrays", error.cause)


def _eval_faults(cache: LogitCache) -> list[Fault]:
    part = cache.eval_commits
    found, damaged = part.readable()
    if damaged:
        return [Fault(key, "the record is damaged", key=key) for key in damaged]
    if not found:
        return [Fault("eval_logits", "the test split is not there yet")]
    return [
        Fault("eval_logits", what, "eval", 0, 0)
        for record in found.values()
        for what in _object_faults(cache.group.store, record, {"eval_logits/c/0/0"})[1]
    ]


# ---- blocks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Logits, or one rectification: what its blocks should be.

    views: those that have to be complete, None for those that have any block. consistent: what is
    wrong between a record and its arrays. count: takes the records of a view without faults; whole:
    what is then wrong with all of them together.
    """

    commits: CommitLog
    folder: str
    specs: dict[str, ArraySpec]
    views: range | None
    consistent: Callable[[int, int, Record], Iterator[str]]
    count: Callable[[ViewRecords], object]
    whole: Callable[[], list[Fault]]


def _checked(
    cache: LogitCache,
    part: _Part,
    intact: dict[int, ViewRecords],
    reporter: Reporter,
    threads: int,
) -> Verified:
    """Every block of a part, several at a time; the records of a few views are in memory.

    intact: what is left of the logits' records in views where some are damaged. They are faults
    here, and no reason to stop.
    """
    files = part.commits.files()
    total, blocks, size = len(files) * cache.grid.num_blocks, 0, 0
    faults = [
        fault
        for view in part.views or ()
        if view not in files
        for fault in _missing(cache, part, view, {})
    ]
    inspected = part.commits.inspect(files)
    with ThreadPoolExecutor(threads) as pool:
        while some := list(islice(inspected, _VIEWS_AT_ONCE)):
            for view, found, damaged in some:
                faults += [Fault(key, "the record is damaged", key=key) for key in damaged]
                faults += _missing(cache, part, view, found)
                if damaged and part.commits is cache.commits:
                    intact[view] = found
                part.commits.hold(view, found)
                if view in intact:
                    cache.commits.hold(view, intact[view])
            where = [((view, block), r) for view, found, _ in some for block, r in found.items()]
            for read, wrong in pool.map(lambda item: _block_faults(cache, part, *item), where):
                size, blocks = size + read, blocks + 1
                faults += wrong
                reporter.progress(f"verify {part.commits.part}", blocks, total, "blocks")
            if not faults:
                for _, found, _ in some:
                    part.count(found)
    return Verified(faults, blocks, size)


def _missing(cache: LogitCache, part: _Part, view: int, found: ViewRecords) -> list[Fault]:
    """The blocks that should have a record and have none."""
    if not (found if part.views is None else view in part.views):
        return []
    name = part.commits.part
    return [
        Fault(f"{name}, view {view}, block {block}", "is not there", name, view, block)
        for block in range(cache.grid.num_blocks)
        if block not in found
    ]


def _block_faults(
    cache: LogitCache, part: _Part, where: tuple[int, int], record: Record
) -> tuple[int, list[Fault]]:
    """Bytes read, and the faults of one block."""
    view, block = where
    name = f"{part.commits.part}, view {view}, block {block}"

    def faults(whats: list[str]) -> list[Fault]:
        return [Fault(name, what, part.commits.part, view, block) for what in whats]

    if not (0 <= view < cache.num_views and 0 <= block < cache.grid.num_blocks):
        return 0, faults(["is outside the arrays"])
    keys = {block_key(f"{part.folder}{n}", spec, view, block) for n, spec in part.specs.items()}
    rows, size = cache.grid.rows(block), 0
    try:
        size, whats = _object_faults(cache.group.store, record, keys)
        if record.get("rows") != [rows.start, rows.stop]:
            whats.append("its record speaks of other rows")
        whats = whats or list(part.consistent(view, block, record))
    except UnansweredError:
        raise
    except CacheError as error:
        whats = [error.cause]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        whats = [f"its record cannot be read: {error!r}"]
    return size, faults(whats)


def _object_faults(store: Store, record: Record, keys: set[str]) -> tuple[int, list[str]]:
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


def _logits_part(cache: LogitCache) -> _Part:
    def consistent(view: int, block: int, record: Record) -> Iterator[str]:
        rows = cache.read_block(view, block)
        if not bool(torch.isfinite(rows.logits).all()):
            yield "decodes to logits that are not finite"
        if int((rows.predictions == rows.labels).sum()) != record.get("right"):
            yield "its predictions are not those its record counted"

    def whole() -> list[Fault]:
        if cache.fidelity is None:
            return [Fault("fidelity", "is not declared: stage one has not finished")]
        return []

    all_specs = all_arrays(cache.num_classes, cache.encoding).items()
    specs = {name: spec for name, spec in all_specs if spec.by_block}
    views = range(cache.num_views)
    return _Part(cache.commits, "", specs, views, consistent, lambda _: None, whole)


def _rectified_part(
    cache: LogitCache, rectification: Rectification, bad: set[tuple[int, int]]
) -> _Part:
    """bad: blocks whose logits are damaged, which say nothing about what was made from them."""
    name, settings = f"rectified/{rectification.name}", rectification.settings
    asked = {n: getattr(settings, n) for n in ("method", "space", "temperature")}
    try:
        known = msgspec.convert({**asked, "materialise": settings.materialised}, RectifyConfig)
    except ValueError as error:  # of msgspec, or a ConfigError
        raise CacheError(f"its settings cannot be: {error}") from error
    if known.settings != settings:
        raise CacheError("its settings contradict each other")

    def consistent(view: int, block: int, record: Record) -> Iterator[str]:
        if (view, block) in bad:
            return
        made, statistics = rectified_block(cache, rectification.settings, view, block)
        if _plain(statistics) != _plain(record.get("statistics")):
            yield "its statistics are not those of its rows"
        for array, values in made.items():
            stored = read_array(rectification.group, array, view, cache.grid.rows(block))
            close = torch.allclose(stored.float(), values.float(), rtol=1e-3, atol=1e-3)
            if not close:
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

    specs = rectification.specs
    return _Part(rectification.commits, f"{name}/", specs, None, consistent, count, whole)


def _rectification_names(cache: LogitCache, faults: list[Fault]) -> list[str]:
    """The rectifications, by their folders and their records: also damaged or deleted ones."""
    try:
        known = set(cache.rectifications)
    except UnansweredError:
        raise
    except CacheError as error:
        faults.append(Fault("rectified", error.cause))
        known = set()
    store = cache.group.store
    return sorted(known | {*folders(store, "rectified"), *folders(store, "commits/rectified")})


def _plain(value: Any) -> Any:
    """JSON has no tuples and no floats that are integers."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
