"""Mend what `verify` found: write metadata again, compute bad blocks again, nothing else.

Blocks are forgotten first and computed by stages one and two as if they had never been there, so a
repair that is stopped goes on like an interrupted run. On the machine that made the cache the
mended bytes are the same; on another they are as near as the teacher is to itself.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from zarr.abc.store import Store

from stages.cache import LogitCache, metadata
from stages.cache.arrays import open_group, read_array
from stages.cache.commits import CommitLog
from stages.cache.encoding import Encoding, restored
from stages.cache.identity import identity_from_json
from stages.cache.lock import exclusive
from stages.cache.metadata import NewCache, RootAttributes, all_arrays, check_seal
from stages.cache.rectified import RectificationSettings
from stages.cache.storage import Location, folders, location, read_object, write_object
from stages.cache_teacher import CacheJob, cache_teacher
from stages.errors import CacheError
from stages.rectify import config_of, rectify
from stages.reporting import Reporter, Silent
from stages.settings import RectifyConfig
from stages.teacher.logits import FirstRows, TeacherPass
from stages.teacher.recorded import check_teacher, recorded_job, trusted_attributes
from stages.verify import Fault, Verified, verify
from stages.verify.documents import root_faults
from stages.verify.known_views import known_views, rectified_views

__all__ = ["check_teacher", "recorded_job", "repair"]


def repair(
    path: str | Location, job: CacheJob, faults: list[Fault], reporter: Reporter | None = None
) -> Verified:
    """Mend these faults; return what verifying it all then finds.

    Raises IdentityError if `job` is not what the cache was made from.
    """
    reporter, where = reporter or Silent(), location(path)
    check_teacher(where, job)
    with exclusive(where):
        attributes = trusted_attributes(where, mend=True)
        covered = _mend_metadata(where, attributes, job, reporter)
        # Metadata that was damaged may have hidden damaged blocks.
        faults = [*faults, *verify(where, Silent()).faults]
        _forget(where, faults)
        cache = LogitCache.open(where)
        views, again = cache.num_views, _to_rectify(cache, covered)
    job = _with_config(job, views=views, encoding="auto")
    cache_teacher(job, path, reporter)
    for config in again:
        rectify(path, config, reporter)
    return verify(where, reporter)


def _mend_metadata(
    where: Location, attributes: RootAttributes, job: CacheJob, reporter: Reporter
) -> dict[str, int]:
    """Write every document and every whole array that is not as stage one would write it now.

    A store with the same metadata is made beside it, in a temporary folder, and copied from.
    Nothing gets smaller: the views are as many as anything intact knows of. Returns how many of
    them each rectification covers.
    """
    identity = identity_from_json(attributes.identity, str(where))
    coding = _calibrated(where, attributes, job)
    group = open_group(where, writable=True)
    if any(root_faults(where)):  # the copy is damaged
        metadata.write_attributes(group, group.attrs.asdict())
    by_block = [n for n, spec in all_arrays(job.num_classes, coding).items() if spec.by_block]
    samples, provenance = identity.dataset.num_samples, attributes.provenance
    views = max(1, known_views(group.store, by_block, samples, provenance).views)
    # Before anything that says so is written anew.
    settings = _rectification_settings(where, attributes.identity_digest)
    covered = {name: rectified_views(group.store, name, views) for name in settings}
    with TemporaryDirectory() as folder:
        reference = LogitCache.create(
            Path(folder) / "reference",
            NewCache(
                identity=identity,
                coding=coding,
                num_views=views,
                dataset_index=job.row_order,
                labels=job.splits.train.labels,
                eval_labels=job.splits.test.labels,
                pixel_probes=attributes.pixel_probes,
                provenance=attributes.provenance,
                block_rows=job.config.block_rows,
            ),
        )
        for name, found in settings.items():
            reference.create_rectification(name, found)
        store = reference.group.store
        for file in sorted(Path(reference.path).rglob("*")):
            key = str(file.relative_to(Path(reference.path)))
            if not file.is_file() or key == "zarr.json" or key.startswith("commits/attr"):
                continue
            content = read_object(store, key) or b""
            is_attributes = key.startswith("rectified/") and key.count("/") == 2
            if read_object(group.store, key) != content and not (
                is_attributes and _intact(where, key)
            ):
                write_object(group.store, key, content)
                reporter.say(f"written again: {key}")
    return covered


def _calibrated(where: Location, attributes: RootAttributes, job: CacheJob) -> Encoding:
    """The cache's encoding; its calibration computed again where it is damaged."""
    group = open_group(where)
    try:
        return restored(attributes.encoding, job.num_classes, lambda name: read_array(group, name))
    except CacheError as error:
        asked, name = job.config.encoding, attributes.encoding.name
        again = _with_config(job, encoding=name if asked == "auto" else asked)
        blocks = TeacherPass.of(again).first_blocks()
        coding = FirstRows.of_blocks(again, blocks).fitted(again.config)
        if coding.digest() != attributes.encoding.digest:
            raise CacheError(
                f"the calibration of {where} is damaged and cannot be computed again here",
                "Repair it on the machine that made it, or cache again.",
            ) from error
        return coding


def _rectification_settings(where: Location, identity: str) -> dict[str, RectificationSettings]:
    """Of every rectification, from the records of its blocks: they say it once more."""
    store = open_group(where).store
    found = {}
    for name in {*folders(store, "rectified"), *folders(store, "commits/rectified")}:
        for _, records, _ in CommitLog(store, f"rectified/{name}", 1, identity).inspect():
            for record in records.values():
                with contextlib.suppress(KeyError, msgspec.ValidationError):
                    found[name] = msgspec.convert(record["settings"], RectificationSettings)
        if name not in found and (settings := _settings_by_attributes(store, name)):
            found[name] = settings
    return found


def _settings_by_attributes(store: Store, name: str) -> RectificationSettings | None:
    """Of a rectification without any record; None if it was never finished being created."""
    document = read_object(store, f"rectified/{name}/zarr.json") or b"{}"
    try:
        attributes = json.loads(document).get("attributes", {})
        if not attributes and not folders(store, f"commits/rectified/{name}"):
            return None
        check_seal(attributes, name)
        return RectificationSettings.of_attributes(attributes)
    except (AttributeError, ValueError, CacheError) as error:
        raise CacheError(
            f"rectification '{name}' cannot be repaired: its attributes and all its records are "
            "damaged",
            f"Remove rectified/{name} and commits/rectified/{name}, repair and rectify again.",
        ) from error


def _intact(where: Location, key: str) -> bool:
    """Whether the attributes of a rectification are what was written, with its statistics."""
    try:
        cache = LogitCache.open(where)
        cache.rectification(key.split("/")[1])
    except CacheError:
        return False
    return True


def _forget(where: Location, faults: list[Fault]) -> None:
    """Unmake bad blocks, and the rectified blocks that were made from them."""
    cache = LogitCache.open(where, writable=True)
    for fault in faults:
        if fault.key is not None:
            cache.commits.discard(fault.key)
    logs = {"logits": cache.commits, "eval": cache.eval_commits}
    logs |= {f"rectified/{n}": cache.rectification(n).commits for n in cache.rectifications}
    for fault in faults:
        for part, log in logs.items():
            made_from = fault.part == "logits" and part.startswith("rectified/")
            if fault.at and (part == fault.part or made_from) and log.has(fault.at):
                log.forget(fault.at)


def _to_rectify(cache: LogitCache, covered: Mapping[str, int]) -> list[RectifyConfig]:
    """The rectifications that have to be run again: all that cover any view."""
    return [
        config_of(cache.rectification(name).settings, name=name, views=covered[name])
        for name in cache.rectifications
        if covered.get(name)
    ]


def _with_config(job: CacheJob, **changes: Any) -> CacheJob:
    return dataclasses.replace(job, config=msgspec.structs.replace(job.config, **changes))
