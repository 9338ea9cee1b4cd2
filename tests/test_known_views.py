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
def rectified(job: CacheJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made with two views, extended to four, and rectified."""
    path = tmp_path_factory.mktemp("grown") / "c.zarr"
    cache_teacher(job, path)
    more = msgspec.structs.replace(job.config, views=VIEWS)
    cache_teacher(dataclasses.replace(job, config=more), path)
    rectify(path, RectifyConfig())
    return path


@pytest.fixture
def store(rectified: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rectified, tmp_path / "c.zarr"))


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
OF_RECTIFIED = (f"{RECTIFIED}/wrong/zarr.json", f"{RECTIFIED}/label_logit/zarr.json")
UNKNOWN = [gone(RECTIFIED, f"commits/{RECTIFIED}")]
"""Nothing of the rectification is left that could tell; it is gone with them."""
LOST: dict[str, list[Loss]] = {
    "records-gone-and-documents-stale": [shrunk(*DOCUMENTS), gone("commits/logits")],
    "all-documents-stale": [shrunk(*DOCUMENTS, *OF_RECTIFIED), flipped(RECORDS[0])],
    # the rectification alone knows of the last view, and is whole
    "root-lost": [gone(*RECORDS, *SHARDS), shrunk(*DOCUMENTS)],
    "its-attributes-and-last-record": [
        gone(f"{RECTIFIED}/zarr.json"),
        flipped(f"commits/{RECTIFIED}/v00003.json"),
    ],
    "only-names-of-records-know": [*UNKNOWN, gone(*DOCUMENTS, *SHARDS), flipped(RECORDS[0])],
    "only-one-document-knows": [*UNKNOWN, gone(*RECORDS, *SHARDS, *DOCUMENTS[1:])],
    "all-but-one-shard-gone": [
        *UNKNOWN,
        gone(*RECORDS, *SHARDS[:2], "logits_scale", *DOCUMENTS[1:2]),
    ],
}
QUICK = ("only-one-document-knows", "root-lost")


def differing(store: Path, truth: Path, without: str = "-") -> list[str]:
    found, known = tree(store), tree(truth)
    keys = sorted(key for key in {*found, *known} if found.get(key) != known.get(key))
    return [key for key in keys if without not in key]


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LOST]
)
def test_repair_brings_views_back(name: str, job: CacheJob, store: Path, rectified: Path) -> None:
    for lose in LOST[name]:
        lose(store)

    faults = verify(store).faults
    assert faults
    assert repair(store, job, faults).faults == []

    assert LogitCache.open(store).num_views == VIEWS
    unknown = RECTIFIED if UNKNOWN[0] in LOST[name] else "-"
    assert differing(store, rectified, unknown) == []


@pytest.mark.slow
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
    for number in range(5):
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


def claims(views: int) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["shape"][0] = views

    return change


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("array", "views"),
    [
        ("prediction", 10**12),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("prediction", 6), (f"{RECTIFIED}/wrong", 2**63 - 1))
        ),
    ],
)
def test_one_document_is_not_believed(
    rectified: Path, job: CacheJob, store: Path, array: str, views: int
) -> None:
    edit_json(store / array / "zarr.json", claims(views))

    faults = verify(store).faults
    assert 0 < len(faults) < 1100
    assert repair(store, job, faults).faults == []
    assert differing(store, rectified) == []


@pytest.mark.timeout(60)
def test_documents_that_all_claim_too_many_views_are_a_fault(store: Path) -> None:
    for array in LOGITS:
        edit_json(store / array / "zarr.json", claims(900_000))
    assert 0 < len(verify(store).faults) < 1100


@pytest.mark.timeout(60)
def test_a_cache_that_claims_too_many_samples_is_told_at_once(store: Path) -> None:
    """By every document alike, and sealed: no other number contradicts it."""
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
    "name", [n if n == "block" else pytest.param(n, marks=pytest.mark.slow) for n in ABSURD]
)
def test_a_record_that_claims_what_cannot_be_is_a_fault(store: Path, name: str) -> None:
    edit_record(store, 0, ABSURD[name])
    assert 1 <= len(verify(store).faults) < 20


@pytest.mark.timeout(60)
def test_a_record_beyond_all_views_is_discarded(
    rectified: Path, job: CacheJob, store: Path
) -> None:
    records = unsealed((store / RECORDS[0]).read_bytes())
    far = [{**record, "view": 10**12} for record in records]
    (store / f"commits/logits/v{10**12}.json").write_bytes(seal_records(far))
    (store / "commits/logits/v99999.json").write_bytes(b"nonsense")

    faults = verify(store).faults

    assert {fault.at.view for fault in faults if fault.at} == {10**12}
    assert repair(store, job, faults).faults == []
    assert differing(store, rectified) == []
