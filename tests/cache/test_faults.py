"""Disks that are full or read-only, and metadata that somebody changed and sealed again."""

import asyncio
import contextlib
import dataclasses
import errno
import json
import shutil
from collections.abc import Callable, Iterator
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
from helpers import refusal, resized, student_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zarr.core.buffer import default_buffer_prototype
from zarr.core.group import GroupMetadata
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import LocalStore

from stages.cache import LogitCache
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
    set_, written = LocalStore.set, []

    async def full(store: LocalStore, key: str, value: Any, *more: Any) -> None:
        if len(written) < number:
            await set_(store, key, value, *more)
            written.append(key)
            return
        if leaves:
            path = (store.root / key).with_suffix(f".{uuid4().hex}.partial")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(value.to_bytes()[: len(value) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "set", full)
        yield written


STAGES: dict[str, Callable[[CacheJob, Path], object]] = {
    "cache-teacher": cache_teacher,
    "rectify": lambda job, store: rectify(store, RectifyConfig()),
}


def committed(store: Path) -> dict[str, bytes]:
    """The objects of every block that has a record: key -> content."""
    if not LogitCache.exists(store):
        return {}
    cache = LogitCache.open(store)
    logs = [cache.commits, cache.eval_commits]
    logs += [cache.rectification(name).commits for name in cache.rectifications]
    keys = [key for log in logs for record in log.records.values() for key in record["objects"]]
    return {key: (store / key).read_bytes() for key in keys}


@pytest.mark.parametrize(
    ("stage", "number", "leaves"),
    [
        ("cache-teacher", 4, False),
        ("rectify", 12, True),
        *(
            pytest.param(stage, number, bool(number % 2), marks=pytest.mark.slow)
            for stage, writes in (("cache-teacher", 45), ("rectify", 32))
            for number in range(writes)
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
        message = refusal(lambda: STAGES[stage](tiny_job, store))
    assert message or len(written) <= number  # it had written everything before
    if message:
        assert "No space left on device" in message
        assert "run the same command again" in message
    before = committed(store)

    STAGES[stage](tiny_job, store)

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


def test_a_cache_on_a_read_only_disk_is_verified_and_learned_from(
    read_only: Path, tiny_job: CacheJob, tmp_path: Path
) -> None:
    assert verify(read_only).faults == []
    config = student_of(read_only, bias=BiasSettings(mode="rectify"))
    train_student(config, tmp_path / "run", splits=tiny_job.splits)
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_what_would_write_to_a_read_only_disk_says_so(read_only: Path, tiny_job: CacheJob) -> None:
    before = tree(read_only)
    more = dataclasses.replace(tiny_job, config=msgspec.structs.replace(tiny_job.config, views=3))
    for work in (
        lambda: cache_teacher(more, read_only),
        lambda: rectify(read_only, RectifyConfig(method="swap")),
    ):
        with pytest.raises(CacheError, match="cannot be written: Read-only file system"):
            work()
    assert tree(read_only) == before


@pytest.fixture(scope="module")
def tiny_truth(tiny_cache: Path) -> list[Tensor]:
    return everything(tiny_cache)


# ---- sealed again: the root -----------------------------------------------------------------


def refuses(store: Path, **what: Any) -> None:
    """Whoever opens it gets a CacheError; verify finds a fault, or raises a CacheError as well."""
    with pytest.raises(CacheError):
        everything(store, **what)
    assert found_by_verify(store)


def encoding(**changes: Any) -> Change:
    """Other values about the encoding."""
    return lambda attributes: attributes["encoding"].update(changes)


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
    **{
        f"no-{'-'.join(keys)}": drop(*keys)
        for keys in (
            *(("version",), ("format",), ("identity",), ("identity", "dataset"), ("encoding",)),
            *(("identity_digest",), ("encoding", "name"), ("encoding", "parameters")),
            *(("pixel_probes",), ("provenance",), ("fidelity", "rows")),
        )
    },
    **{
        f"{key}-{value}": lambda a, key=key, value=value: a.update({key: value})
        for key, value in (
            *(("version", 2), ("version", "1"), ("format", ["teacher-logit-cache"])),
            *(("identity", "mine"), ("identity_digest", 1), ("encoding", "klt")),
            *(("pixel_probes", "12"), ("pixel_probes", [0.5]), ("provenance", []), ("fidelity", 1)),
        )
    },
    "encoding-unknown": encoding(name="jpeg"),
    "encoding-auto": encoding(name="auto"),
    "encoding-with-parameters": encoding(name="klt:k=3"),
    "encoding-of-others": encoding(name="float32", parameters={}),
    "encoding-parameters-of-others": encoding(name="topk", parameters={"k": 3}),
    "encoding-parameters-as-list": encoding(parameters=[]),
    **{
        f"samples-{value}": identity("dataset", num_samples=value)
        for value in (299, 0, -300, "300")
    },
    **{
        f"{len(names)}-classes": identity("dataset", class_names=names)
        for names in (list("123456789"), [], [str(n) for n in range(70_000)])
    },
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
    edit_attributes(tiny_copy, SEALED["0-classes"])
    refuses(tiny_copy)


@pytest.fixture(scope="module")
def topk_cache(tiny_job: CacheJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("topk") / "topk.zarr"
    cache_teacher(resized(tiny_job, 60, 20, encoding="topk:k=3", views=1), path)
    return path


PARAMETERS: list[dict[str, Any]] = [
    *({"k": k} for k in (0, 4, 11, None, "three", [3])),
    *({"temperatures": t} for t in ([], [1.0, 2.0], [-1.0, 2.0, 4.0], "1/2/4", 1.0)),
    {"temperatures": [float("nan"), 2.0, 4.0]},
    *({"dtype": dtype} for dtype in ("int64", "float32", "nonsense", "int16", None)),
    *({"step": step} for step in ("fine", 0.0)),
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_parameters_that_are_not_those_of_the_store_are_refused(
    topk_cache: Path, small_cache: Path, tmp_path: Path, parameters: dict[str, Any]
) -> None:
    """Of topk, and of klt; the digest is the one that these parameters would have."""
    of_klt = not parameters.keys() & {"k", "temperatures"}
    store = Path(shutil.copytree(small_cache if of_klt else topk_cache, tmp_path / "c.zarr"))
    coding: Any = LogitCache.open(store).encoding
    known, digest = {**coding.parameters, **parameters}, coding.digest()
    with contextlib.suppress(PipelineError, TypeError):
        if of_klt:
            digest = dataclasses.replace(coding, dtype=known["dtype"]).digest()
        else:
            digest = TopK(10, known["k"], tuple(known["temperatures"])).digest()

    edit_attributes(store, encoding(parameters=known, digest=digest))

    refuses(store, views=1, rectified=None)


def test_another_number_of_probes_is_told(tiny_copy: Path, tiny_job: CacheJob) -> None:
    for probes in ([], [1], list(range(1000))):
        edit_attributes(tiny_copy, lambda attributes, p=probes: attributes.update(pixel_probes=p))
        (fault,) = verify_pixels(LogitCache.open(tiny_copy), tiny_job.splits)
        assert fault.where == "pixels"


# ---- sealed again: rectifications and records -----------------------------------------------

RECTIFICATIONS: dict[str, Change] = {
    **{f"no-{key}": drop(key) for key in ("method", "identity_digest")},
    **{
        f"{key}-{value}": lambda a, key=key, value=value: a.update({key: value})
        for key, value in (
            *(("method", "hope"), ("method", "swap"), ("space", "outer"), ("temperature", 0.0)),
            *(("temperature", float("nan")), ("temperature", "4"), ("temperature", 2.0)),
            *(("temperature_free", True), ("materialised", True)),
            *(("statistics", "good"), ("statistics", {})),
        )
    },
    "nothing": lambda a: a.clear(),
}


@pytest.mark.parametrize("name", RECTIFICATIONS)
def test_a_rectification_whose_attributes_make_no_sense_is_found_though_sealed(
    tiny_copy: Path, tiny_truth: list[Tensor], name: str
) -> None:
    edit_attributes(tiny_copy, RECTIFICATIONS[name], "rectified/pairwise-T4")
    assert found_by_verify(tiny_copy)
    assert refused_or_true(tiny_copy, tiny_truth)


def described(record: dict[str, Any]) -> dict[str, Any]:
    """What the first object of a record is said to be."""
    found: dict[str, Any] = next(iter(record["objects"].values()))
    return found


RECORDS: dict[str, Change] = {
    "nothing": lambda r: r.clear(),
    "no-objects": drop("objects"),
    "objects-as-list": lambda r: r.update(objects=list(r["objects"])),
    "object-without-size": lambda r: described(r).pop("bytes"),
    "object-without-digest": lambda r: described(r).pop("sha256"),
    "size-as-text": lambda r: described(r).update(bytes="12"),
    "view-as-text": lambda r: r.update(view="first"),
    "view-beyond": lambda r: r.update(view=10**6),
    "view-negative": lambda r: r.update(view=-1),
    "other-block": lambda r: r.update(block=2),
    "rows-as-text": lambda r: r.update(rows="0-100"),
}
OF_ONE_PART: dict[str, dict[str, Change]] = {
    "logits": {
        "right-as-text": lambda r: r.update(right="many"),
        "wrong-count": lambda r: r.update(right=r["right"] + 1),
        "no-count": drop("right"),
        "no-rows": drop("rows"),
        "other-rows": lambda r: r.update(rows=[0, 30]),
        "other-objects": lambda r: r.update(
            objects={key.replace("/0/1", "/0/0"): x for key, x in r["objects"].items()}
        ),
    },
    "rectified/pairwise-T4": {
        "no-statistics": drop("statistics"),
        "statistics-as-text": lambda r: r.update(statistics="good"),
        "statistics-of-text": lambda r: r["statistics"].update(confused="no"),
    },
}


@pytest.mark.parametrize(
    ("part", "name"),
    # what is read alike is tried at one part
    [(part, name) for part, own in OF_ONE_PART.items() for name in own]
    + [("logits", name) for name in RECORDS],
)
def test_a_record_that_makes_no_sense_or_is_untrue_is_found_though_sealed(
    tiny_copy: Path, tiny_truth: list[Tensor], part: str, name: str
) -> None:
    edit_record(tiny_copy, 1, {**RECORDS, **OF_ONE_PART[part]}[name], 0, part)
    assert found_by_verify(tiny_copy)
    assert refused_or_true(tiny_copy, tiny_truth)


# ---- documents of arrays --------------------------------------------------------------------


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield (*path, key)
            yield from places(value, (*path, key))


@pytest.fixture(scope="module")
def my_copy(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_cache, tmp_path_factory.mktemp("fuzz") / "c.zarr"))


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
        after = (store / key).read_bytes()
        # Provenance and fidelity say nothing that anything else in the store would repeat.
        free = sealed and at[0] in ("provenance", "fidelity", "top5_agreement", "pixel_probes")
        if after != before[key]:
            assert found_by_verify(store) or free or same_meaning(before[key], after)
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


@pytest.mark.parametrize("sealed", [False, True], ids=["documents", "attributes"])
@settings(max_examples=12, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_change_of_a_document_is_found(
    my_copy: Path, tiny_truth: list[Tensor], sealed: bool, data: st.DataObject
) -> None:
    """Of sealed attributes: is refused, or harmless."""
    check_any_change(my_copy, tiny_truth, data, sealed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sealed", [False, True], ids=["documents", "attributes"])
@settings(max_examples=250, deadline=None, database=None)
@given(data=st.data())
def test_many_changes_of_documents_are_found(
    my_copy: Path, tiny_truth: list[Tensor], sealed: bool, data: st.DataObject
) -> None:
    check_any_change(my_copy, tiny_truth, data, sealed)
