"""Whatever happens to a byte of a cache, verify says so and nobody reads it."""

import dataclasses
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
from safetensors.torch import load_file, save_file
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
from stages.reporting import Silent
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


def kind_of(key: str) -> str:
    """Files that are alike: shards of one array, records, documents, ..."""
    return re.sub(r"c/\d+/\d+.*|\d+", "#", key)


def by_kind(keys: list[str]) -> list[list[str]]:
    kinds = defaultdict(list)
    for key in keys:
        kinds[kind_of(key)].append(key)
    return list(kinds.values())


def blocks_with_faults(faults: list[Fault]) -> set[tuple[str, int, int]]:
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


@pytest.mark.parametrize(
    ("method", "materialise"),
    [
        pytest.param("swap", True, id="swap-whole-rows"),
        pytest.param("blend", False, id="blend-two-entries", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_rectification_holds(
    small_copy: Path, method: Any, materialise: bool
) -> None:
    rectify(small_copy, RectifyConfig(method=method, temperature=2, materialise=materialise))

    verified = verify(small_copy)

    assert verified.faults == []
    assert verified.blocks == 3 * VIEWS * BLOCKS


def test_verify_writes_nothing(
    small_cache: Path, monkeypatch: pytest.MonkeyPatch, finished_cache: Path
) -> None:
    async def forbidden(store: LocalStore, key: str, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{key} was written")

    before = tree(small_cache)
    for name in ("set", "set_if_not_exists", "delete"):
        monkeypatch.setattr(LocalStore, name, forbidden)

    assert verify(small_cache).faults == []
    assert tree(small_cache) == before


# ---- bytes ----------------------------------------------------------------------------------


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("flips", [10, pytest.param(500, marks=pytest.mark.slow)])
def test_any_flipped_byte_is_found_and_never_read(small_copy: Path, flips: int) -> None:
    contents, truth = tree(small_copy), everything(small_copy)
    kinds, draw = by_kind(list(contents)), random.Random(1)
    draw.shuffle(kinds)
    missed, read = [], []
    for number in range(flips):
        key = draw.choice(kinds[number % len(kinds)])
        at, mask = draw.randrange(len(contents[key])), draw.randrange(1, 256)
        with harmed(small_copy / key, flipped(contents[key], at, mask)):
            changed = (small_copy / key).read_bytes()
            if not found_by_verify(small_copy) and not same_content(key, changed, contents[key]):
                missed.append((key, at, mask))
            if not refused_or_true(small_copy, truth):
                read.append((key, at, mask))

    assert missed == []
    assert read == []
    assert tree(small_copy) == contents


@pytest.mark.parametrize("part", ["logits", "rectified/pairwise-T4"])
def test_a_flip_inside_a_block_names_exactly_that_block(small_copy: Path, part: str) -> None:
    keys = [key for key in tree(small_copy) if (block_of(key) or ("",))[0] == part]
    for kind in by_kind(keys):
        key = kind[len(kind) // 2]
        content = (small_copy / key).read_bytes()
        with harmed(small_copy / key, flipped(content, len(content) // 2)):
            faults = verify(small_copy).faults

        assert blocks_with_faults(faults) == {block_of(key)}
        assert key in faults[0].what
        assert all(fault.part is not None for fault in faults)


# ---- records --------------------------------------------------------------------------------


def copies_another_block(record: dict[str, Any]) -> None:
    record["objects"] = {key.replace("/0/1", "/0/2"): x for key, x in record["objects"].items()}


RECORDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "other-rows": (lambda r: r.update(rows=[0, 100]), "speaks of other rows"),
    "no-rows": (lambda r: r.pop("rows"), "speaks of other rows"),
    "wrong-count": (lambda r: r.update(right=r["right"] + 1), "its record counted"),
    "no-count": (lambda r: r.pop("right"), "its record counted"),
    "other-objects": (copies_another_block, "speaks of other objects"),
    "no-objects": (lambda r: r.pop("objects"), "speaks of other objects"),
}


@pytest.mark.parametrize(("change", "words"), RECORDS.values(), ids=RECORDS)
def test_a_record_that_is_sealed_and_untrue_is_found(
    small_copy: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    edit_record(small_copy, 1, change)

    faults = verify(small_copy).faults

    assert any(words in fault.what for fault in faults)
    assert blocks_with_faults(faults) == {("logits", 0, 1)}


@pytest.mark.parametrize("at", [(7, 0), (0, 7), (-1, 0)], ids=["view", "block", "negative"])
def test_a_record_of_a_block_outside_the_arrays_is_found(
    small_copy: Path, at: tuple[int, int]
) -> None:
    cache = LogitCache.open(small_copy, writable=True)
    cache.commits.commit(BlockId(*at), cache.commits.of_view(0)[0])

    # A view below zero has no name that a record could have: such a file is nobody's.
    faults = verify(small_copy).faults

    assert [fault.what for fault in faults] == (["is outside the arrays"] if min(at) >= 0 else [])


def test_a_damaged_record_says_nothing_of_its_neighbours(small_copy: Path) -> None:
    """Of a view that is not compacted: what was made from its other blocks is in order."""
    folder = small_copy / "commits/logits"
    records = unsealed((folder / "v00000.json").read_bytes())
    (folder / "v00000.json").unlink()
    for block, record in enumerate(records):
        file = folder / f"v00000/b{block:05d}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(seal_records([record]))
    flip(folder / "v00000/b00001.json")

    faults = verify(small_copy).faults

    assert [(f.where, f.what) for f in faults] == [
        ("commits/logits/v00000/b00001.json", "the record is damaged"),
        ("logits, view 0, block 1", "is not there"),
    ]


def test_missing_blocks_are_named(small_copy: Path) -> None:
    cache = LogitCache.open(small_copy, writable=True)
    cache.commits.forget(BlockId(1, 2))
    cache.rectification("pairwise-T4").commits.forget(BlockId(0, 1))

    faults = verify(small_copy).faults

    missing = {(f.part, *f.at) for f in faults if f.what == "is not there"}
    assert missing == {("logits", 1, 2), ("rectified/pairwise-T4", 0, 1)}


def test_a_rectification_of_the_first_views_alone_is_whole(small_copy: Path) -> None:
    rectify(small_copy, RectifyConfig(views=1, name="first"))

    assert verify(small_copy).faults == []


def test_a_cache_without_its_test_split_is_not_finished(small_copy: Path) -> None:
    shutil.rmtree(small_copy / "commits/eval")

    (fault,) = verify(small_copy).faults

    assert (fault.where, fault.what) == ("eval_logits", "the test split is not there yet")


def test_a_cache_whose_blocks_are_there_and_whose_fidelity_is_not_is_unfinished(
    small_copy: Path,
) -> None:
    edit_attributes(small_copy, lambda attributes: attributes.pop("fidelity"))

    (fault,) = verify(small_copy).faults

    assert fault.where == "fidelity"
    assert "has not finished" in fault.what


def test_room_for_views_that_are_not_there_is_named(small_copy: Path) -> None:
    LogitCache.open(small_copy, writable=True).grow(3)

    faults = verify(small_copy).faults

    assert blocks_with_faults(faults) == {("logits", 2, block) for block in range(BLOCKS)}


@pytest.mark.parametrize("array", ["logits_code", "prediction"])
def test_an_array_with_more_room_than_the_others_is_named(small_copy: Path, array: str) -> None:
    found = zarr.open_group(small_copy, mode="r+")[array]
    assert isinstance(found, zarr.Array)
    found.resize((5, *found.shape[1:]))

    faults = verify(small_copy).faults

    assert faults
    assert any("logits_code" in fault.where or "logits_code" in fault.what for fault in faults)


# ---- rectifications -------------------------------------------------------------------------


def test_a_rectification_copied_from_another_cache_is_found(
    small_copy: Path, finished_cache: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.zarr"
    shutil.copytree(finished_cache, other)
    rectify(other, RectifyConfig(method="swap"))
    for folder in ("rectified", "commits/rectified"):
        shutil.copytree(other / folder / "swap-T4", small_copy / folder / "swap-T4")

    faults = verify(small_copy).faults

    assert any("belongs to another cache" in fault.what for fault in faults)
    assert {fault.where for fault in faults} == {"rectified/swap-T4"}


def written_by_hand(store: Path, array: str, change: Callable[[Any], Any]) -> None:
    """Change values of block 1 of view 0; shard, record and statistics agree with each other."""
    found = zarr.open_group(store / "rectified/pairwise-T4", mode="r+")[array]
    assert isinstance(found, zarr.Array)
    found[0, 100:200] = change(found[0, 100:200])
    key = f"rectified/pairwise-T4/{array}/c/0/1"
    content = (store / key).read_bytes()
    edit_record(store, 1, lambda r: r["objects"].update({key: described(content)}), 0, key[:21])


@pytest.mark.parametrize(
    ("array", "change"),
    [
        pytest.param("label_logit", lambda values: values + 0.01, id="label"),
        pytest.param("predicted_logit", lambda values: values[::-1], id="predicted"),
        pytest.param("wrong", lambda values: ~values, id="mask"),
        pytest.param("label_logit", lambda values: values * float("nan"), id="not-numbers"),
    ],
)
def test_rectified_values_that_do_not_follow_from_the_rows_are_found(
    small_copy: Path, array: str, change: Callable[[Any], Any]
) -> None:
    written_by_hand(small_copy, array, change)

    (fault,) = verify(small_copy).faults

    assert (fault.part, *(fault.at or ())) == ("rectified/pairwise-T4", 0, 1)
    assert fault.what == f"{array} is not what the rows give"


def test_statistics_that_do_not_follow_from_the_rows_are_found(small_copy: Path) -> None:
    part = "rectified/pairwise-T4"
    edit_record(small_copy, 1, lambda record: record["statistics"].update(wrong=0), 0, part)

    (fault,) = verify(small_copy).faults

    assert (fault.part, *(fault.at or ())) == (part, 0, 1)
    assert fault.what == "its statistics are not those of its rows"


def test_statistics_of_all_blocks_changed_by_hand_are_found(small_copy: Path) -> None:
    edit_attributes(
        small_copy, lambda a: a["statistics"].update(wrong_rows=1), "rectified/pairwise-T4"
    )

    (fault,) = verify(small_copy).faults

    assert fault.what == "its statistics are not those of its blocks"


# ---- no cache at all ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, lambda p: p.write_text("x")])
def test_where_there_is_no_cache_verify_says_so(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "there")

    with pytest.raises(CacheError, match=r"no cache at|not a teacher-logit cache"):
        verify(tmp_path / "there")


def test_somebody_elses_group_is_no_cache(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "g.zarr", zarr_format=3, attributes={"title": "sea"})

    (fault,) = verify(tmp_path / "g.zarr").faults

    assert "not a teacher-logit cache" in fault.what


def test_a_root_document_that_is_gone_is_told_apart_from_no_cache(small_copy: Path) -> None:
    (small_copy / "zarr.json").unlink()

    (fault,) = verify(small_copy).faults

    assert fault.where == "root attributes"


# ---- the teacher ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoding",
    [
        "uint8",
        *(
            pytest.param(e, marks=pytest.mark.slow)
            for e in ("float32", "float16", "klt", "topk:k=3")
        ),
    ],
)
def test_the_right_teacher_says_what_the_cache_says(
    small_job: CacheJob, tmp_path: Path, encoding: str
) -> None:
    job = resized(small_job, 60, 20, encoding=encoding, views=1, block_rows=60)
    cache_teacher(job, tmp_path / "c.zarr")

    assert verify(tmp_path / "c.zarr").faults == []
    assert verify_live(LogitCache.open(tmp_path / "c.zarr"), job, 100) == []


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_other_batches_are_no_other_teacher(small_cache: Path, small_job: CacheJob) -> None:
    config = msgspec.structs.replace(small_job.config, batch_size=7)

    job = dataclasses.replace(small_job, config=config)

    heard = Heard()
    assert verify_live(LogitCache.open(small_cache), job, 40, seed=3, reporter=heard) == []
    (line,) = heard.lines
    assert "40 rows" in line


@pytest.fixture(scope="module")
def other_weights(teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a teacher that differs in the sign of its last layer."""
    run = tmp_path_factory.mktemp("other") / "run"
    shutil.copytree(teacher_run, run)
    weights = load_file(run / "model.safetensors")
    last = [name for name in weights if weights[name].ndim == 2][-1]
    save_file({**weights, last: -weights[last]}, run / "model.safetensors")
    (run / "summary.json").unlink()  # which has a digest of the old ones
    return run


def with_weights(job: CacheJob, run: Path) -> CacheJob:
    teacher = TeacherSettings(weights=str(run))
    return prepare(msgspec.structs.replace(job.config, teacher=teacher), job.splits)


def test_another_teacher_of_the_same_architecture_is_refused(
    small_cache: Path, small_job: CacheJob, finished_cache: Path, other_weights: Path
) -> None:
    with pytest.raises(IdentityError, match=r"teacher\.weights: ") as caught:
        check_teacher(small_cache, with_weights(small_job, other_weights))
    assert "--weights" in caught.value.remedy

    with pytest.raises(IdentityError, match=r"teacher\.weights: "):
        recorded_job(finished_cache, weights=str(other_weights))


def test_what_another_teacher_says_is_another_thing(
    small_cache: Path, small_job: CacheJob, other_weights: Path
) -> None:
    job = with_weights(small_job, other_weights)

    (fault,) = verify_live(LogitCache.open(small_cache), job, 50)

    assert fault.where == "live teacher"
    assert "mean KL" in fault.what


def test_rows_in_another_order_are_found_by_the_teacher_alone(
    tiny_job: CacheJob, tmp_path: Path
) -> None:
    cache_teacher(tiny_job, tmp_path / "c.zarr")
    cache = LogitCache.open(tmp_path / "c.zarr", writable=True)
    for view in range(2):
        for block in range(2):
            rows = cache.read_block(view, block)
            order = torch.randperm(len(rows.labels), generator=torch.Generator().manual_seed(1))
            record = {"device": "abacus"}
            logits = rows.logits[order]
            cache.write_block(view, block, logits, rows.predictions[order], record)
    cache.write_fidelity()

    assert verify(tmp_path / "c.zarr").faults == []  # every byte is what its record says
    (fault,) = verify_live(LogitCache.open(tmp_path / "c.zarr"), tiny_job, 100)
    assert fault.where == "live teacher"


def test_an_unfinished_cache_declares_nothing_to_hold(
    small_copy: Path, small_job: CacheJob
) -> None:
    edit_attributes(small_copy, lambda attributes: attributes.pop("fidelity"))

    (fault,) = verify_live(LogitCache.open(small_copy), small_job, 10)

    assert "not finished" in fault.what


def test_the_recorded_job_is_the_one_that_made_the_cache(
    finished_cache: Path, cache_config: CacheConfig
) -> None:
    job = recorded_job(finished_cache, device="cpu")

    assert job.config == cache_config
    assert job.identity == LogitCache.open(finished_cache).identity


# ---- the pixels -----------------------------------------------------------------------------


def test_the_pixels_that_the_teacher_saw_hold(small_cache: Path, small_job: CacheJob) -> None:
    assert verify_pixels(LogitCache.open(small_cache), small_job.splits) == []


def with_image_changed(dataset: ImageDataset, digest: str | None) -> ImageDataset:
    assert dataset.images is not None
    images = dataset.images.clone()
    images[:, 0, 4, 4] ^= 1
    digest = digest or "of other images"
    return dataclasses.replace(
        dataset, images=images, load=images.__getitem__, images_digest=digest
    )


def test_an_image_that_changed_is_found(small_cache: Path, small_job: CacheJob) -> None:
    train = with_image_changed(small_job.splits.train, None)
    splits = Splits(train, small_job.splits.test)

    (fault,) = verify_pixels(LogitCache.open(small_cache), splits)

    assert fault.where == "pixels"
    assert "images: " in fault.what


def test_a_decoder_that_changed_is_found_by_the_probes(
    small_cache: Path, small_job: CacheJob
) -> None:
    # Of a folder the digest is of names and sizes: only the probes look at pixels.
    train = small_job.splits.train
    splits = Splits(with_image_changed(train, train.images_digest), small_job.splits.test)

    (fault,) = verify_pixels(LogitCache.open(small_cache), splits)

    assert "pixel probes" in fault.what


def test_fewer_samples_are_another_dataset(small_cache: Path, small_job: CacheJob) -> None:
    splits = Splits(first(small_job.splits.train, 299), small_job.splits.test)

    (fault,) = verify_pixels(LogitCache.open(small_cache), splits)

    assert "num_samples: 299, not 300" in fault.what
