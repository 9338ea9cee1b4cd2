"""Repair: whatever was damaged, the bytes of an undamaged cache come back."""

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zarr
from damage import (
    edit_attributes,
    edit_record,
    everything,
    flip,
    flipped,
    same,
    same_content,
    tree,
)

from stages.cache import LogitCache
from stages.cache.layout import BlockId
from stages.cache_teacher import CacheJob
from stages.errors import CacheError, IdentityError
from stages.rectify import rectify
from stages.repair import recorded_job, repair
from stages.settings import RectifyConfig
from stages.verify import Fault, verify

Cut = Callable[[bytes, random.Random], bytes | None]

CUTS: dict[str, Cut] = {
    "flipped": lambda c, draw: flipped(c, draw.randrange(len(c)), draw.randrange(1, 256)),
    "deleted": lambda content, draw: None,
    "cut": lambda content, draw: content[: len(content) // 2],
    "empty": lambda content, draw: b"",
}


def faults_of(store: Path) -> list[Fault]:
    """What the command hands to repair."""
    return verify(store, threads=1).faults


def differing(store: Path, truth: dict[str, bytes]) -> list[str]:
    """The files with another content; of documents, that say something else."""
    found = tree(store)
    keys = {*found, *truth}
    return sorted(k for k in keys if not same_content(k, found.get(k), truth.get(k)))


def test_many_things_damaged_at_once_are_as_they_were(
    small_copy: Path, small_job: CacheJob
) -> None:
    truth, draw = tree(small_copy), random.Random(4)
    # The root and its copy are not lost together, nor all that says what a rectification is.
    spared = {"commits/attributes.json", "commits/rectified/pairwise-T4/v00001.json"}
    for key in sorted(truth.keys() - spared):
        content = CUTS[draw.choice(list(CUTS))](truth[key], draw)
        (small_copy / key).unlink() if content is None else (small_copy / key).write_bytes(content)
    assert repair(small_copy, small_job, faults_of(small_copy)).faults == []
    assert differing(small_copy, truth) == []


def without_folder(store: Path) -> None:
    shutil.rmtree(store / "rectified/pairwise-T4")


def only_attributes_left(store: Path) -> None:
    shutil.rmtree(store / "commits/rectified/pairwise-T4")
    flip(store / "rectified/pairwise-T4/wrong/zarr.json")


def longer_array(store: Path) -> None:
    """As an append leaves it that stopped."""
    found: Any = zarr.open_group(store, mode="r+")["logits"]
    found.resize((5, *found.shape[1:]))


def untrue_records(store: Path) -> None:
    edit_record(store, 1, lambda record: record.update(right=0))
    edit_record(store, 0, lambda record: record.update(statistics={}), 0, "rectified/pairwise-T4")
    edit_record(store, 0, lambda record: record.update(rows=[0, 1]), 1)
    edit_record(store, 1, lambda record: record.update(objects={}), 1)


@pytest.mark.parametrize(
    "harm", [without_folder, only_attributes_left, longer_array, untrue_records]
)
def test_what_is_lacking_or_untrue_is_mended(
    tiny_copy: Path, tiny_job: CacheJob, tiny_cache: Path, harm: Callable[[Path], None]
) -> None:
    harm(tiny_copy)
    faults = faults_of(tiny_copy)
    assert faults
    assert repair(tiny_copy, tiny_job, faults).faults == []
    assert differing(tiny_copy, tree(tiny_cache)) == []


def test_a_rectification_that_nothing_speaks_of_any_more_is_told(
    tiny_copy: Path, tiny_job: CacheJob, tiny_cache: Path
) -> None:
    flip(tiny_copy / "rectified/pairwise-T4/zarr.json")
    for view in (0, 1):
        flip(tiny_copy / f"commits/rectified/pairwise-T4/v{view:05d}.json")

    with pytest.raises(CacheError, match="'pairwise-T4' cannot be repaired") as caught:
        repair(tiny_copy, tiny_job, faults_of(tiny_copy))
    assert "rectify again" in caught.value.remedy
    for folder in ("rectified", "commits/rectified"):  # what the remedy says
        shutil.rmtree(tiny_copy / folder / "pairwise-T4")
    rectify(tiny_copy, RectifyConfig())
    assert differing(tiny_copy, tree(tiny_cache)) == []


def test_only_what_was_damaged_is_computed_again(
    tiny_copy: Path, tiny_job: CacheJob, tiny_cache: Path
) -> None:
    times = {p: p.stat().st_mtime_ns for p in tiny_copy.rglob("*/c/**/*") if p.is_file()}
    flip(tiny_copy / "logits/c/1/0/0")
    repair(tiny_copy, tiny_job, faults_of(tiny_copy))
    again = {str(p.relative_to(tiny_copy)) for p in times if p.stat().st_mtime_ns != times[p]}
    names = ("wrong", "label_logit", "predicted_logit")
    rectified = {f"rectified/pairwise-T4/{name}/c/1/0" for name in names}
    assert again == {"logits/c/1/0/0", "prediction/c/1/0", *rectified}
    assert differing(tiny_copy, tree(tiny_cache)) == []


def test_a_block_made_from_a_damaged_one_is_made_again(
    tiny_copy: Path, tiny_job: CacheJob, tiny_cache: Path
) -> None:
    # a rectification of rows that nobody has any more, each byte as its record says
    cache = LogitCache.open(tiny_copy, writable=True)
    rows = cache.read_block(0, 0)
    cache.write_block(0, 0, rows.logits.flip(1), rows.predictions, {})
    rectification = cache.rectification("pairwise-T4")
    rectification.commits.forget(BlockId(0, 0))
    rectify(tiny_copy, RectifyConfig())
    flip(tiny_copy / "logits/c/0/0/0")

    assert repair(tiny_copy, tiny_job, faults_of(tiny_copy)).faults == []
    assert same(everything(tiny_copy), everything(tiny_cache))


@pytest.mark.slow
def test_several_rectifications_are_mended(tiny_copy: Path, tiny_job: CacheJob) -> None:
    rectify(tiny_copy, RectifyConfig(method="swap", name="mine", materialise=True, views=1))
    rectify(tiny_copy, RectifyConfig(method="blend", space="probability-1", temperature=2))
    truth, group = tree(tiny_copy), tiny_copy / "rectified"
    flip(tiny_copy / "logits/c/0/0/0")
    flip(group / "mine/log_distribution/c/0/1/0")
    flip(group / "blend-T2-probability-1/wrong/zarr.json")
    flip(group / "pairwise-T4/wrong/c/1/1")

    assert repair(tiny_copy, tiny_job, faults_of(tiny_copy)).faults == []
    assert differing(tiny_copy, truth) == []


# ---- what is refused ------------------------------------------------------------------------


def test_a_job_of_another_cache_repairs_nothing(
    tiny_job: CacheJob, small_copy: Path, small_job: CacheJob
) -> None:
    before = tree(small_copy)

    with pytest.raises(IdentityError, match=r"dataset\.\w+: "):
        repair(small_copy, tiny_job, [])
    assert tree(small_copy) == before
    flip(small_copy / "klt_basis/c/0/0")
    before = tree(small_copy)
    # a calibration of another device: its rows are near, and not the same
    config = msgspec.structs.replace(small_job.config, max_kl=1e-4)
    with pytest.raises(CacheError) as caught:
        repair(small_copy, dataclasses.replace(small_job, config=config), [])
    assert "machine that made it" in caught.value.remedy
    assert tree(small_copy) == before


def test_without_the_root_and_its_copy_nothing_can_be_said(
    tiny_copy: Path, tiny_job: CacheJob
) -> None:
    edit_attributes(tiny_copy, lambda attributes: attributes["provenance"].pop("config"))
    with pytest.raises(CacheError, match="how it was made"):
        recorded_job(tiny_copy)
    flip(tiny_copy / "zarr.json")
    flip(tiny_copy / "commits/attributes.json")

    for work in (lambda: repair(tiny_copy, tiny_job, []), lambda: recorded_job(tiny_copy)):
        with pytest.raises(CacheError, match="cannot be repaired") as caught:
            work()
        assert "cache again" in caught.value.remedy


def test_a_folder_without_a_cache_is_not_repaired(tiny_job: CacheJob, tmp_path: Path) -> None:
    with pytest.raises(CacheError):
        recorded_job(tmp_path / "nothing")
    with pytest.raises(CacheError):
        repair(tmp_path / "nothing", tiny_job, [])
    assert list(tmp_path.iterdir()) == []
