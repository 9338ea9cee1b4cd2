"""Disks that are full or read-only, and metadata that somebody changed and sealed again."""

import asyncio
import dataclasses
import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from damage import (
    Change,
    edit_attributes,
    edit_json,
    edit_record,
    everything,
    found_by_verify,
    records,
    refused_or_true,
    tree,
    values,
)
from helpers import refusal, student_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zarr.core.buffer import default_buffer_prototype
from zarr.core.group import GroupMetadata
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import LocalStore

from stages.cache import LogitCache
from stages.cache.encoding.klt import Klt
from stages.cache.encoding.topk import TopK
from stages.cache.identity import identity_from_json
from stages.cache.storage import half_written
from stages.cache_teacher import CacheJob, cache_teacher
from stages.errors import CacheError, PipelineError
from stages.rectify import rectify
from stages.settings import (
    BiasSettings,
    RectifyConfig,
)
from stages.train_student import train_student
from stages.verify import verify, verify_pixels

# ---- full disks -----------------------------------------------------------------------------


@contextmanager
def full_at(number: int, leaves: bool = False) -> Iterator[list[str]]:
    """A disk that is full from the `number`-th write on; the keys that were written before.

    leaves: a half-written file stays behind, as when the process is killed while it waits.
    """
    put, written = LocalStore.set, []

    async def full(store: LocalStore, key: str, value: Any, *more: Any) -> None:
        if len(written) == number:
            if leaves:
                path = (store.root / key).with_suffix(f".{uuid4().hex}.partial")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(value.to_bytes()[: len(value) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        await put(store, key, value, *more)
        written.append(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "set", full)
        yield written


def run(stage: str, job: CacheJob, store: Path) -> None:
    if stage == "cache-teacher":
        cache_teacher(job, store)
    else:
        rectify(store, RectifyConfig())


def committed(store: Path) -> dict[str, bytes]:
    """The objects of every block that has a record: key -> content."""
    if not LogitCache.exists(store):
        return {}
    cache = LogitCache.open(store)
    logs = [cache.commits, cache.eval_commits]
    logs += [cache.rectification(name).commits for name in cache.rectifications]
    return {
        key: (store / key).read_bytes()
        for log in logs
        for record in log.records.values()
        for key in record["objects"]
    }


@pytest.mark.parametrize(
    ("stage", "number", "leaves"),
    [
        ("cache-teacher", 4, False),
        ("cache-teacher", 16, True),
        ("rectify", 12, True),
        *(
            pytest.param(stage, number, leaves, marks=pytest.mark.slow)
            for stage, writes in (("cache-teacher", 45), ("rectify", 32))
            for number in range(writes)
            for leaves in (False, True)
        ),
    ],
)
def test_a_disk_that_is_full_loses_nothing_and_the_same_command_completes(
    tiny_job: CacheJob, tiny_cache: Path, tmp_path: Path, stage: str, number: int, leaves: bool
) -> None:
    store = tmp_path / "c.zarr"
    if stage == "rectify":
        cache_teacher(tiny_job, store)
    with full_at(number, leaves) as written:
        message = refusal(lambda: run(stage, tiny_job, store))
    assert message or len(written) <= number  # it had written everything before
    if message:
        assert "No space left on device" in message
        assert "run the same command again" in message
    before = committed(store)

    run(stage, tiny_job, store)

    assert {key: (store / key).read_bytes() for key in before} == before
    assert half_written(store) == []
    rectify(store, RectifyConfig())
    assert values(tree(store)) == values(tree(tiny_cache))
    assert records(store) == records(tiny_cache)
    assert verify(store).faults == []


# ---- read-only disks ------------------------------------------------------------------------


@pytest.fixture
def read_only(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished cache on a disk that takes no write. (Permissions do not bind root.)"""

    async def refused(*_: Any, **__: Any) -> None:
        await asyncio.sleep(0)
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("set", "set_if_not_exists", "delete", "delete_dir"):
        monkeypatch.setattr(LocalStore, name, refused)
    return tiny_cache


def test_a_cache_on_a_read_only_disk_is_verified(read_only: Path) -> None:
    assert verify(read_only).faults == []


def test_a_student_learns_from_a_read_only_disk(
    read_only: Path, tiny_job: CacheJob, tmp_path: Path
) -> None:
    config = student_of(read_only, bias=BiasSettings(mode="rectify"))

    train_student(config, tmp_path / "run", splits=tiny_job.splits)

    assert (tmp_path / "run" / "model.safetensors").exists()


def test_what_would_write_to_a_read_only_disk_says_so(read_only: Path, tiny_job: CacheJob) -> None:
    before = tree(read_only)
    more = dataclasses.replace(tiny_job, config=msgspec.structs.replace(tiny_job.config, views=3))

    with pytest.raises(CacheError, match="cannot be written: Read-only file system"):
        cache_teacher(more, read_only)
    with pytest.raises(CacheError, match="cannot be written: Read-only file system"):
        rectify(read_only, RectifyConfig(method="swap"))
    assert tree(read_only) == before


@pytest.fixture(scope="module")
def truth(small_cache: Path) -> list[Tensor]:
    return everything(small_cache)


@pytest.fixture(scope="module")
def tiny_truth(tiny_cache: Path) -> list[Tensor]:
    return everything(tiny_cache)


# ---- sealed again: the root -----------------------------------------------------------------


def refuses(store: Path) -> None:
    """Whoever opens it gets a CacheError; verify finds a fault, or raises a CacheError as well."""
    with pytest.raises(CacheError):
        everything(store)
    assert found_by_verify(store)


def encoding(**changes: Any) -> Change:
    """Other parameters of the encoding; its digest as `made` has it, or the old one."""
    made = changes.pop("made", None)

    def change(attributes: dict[str, Any]) -> None:
        attributes["encoding"].update(changes)
        if made is not None:
            attributes["encoding"]["digest"] = made(attributes)

    return change


def identity(section: str, **changes: Any) -> Change:
    """Another identity, with its own digest where it has one."""

    def change(attributes: dict[str, Any]) -> None:
        attributes["identity"][section].update(changes)
        try:
            digest = identity_from_json(attributes["identity"], "").digest()
        except CacheError:
            return
        attributes["identity_digest"] = digest

    return change


def drop(*keys: str) -> Change:
    def change(attributes: dict[str, Any]) -> None:
        for key in keys[:-1]:
            attributes = attributes[key]
        attributes.pop(keys[-1])

    return change


SEALED: dict[str, Change] = {
    "other-version": lambda a: a.update(version=2),
    "version-as-text": lambda a: a.update(version="1"),
    "no-version": drop("version"),
    "no-format": drop("format"),
    "format-as-list": lambda a: a.update(format=["teacher-logit-cache"]),
    "no-identity": drop("identity"),
    "identity-as-text": lambda a: a.update(identity="mine"),
    "identity-without-dataset": drop("identity", "dataset"),
    "identity-digest-as-number": lambda a: a.update(identity_digest=1),
    "no-identity-digest": drop("identity_digest"),
    "no-encoding": drop("encoding"),
    "no-encoding-name": drop("encoding", "name"),
    "no-encoding-parameters": drop("encoding", "parameters"),
    "encoding-as-text": lambda a: a.update(encoding="klt"),
    "encoding-unknown": encoding(name="jpeg"),
    "encoding-auto": encoding(name="auto"),
    "encoding-with-parameters": encoding(name="klt:k=3"),
    "encoding-of-others": encoding(name="float32", parameters={}),
    "encoding-parameters-of-others": encoding(name="topk", parameters={"k": 3}),
    "encoding-parameters-as-list": encoding(parameters=[]),
    "no-probes": drop("pixel_probes"),
    "probes-as-text": lambda a: a.update(pixel_probes="12"),
    "probes-of-floats": lambda a: a.update(pixel_probes=[0.5]),
    "no-provenance": drop("provenance"),
    "provenance-as-list": lambda a: a.update(provenance=[]),
    "fidelity-as-number": lambda a: a.update(fidelity=1),
    "fidelity-without-rows": drop("fidelity", "rows"),
    "fewer-samples": identity("dataset", num_samples=299),
    "no-samples": identity("dataset", num_samples=0),
    "samples-below-zero": identity("dataset", num_samples=-300),
    "samples-as-text": identity("dataset", num_samples="300"),
    "fewer-classes": identity("dataset", class_names=list("123456789")),
    "no-classes": identity("dataset", class_names=[]),
    "more-classes": identity("dataset", class_names=[str(n) for n in range(70_000)]),
    "other-labels": identity("dataset", labels="of others"),
    "other-teacher": identity("teacher", weights="of others"),
}


@pytest.mark.parametrize("name", SEALED)
def test_attributes_that_make_no_sense_are_refused_though_sealed(
    small_copy: Path, name: str
) -> None:
    edit_attributes(small_copy, SEALED[name])

    refuses(small_copy)


def test_a_cache_of_no_classes_is_refused(tiny_copy: Path) -> None:
    """Of float32 rows, where the class dimension is that of the arrays."""
    edit_attributes(tiny_copy, SEALED["no-classes"])

    refuses(tiny_copy)


@pytest.mark.parametrize(
    "parameters",
    [
        {"dtype": "int64"},
        {"dtype": "float32"},
        {"dtype": "nonsense"},
        {"dtype": "int16"},
        {"dtype": None},
        {"step": "fine"},
        {"step": 0.0},
        {},
    ],
    ids=str,
)
def test_parameters_of_klt_that_are_not_those_of_the_store_are_refused(
    small_copy: Path, parameters: dict[str, Any]
) -> None:
    """The digest is the one that these parameters would have."""
    coding = LogitCache.open(small_copy).encoding
    assert isinstance(coding, Klt)
    step = coding.parameters["step"]
    try:
        digest = dataclasses.replace(coding, dtype=str(parameters.get("dtype", "int8"))).digest()
    except PipelineError:
        digest = coding.digest()
    known = {"step": step, **parameters}

    edit_attributes(small_copy, encoding(parameters=known, digest=digest))

    refuses(small_copy)


@pytest.fixture(scope="module")
def topk_cache(tiny_job: CacheJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = msgspec.structs.replace(tiny_job.config, encoding="topk:k=3")
    path = tmp_path_factory.mktemp("topk") / "topk.zarr"
    cache_teacher(dataclasses.replace(tiny_job, config=config), path)
    return path


@pytest.mark.parametrize(
    "parameters",
    [
        {"k": 0},
        {"k": 4},
        {"k": 11},
        {"k": None},
        {"k": "three"},
        {"k": [3]},
        {"temperatures": []},
        {"temperatures": [1.0, 2.0]},
        {"temperatures": [-1.0, 2.0, 4.0]},
        {"temperatures": [float("nan"), 2.0, 4.0]},
        {"temperatures": "1/2/4"},
        {"temperatures": 1.0},
    ],
    ids=str,
)
def test_parameters_of_topk_that_make_no_sense_are_refused(
    topk_cache: Path, tmp_path: Path, parameters: dict[str, Any]
) -> None:
    store = Path(shutil.copytree(topk_cache, tmp_path / "c.zarr"))
    known = {"k": 3, "temperatures": [1.0, 2.0, 4.0], **parameters}
    try:
        made = TopK(10, known["k"], tuple(known["temperatures"])).digest()
    except (PipelineError, TypeError):
        made = LogitCache.open(store).encoding.digest()

    edit_attributes(store, encoding(parameters=known, digest=made))

    with pytest.raises(CacheError):
        everything(store, rectified=None)
    assert found_by_verify(store)


@pytest.mark.parametrize("probes", [[], [1], list(range(1000))], ids=["none", "one", "many"])
def test_another_number_of_probes_is_told(
    small_copy: Path, small_job: CacheJob, probes: list[int]
) -> None:
    edit_attributes(small_copy, lambda attributes: attributes.update(pixel_probes=probes))

    (fault,) = verify_pixels(LogitCache.open(small_copy), small_job.splits)

    assert fault.where == "pixels"


# ---- sealed again: rectifications and records -----------------------------------------------

RECTIFICATIONS: dict[str, Change] = {
    "no-method": drop("method"),
    "method-unknown": lambda a: a.update(method="hope"),
    "space-unknown": lambda a: a.update(space="outer"),
    "temperature-zero": lambda a: a.update(temperature=0.0),
    "temperature-nan": lambda a: a.update(temperature=float("nan")),
    "temperature-as-text": lambda a: a.update(temperature="4"),
    "other-temperature": lambda a: a.update(temperature=2.0),
    "temperature-free": lambda a: a.update(temperature_free=True),
    "other-method": lambda a: a.update(method="swap"),
    "materialised": lambda a: a.update(materialised=True),
    "no-identity": drop("identity_digest"),
    "statistics-as-text": lambda a: a.update(statistics="good"),
    "statistics-empty": lambda a: a.update(statistics={}),
    "nothing": lambda a: a.clear(),
}


@pytest.mark.parametrize("name", RECTIFICATIONS)
def test_a_rectification_whose_attributes_make_no_sense_is_found_though_sealed(
    tiny_copy: Path, tiny_truth: list[Tensor], name: str
) -> None:
    edit_attributes(tiny_copy, RECTIFICATIONS[name], "rectified/pairwise-T4")

    assert found_by_verify(tiny_copy)
    assert refused_or_true(tiny_copy, tiny_truth)


RECORDS: dict[str, Change] = {
    "nothing": lambda r: r.clear(),
    "no-objects": drop("objects"),
    "objects-as-list": lambda r: r.update(objects=list(r["objects"])),
    "object-without-size": lambda r: next(iter(r["objects"].values())).pop("bytes"),
    "object-without-digest": lambda r: next(iter(r["objects"].values())).pop("sha256"),
    "size-as-text": lambda r: next(iter(r["objects"].values())).update(bytes="12"),
    "view-as-text": lambda r: r.update(view="first"),
    "view-beyond": lambda r: r.update(view=10**6),
    "view-negative": lambda r: r.update(view=-1),
    "other-block": lambda r: r.update(block=2),
    "rows-as-text": lambda r: r.update(rows="0-100"),
}
OF_ONE_PART: dict[str, dict[str, Change]] = {
    "logits": {"right-as-text": lambda r: r.update(right="many")},
    "rectified/pairwise-T4": {
        "no-statistics": drop("statistics"),
        "statistics-as-text": lambda r: r.update(statistics="good"),
        "statistics-of-text": lambda r: r["statistics"].update(confused="no"),
    },
}


@pytest.mark.parametrize(
    ("part", "name"),
    [
        # what is read alike is tried at one part, and at the other by the slow tests
        pytest.param(
            part,
            name,
            marks=[] if own or part == "logits" else pytest.mark.slow,
        )
        for part, more in OF_ONE_PART.items()
        for name, own in [*((n, False) for n in RECORDS), *((n, True) for n in more)]
    ],
)
def test_a_record_that_makes_no_sense_is_found_though_sealed(
    tiny_copy: Path, tiny_truth: list[Tensor], part: str, name: str
) -> None:
    edit_record(tiny_copy, 1, {**RECORDS, **OF_ONE_PART[part]}[name], 0, part)

    assert found_by_verify(tiny_copy)
    assert refused_or_true(tiny_copy, tiny_truth)


# ---- documents of arrays --------------------------------------------------------------------

DOCUMENTS: dict[str, Change] = {
    "shape": lambda d: d["shape"].append(1),
    "longer": lambda d: d["shape"].__setitem__(-1, d["shape"][-1] + 1),
    "shorter": lambda d: d["shape"].__setitem__(-1, d["shape"][-1] - 1),
    "shape-negative": lambda d: d["shape"].__setitem__(0, -1),
    "shape-as-text": lambda d: d.update(shape="2"),
    "no-shape": drop("shape"),
    "dtype": lambda d: d.update(data_type="float64"),
    "dtype-unknown": lambda d: d.update(data_type="decimal"),
    "dtype-narrower": lambda d: d.update(data_type="uint8"),
    "no-names": drop("dimension_names"),
    "other-names": lambda d: d["dimension_names"].reverse(),
    "names-as-text": lambda d: d.update(dimension_names=["x"] * len(d["dimension_names"])),
    "fill-value": lambda d: d.update(fill_value=1),
    "fill-value-as-text": lambda d: d.update(fill_value="none"),
    "no-codecs": lambda d: d.update(codecs=[]),
    "codecs-as-text": lambda d: d.update(codecs="zstd"),
    "codec-unknown": lambda d: d["codecs"].append({"name": "rot13"}),
    "codec-more": lambda d: d["codecs"].append({"name": "crc32c"}),
    "chunks": lambda d: d["chunk_grid"]["configuration"]["chunk_shape"].__setitem__(-1, 7),
    "chunks-of-zero": lambda d: d["chunk_grid"]["configuration"]["chunk_shape"].__setitem__(0, 0),
    "keys": lambda d: d["chunk_key_encoding"]["configuration"].update(separator="."),
    "keys-of-v2": lambda d: d["chunk_key_encoding"].update(name="v2"),
    "a-group": lambda d: d.update(node_type="group"),
    "format": lambda d: d.update(zarr_format=2),
    "attributes": lambda d: d["attributes"].update(mine=1),
    "transformers": lambda d: d.update(storage_transformers=[{"name": "x"}]),
    "one-more-that-must-be-understood": lambda d: d.update(mine={"must_understand": True}),
    "one-more": lambda d: d.update(mine={"must_understand": False}),
}
ARRAYS = ("logits_code", "prediction", "label", "eval_logits", "rectified/pairwise-T4/label_logit")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_an_array_whose_document_makes_no_sense_is_found(
    small_copy: Path, truth: list[Tensor], name: str
) -> None:
    array = ARRAYS[list(DOCUMENTS).index(name) % len(ARRAYS)]
    edit_json(small_copy / array / "zarr.json", DOCUMENTS[name])

    assert found_by_verify(small_copy)
    assert refused_or_true(small_copy, truth)


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    pairs = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for key, value in pairs:
        yield (*path, key)
        yield from places(value, (*path, key))


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 400)
    | st.sampled_from([2**31, 2**63, -(2**63), 1e308, "", "zstd", "int8", "/", "NaN"])
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def my_copy(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(small_cache, tmp_path_factory.mktemp("fuzz") / "c.zarr"))


def check_any_change(store: Path, truth: list[Tensor], data: st.DataObject, sealed: bool) -> None:
    """Change or remove one value of one document; verify says so, readers refuse or are right."""
    names = sorted(key for key in tree(store) if key.endswith("zarr.json"))
    key = "zarr.json" if sealed else data.draw(st.sampled_from(names))
    before = {name: (store / name).read_bytes() for name in (key, "commits/attributes.json")}
    document = json.loads(before[key])
    document = document["attributes"] if sealed else document
    at = data.draw(st.sampled_from([p for p in places(document) if p != ("digest",)]))
    removed = data.draw(st.booleans())
    value = None if removed else data.draw(ANYTHING)

    def change(known: Any) -> None:
        for step in at[:-1]:
            known = known[step]
        if removed:
            del known[at[-1]]
        else:
            known[at[-1]] = value

    try:
        if sealed:
            edit_attributes(store, change)
        else:
            edit_json(store / key, change)
        # Provenance and fidelity say nothing that anything else in the store would repeat.
        free = sealed and at[0] in ("provenance", "fidelity", "top5_agreement", "pixel_probes")
        if (store / key).read_bytes() != before[key]:
            assert (
                found_by_verify(store)
                or free
                or same_meaning(before[key], (store / key).read_bytes())
            )
        assert refused_or_true(store, truth)
    finally:
        for name, content in before.items():
            (store / name).write_bytes(content)


def same_meaning(before: bytes, document: bytes) -> bool:
    """Whether Zarr reads the same in two documents: a field may have its default or be left out,
    and JSON knows 1 and 1.0.
    """
    try:
        known, found = (json.loads(each) for each in (before, document))
        kind = ArrayV3Metadata if known["node_type"] == "array" else GroupMetadata
        whole = []
        for each in (known, found):
            made = kind.from_dict(each).to_buffer_dict(default_buffer_prototype())
            read = json.loads(made["zarr.json"].to_bytes())
            (read.get("attributes") or {}).pop("digest", None)
            whole.append(read)
    except Exception:  # zarr raises many kinds on documents that make no sense
        return False
    return bool(whole[0] == whole[1])


@settings(max_examples=5, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_change_of_a_document_is_found(
    my_copy: Path, truth: list[Tensor], data: st.DataObject
) -> None:
    check_any_change(my_copy, truth, data, sealed=False)


@settings(max_examples=5, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_change_of_the_attributes_is_refused_or_harmless_though_sealed(
    my_copy: Path, truth: list[Tensor], data: st.DataObject
) -> None:
    check_any_change(my_copy, truth, data, sealed=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sealed", [False, True], ids=["documents", "attributes"])
@settings(max_examples=600, deadline=None, database=None)
@given(data=st.data())
def test_many_changes_of_documents_are_found(
    my_copy: Path, truth: list[Tensor], sealed: bool, data: st.DataObject
) -> None:
    check_any_change(my_copy, truth, data, sealed)
