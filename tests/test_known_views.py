"""How many views a cache has: repair never makes it smaller, whatever knows of them is lost."""

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from damage import edit_attributes, edit_json, edit_record, flip, tree
from helpers import resized

from stages.cache import LogitCache
from stages.cache.identity import identity_from_json
from stages.cache.records import seal_records, unsealed
from stages.cache_teacher import CacheJob, cache_teacher
from stages.errors import CacheError
from stages.rectify import rectify
from stages.repair import repair
from stages.settings import RectifyConfig
from stages.verify import verify

Loss = Callable[[Path], object]
RECTIFIED = "rectified/pairwise-T4"
VIEWS = 4
"""Provenance says 2: the cache was made with so many and extended."""


@pytest.fixture(scope="module")
def job(small_job: CacheJob) -> CacheJob:
    """Two views of two blocks."""
    return resized(small_job, 60, 20, block_rows=30, encoding="uint8")


@pytest.fixture(scope="module")
def plain(job: CacheJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made with two views and extended to four."""
    path = tmp_path_factory.mktemp("grown") / "plain.zarr"
    cache_teacher(job, path)
    more = msgspec.structs.replace(job.config, views=VIEWS)
    cache_teacher(dataclasses.replace(job, config=more), path)
    return path


@pytest.fixture(scope="module")
def rectified(plain: Path) -> Path:
    """The same with a rectification."""
    path = Path(shutil.copytree(plain, plain.with_name("rectified.zarr")))
    rectify(path, RectifyConfig())
    return path


def stale(document: dict[str, Any]) -> None:
    """As before the views were appended."""
    document["shape"][0] = 2


def gone(*keys: str) -> Loss:
    def lose(store: Path) -> None:
        for key in keys:
            path = store / key
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return lose


def flipped(*keys: str) -> Loss:
    return lambda store: [flip(store / key) for key in keys]


def shrunk(*keys: str) -> Loss:
    return lambda store: [edit_json(store / key, stale) for key in keys]


LOGITS = ("logits_code", "logits_offset", "logits_scale", "prediction")
DOCUMENTS = tuple(f"{name}/zarr.json" for name in LOGITS)
SHARDS = ("logits_code/c/3", "logits_offset/c/3", "logits_scale/c/3", "prediction/c/3")
RECORDS = ("commits/logits/v00003.json", "commits/logits/v00002.json")
LOST: dict[str, list[Loss]] = {
    "last-record-flipped": [flipped(RECORDS[0])],
    "records-gone": [gone("commits/logits")],
    "documents-stale": [shrunk(*DOCUMENTS)],
    "only-shards-know": [shrunk(*DOCUMENTS), gone("commits/logits")],
    "only-names-of-records-know": [gone(*DOCUMENTS, *SHARDS), flipped(RECORDS[0])],
    "only-one-document-knows": [gone(*RECORDS, *SHARDS, *DOCUMENTS[1:])],
    "all-but-one-shard-gone": [gone(*RECORDS, *SHARDS[:2], "logits_scale", *DOCUMENTS[1:2])],
}
DEFAULT = ("last-record-flipped", "only-one-document-knows")


def differing(store: Path, truth: Path) -> list[str]:
    found, known = tree(store), tree(truth)
    return sorted(key for key in {*found, *known} if found.get(key) != known.get(key))


OF_RECTIFIED: dict[str, list[Loss]] = {
    # the rectification alone knows of the last view, and is whole
    "root-lost": [gone(*RECORDS, *SHARDS), shrunk(*DOCUMENTS)],
    "its-attributes-and-last-record": [
        gone(f"{RECTIFIED}/zarr.json"),
        flipped(f"commits/{RECTIFIED}/v00003.json"),
    ],
    "all-documents-stale": [
        shrunk(*DOCUMENTS, *(f"{RECTIFIED}/{n}/zarr.json" for n in ("wrong", "label_logit"))),
        flipped(RECORDS[0]),
    ],
}


PLAIN = [(name, loses, "plain", name in DEFAULT) for name, loses in LOST.items()]
RECTIFIED_TOO = [(n, loses, "rectified", n == "root-lost") for n, loses in OF_RECTIFIED.items()]


@pytest.mark.parametrize(
    ("loses", "whole"),
    [
        pytest.param(loses, whole, id=f"{whole}-{name}", marks=[] if quick else pytest.mark.slow)
        for name, loses, whole, quick in [*PLAIN, *RECTIFIED_TOO]
    ],
)
def test_repair_brings_every_view_back(
    loses: list[Loss], whole: str, job: CacheJob, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    truth: Path = request.getfixturevalue(whole)
    store = Path(shutil.copytree(truth, tmp_path / "c.zarr"))
    for lose in loses:
        lose(store)

    faults = verify(store).faults
    assert faults
    assert repair(store, job, faults).faults == []

    assert LogitCache.open(store).num_views == VIEWS
    assert differing(store, truth) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_witness_that_is_left_is_enough(rectified: Path, job: CacheJob, tmp_path: Path) -> None:
    """Of all that knows of the last view, everything is damaged but one thing or two."""
    draw = random.Random(5)
    # each knows by itself: a document only where no other can be read
    witnesses = [
        *RECORDS[:1],
        *SHARDS,
        f"commits/{RECTIFIED}/v00003.json",
        f"{RECTIFIED}/zarr.json",
    ]
    wrong = []
    for number in range(40):
        store = tmp_path / f"{number}.zarr"
        shutil.copytree(rectified, store)
        left = draw.sample(witnesses, draw.choice([1, 2]))
        for key in {*witnesses, *DOCUMENTS} - {*left}:
            if key in DOCUMENTS:
                draw.choice([gone, shrunk, flipped])(key)(store)
            elif key in SHARDS:
                gone(key)(store)
            else:
                draw.choice([gone, flipped])(key)(store)
        for folder in (f"{RECTIFIED}/{name}/c/3" for name in ("wrong", "predicted_logit")):
            gone(folder)(store)  # one of three shards is left, by which it knows what it covered
        if repair(store, job, verify(store).faults).faults or differing(store, rectified):
            wrong.append((left, differing(store, rectified)))
        shutil.rmtree(store)

    assert wrong == []


# ---- claims that cannot be ------------------------------------------------------------------


def claims(views: int) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["shape"][0] = views

    return change


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("arrays", "views"),
    [
        (("logits_code",), 10**12),
        pytest.param(("prediction",), 6, marks=pytest.mark.slow),
        (LOGITS, 900_000),
        pytest.param((f"{RECTIFIED}/wrong",), 2**63 - 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_document_that_claims_too_many_views_is_a_fault(
    rectified: Path, tmp_path: Path, arrays: tuple[str, ...], views: int
) -> None:
    store = Path(shutil.copytree(rectified, tmp_path / "c.zarr"))
    for array in arrays:
        edit_json(store / array / "zarr.json", claims(views))

    faults = verify(store).faults

    assert faults
    assert len(faults) < 1100


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("array", "views"),
    [
        ("prediction", 10**12),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("prediction", 6),
                (f"{RECTIFIED}/wrong", 6),
                (f"{RECTIFIED}/wrong", 10**12),
            )
        ),
    ],
)
def test_repair_does_not_believe_one_document_that_claims_more_than_all_others(
    rectified: Path, job: CacheJob, tmp_path: Path, array: str, views: int
) -> None:
    store = Path(shutil.copytree(rectified, tmp_path / "c.zarr"))
    edit_json(store / array / "zarr.json", claims(views))

    assert repair(store, job, verify(store).faults).faults == []
    assert differing(store, rectified) == []


@pytest.mark.timeout(60)
def test_a_cache_that_claims_too_many_samples_is_told_in_a_second_and_little_memory(
    rectified: Path, tmp_path: Path
) -> None:
    """By every document alike, and sealed: no other number contradicts it."""
    store = Path(shutil.copytree(rectified, tmp_path / "c.zarr"))
    samples = 10**12

    def identity(attributes: dict[str, Any]) -> None:
        attributes["identity"]["dataset"]["num_samples"] = samples
        attributes["identity_digest"] = identity_from_json(attributes["identity"], "").digest()

    def whole(document: dict[str, Any]) -> None:
        document["shape"] = [samples]
        document["chunk_grid"]["configuration"]["chunk_shape"] = [samples]

    edit_attributes(store, identity)
    for name in ("dataset_index", "label"):
        edit_json(store / name / "zarr.json", whole)
    for name in LOGITS:
        edit_json(store / name / "zarr.json", lambda d: d["shape"].__setitem__(1, samples))

    try:
        faults = verify(store).faults
    except CacheError:
        return
    assert 1 <= len(faults) < 10_000


ABSURD: dict[str, Callable[[dict[str, Any]], object]] = {
    "bytes": lambda r: next(iter(r["objects"].values())).update(bytes=10**18),
    "objects": lambda r: r.update(objects={f"x/{n}": {} for n in range(10_000)}),
    "block": lambda r: r.update(block=10**15),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "block" else pytest.mark.slow) for n in ABSURD]
)
def test_a_record_that_claims_what_cannot_be_is_a_fault(
    rectified: Path, tmp_path: Path, name: str
) -> None:
    store = Path(shutil.copytree(rectified, tmp_path / "c.zarr"))
    edit_record(store, 0, ABSURD[name])

    faults = verify(store).faults

    assert 1 <= len(faults) < 20


@pytest.mark.timeout(60)
def test_a_record_of_a_view_that_cannot_be_is_discarded(
    plain: Path, job: CacheJob, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(plain, tmp_path / "c.zarr"))
    records = unsealed((store / RECORDS[0]).read_bytes())
    far = [{**record, "view": 10**12} for record in records]
    (store / f"commits/logits/v{10**12}.json").write_bytes(seal_records(far))
    (store / "commits/logits/v99999.json").write_bytes(b"nonsense")

    faults = verify(store).faults

    assert {fault.at.view for fault in faults if fault.at} == {10**12}
    assert repair(store, job, faults).faults == []
    assert differing(store, plain) == []
