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
from damage import Change, at_call, edit_attributes, edit_json, harmed, tree
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
DROPPED = (".DS_Store", "Thumbs.db", "._a")
"""What a system drops into an empty folder is in nobody's way."""


def create(path: Path, num_views: int = 2, other: bool = False) -> LogitCache:
    """A cache without any block. other: of other labels, in another order."""
    return LogitCache.create(
        path,
        NewCache(
            identity=IDENTITY,
            coding=Float32(),
            num_views=num_views,
            dataset_index=ORDER.flip(0) if other else ORDER,
            labels=LABELS.flip(0) if other else LABELS,
            eval_labels=(torch.arange(TEST_ROWS) + 2 * other) % CLASSES,
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


def values_of(rows: int) -> dict[str, Tensor]:
    """A block of a rectification."""
    ones = torch.ones(rows)
    return {"label_logit": ones, "predicted_logit": ones, "wrong": ones.bool()}


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
    assert (cache.identity, cache.pixel_probes) == (IDENTITY, [1, 2, 3])
    assert torch.equal(cache.labels, LABELS)
    samples = torch.tensor([4, 4, 9, 0])
    for view in (0, 1):
        logits, targets = logits_of_view(view), cache.read_view(view)
        wrong = [int(row.argmax()) != int(label) for row, label in zip(logits, LABELS, strict=True)]
        assert torch.equal(targets.rows(samples), logits[samples])
        assert targets.wrong(samples).tolist() == [wrong[i] for i in samples]
        assert cache.top1(view) == pytest.approx(1 - sum(wrong) / ROWS)
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


def test_what_is_not_committed_is_never_read(tmp_path: Path) -> None:
    cache = create(tmp_path / "partial.zarr")
    write(cache, 0, 0, 2)
    # block 1 of view 0 is written, but its record never was: a kill in between
    array: Any = zarr.open_group(cache.path, mode="r+")["logits"]
    array[0, 4:8] = np.ones((4, CLASSES), np.float32)

    for found in (cache, LogitCache.open(cache.path)):
        for name, *at in (
            *(("read_view", 0), ("read_block", 0, 1), ("distribution", 0), ("top1", 0)),
            *(("read_view", 1), ("read_block", 1, 0), ("eval_logits",)),
        ):
            with pytest.raises(CacheError):
                getattr(found, name)(*at)
        assert torch.equal(found.read_block(0, 2).logits, logits_of_view(0)[ORDER[8:]])


def test_views_outside_the_cache_are_refused(path: Path) -> None:
    for view in (-1, 2, 1000):
        with pytest.raises(CacheError, match=f"not {view}"):
            LogitCache.open(path).read_view(view)


# ---- damage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [b"", None], ids=["empty", "gone"])
def test_an_object_without_content_is_noticed(path: Path, kept: bytes | None) -> None:
    for name, read in {
        "logits/c/1/0/0": lambda cache: cache.read_view(1),
        "logits/c/1/2/0": lambda cache: cache.read_block(1, 2),
        "prediction/c/1/2": lambda cache: cache.top1(1),
        "eval_logits/c/0/0": lambda cache: cache.eval_logits(),
    }.items():
        with harmed(path / name, kept), pytest.raises(CacheError, match=name) as caught:
            read(LogitCache.open(path))
        assert "pipeline verify CACHE --repair" in caught.value.remedy
    for name in ("label", "dataset_index", "eval_label"):
        with harmed(path / name / "c/0", kept), pytest.raises(CacheError, match=name):
            LogitCache.open(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("logits", b""), ("label", b"{"), ("dataset_index", b"[]"), ("prediction", b"{}")),
        *(("eval_logits", b'{"zarr_format": 3}'), ("eval_label", b"")),
    ],
)
def test_a_damaged_metadata_document_is_told(path: Path, name: str, content: bytes) -> None:
    def read() -> object:
        cache = LogitCache.open(path)
        return cache.read_view(0), cache.eval_logits()

    with harmed(path / name / "zarr.json", content), pytest.raises(CacheError, match=name):
        read()


def test_room_for_more_views_than_are_committed_is_no_damage(path: Path) -> None:
    """As an append leaves it that was killed after its first array."""
    array: Any = zarr.open_group(path, mode="r+")["logits"]
    array.resize((9, ROWS, CLASSES))
    cache = LogitCache.open(path)
    assert cache.num_views == 2
    assert torch.equal(cache.read_view(1).rows(ORDER), logits_of_view(1)[ORDER])


def test_the_root_attributes_have_an_equal_copy(path: Path) -> None:
    for _ in range(2):
        (copy,) = unsealed((path / "commits/attributes.json").read_bytes())
        assert copy == json.loads((path / "zarr.json").read_text())["attributes"] == sealed(copy)
        LogitCache.open(path, writable=True).write_fidelity()
    assert LogitCache.open(path).fidelity is not None


# ---- opening --------------------------------------------------------------------------------


def by_hand(change: Change) -> Callable[[Path], object]:
    """The root attributes changed, their digest left as it was."""
    return lambda path: edit_json(path / "zarr.json", lambda d: change(d["attributes"]))


def attributes(change: Change) -> Callable[[Path], object]:
    """The root attributes changed and sealed again, as a program that means it would do."""
    return lambda path: edit_attributes(path, change)


def only(wanted: dict[str, Any]) -> Change:
    def change(found: dict[str, Any]) -> None:
        found.clear()
        found.update(wanted)

    return change


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        shutil.rmtree(path)
        make(path)

    return damage


def folder_of(name: str, content: str = "mine") -> Callable[[Path], object]:
    return lambda path: put(path, {name: content.encode()})


def put(path: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


OTHER = "not a teacher-logit cache"
OTHER = "not a teacher-logit cache"
Harm = Callable[[Path], object]
FREE: dict[str, tuple[Harm, str]] = {
    "missing": (shutil.rmtree, "no cache at"),
    "empty-folder": (replaced_by(Path.mkdir), OTHER),
    # as a create that was killed at its first byte leaves it
    "half-written": (replaced_by(folder_of(f"zarr.{uuid4().hex}.partial", '{"zarr_')), OTHER),
    "unfinished": (by_hand(only(UNFINISHED)), "never finished"),
    **{f"of-{name}": (replaced_by(folder_of(name)), OTHER) for name in DROPPED},
}
TAKEN: dict[str, tuple[Harm, str]] = {
    "file": (replaced_by(lambda p: p.write_text("x")), OTHER),
    "plain-folder": (replaced_by(folder_of("holiday.txt")), OTHER),
    "folder-of-partials": (replaced_by(folder_of("film.mkv.partial")), OTHER),
    "group": (replaced_by(lambda p: zarr.create_group(p, attributes={"title": "sea"})), OTHER),
    "empty-group": (replaced_by(lambda p: zarr.create_group(p)), OTHER),
    "array": (replaced_by(lambda p: zarr.create_array(p, shape=(3,), dtype="int8")), OTHER),
    "zarr-2": (replaced_by(lambda p: zarr.create_group(p, zarr_format=2)), OTHER),
    "no-json": (lambda p: (p / "zarr.json").write_text("{"), OTHER),
    "no-attributes": (attributes(dict.clear), OTHER),
    "marked-and-more": (attributes(lambda a: a.update(unfinished=True, version=None)), "version"),
    "identity-edited": (
        attributes(lambda a: a["identity"]["dataset"].update(labels="12")),
        "identity does not match its digest",
    ),
    "no-predictions": (lambda p: shutil.rmtree(p / "prediction"), "'prediction' is missing"),
    "other-digest": (by_hand(lambda a: a.update(digest="00")), "digest is another"),
    "no-seal": (by_hand(lambda a: a.pop("digest")), "digest is another"),
    "one-more": (by_hand(lambda a: a.update(note="hello")), "digest is another"),
    "probe-edited": (by_hand(lambda a: a["pixel_probes"].append(4)), "digest is another"),
}
"""More that is sealed and makes no sense: tests/cache/test_faults.py."""
"""More that is sealed and makes no sense: tests/cache/test_faults.py."""


@pytest.mark.parametrize(("harm", "words"), [*FREE.values(), *TAKEN.values()], ids=[*FREE, *TAKEN])
def test_what_is_not_a_cache_is_not_opened(path: Path, harm: Harm, words: str) -> None:
    harm(path)
    for writable in (False, True):
        with pytest.raises(CacheError, match=words):
            LogitCache.open(path, writable)


@pytest.mark.parametrize(("harm", "_"), FREE.values(), ids=FREE)
def test_where_there_is_nothing_a_cache_is_made(path: Path, harm: Harm, _: str) -> None:
    """And what lies beside it stays."""
    harm(path)
    if (path / "label").exists():  # a creation that was interrupted
        put(path, THEIRS)
    theirs = {k: c for k, c in tree(path).items() if Path(k).name in DROPPED or k in THEIRS}

    assert LogitCache.exists(path) is False
    create(path)

    assert theirs.items() <= tree(path).items()
    assert LogitCache.open(path).complete_views == []  # nothing of ours was left over


@pytest.mark.parametrize(
    ("harm", "_"), [*TAKEN.values(), (lambda p: None, "")], ids=[*TAKEN, "cache"]
)
def test_what_is_there_is_never_taken_for_free_and_never_emptied(
    path: Path, harm: Harm, _: str
) -> None:
    harm(path)
    before = tree(path.parent)
    with contextlib.suppress(CacheError):  # it may refuse to say; it may not say "nothing there"
        assert LogitCache.exists(path)
    with pytest.raises(CacheError):
        create(path)
    assert tree(path.parent) == before


THEIRS = {
    ".DS_Store": b"\0\0\0\1Bud1",
    "mine/notes.txt": b"dear diary",
    "mine/label/c/0": b"a label of mine",
    "readme.md": b"# hello",
}


def test_what_lies_beside_a_cache_is_no_part_of_it(path: Path) -> None:
    put(path, THEIRS)
    put(path, {"rectified/notes.txt": b"mine", "rectified/.DS_Store": b"", "rectified/x/y": b"z"})
    put(path, {"commits/.DS_Store": b"", "commits/logits/.DS_Store": b"", "label/.DS_Store": b""})

    cache = LogitCache.open(path, writable=True)

    assert (cache.complete_views, cache.rectifications) == ([0, 1], [])
    assert document_faults(path) == []
    with pytest.raises(CacheError, match="rectified/x"):
        cache.create_rectification("x", SETTINGS)
    cache.create_rectification("r", SETTINGS)
    assert LogitCache.open(path).rectifications == ["r"]
    assert {**THEIRS, "rectified/x/y": b"z"}.items() <= tree(path).items()


def test_a_large_folder_is_refused_without_a_walk_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, {"home/me/deep/down/file": b"x"})
    looked_at, scan = [], os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda folder: looked_at.append(Path(folder)) or scan(folder)
    )
    monkeypatch.setattr(os, "walk", lambda *_, **__: pytest.fail("walks"))
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("walks"))
    for refused in (lambda: create(tmp_path), lambda: LogitCache.exists("/")):
        with pytest.raises(CacheError, match=OTHER):
            refused()
    assert set(looked_at) <= {tmp_path, Path("/")}


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
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", at_call(stop_at, Killed, shutil.rmtree))
        with pytest.raises(Killed):
            create(path)
    assert not LogitCache.exists(path)
    with pytest.raises(CacheError, match="never finished"):
        LogitCache.open(path)

    create(path)

    assert array_bytes(path) == array_bytes(whole.path)


# ---- creating and growing -------------------------------------------------------------------


def test_an_interrupted_create_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = create(tmp_path / "whole.zarr")
    make = metadata.create_array
    for stop_at in range(1, 7):  # arrays: five and the logits
        monkeypatch.setattr(metadata, "create_array", at_call(stop_at, KeyboardInterrupt, make))
        with pytest.raises(KeyboardInterrupt):
            create(tmp_path / "again.zarr")
        assert not LogitCache.exists(tmp_path / "again.zarr")
        with pytest.raises(CacheError, match="never finished"):
            LogitCache.open(tmp_path / "again.zarr")
    monkeypatch.undo()

    assert tree(create(tmp_path / "again.zarr").path) == tree(whole.path)


def test_what_is_there_is_counted_in_unfinished_views_as_well(
    path: Path, capsys: pytest.CaptureFixture[str]
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


def test_a_reader_sees_what_another_process_adds(path: Path) -> None:
    reader, writer = LogitCache.open(path), LogitCache.open(path, writable=True)
    assert reader.complete_views == [0, 1]

    writer.grow(3)
    write(writer, 2, 0, 1)
    with pytest.raises(CacheError, match="view 2 of logits is not complete"):
        reader.read_view(2)
    write(writer, 2, 2)
    assert torch.equal(reader.read_view(2).rows(ORDER), logits_of_view(2)[ORDER])
    assert (reader.num_views, reader.complete_views) == (3, [0, 1, 2])

    rectification = writer.create_rectification("mine", SETTINGS)
    for view in (0, 2):
        with pytest.raises(CacheError):
            reader.read_view(view, "mine")
        for block in range(3):
            rows = values_of(writer.grid.length(block))
            rectification.blocks.write(BlockId(view, block), rows, {})
        assert reader.read_view(view, "mine").rectified is not None
    LogitCache.open(path, writable=True).grow(4)
    assert reader.read_view(2, "mine").rectified is not None
    with pytest.raises(CacheError, match="not complete"):
        reader.read_view(3)


def test_growing_keeps_what_is_there_and_is_safe_to_repeat(path: Path) -> None:
    cache = LogitCache.open(path, writable=True)
    cache.create_rectification("mine", SETTINGS).blocks.write(BlockId(0, 0), values_of(4), {})
    before = tree(path)

    for views in (5, 5, 3, 1):  # never smaller
        LogitCache.open(path, writable=True).grow(views)
        group: Any = zarr.open_group(path, mode="r")
        for name in ("logits", "prediction", "rectified/mine/wrong", "rectified/mine/label_logit"):
            assert group[name].shape[0] == 5

    cache, after = LogitCache.open(path, writable=True), tree(path)
    assert (cache.num_views, cache.complete_views) == (5, [0, 1])
    assert before.keys() == after.keys()
    changed = {name for name in after if before[name] != after[name]}
    assert {Path(name).name for name in changed} <= {"zarr.json", "attributes.json"}
    write(cache, 4, 0, 1, 2)
    for view in (0, 1, 4):
        assert torch.equal(cache.read_view(view).rows(ORDER), logits_of_view(view)[ORDER])


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_kill_while_growing_is_mended_by_growing_again(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    LogitCache.open(path, writable=True).create_rectification("mine", SETTINGS)
    shutil.copytree(path, tmp_path / "whole.zarr")
    LogitCache.open(tmp_path / "whole.zarr", writable=True).grow(4)
    resize = at_call(stop_at, KeyboardInterrupt, zarr.Array.resize)
    monkeypatch.setattr(zarr.Array, "resize", lambda array, shape: resize(array, shape))
    with pytest.raises(KeyboardInterrupt):  # three arrays of the rectification, two of the cache
        LogitCache.open(path, writable=True).grow(4)
    assert torch.equal(LogitCache.open(path).read_view(1).rows(ORDER), logits_of_view(1)[ORDER])
    LogitCache.open(path, writable=True).grow(4)

    assert tree(path) == tree(tmp_path / "whole.zarr")
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
