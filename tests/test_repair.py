"""Repair: whatever was damaged, the bytes of an undamaged cache come back."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import forks
import msgspec
import pytest
import zarr
from damage import (
    edit_attributes,
    edit_record,
    everything,
    flip,
    flipped,
    records,
    same,
    same_content,
    tree,
)
from helpers import Words

from stages.cache import LogitCache
from stages.cache.layout import BlockId
from stages.cache_teacher import CacheJob
from stages.errors import CacheError, IdentityError
from stages.rectify import rectify
from stages.repair import recorded_job, repair
from stages.settings import RectifyConfig
from stages.verify import Fault, verify

HELPER = Path(__file__).with_name("kill_repair.py")
Cut = Callable[[bytes, random.Random], bytes | None]

CUTS: dict[str, Cut] = {
    "flipped": lambda content, draw: flipped(
        content, draw.randrange(len(content)), draw.randrange(1, 256)
    ),
    "deleted": lambda content, draw: None,
    "cut": lambda content, draw: content[: len(content) // 2],
    "empty": lambda content, draw: b"",
}


def faults_of(store: Path) -> list[Fault]:
    """What the command hands to repair."""
    return verify(store, threads=1).faults


def damage(store: Path, key: str, cut: Cut, draw: random.Random) -> None:
    content = cut((store / key).read_bytes(), draw)
    if content is None:
        (store / key).unlink()
    else:
        (store / key).write_bytes(content)


def differing(store: Path, truth: dict[str, bytes]) -> list[str]:
    """The files with another content; of documents, that say something else."""
    found = tree(store)
    keys = {*found, *truth}
    return sorted(k for k in keys if not same_content(k, found.get(k), truth.get(k)))


def mended(store: Path, job: CacheJob, whole: Path) -> None:
    """Repair it, and nothing differs from what is whole."""
    assert repair(store, job, faults_of(store)).faults == []
    assert differing(store, tree(whole)) == []


def test_many_things_damaged_at_once_are_as_they_were(
    small_copy: Path, small_job: CacheJob
) -> None:
    truth, draw = tree(small_copy), random.Random(4)
    # The root and its copy are not lost together, nor all that says what a rectification is.
    spared = {"commits/attributes.json", "commits/rectified/pairwise-T4/v00001.json"}
    for key in sorted(truth.keys() - spared):
        damage(small_copy, key, CUTS[draw.choice(list(CUTS))], draw)

    assert repair(small_copy, small_job, faults_of(small_copy)).faults == []
    assert differing(small_copy, truth) == []


def test_a_rectification_of_which_only_attributes_are_left_is_made_again(
    tiny_copy: Path, tiny_job: CacheJob, tiny_cache: Path
) -> None:
    shutil.rmtree(tiny_copy / "commits/rectified/pairwise-T4")
    flip(tiny_copy / "rectified/pairwise-T4/wrong/zarr.json")

    mended(tiny_copy, tiny_job, tiny_cache)


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
    assert repair(tiny_copy, tiny_job, []).faults == []
    rectify(tiny_copy, RectifyConfig())
    assert differing(tiny_copy, tree(tiny_cache)) == []


def test_only_what_was_damaged_is_computed_again(
    tiny_copy: Path, tiny_job: CacheJob, tiny_cache: Path
) -> None:
    times = {
        path: path.stat().st_mtime_ns for path in tiny_copy.rglob("*/c/**/*") if path.is_file()
    }
    flip(tiny_copy / "logits/c/1/0/0")
    words = Words()

    repair(tiny_copy, tiny_job, faults_of(tiny_copy), words)

    again = {str(p.relative_to(tiny_copy)) for p in times if p.stat().st_mtime_ns != times[p]}
    rectified = {f"rectified/pairwise-T4/{n}/c/1/0" for n in ("wrong", "label_logit")}
    rectified.add("rectified/pairwise-T4/predicted_logit/c/1/0")
    assert again == {"logits/c/1/0/0", "prediction/c/1/0", *rectified}
    assert "3 blocks are there already, 1 are missing" in words.lines
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


def test_records_that_are_sealed_and_untrue_are_mended(
    tiny_copy: Path, tiny_job: CacheJob, tiny_cache: Path
) -> None:
    edit_record(tiny_copy, 1, lambda record: record.update(right=0))
    edit_record(
        tiny_copy, 0, lambda record: record.update(statistics={}), 0, "rectified/pairwise-T4"
    )
    edit_record(tiny_copy, 0, lambda record: record.update(rows=[0, 1]), 1)
    edit_record(tiny_copy, 1, lambda record: record.update(objects={}), 1)

    mended(tiny_copy, tiny_job, tiny_cache)


@pytest.mark.slow
def test_several_rectifications_are_mended(tiny_copy: Path, tiny_job: CacheJob) -> None:
    rectify(tiny_copy, RectifyConfig(method="swap", name="mine", materialise=True, views=1))
    rectify(tiny_copy, RectifyConfig(method="blend", space="probability-1", temperature=2))
    truth = tree(tiny_copy)
    for key in (
        "logits/c/0/0/0",
        "rectified/mine/log_distribution/c/0/1/0",
        "rectified/blend-T2-probability-1/wrong/zarr.json",
        "rectified/pairwise-T4/wrong/c/1/1",
    ):
        flip(tiny_copy / key)

    assert repair(tiny_copy, tiny_job, faults_of(tiny_copy)).faults == []
    assert differing(tiny_copy, truth) == []


def test_an_append_that_stopped_is_completed(
    tiny_copy: Path, tiny_job: CacheJob, tiny_cache: Path
) -> None:
    found = zarr.open_group(tiny_copy, mode="r+")["logits"]
    assert isinstance(found, zarr.Array)
    found.resize((5, *found.shape[1:]))

    mended(tiny_copy, tiny_job, tiny_cache)


# ---- what is refused ------------------------------------------------------------------------


def test_a_job_of_another_cache_repairs_nothing(tiny_job: CacheJob, cache_copy: Path) -> None:
    before = tree(cache_copy)

    with pytest.raises(IdentityError, match=r"dataset\.\w+: "):
        repair(cache_copy, tiny_job, [])
    assert tree(cache_copy) == before


def test_without_the_root_and_its_copy_nothing_can_be_said(
    tiny_copy: Path, tiny_job: CacheJob
) -> None:
    flip(tiny_copy / "zarr.json")
    flip(tiny_copy / "commits/attributes.json")

    with pytest.raises(CacheError, match="cannot be repaired") as caught:
        repair(tiny_copy, tiny_job, [])
    assert "cache again" in caught.value.remedy
    with pytest.raises(CacheError, match="cannot be repaired"):
        recorded_job(tiny_copy)


def test_a_calibration_that_cannot_be_computed_again_here_is_told(
    small_copy: Path, small_job: CacheJob
) -> None:
    flip(small_copy / "klt_basis/c/0/0")
    before = tree(small_copy)
    # another device: its rows are near, and not the same
    config = msgspec.structs.replace(small_job.config, max_kl=1e-4)

    with pytest.raises(CacheError, match="cannot be computed again here") as caught:
        repair(small_copy, dataclasses.replace(small_job, config=config), [])
    assert "machine that made it" in caught.value.remedy
    assert tree(small_copy) == before


def test_a_cache_that_does_not_say_how_it_was_made_is_told(tiny_copy: Path) -> None:
    edit_attributes(tiny_copy, lambda attributes: attributes["provenance"].pop("config"))

    with pytest.raises(CacheError, match="does not say how it was made"):
        recorded_job(tiny_copy)


def test_a_folder_without_a_cache_is_not_repaired(tiny_job: CacheJob, tmp_path: Path) -> None:
    with pytest.raises(CacheError):
        recorded_job(tmp_path / "nothing")
    with pytest.raises(CacheError):
        repair(tmp_path / "nothing", tiny_job, [])
    assert list(tmp_path.iterdir()) == []


# ---- killed half-way ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_repair_that_was_killed_is_repeated(teacher_run: Path, tmp_path: Path) -> None:
    done = forks.run([str(HELPER), str(teacher_run), str(tmp_path), "60", "0"], timeout=1700)
    assert done.returncode == 0, done.stderr

    figures = json.loads(done.stdout)
    print(figures)  # shown by -s
    assert len(figures["faults_at_kill"]) == 60
    truth = tree(tmp_path / "undisturbed")
    for number in range(figures["stores"]):
        store = tmp_path / f"killed-{number}"
        # but for compaction: a run that is killed before it leaves nothing else to do
        others = [key for key in differing(store, truth) if not key.startswith("commits/")]
        assert others == []
        assert records(store) == records(tmp_path / "undisturbed")
        assert faults_of(store) == []


def test_a_rectification_that_was_deleted_is_noticed_and_made_again(
    tiny_copy: Path, tiny_job: CacheJob, tiny_cache: Path
) -> None:
    shutil.rmtree(tiny_copy / "rectified/pairwise-T4")

    faults = faults_of(tiny_copy)

    assert any("pairwise-T4" in fault.where for fault in faults)
    assert repair(tiny_copy, tiny_job, faults).faults == []
    assert tree(tiny_copy) == tree(tiny_cache)
