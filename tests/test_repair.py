"""Repair: whatever was damaged, the bytes of an undamaged cache come back."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    same,
    same_content,
    tree,
)
from helpers import Words
from safetensors.torch import load_file, save_file

from stages.cache import LogitCache
from stages.cache.layout import BlockId
from stages.cache_teacher import CacheJob, cache_teacher
from stages.errors import CacheError, IdentityError
from stages.rectify import rectify
from stages.repair import recorded_job, repair
from stages.settings import CacheConfig, RectifyConfig
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


def records(store: Path) -> list[dict[tuple[int, int], dict[str, Any]]]:
    """What is committed, compacted or not."""
    cache = LogitCache.open(store)
    parts = [cache.commits, cache.eval_commits, cache.rectification("pairwise-T4").commits]
    return [dict(sorted(part.records.items())) for part in parts]


def differing(store: Path, truth: dict[str, bytes]) -> list[str]:
    """The files with another content; of documents, that say something else."""
    found = tree(store)
    keys = {*found, *truth}
    return sorted(k for k in keys if not same_content(k, found.get(k), truth.get(k)))


@pytest.fixture(scope="module")
def tiny_job(small_job: CacheJob) -> CacheJob:
    """Two views of two blocks."""
    return dataclasses.replace(
        small_job, config=msgspec.structs.replace(small_job.config, block_rows=150)
    )


@pytest.fixture(scope="module")
def tiny_cache(tiny_job: CacheJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.zarr"
    cache_teacher(tiny_job, path)
    rectify(path, RectifyConfig())
    return path


def test_many_things_damaged_at_once_are_as_they_were(
    tiny_cache: Path, tiny_job: CacheJob, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(tiny_cache, tmp_path / "c.zarr"))
    truth, draw = tree(store), random.Random(4)
    # The root and its copy are not lost together, nor all that says what a rectification is.
    spared = {"commits/attributes.json", "commits/rectified/pairwise-T4/v00001.json"}
    for key in sorted(truth.keys() - spared):
        damage(store, key, CUTS[draw.choice(list(CUTS))], draw)

    assert repair(store, tiny_job, faults_of(store)).faults == []
    assert differing(store, truth) == []


def test_a_rectification_of_which_only_attributes_are_left_is_made_again(
    tiny_cache: Path, tiny_job: CacheJob, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(tiny_cache, tmp_path / "c.zarr"))
    shutil.rmtree(store / "commits/rectified/pairwise-T4")
    flip(store / "rectified/pairwise-T4/wrong/zarr.json")

    assert repair(store, tiny_job, faults_of(store)).faults == []
    assert differing(store, tree(tiny_cache)) == []


def test_a_rectification_that_nothing_speaks_of_any_more_is_told(
    tiny_cache: Path, tiny_job: CacheJob, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(tiny_cache, tmp_path / "c.zarr"))
    flip(store / "rectified/pairwise-T4/zarr.json")
    for view in (0, 1):
        flip(store / f"commits/rectified/pairwise-T4/v{view:05d}.json")

    with pytest.raises(CacheError, match="'pairwise-T4' cannot be repaired") as caught:
        repair(store, tiny_job, faults_of(store))
    assert "rectify again" in caught.value.remedy
    for folder in ("rectified", "commits/rectified"):  # what the remedy says
        shutil.rmtree(store / folder / "pairwise-T4")
    assert repair(store, tiny_job, []).faults == []
    rectify(store, RectifyConfig())
    assert differing(store, tree(tiny_cache)) == []


def test_only_what_was_damaged_is_computed_again(
    tiny_cache: Path, tiny_job: CacheJob, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(tiny_cache, tmp_path / "c.zarr"))
    times = {path: path.stat().st_mtime_ns for path in store.rglob("*/c/**/*") if path.is_file()}
    flip(store / "logits_code/c/1/0/0")
    words = Words()

    repair(store, tiny_job, faults_of(store), words)

    again = {str(p.relative_to(store)) for p in times if p.stat().st_mtime_ns != times[p]}
    rectified = {f"rectified/pairwise-T4/{n}/c/1/0" for n in ("wrong", "label_logit")}
    rectified.add("rectified/pairwise-T4/predicted_logit/c/1/0")
    assert again == {"logits_code/c/1/0/0", "prediction/c/1/0", *rectified}
    assert "3 blocks are there already, 1 are missing" in words.lines
    assert differing(store, tree(tiny_cache)) == []


def test_a_block_made_from_a_damaged_one_is_made_again(
    tiny_cache: Path, tiny_job: CacheJob, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(tiny_cache, tmp_path / "c.zarr"))
    # a rectification of rows that nobody has any more, each byte as its record says
    cache = LogitCache.open(store, writable=True)
    rows = cache.read_block(0, 0)
    cache.write_block(0, 0, rows.logits.flip(1), rows.predictions, {})
    rectification = cache.rectification("pairwise-T4")
    rectification.commits.forget(BlockId(0, 0))
    rectify(store, RectifyConfig())
    flip(store / "logits_code/c/0/0/0")

    assert repair(store, tiny_job, faults_of(store)).faults == []
    assert same(everything(store), everything(tiny_cache))


def test_records_that_are_sealed_and_untrue_are_mended(
    tiny_cache: Path, tiny_job: CacheJob, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(tiny_cache, tmp_path / "c.zarr"))
    edit_record(store, 1, lambda record: record.update(right=0))
    edit_record(store, 0, lambda record: record.update(statistics={}), 0, "rectified/pairwise-T4")
    edit_record(store, 0, lambda record: record.update(rows=[0, 1]), 1)
    edit_record(store, 1, lambda record: record.update(objects={}), 1)

    assert repair(store, tiny_job, faults_of(store)).faults == []
    assert differing(store, tree(tiny_cache)) == []


def test_several_rectifications_are_mended(
    tiny_cache: Path, tiny_job: CacheJob, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(tiny_cache, tmp_path / "c.zarr"))
    rectify(store, RectifyConfig(method="swap", name="mine", materialise=True, views=1))
    rectify(store, RectifyConfig(method="blend", space="probability-1", temperature=2))
    truth = tree(store)
    for key in (
        "logits_code/c/0/0/0",
        "rectified/mine/log_distribution/c/0/1/0",
        "rectified/blend-T2-probability-1/wrong/zarr.json",
        "rectified/pairwise-T4/wrong/c/1/1",
    ):
        flip(store / key)

    assert repair(store, tiny_job, faults_of(store)).faults == []
    assert differing(store, truth) == []


def test_an_append_that_stopped_is_completed(
    tiny_cache: Path, tiny_job: CacheJob, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(tiny_cache, tmp_path / "c.zarr"))
    found = zarr.open_group(store, mode="r+")["logits_code"]
    assert isinstance(found, zarr.Array)
    found.resize((5, *found.shape[1:]))

    assert repair(store, tiny_job, faults_of(store)).faults == []
    assert differing(store, tree(tiny_cache)) == []


# ---- what is refused ------------------------------------------------------------------------


def test_the_wrong_teacher_repairs_nothing(
    finished_cache: Path, cache_copy: Path, teacher_run: Path, tmp_path: Path
) -> None:
    flip(cache_copy / "logits/c/0/1/0")
    before = tree(cache_copy)
    other = Path(shutil.copytree(teacher_run, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: -weights[name]}, other / "model.safetensors")
    (other / "summary.json").unlink()  # which has a digest of the old ones

    with pytest.raises(IdentityError, match=r"teacher\.weights: ") as caught:
        recorded_job(cache_copy, weights=str(other))
    assert "--weights" in caught.value.remedy
    assert tree(cache_copy) == before


def test_a_job_of_another_cache_repairs_nothing(tiny_job: CacheJob, cache_copy: Path) -> None:
    before = tree(cache_copy)

    with pytest.raises(IdentityError, match=r"dataset\.\w+: "):
        repair(cache_copy, tiny_job, [])
    assert tree(cache_copy) == before


def test_without_the_root_and_its_copy_nothing_can_be_said(
    tiny_cache: Path, tiny_job: CacheJob, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(tiny_cache, tmp_path / "c.zarr"))
    flip(store / "zarr.json")
    flip(store / "commits/attributes.json")

    with pytest.raises(CacheError, match="cannot be repaired") as caught:
        repair(store, tiny_job, [])
    assert "cache again" in caught.value.remedy
    with pytest.raises(CacheError, match="cannot be repaired"):
        recorded_job(store)


def test_a_calibration_that_cannot_be_computed_again_here_is_told(
    tiny_cache: Path, tiny_job: CacheJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Path(shutil.copytree(tiny_cache, tmp_path / "c.zarr"))
    flip(store / "klt_basis/c/0/0")
    before = tree(store)
    # another device: its rows are near, and not the same
    job = dataclasses.replace(
        tiny_job, config=msgspec.structs.replace(tiny_job.config, max_kl=1e-4)
    )

    with pytest.raises(CacheError, match="cannot be computed again here") as caught:
        repair(store, job, [])
    assert "machine that made it" in caught.value.remedy
    assert tree(store) == before


def test_a_cache_that_does_not_say_how_it_was_made_is_told(
    tiny_cache: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(tiny_cache, tmp_path / "c.zarr"))
    edit_attributes(store, lambda attributes: attributes["provenance"].pop("config"))

    with pytest.raises(CacheError, match="does not say how it was made"):
        recorded_job(store)


def test_a_folder_without_a_cache_is_not_repaired(tiny_job: CacheJob, tmp_path: Path) -> None:
    with pytest.raises(CacheError):
        recorded_job(tmp_path / "nothing")
    with pytest.raises(CacheError):
        repair(tmp_path / "nothing", tiny_job, [])
    assert list(tmp_path.iterdir()) == []


# ---- killed half-way ------------------------------------------------------------------------


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "kills", [pytest.param(1, id="once"), pytest.param(60, id="many", marks=pytest.mark.slow)]
)
def test_a_repair_that_was_killed_is_repeated(
    teacher_run: Path, cache_config: CacheConfig, tmp_path: Path, kills: int
) -> None:
    done = forks.run([str(HELPER), str(teacher_run), str(tmp_path), str(kills), "0"], timeout=1700)
    assert done.returncode == 0, done.stderr

    figures = json.loads(done.stdout)
    print(figures)  # shown by -s
    assert len(figures["faults_at_kill"]) == kills
    truth = tree(tmp_path / "undisturbed")
    for number in range(figures["stores"]):
        store = tmp_path / f"killed-{number}"
        # but for compaction: a run that is killed before it leaves nothing else to do
        others = [key for key in differing(store, truth) if not key.startswith("commits/")]
        assert others == []
        assert records(store) == records(tmp_path / "undisturbed")
        assert faults_of(store) == []


def test_a_rectification_that_was_deleted_is_noticed_and_made_again(
    tiny_cache: Path, tiny_job: CacheJob, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(tiny_cache, tmp_path / "c.zarr"))
    shutil.rmtree(store / "rectified/pairwise-T4")

    faults = faults_of(store)

    assert any("pairwise-T4" in fault.where for fault in faults)
    assert repair(store, tiny_job, faults).faults == []
    assert tree(store) == tree(tiny_cache)
