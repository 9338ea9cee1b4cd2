import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

from pipeline.console import Console
from pipeline.tables import show_cache
from stages.cache import LogitCache, metadata
from stages.cache.encoding.floats import Float32
from stages.cache.identity import DatasetIdentity, Identity, TeacherIdentity, ViewsIdentity
from stages.cache.layout import BlockId
from stages.cache.metadata import NewCache, sealed
from stages.cache.records import unsealed
from stages.cache.rectified import RectificationSettings
from stages.errors import CacheError
from stages.verify.documents import document_faults

ROWS, CLASSES, TEST_ROWS = 10, 3, 4
BLOCKS = 3  # of 4, 4 and 2 rows
ORDER = torch.tensor([3, 7, 0, 9, 1, 5, 2, 8, 6, 4])
LABELS = torch.arange(ROWS) % CLASSES
IDENTITY = Identity(
    teacher=TeacherIdentity("net", "00", (0.5,), (0.5,), None),
    dataset=DatasetIdentity("made-up", "train", ROWS, ("a", "b", "c"), "11", "22"),
    views=ViewsIdentity("pad-crop", {"pad": 4}, 1, 0),
    compute_dtype="float32",
)


SETTINGS = RectificationSettings("swap", "probability-T", 4.0, True)
UNFINISHED = {"format": "teacher-logit-cache", "unfinished": True}


def create(path: Path, num_views: int = 2) -> LogitCache:
    """A cache without any block."""
    return LogitCache.create(
        path,
        NewCache(
            identity=IDENTITY,
            coding=Float32(),
            num_views=num_views,
            dataset_index=ORDER,
            labels=LABELS,
            eval_labels=torch.arange(TEST_ROWS) % CLASSES,
            pixel_probes=[1, 2, 3],
            provenance={"device": "abacus"},
            block_rows=4,
        ),
    )


def logits_of_view(view: int) -> Tensor:
    """(ROWS, CLASSES) in dataset order."""
    return torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(view))


def write(cache: LogitCache, view: int, *blocks: int) -> None:
    for block in blocks:
        logits = logits_of_view(view)[ORDER[4 * block : 4 * block + 4]]
        cache.write_block(view, block, logits, logits.argmax(1), {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two complete views and the test split. Read only: take `path`."""
    cache = create(tmp_path_factory.mktemp("whole") / "small.zarr")
    write(cache, 0, 0, 1, 2)
    write(cache, 1, 0, 1, 2)
    cache.write_eval_logits(torch.eye(TEST_ROWS, CLASSES), {})
    return cache.path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    """A whole cache of one's own."""
    return Path(shutil.copytree(whole, tmp_path / "small.zarr"))


# ---- reading --------------------------------------------------------------------------------


def test_everything_comes_back_in_dataset_order(path: Path) -> None:
    cache = LogitCache.open(path)

    assert (cache.num_views, cache.num_samples, cache.num_classes) == (2, ROWS, CLASSES)
    assert cache.complete_views == [0, 1]
    assert cache.identity == IDENTITY
    assert cache.pixel_probes == [1, 2, 3]
    assert torch.equal(cache.labels, LABELS)
    samples = torch.tensor([4, 4, 9, 0])
    for view in (0, 1):
        logits = logits_of_view(view)
        targets = cache.read_view(view)
        assert torch.equal(targets.rows(samples), logits[samples])
        assert targets.wrong(samples).tolist() == [
            int(logits[i].argmax()) != int(LABELS[i]) for i in samples
        ]
        share = sum(int(logits[i].argmax()) == int(LABELS[i]) for i in range(ROWS)) / ROWS
        assert cache.top1(view) == pytest.approx(share)
        assert cache.top1_per_view[view] == cache.top1(view)
        for temperature in (1.0, 4.0):
            torch.testing.assert_close(
                cache.distribution(view, temperature=temperature),
                (logits.double() / temperature).softmax(1).float(),
            )
    logits, labels = cache.eval_logits()
    eye = torch.eye(TEST_ROWS, CLASSES)
    assert torch.equal(logits, eye - eye.amax(1, keepdim=True))
    assert labels.tolist() == [0, 1, 2, 0]


EVAL_LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "as-they-are": lambda z: z,
    "offset": lambda z: z + 5_000,
    "offset-a-row": lambda z: z + 1e4 * (-1) ** torch.arange(len(z))[:, None],
    "scale": lambda z: z * 1e5,
    "tiny": lambda z: z * 1e-4,
    "hair": lambda z: 100 + z.sign() * 2**-17,  # one unit in the last place apart
}


@pytest.mark.parametrize("change", EVAL_LOGITS.values(), ids=EVAL_LOGITS)
def test_the_test_split_is_kept_at_any_offset_and_scale(
    tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    cache = create(tmp_path / "small.zarr")
    logits = change(8 * torch.randn(TEST_ROWS, CLASSES, generator=torch.Generator().manual_seed(3)))

    cache.write_eval_logits(logits, {})

    cache = LogitCache.open(cache.path)
    kept, labels = cache.eval_logits()
    assert torch.equal(cache.eval_predictions(), logits.argmax(1))
    assert cache.eval_top1() == float((logits.argmax(1) == labels).double().mean())
    for temperature in (1, 4, 20):
        exact, found = (torch.softmax(z.double() / temperature, dim=1) for z in (logits, kept))
        below = (logits.double().amax(1, keepdim=True) - logits.double()) / temperature
        mean = (exact * below).sum(1, keepdim=True)
        bound = 2**-11 * exact * (below + mean) * 1.05 + 1e-7  # rounding of d, to first order
        assert bool(((found - exact).abs() <= bound).all())


def test_blocks_can_be_written_in_any_order_and_again(path: Path, tmp_path: Path) -> None:
    cache = create(tmp_path / "other.zarr")
    for view, block in [(1, 2), (0, 1), (1, 0), (0, 2), (0, 0), (1, 1), (1, 0)]:
        write(cache, view, block)

    for view in (0, 1):
        expected = LogitCache.open(path).distribution(view)
        assert torch.equal(LogitCache.open(cache.path).distribution(view), expected)


READS: list[Callable[[LogitCache], object]] = [
    *(lambda cache: cache.read_view(0), lambda cache: cache.read_block(0, 1)),
    *(lambda cache: cache.distribution(0), lambda cache: cache.top1(0)),
    *(lambda cache: cache.read_view(1), lambda cache: cache.read_block(1, 0)),
    lambda cache: cache.eval_logits(),
]


def test_what_is_not_committed_is_never_read(tmp_path: Path) -> None:
    cache = create(tmp_path / "partial.zarr")
    write(cache, 0, 0, 2)
    # block 1 of view 0 is written, but its record never was: a kill in between
    array = zarr.open_group(cache.path, mode="r+")["logits"]
    assert isinstance(array, zarr.Array)
    array[0, 4:8] = np.ones((4, CLASSES), np.float32)

    for found in (cache, LogitCache.open(cache.path)):
        for read in READS:
            with pytest.raises(
                CacheError, match=r"not complete|is not there|no logits of the test"
            ):
                read(found)
        assert torch.equal(found.read_block(0, 2).logits, logits_of_view(0)[ORDER[8:]])


def test_views_outside_the_cache_are_refused(path: Path) -> None:
    for view in (-1, 2, 1000):
        with pytest.raises(CacheError, match=f"views 0 to 1, not {view}"):
            LogitCache.open(path).read_view(view)


def test_a_record_that_is_removed_takes_its_block_away(path: Path) -> None:
    (path / "commits/logits/v00001.json").unlink()
    cache = LogitCache.open(path)

    assert cache.complete_views == [0]
    with pytest.raises(CacheError, match=r"view 1 of logits is not complete \(1 of 2"):
        cache.read_view(1)


# ---- damage ---------------------------------------------------------------------------------


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x40
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["logits/c/1/0/0", "label/c/0"])
def test_any_flipped_byte_of_a_shard_or_array_is_noticed(path: Path, name: str) -> None:
    file = path / name
    intact, cache = file.read_bytes(), LogitCache.open(path)
    for position in range(len(intact)):
        flip(file, position)
        with pytest.raises(CacheError, match="damaged"):
            cache.read_view(1) if "logits" in name else LogitCache.open(path)
        file.write_bytes(intact)

    assert torch.equal(LogitCache.open(path).read_view(1).rows(ORDER), logits_of_view(1)[ORDER])


OBJECTS: dict[str, Callable[[LogitCache], object]] = {
    "logits/c/1/0/0": lambda cache: cache.read_view(1),
    "logits/c/1/2/0": lambda cache: cache.read_block(1, 2),
    "prediction/c/1/2": lambda cache: cache.top1(1),
    "eval_logits/c/0/0": lambda cache: cache.eval_logits(),
}


@pytest.mark.parametrize(("name", "read"), OBJECTS.items())
@pytest.mark.parametrize("kept", [0, -1, None], ids=["nothing", "all-but-one", "gone"])
def test_a_cut_off_object_is_noticed(
    path: Path, name: str, read: Callable[[LogitCache], object], kept: int | None
) -> None:
    file = path / name
    whole = file.read_bytes()
    file.unlink()
    if kept is not None:
        file.write_bytes(whole[:kept])

    what = "missing" if kept is None else "damaged"
    with pytest.raises(CacheError, match=f"object {name} is {what}") as caught:
        read(LogitCache.open(path))
    assert "pipeline verify CACHE --repair" in caught.value.remedy
    assert torch.equal(LogitCache.open(path).read_view(0).rows(ORDER), logits_of_view(0)[ORDER])


@pytest.mark.parametrize(
    ("name", "harm"),
    [("logits/c/1/2/0", "gone"), ("prediction/c/1/2", "empty"), ("logits/c/1/2/0", "zeros")],
)
def test_a_damaged_shard_can_be_written_again(path: Path, name: str, harm: str) -> None:
    file = path / name
    intact = file.read_bytes()
    file.write_bytes(bytes(len(intact)) if harm == "zeros" else b"")
    if harm == "gone":
        file.unlink()
    (path / "commits/logits/v00001.json").unlink()

    write(LogitCache.open(path, writable=True), 1, 0, 1, 2)

    assert file.read_bytes() == intact
    assert torch.equal(LogitCache.open(path).read_view(1).rows(ORDER), logits_of_view(1)[ORDER])


@pytest.mark.parametrize(
    ("name", "harm"), [("label", "gone"), ("dataset_index", "empty"), ("eval_label", "gone")]
)
def test_the_only_chunk_of_an_array_that_is_gone_is_noticed(
    path: Path, name: str, harm: str
) -> None:
    (path / name / "c/0").write_bytes(b"")
    if harm == "gone":
        (path / name / "c/0").unlink()

    with pytest.raises(CacheError, match=f"{name}: its values are missing"):
        LogitCache.open(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("logits", ""), ("label", "{"), ("dataset_index", "[]"), ("prediction", "{}")),
        *(("eval_logits", '{"zarr_format": 3}'), ("eval_label", "")),
    ],
)
def test_a_damaged_metadata_document_is_told(path: Path, name: str, content: str) -> None:
    (path / name / "zarr.json").write_text(content)

    def read_all() -> None:
        cache = LogitCache.open(path)
        cache.read_view(0)
        cache.eval_logits()

    with pytest.raises(CacheError, match=f"'{name}'"):
        read_all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("logits", {"fill_value": 1.0}, id="fill-value"),
        pytest.param("logits", {"attributes": {"note": "hello"}}, id="attributes"),
        pytest.param("eval_logits", {"codecs": [{"name": "bytes"}]}, id="codecs"),
    ],
)
def test_array_metadata_changed_by_hand_are_noticed(
    path: Path, name: str, change: dict[str, Any]
) -> None:
    document = path / name / "zarr.json"
    document.write_text(json.dumps(json.loads(document.read_text()) | change))

    (key,) = change
    with pytest.raises(
        CacheError, match=f"array '{name}' is not what was written: {key}"
    ) as caught:
        LogitCache.open(path)
    assert "pipeline verify CACHE --repair" in caught.value.remedy


def test_room_for_more_views_than_are_committed_is_no_damage(path: Path) -> None:
    """As an append leaves it that was killed after its first array."""
    array = zarr.open_group(path, mode="r+")["logits"]
    assert isinstance(array, zarr.Array)
    array.resize((9, ROWS, CLASSES))

    cache = LogitCache.open(path)
    assert cache.num_views == 2
    assert torch.equal(cache.read_view(1).rows(ORDER), logits_of_view(1)[ORDER])


def test_the_root_attributes_have_an_equal_copy(path: Path) -> None:
    def copied() -> Any:
        (copy,) = unsealed((path / "commits/attributes.json").read_bytes())
        return copy

    assert copied() == json.loads((path / "zarr.json").read_text())["attributes"]
    LogitCache.open(path, writable=True).write_fidelity()

    assert copied() == json.loads((path / "zarr.json").read_text())["attributes"]
    assert copied() == sealed(copied())
    assert LogitCache.open(path).fidelity is not None


# ---- opening --------------------------------------------------------------------------------


def by_hand(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    """The root attributes changed, their digest left as it was."""

    def damage(path: Path) -> None:
        document = json.loads((path / "zarr.json").read_text())
        change(document["attributes"])
        (path / "zarr.json").write_text(json.dumps(document))

    return damage


def attributes(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    """The root attributes changed and sealed again, as a program that means it would do."""

    def resealed(found: dict[str, Any]) -> None:
        change(found)
        found |= sealed(found)

    return by_hand(resealed)


def only(wanted: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        found.clear()
        found.update(wanted)

    return change


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        shutil.rmtree(path)
        make(path)

    return damage


def partial_downloads(path: Path) -> None:
    path.mkdir()
    (path / "film.mkv.partial").write_text("half a film")


def plain_folder(path: Path) -> None:
    path.mkdir()
    (path / "holiday.txt").write_text("sun")


def only_half_written(path: Path) -> None:
    """As a create that was killed at its first byte leaves it."""
    path.mkdir()
    (path / f"zarr.{uuid4().hex}.partial").write_text('{"zarr_')


def zarr_group(path: Path, **attributes: str) -> None:
    group = zarr.create_group(path, zarr_format=3, attributes=attributes)
    group.create_array("temperature", shape=(3,), dtype="float32")


NOT_A_CACHE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "no cache at"),
    "file": (replaced_by(lambda p: p.write_text("x")), "not a teacher-logit cache"),
    "empty-folder": (replaced_by(Path.mkdir), "not a teacher-logit cache"),
    "plain-folder": (replaced_by(plain_folder), "not a teacher-logit cache"),
    "other-group": (replaced_by(lambda p: zarr_group(p, title="sea")), "not a teacher-logit cache"),
    "array": (
        replaced_by(lambda p: zarr.create_array(p, shape=(3,), dtype="int8")),
        "not a teacher-logit cache",
    ),
    "zarr-2": (
        replaced_by(lambda p: zarr.create_group(p, zarr_format=2)),
        "not a teacher-logit cache",
    ),
    "no-json": (lambda p: (p / "zarr.json").write_text("{"), "not a teacher-logit cache"),
    "unfinished": (by_hand(only(UNFINISHED)), "never finished"),
    "no-attributes": (attributes(dict.clear), "not a teacher-logit cache"),
    "marked-and-more": (attributes(lambda a: a.update(unfinished=True, version=None)), "version"),
    "identity-edited": (
        attributes(lambda a: a["identity"]["dataset"].update(labels="12")),
        "identity does not match its digest",
    ),
    "digest-edited": (attributes(lambda a: a.update(identity_digest="12")), "match its digest"),
    "identity-incomplete": (attributes(lambda a: a["identity"].pop("views")), "not readable"),
    "identity-a-list": (attributes(lambda a: a.update(identity=[])), r"damaged.*\$\.identity"),
    "provenance-null": (attributes(lambda a: a.update(provenance=None)), r"damaged.*provenance"),
    "probe-a-word": (
        attributes(lambda a: a["pixel_probes"].append("12")),
        r"damaged.*\$\.pixel_probes",
    ),
    "no-predictions": (lambda p: shutil.rmtree(p / "prediction"), "'prediction' is missing"),
    "other-digest": (by_hand(lambda a: a.update(digest="00")), "digest is another"),
    "no-seal": (by_hand(lambda a: a.pop("digest")), "digest is another"),
    "one-more": (by_hand(lambda a: a.update(note="hello")), "digest is another"),
    "provenance-edited": (by_hand(lambda a: a["provenance"].clear()), "digest is another"),
    "probe-edited": (by_hand(lambda a: a["pixel_probes"].append(4)), "digest is another"),
    "encoding-edited": (by_hand(lambda a: a["encoding"].update(name="klt")), "digest is another"),
}


@pytest.mark.parametrize(("damage", "message"), NOT_A_CACHE.values(), ids=NOT_A_CACHE)
def test_what_is_not_a_cache_is_not_opened(
    path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(path)

    for writable in (False, True):
        with pytest.raises(CacheError, match=message):
            LogitCache.open(path, writable)


@pytest.mark.parametrize(
    ("damage", "exists"),
    [
        pytest.param(lambda p: None, True, id="cache"),
        pytest.param(shutil.rmtree, False, id="missing"),
        pytest.param(replaced_by(Path.mkdir), False, id="empty-folder"),
        pytest.param(replaced_by(only_half_written), False, id="half-written"),
        pytest.param(by_hand(only(UNFINISHED)), False, id="interrupted"),
    ],
)
def test_exists(path: Path, damage: Callable[[Path], object], exists: bool) -> None:
    damage(path)

    assert LogitCache.exists(path) is exists


@pytest.mark.parametrize("make", [plain_folder, lambda p: p.write_text("x")], ids=["dir", "file"])
def test_something_else_is_neither_there_nor_missing(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "else")

    with pytest.raises(CacheError, match="not a teacher-logit cache"):
        LogitCache.exists(tmp_path / "else")


FOREIGN: dict[str, Callable[[Path], object]] = {
    "no-attributes": zarr_group,
    "attributes": lambda p: zarr_group(p, title="sea"),
    "nothing-in-it": lambda p: zarr.create_group(p, zarr_format=3),
    "folder": plain_folder,
    "folder-of-partials": partial_downloads,
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_what_is_somebody_elses_is_never_taken_for_free_and_never_emptied(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    theirs = tmp_path / "theirs"
    make(theirs)
    before = {p: p.read_bytes() for p in theirs.rglob("*") if p.is_file()}

    with contextlib.suppress(CacheError):  # it may refuse to say; it may not say "nothing there"
        assert LogitCache.exists(theirs)
    with pytest.raises(CacheError, match="not a teacher-logit cache"):
        LogitCache.open(theirs, writable=True)
    with pytest.raises(CacheError):
        create(theirs)
    assert {p: p.read_bytes() for p in theirs.rglob("*") if p.is_file()} == before


THEIRS = {
    ".DS_Store": b"\0\0\0\1Bud1",
    "mine/notes.txt": b"dear diary",
    "mine/label/c/0": b"a label of mine",
    "readme.md": b"# hello",
}


def put(path: Path, files: dict[str, bytes] = THEIRS) -> None:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def there(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in THEIRS}


def test_what_lies_beside_an_interrupted_creation_stays(path: Path) -> None:
    by_hand(only(UNFINISHED))(path)
    put(path)

    assert not LogitCache.exists(path)
    create(path)

    assert there(path) == THEIRS
    assert LogitCache.open(path).complete_views == []  # nothing of ours was left over


def test_what_lies_beside_a_cache_is_no_part_of_it(path: Path) -> None:
    put(path)
    put(path, {"rectified/notes.txt": b"mine", "rectified/.DS_Store": b"", "rectified/x/y": b"z"})
    put(path, {"commits/.DS_Store": b"", "commits/logits/.DS_Store": b"", "label/.DS_Store": b""})

    cache = LogitCache.open(path, writable=True)

    assert (cache.complete_views, cache.rectifications) == ([0, 1], [])
    assert document_faults(path) == []
    with pytest.raises(CacheError, match="rectified/x holds something that is no rectification: y"):
        cache.create_rectification("x", SETTINGS)
    assert (path / "rectified/x/y").read_bytes() == b"z"
    cache.create_rectification("r", SETTINGS)
    assert LogitCache.open(path).rectifications == ["r"]
    assert there(path) == THEIRS


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "._a"])
def test_what_a_system_drops_into_an_empty_folder_is_in_nobodys_way(
    tmp_path: Path, name: str
) -> None:
    put(tmp_path / "c.zarr", {name: b"x"})
    assert not LogitCache.exists(tmp_path / "c.zarr")
    create(tmp_path / "c.zarr")
    assert (tmp_path / "c.zarr" / name).exists()


def test_a_large_folder_is_refused_without_a_walk_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, {"home/me/deep/down/file": b"x"})
    looked_at = []

    def scandir(folder: str) -> object:
        looked_at.append(Path(folder))
        return scan(folder)

    scan = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "walk", lambda *_, **__: pytest.fail("walks"))
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("walks"))
    with pytest.raises(CacheError, match="not a teacher-logit cache: it holds home"):
        create(tmp_path)
    with pytest.raises(CacheError, match="not a teacher-logit cache: it holds "):
        LogitCache.exists("/")
    assert set(looked_at) <= {tmp_path, Path("/")}


def test_a_cache_is_never_replaced(path: Path) -> None:
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}

    with pytest.raises(CacheError, match="there is a cache at"):
        create(path)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


class Killed(Exception):  # noqa: N818
    """Stands for SIGKILL inside Zarr's event loop, whose thread a KeyboardInterrupt would end: all
    that uses Zarr later would wait for it.
    """


@pytest.mark.parametrize("stop_at", [1, 4, 8])
def test_a_create_killed_while_it_removed_what_another_left_is_replaced(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    array_bytes: Callable[[Path], dict[str, bytes]],
    stop_at: int,
) -> None:
    whole = create(tmp_path / "whole.zarr")
    by_hand(only(UNFINISHED))(path)
    calls = 0

    def interrupted(folder: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Killed
        remove(folder)

    remove = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(Killed):
            create(path)
    assert not LogitCache.exists(path)
    with pytest.raises(CacheError, match="never finished"):
        LogitCache.open(path)

    create(path)

    assert array_bytes(path) == array_bytes(whole.path)


# ---- creating and growing -------------------------------------------------------------------


def test_an_interrupted_create_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    whole = create(tmp_path / "whole.zarr")
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return make(*arguments)

    make = metadata.create_array
    monkeypatch.setattr(metadata, "create_array", interrupted)
    for stop_at in range(1, 7):  # noqa: B007, read by `interrupted`; arrays: five and the logits
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            create(tmp_path / "again.zarr")
        assert not LogitCache.exists(tmp_path / "again.zarr")
        with pytest.raises(CacheError, match="never finished"):
            LogitCache.open(tmp_path / "again.zarr")
    stop_at = 0
    again = create(tmp_path / "again.zarr")

    assert array_bytes(again.path) == array_bytes(whole.path)
    assert (again.path / "zarr.json").read_bytes() == (whole.path / "zarr.json").read_bytes()


def test_what_is_there_is_counted_in_unfinished_views_as_well(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = LogitCache.open(path, writable=True)
    cache.grow(4)
    write(cache, 3, 2, 0)

    there = LogitCache.open(path).commits.extent()

    shards = [*path.glob("logits/c/*/*/0"), *path.glob("prediction/c/*/*")]
    assert (there.blocks, there.rows) == (8, 2 * ROWS + 6)
    assert there.bytes == sum(file.stat().st_size for file in shards)
    show_cache(str(path), Console())
    shown = capsys.readouterr().out
    assert "2 of 4 views, 8 of 12 blocks" in shown
    assert f"{there.bytes / there.rows:.1f} bytes a sample and view" in shown
    show_cache(str(create(tmp_path / "empty.zarr").path), Console())
    assert "0 of 2 views, 0 of 6 blocks" in capsys.readouterr().out


def test_a_reader_sees_what_another_process_adds(path: Path) -> None:
    reader, writer = LogitCache.open(path), LogitCache.open(path, writable=True)
    assert reader.complete_views == [0, 1]
    assert reader.read_view(1).rectified is None

    writer.grow(3)
    write(writer, 2, 0, 1)
    with pytest.raises(CacheError, match="view 2 of logits is not complete"):
        reader.read_view(2)
    write(writer, 2, 2)
    assert torch.equal(reader.read_view(2).rows(ORDER), logits_of_view(2)[ORDER])
    assert (reader.num_views, reader.complete_views) == (3, [0, 1, 2])

    rectification = writer.create_rectification("mine", SETTINGS)
    values = {"label_logit": torch.ones(4), "predicted_logit": torch.ones(4)}
    values["wrong"] = torch.ones(4, dtype=torch.bool)
    for view in (0, 2):
        with pytest.raises(CacheError):
            reader.read_view(view, "mine")
        for block in range(3):
            rows = {name: x[: writer.grid.length(block)] for name, x in values.items()}
            rectification.blocks.write(BlockId(view, block), rows, {})
        assert reader.read_view(view, "mine").rectified is not None
    LogitCache.open(path, writable=True).grow(4)
    assert reader.read_view(2, "mine").rectified is not None
    with pytest.raises(CacheError, match="not complete"):
        reader.read_view(3)


def test_growing_keeps_what_is_there_and_is_safe_to_repeat(
    path: Path, array_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    cache = LogitCache.open(path, writable=True)
    rectification = cache.create_rectification("mine", SETTINGS)
    ones = {"label_logit": torch.ones(4), "predicted_logit": torch.ones(4)}
    rectification.blocks.write(BlockId(0, 0), ones | {"wrong": torch.ones(4, dtype=torch.bool)}, {})
    before = array_bytes(path)

    for views in (5, 5, 3, 1):  # never smaller
        LogitCache.open(path, writable=True).grow(views)
        cache = LogitCache.open(path)
        assert cache.num_views == 5
        assert cache.complete_views == [0, 1]
        group = zarr.open_group(path, mode="r")
        for name in ("logits", "prediction", "rectified/mine/wrong", "rectified/mine/label_logit"):
            array = group[name]
            assert isinstance(array, zarr.Array)
            assert array.shape[0] == 5

    after = array_bytes(path)
    changed = {name for name in after if before.get(name) != after[name]}
    assert {name.rpartition("/")[2] for name in changed} == {"zarr.json"}
    assert before.keys() == after.keys()
    for view in (0, 1):
        assert torch.equal(cache.read_view(view).rows(ORDER), logits_of_view(view)[ORDER])
    with pytest.raises(CacheError, match="view 4 of logits is not complete"):
        cache.read_view(4)
    cache = LogitCache.open(path, writable=True)
    write(cache, 4, 0, 1, 2)
    assert torch.equal(cache.read_view(4).rows(ORDER), logits_of_view(4)[ORDER])


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_kill_while_growing_is_mended_by_growing_again(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    array_bytes: Callable[[Path], dict[str, bytes]],
    stop_at: int,
) -> None:
    LogitCache.open(path, writable=True).create_rectification("mine", SETTINGS)
    shutil.copytree(path, tmp_path / "whole.zarr")
    LogitCache.open(tmp_path / "whole.zarr", writable=True).grow(4)
    calls = 0

    def interrupted(array: Any, shape: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        resize(array, shape)

    resize = zarr.Array.resize
    monkeypatch.setattr(zarr.Array, "resize", interrupted)
    with pytest.raises(KeyboardInterrupt):  # three arrays of the rectification, two of the cache
        LogitCache.open(path, writable=True).grow(4)
    assert torch.equal(LogitCache.open(path).read_view(1).rows(ORDER), logits_of_view(1)[ORDER])
    LogitCache.open(path, writable=True).grow(4)

    assert array_bytes(path) == array_bytes(tmp_path / "whole.zarr")
    assert LogitCache.open(path).num_views == 4


SPELLINGS: dict[str, Callable[[dict[str, Any]], str]] = {
    "compact": lambda d: json.dumps(d, separators=(",", ":")),
    "sorted": lambda d: json.dumps(d, sort_keys=True, indent=4),
    "without-defaults": lambda d: json.dumps(
        {k: v for k, v in d.items() if k != "storage_transformers"}, indent=1
    ),
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_documents_of_another_version_of_zarr_are_no_damage(
    path: Path, spell: Callable[[dict[str, Any]], str]
) -> None:
    LogitCache.open(path, writable=True).create_rectification("r", SETTINGS)
    for file in path.rglob("zarr.json"):
        document = json.loads(file.read_text())
        file.write_text(spell(document))
        if document["node_type"] == "group" and not document["attributes"]:
            file.write_text(spell({**document, "consolidated_metadata": None}))

    assert document_faults(path) == []
    assert LogitCache.open(path).complete_views == [0, 1]


@pytest.mark.parametrize("key", ["", "label", "logits", "commits", "rectified"])
def test_a_document_that_says_something_else_is_a_fault(path: Path, key: str) -> None:
    file = path / key / "zarr.json"
    document = json.loads(file.read_text())
    for name, value in {"zarr_format": 3.0001, "more": 1, "node_type": "grope"}.items():
        file.write_text(json.dumps({**document, name: value}))
        try:
            found = [fault.where for fault in document_faults(path)]
        except CacheError:
            found = [f"{key}/zarr.json".lstrip("/")]  # the root cannot be opened at all
        assert f"{key}/zarr.json".lstrip("/") in found, (name, value)


def test_only_codecs_of_the_specification_and_no_pickle(path: Path) -> None:
    def names(codecs: list[dict[str, Any]]) -> set[str]:
        inner = [c for codec in codecs for c in codec.get("configuration", {}).get("codecs", [])]
        return {codec["name"] for codec in codecs} | (names(inner) if inner else set())

    documents = [json.loads(file.read_text()) for file in path.rglob("zarr.json")]
    found = [document for document in documents if document["node_type"] == "array"]

    assert len(found) == 7
    for document in found:
        assert names(document["codecs"]) <= {"bytes", "zstd", "crc32c", "sharding_indexed"}
        assert document["dimension_names"]
        assert all(document["dimension_names"])
