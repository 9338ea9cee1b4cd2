"""Whatever happens to a byte of a cache, verify says so and nobody reads it."""

import dataclasses
import itertools
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zarr
from damage import (
    edit_attributes,
    edit_record,
    everything,
    flip,
    flipped,
    found_by_verify,
    harmed,
    refused_or_true,
    same_content,
    tree,
)
from helpers import Words, first, resized
from zarr.storage import LocalStore

from stages.cache import LogitCache
from stages.cache.blocks import described
from stages.cache.layout import BlockId
from stages.cache.records import seal_records, unsealed
from stages.cache_teacher import CacheJob, cache_teacher, prepare
from stages.data import Splits
from stages.errors import CacheError, IdentityError
from stages.inputs.datasets import ImageDataset
from stages.rectify import rectify
from stages.repair import check_teacher, recorded_job
from stages.settings import CacheConfig, RectifyConfig, TeacherSettings
from stages.verify import Fault, verify, verify_live, verify_pixels

VIEWS, BLOCKS = 2, 3
_BLOCK = re.compile(r"(?:rectified/(?P<name>[^/]+)/)?(?P<array>\w+)/c/(?P<view>\d+)/(?P<block>\d+)")
_WHOLE = {"dataset_index", "label", "eval_label", "eval_logits", "klt_basis", "klt_mean"}


def block_of(key: str) -> tuple[str, int, int] | None:
    """The block that an object is a part of, as a fault names it."""
    found = _BLOCK.match(key)
    if found is None or found["array"] in _WHOLE:
        return None
    part = "logits" if found["name"] is None else f"rectified/{found['name']}"
    return part, int(found["view"]), int(found["block"])


def by_kind(keys: list[str]) -> list[list[str]]:
    """Files that are alike: shards of one array, records, documents, ..."""
    kinds = defaultdict(list)
    for key in keys:
        kinds[re.sub(r"c/\d+/\d+.*|\d+", "#", key)].append(key)
    return list(kinds.values())


def blocks_of(faults: list[Fault]) -> set[tuple[str, int, int]]:
    return {(fault.part, *fault.at) for fault in faults if fault.part is not None}


# ---- what is in order -----------------------------------------------------------------------


def test_a_finished_cache_has_no_fault_and_every_block_is_looked_at(small_cache: Path) -> None:
    words = Words()
    verified = verify(small_cache, words)
    assert verified.faults == []
    assert verified.blocks == 2 * VIEWS * BLOCKS
    blocks = [content for key, content in tree(small_cache).items() if block_of(key)]
    assert verified.bytes == sum(map(len, blocks))
    assert words.done[-1] == 1


def test_every_kind_of_rectification_holds(tiny_copy: Path) -> None:
    """With whole rows, of two entries, and of the first views alone."""
    for method, space, materialise in (
        ("swap", "probability-T", True),
        ("blend", "probability-1", False),
    ):
        rectify(tiny_copy, RectifyConfig(method, space, temperature=2, materialise=materialise))
    rectify(tiny_copy, RectifyConfig(views=1, name="first"))

    verified = verify(tiny_copy)

    assert verified.faults == []
    assert verified.blocks == 4 * 2 * 2 + 2


def test_verify_writes_nothing(small_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(small_cache)
    for name in ("set", "set_if_not_exists", "delete"):
        monkeypatch.setattr(LocalStore, name, lambda *_, **__: pytest.fail("was written"))
    assert verify(small_cache).faults == []
    assert tree(small_cache) == before


# ---- bytes ----------------------------------------------------------------------------------


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("flips", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_any_flipped_byte_is_found_and_never_read(small_copy: Path, flips: int) -> None:
    contents, truth = tree(small_copy), everything(small_copy)
    kinds, draw = by_kind(list(contents)), random.Random(1)
    draw.shuffle(kinds)
    missed, read = [], []
    for number in range(flips):
        key = draw.choice(kinds[number % len(kinds)])
        at, mask = draw.randrange(len(contents[key])), draw.randrange(1, 256)
        changed = flipped(contents[key], at, mask)
        with harmed(small_copy / key, changed):
            if not found_by_verify(small_copy) and not same_content(key, changed, contents[key]):
                missed.append((key, at, mask))
            if not refused_or_true(small_copy, truth):
                read.append((key, at, mask))

    assert (missed, read) == ([], [])
    assert tree(small_copy) == contents


@pytest.mark.parametrize("part", ["logits", "rectified/pairwise-T4"])
def test_a_flip_inside_a_block_names_exactly_that_block(small_copy: Path, part: str) -> None:
    keys = [key for key in tree(small_copy) if (block_of(key) or ("",))[0] == part]
    for kind in by_kind(keys):
        key = kind[len(kind) // 2]
        content = (small_copy / key).read_bytes()
        with harmed(small_copy / key, flipped(content, len(content) // 2)):
            faults = verify(small_copy).faults

        assert blocks_of(faults) == {block_of(key)}
        assert key in faults[0].what
        assert all(fault.part is not None for fault in faults)


# ---- records --------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "found"), [((7, 0), 1), ((0, 7), 1), ((-1, 0), 0)])
def test_a_record_of_a_block_outside_the_arrays_is_found(
    tiny_copy: Path, at: tuple[int, int], found: int
) -> None:
    """A view below zero has no name that a record could have: such a file is nobody's."""
    cache = LogitCache.open(tiny_copy, writable=True)
    cache.commits.commit(BlockId(*at), cache.commits.of_view(0)[0])
    assert len(verify(tiny_copy).faults) == found


def test_a_damaged_record_says_nothing_of_its_neighbours(tiny_copy: Path) -> None:
    """Of a view that is not compacted: what was made from its other blocks is in order."""
    folder = tiny_copy / "commits/logits"
    records = unsealed((folder / "v00000.json").read_bytes())
    (folder / "v00000.json").unlink()
    (folder / "v00000").mkdir()
    for block, record in enumerate(records):
        (folder / f"v00000/b{block:05d}.json").write_bytes(seal_records([record]))
    flip(folder / "v00000/b00001.json")

    record, block = verify(tiny_copy).faults

    assert record.where == "commits/logits/v00000/b00001.json"
    assert blocks_of([block]) == {("logits", 0, 1)}


PART = "rectified/pairwise-T4"
LACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "test-split": (lambda s: shutil.rmtree(s / "commits/eval"), "eval_logits"),
    "fidelity": (lambda s: edit_attributes(s, lambda a: a.pop("fidelity")), "fidelity"),
    "root": (lambda s: (s / "zarr.json").unlink(), "root attributes"),
    "statistics": (
        lambda s: edit_attributes(s, lambda a: a["statistics"].update(wrong_rows=1), PART),
        PART,
    ),
    "statistics-of-a-block": (
        lambda s: edit_record(s, 1, lambda r: r["statistics"].update(wrong=0), 0, PART),
        f"{PART}, view 0, block 1",
    ),
}


@pytest.mark.parametrize(("harm", "where"), LACKS.values(), ids=LACKS)
def test_what_is_lacking_or_untrue_is_named(
    tiny_copy: Path, harm: Callable[[Path], object], where: str
) -> None:
    harm(tiny_copy)
    (fault,) = verify(tiny_copy).faults
    assert fault.where.startswith(where)


def test_missing_blocks_are_named(tiny_copy: Path) -> None:
    """Also of a view that there is only room for."""
    cache = LogitCache.open(tiny_copy, writable=True)
    cache.commits.forget(BlockId(1, 1))
    cache.rectification("pairwise-T4").commits.forget(BlockId(0, 1))
    cache.grow(3)
    missing = {(f.part, *f.at) for f in verify(tiny_copy).faults if f.what == "is not there"}
    assert missing == {(PART, 0, 1), *(("logits", *at) for at in ((1, 1), (2, 0), (2, 1)))}


@pytest.mark.parametrize("array", ["logits", "prediction"])
def test_an_array_with_more_room_than_the_others_is_named(tiny_copy: Path, array: str) -> None:
    found: Any = zarr.open_group(tiny_copy, mode="r+")[array]
    found.resize((5, *found.shape[1:]))
    faults = verify(tiny_copy).faults
    assert any("logits" in fault.where or "logits" in fault.what for fault in faults)


# ---- rectifications -------------------------------------------------------------------------


def test_a_rectification_copied_from_another_cache_is_found(
    tiny_copy: Path, small_cache: Path
) -> None:
    for folder in ("rectified", "commits/rectified"):
        shutil.copytree(small_cache / folder / "pairwise-T4", tiny_copy / folder / "other")
    assert {fault.where for fault in verify(tiny_copy).faults} == {"rectified/other"}


def written_by_hand(store: Path, array: str, change: Callable[[Any], Any]) -> None:
    """Change values of block 1 of view 0; shard, record and statistics agree with each other."""
    found: Any = zarr.open_group(store / PART, mode="r+")[array]
    found[0, 30:60] = change(found[0, 30:60])
    key = f"{PART}/{array}/c/0/1"
    content = (store / key).read_bytes()
    edit_record(store, 1, lambda r: r["objects"].update({key: described(content)}), 0, PART)


@pytest.mark.parametrize(
    ("array", "change"),
    [
        ("label_logit", lambda values: values + 0.01),
        ("predicted_logit", lambda values: values[::-1]),
        ("wrong", lambda values: ~values),
        ("label_logit", lambda values: values * float("nan")),
    ],
    ids=["label", "predicted", "mask", "not-numbers"],
)
def test_rectified_values_that_do_not_follow_from_the_rows_are_found(
    tiny_copy: Path, array: str, change: Callable[[Any], Any]
) -> None:
    written_by_hand(tiny_copy, array, change)
    (fault,) = verify(tiny_copy).faults
    assert blocks_of([fault]) == {(PART, 0, 1)}
    assert array in fault.what


# ---- no cache at all ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, lambda p: p.write_text("x")])
def test_where_there_is_no_cache_verify_says_so(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "there")
    with pytest.raises(CacheError, match=r"no cache at|not a teacher-logit cache"):
        verify(tmp_path / "there")
    zarr.create_group(tmp_path / "g.zarr", zarr_format=3, attributes={"title": "sea"})
    (fault,) = verify(tmp_path / "g.zarr").faults
    assert "not a teacher-logit cache" in fault.what


# ---- the teacher ----------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["uint8", pytest.param("topk:k=3", marks=pytest.mark.slow)])
def test_the_right_teacher_says_what_the_cache_says(
    small_job: CacheJob, tmp_path: Path, encoding: str
) -> None:
    job = resized(small_job, 60, 20, encoding=encoding, views=1, block_rows=60)
    cache_teacher(job, tmp_path / "c.zarr")
    assert verify(tmp_path / "c.zarr").faults == []
    assert verify_live(LogitCache.open(tmp_path / "c.zarr"), job, 100) == []


def test_other_batches_are_no_other_teacher(small_copy: Path, small_job: CacheJob) -> None:
    config = msgspec.structs.replace(small_job.config, batch_size=7)
    job, words = dataclasses.replace(small_job, config=config), Words()
    assert verify_live(LogitCache.open(small_copy), job, 40, seed=3, reporter=words) == []
    assert "40 rows" in words.lines[0]
    # one that has not finished declares nothing to hold
    edit_attributes(small_copy, lambda attributes: attributes.pop("fidelity"))
    (fault,) = verify_live(LogitCache.open(small_copy), small_job, 10)
    assert "not finished" in fault.what


def with_weights(job: CacheJob, run: Path) -> CacheJob:
    teacher = TeacherSettings(weights=str(run))
    return prepare(msgspec.structs.replace(job.config, teacher=teacher), job.splits)


def test_another_teacher_of_the_same_architecture_is_refused(
    small_cache: Path, small_job: CacheJob, finished_cache: Path, other_teacher_run: Path
) -> None:
    job = with_weights(small_job, other_teacher_run)
    for work in (
        lambda: check_teacher(small_cache, job),
        lambda: recorded_job(finished_cache, weights=str(other_teacher_run)),
    ):
        with pytest.raises(IdentityError, match=r"teacher\.weights: ") as caught:
            work()
        assert "--weights" in caught.value.remedy

    (fault,) = verify_live(LogitCache.open(small_cache), job, 50)
    assert fault.where == "live teacher"
    assert "mean KL" in fault.what


def test_rows_in_another_order_are_found_by_the_teacher_alone(
    tiny_job: CacheJob, tiny_copy: Path
) -> None:
    shutil.rmtree(tiny_copy / "rectified/pairwise-T4")
    shutil.rmtree(tiny_copy / "commits/rectified")
    cache = LogitCache.open(tiny_copy, writable=True)
    for view, block in itertools.product(range(2), range(2)):
        rows, order = cache.read_block(view, block), torch.arange(30).roll(1)
        cache.write_block(view, block, rows.logits[order], rows.predictions[order], {})
    cache.write_fidelity()

    assert verify(tiny_copy).faults == []  # every byte is what its record says
    (fault,) = verify_live(LogitCache.open(tiny_copy), tiny_job, 100)
    assert fault.where == "live teacher"


def test_the_recorded_job_is_the_one_that_made_the_cache(
    finished_cache: Path, cache_config: CacheConfig
) -> None:
    job = recorded_job(finished_cache, device="cpu")
    assert job.config == cache_config
    assert job.identity == LogitCache.open(finished_cache).identity


# ---- the pixels -----------------------------------------------------------------------------


def with_image_changed(dataset: ImageDataset, digest: str) -> ImageDataset:
    assert dataset.images is not None
    images = dataset.images.clone()
    images[:, 0, 4, 4] ^= 1
    return dataclasses.replace(
        dataset, images=images, load=images.__getitem__, images_digest=digest
    )


def test_images_that_changed_are_found(small_cache: Path, small_job: CacheJob) -> None:
    """Of a folder the digest is of names and sizes: only the probes look at pixels."""
    cache, train = LogitCache.open(small_cache), small_job.splits.train
    assert verify_pixels(cache, small_job.splits) == []
    for changed, words in (
        (with_image_changed(train, "of other images"), "images: "),
        (with_image_changed(train, train.images_digest), "pixel probes"),
        (first(train, 299), "num_samples: 299, not 300"),
    ):
        (fault,) = verify_pixels(cache, Splits(changed, small_job.splits.test))
        assert fault.where == "pixels"
        assert words in fault.what
