import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import LocalStore

from stages.cache import commits, records
from stages.cache.blocks import described
from stages.cache.commits import CommitLog
from stages.cache.layout import BlockId
from stages.cache.records import Record, seal_records, unsealed
from stages.cache.storage import list_objects, read_object, write_object
from stages.errors import CacheError

BLOCKS = 3


def log(path: Path, part: str = "logits") -> CommitLog:
    """The records as a program that has just started sees them."""
    return CommitLog(LocalStore(path), part, BLOCKS)


def readable(ours: CommitLog) -> tuple[set[BlockId], list[str]]:
    """The blocks whose records are intact; the keys of damaged files."""
    each = list(ours.inspect())
    found = {BlockId(view, block) for view, records, _ in each for block in records}
    return found, [key for _, _, damaged in each for key in damaged]


def commit(path: Path, *pairs: tuple[int, int]) -> None:
    for view, block in pairs:
        objects = {"x": {"bytes": 10 * view + block}}
        log(path).commit(
            BlockId(view, block), {"rows": [4 * block, 4 * block + 4], "objects": objects}
        )


def files(path: Path) -> set[str]:
    return {str(p.relative_to(path / "commits")) for p in path.rglob("*") if p.is_file()}


def test_a_block_exists_once_it_is_committed(tmp_path: Path) -> None:
    before = log(tmp_path)
    assert before.records == {}
    assert not before.has(BlockId(0, 1))

    before.commit(BlockId(0, 1), {"rows": [4, 8]})

    for seen in (before, log(tmp_path)):
        assert seen.has(BlockId(0, 1))
        assert not seen.has(BlockId(1, 0))
        assert not seen.is_complete(0)
        assert dict(seen.records) == {
            (0, 1): {"part": "logits", "view": 0, "block": 1, "rows": [4, 8]}
        }


def test_a_complete_view_becomes_one_file_with_the_same_records(tmp_path: Path) -> None:
    commit(tmp_path, (0, 0), (0, 1), (0, 2), (1, 0))
    before = dict(log(tmp_path).records)

    for view in (0, 1, 2):
        log(tmp_path).compact(view)

    assert files(tmp_path) == {"logits/v00000.json", "logits/v00001/b00000.json"}
    after = log(tmp_path)
    assert dict(after.records) == before
    assert after.is_complete(0)
    assert not after.is_complete(1)
    assert log(tmp_path).has(BlockId(0, 2))


def test_a_kill_during_compaction_loses_nothing(tmp_path: Path) -> None:
    commit(tmp_path, (0, 0), (0, 1), (0, 2))
    before = dict(log(tmp_path).records)
    view = tmp_path / "commits" / "logits" / "v00000"
    shutil.copytree(view, tmp_path / "aside")
    log(tmp_path).compact(0)

    for left in (3, 2, 1, 0):  # the folder is removed file by file
        shutil.rmtree(view, ignore_errors=True)
        view.mkdir()
        for name in sorted((tmp_path / "aside").iterdir())[:left]:
            shutil.copy(name, view)
        assert dict(log(tmp_path).records) == before

    log(tmp_path).compact(0)
    assert dict(log(tmp_path).records) == before


def test_foreign_files_are_ignored(tmp_path: Path) -> None:
    commit(tmp_path, (0, 0))
    folder = tmp_path / "commits" / "logits"
    (folder / "v00000" / "deeper").mkdir()
    for name in (
        ".DS_Store",
        "README.json",
        "v00000.json.bak",
        "v00000/b00001.json~",
        "v00000/.b00001.json.swp",
        "v00000/b00001.0123abcd.partial",
        "v00000/deeper/b00002.json",
    ):
        (folder / name).write_bytes(b"not a record")

    assert set(log(tmp_path).records) == {(0, 0)}


def sealed(text: bytes) -> bytes:
    """A file of records with this text and its digest."""
    digest = hashlib.sha256(text).hexdigest().encode()
    return b'{"digest":"%s","records":%s}' % (digest, text)


WHOLE = seal_records([{"view": 0, "block": 0}])


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"null", id="null"),
        pytest.param(b"\xff\xfe\x00", id="bytes"),
        pytest.param(b'{"view": 0, "block": 0}', id="not-sealed"),
        pytest.param(WHOLE[:-1], id="cut-off"),
        pytest.param(WHOLE + b"\n", id="longer"),
        pytest.param(b" " + WHOLE, id="indented"),
        pytest.param(WHOLE.replace(b'"view":0', b'"view":1'), id="another-view"),
        pytest.param(b'{"digest":"%064d","records":[]}' % 0, id="another-digest"),
        pytest.param(sealed(b"[7]"), id="list-of-numbers"),
        pytest.param(sealed(b'["record"]'), id="text"),
        pytest.param(sealed(b"[null]"), id="list-of-nulls"),
        pytest.param(sealed(b'[{"view": 0}]'), id="no-block"),
        pytest.param(sealed(b'[{"view": "first", "block": 0}]'), id="no-number"),
        pytest.param(sealed(b"[}]"), id="no-json"),
    ],
)
@pytest.mark.parametrize("name", ["v00000.json", "v00000/b00000.json"])
def test_an_unreadable_record_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / "commits" / "logits" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)

    with pytest.raises(CacheError, match=f"commits/logits/{name} is not readable"):
        _ = log(tmp_path).records


@pytest.mark.parametrize("compacted", [True, False], ids=["view", "block"])
def test_any_flipped_byte_of_a_record_is_noticed(tmp_path: Path, compacted: bool) -> None:
    commit(tmp_path, (0, 0), (0, 1), (0, 2))
    if compacted:
        log(tmp_path).compact(0)
    name = "v00000.json" if compacted else "v00000/b00001.json"
    path = tmp_path / "commits" / "logits" / name
    intact = path.read_bytes()
    for position in range(len(intact)):
        content = bytearray(intact)
        content[position] ^= (1, 0x20, 0x80)[position % 3]
        path.write_bytes(content)
        with pytest.raises(CacheError, match=f"{name} is not readable"):
            _ = log(tmp_path).records
        records, damaged = readable(log(tmp_path))
        assert damaged == [f"commits/logits/{name}"]
        assert records == (set() if compacted else {(0, 0), (0, 2)})


values = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
)
records_of_any_kind = st.lists(
    st.dictionaries(st.text(max_size=5), values | st.lists(values, max_size=3), max_size=4),
    max_size=3,
)


@given(records_of_any_kind)
def test_records_are_sealed_and_come_back(records: list[Record]) -> None:
    assert unsealed(seal_records(records)) == records


def test_a_damaged_file_of_records_can_be_discarded(tmp_path: Path) -> None:
    commit(tmp_path, (0, 0), (1, 0))
    path = tmp_path / "commits/logits/v00001/b00000.json"
    path.write_bytes(b"{")
    ours = log(tmp_path)
    records, damaged = readable(ours)
    assert records == {(0, 0)}

    for key in damaged:
        ours.discard(key)

    assert not path.exists()
    assert set(ours.records) == {(0, 0)}
    assert set(log(tmp_path).records) == {(0, 0)}


@pytest.mark.parametrize("compacted", [True, False], ids=["compacted", "by-block"])
@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_forgotten_block_is_gone_and_its_neighbours_stay(
    tmp_path: Path, compacted: bool, block: int
) -> None:
    commit(tmp_path, (0, 0), (0, 1), (0, 2), (1, 0))
    if compacted:
        log(tmp_path).compact(0)
    before = dict(log(tmp_path).records)
    ours = log(tmp_path)

    ours.forget(BlockId(0, block))

    del before[0, block]
    for seen in (ours, log(tmp_path)):
        assert dict(seen.records) == before
        assert not seen.has(BlockId(0, block))
        assert not seen.is_complete(0)
    log(tmp_path).commit(BlockId(0, block), {"objects": {}})
    assert log(tmp_path).is_complete(0)


def test_a_record_that_goes_after_it_was_listed_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed_before(store: Any, prefix: str) -> list[str]:
        return [*list_objects(store, prefix), f"{prefix}v00000/b00000.json", f"{prefix}v00002.json"]

    commit(tmp_path, (0, 0), (0, 1), (0, 2), (1, 0))
    log(tmp_path).compact(0)
    before = dict(log(tmp_path).records)
    monkeypatch.setattr(records, "list_objects", listed_before)

    assert dict(log(tmp_path).records) == before
    assert set(before) == {(0, 0), (0, 1), (0, 2), (1, 0)}


def test_a_view_compacted_while_its_records_are_read_is_found_under_its_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing has both; another process removes the blocks' records before they are read."""

    def compacted_now(store: Any, key: str) -> bytes | None:
        if "/b" in key and (folder := tmp_path / "commits/logits/v00000").exists():
            shutil.rmtree(folder)
        return read_object(store, key)

    commit(tmp_path, (0, 0), (0, 1), (0, 2))
    expected = dict(log(tmp_path).records)
    folder = tmp_path / "commits" / "logits" / "v00000"
    shutil.copytree(folder, tmp_path / "aside")
    log(tmp_path).compact(0)
    shutil.copytree(tmp_path / "aside", folder)  # compaction writes the one file first
    for reader in (commits, records):
        monkeypatch.setattr(reader, "read_object", compacted_now)

    assert dict(log(tmp_path).records) == expected


@pytest.mark.parametrize("harm", ["gone", "cut-off", "longer"])
def test_objects_of_another_size_are_noticed(tmp_path: Path, harm: str) -> None:
    store = LocalStore(tmp_path)
    for block in range(BLOCKS):
        key = f"a/c/0/{block}"
        write_object(store, key, bytes(10))
        log(tmp_path).commit(BlockId(0, block), {"objects": {key: described(bytes(10))}})
    log(tmp_path).check_all_objects()
    path = tmp_path / "a/c/0/1"
    path.write_bytes({"cut-off": bytes(9), "longer": bytes(11), "gone": b""}[harm])
    if harm == "gone":
        path.unlink()

    with pytest.raises(CacheError, match="a/c/0/1"):
        log(tmp_path).check_all_objects([0])
    log(tmp_path).check_all_objects([1])


def test_forgotten_records_are_gone_and_those_of_other_parts_stay(tmp_path: Path) -> None:
    commit(tmp_path, (0, 0), (1, 0))
    log(tmp_path, "rectified/a").commit(BlockId(0, 0), {})
    log(tmp_path, "rectified/ab").commit(BlockId(0, 1), {})
    cleared = log(tmp_path, "rectified/a")
    assert set(cleared.records) == {(0, 0)}

    cleared.clear()
    cleared.clear()  # nothing is there: nothing happens

    assert cleared.records == {}
    assert log(tmp_path, "rectified/a").records == {}
    assert set(log(tmp_path, "rectified/ab").records) == {(0, 1)}
    assert set(log(tmp_path).records) == {(0, 0), (1, 0)}


def test_objects_are_described_by_size_and_digest(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    contents = {"a/c/0": b"", "a/c/1": bytes(range(256)), "b": b"b"}
    for key, content in contents.items():
        write_object(store, key, content)

    for content in contents.values():
        digest = hashlib.sha256(content).hexdigest()
        assert described(content) == {"bytes": len(content), "sha256": digest}
    assert sorted(list_objects(store, "a/")) == ["a/c/0", "a/c/1"]
    assert read_object(store, "a/c/1") == contents["a/c/1"]
    assert read_object(store, "a/c/2") is None


def test_records_are_plain_json(tmp_path: Path) -> None:
    commit(tmp_path, (0, 0))

    path = tmp_path / "commits" / "logits" / "v00000" / "b00000.json"
    document = json.loads(path.read_text())
    known = {
        "part": "logits",
        "view": 0,
        "block": 0,
        "rows": [0, 4],
        "objects": {"x": {"bytes": 0}},
    }
    assert document["records"] == [known]
    text = json.dumps(document["records"], sort_keys=True, separators=(",", ":"))
    assert document["digest"] == hashlib.sha256(text.encode()).hexdigest()


# ---- what is read, and when ------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of all objects that are read."""
    keys: list[str] = []
    get = LocalStore.get

    async def seen(store: LocalStore, key: str, *more: Any, **named: Any) -> Any:
        keys.append(key.removeprefix("commits/logits/"))
        return await get(store, key, *more, **named)

    monkeypatch.setattr(LocalStore, "get", seen)
    return keys


def test_names_alone_say_which_views_are_complete(tmp_path: Path, asked: list[str]) -> None:
    commit(tmp_path, *((view, block) for view in range(5) for block in range(BLOCKS)), (7, 1))
    for view in range(5):
        log(tmp_path).compact(view)
    asked.clear()

    ours = log(tmp_path)
    assert [view for view in range(9) if ours.is_complete(view)] == [0, 1, 2, 3, 4]
    assert ours.views == [0, 1, 2, 3, 4, 7]
    assert ours.missing([3, 7, 8]) == [(7, 0), (7, 2), (8, 0), (8, 1), (8, 2)]
    assert {key for key in asked if key != "v00007.json"} == {"v00007/b00001.json"}

    asked.clear()
    assert sorted(ours.of_view(3)) == [0, 1, 2]
    assert ours.has(BlockId(3, 2))
    assert asked == ["v00003.json"]


def test_a_damaged_record_concerns_its_view_alone(tmp_path: Path) -> None:
    commit(tmp_path, *((view, block) for view in range(3) for block in range(BLOCKS)))
    for view in range(3):
        log(tmp_path).compact(view)
    (tmp_path / "commits/logits/v00001.json").write_bytes(b"{")

    ours = log(tmp_path)
    assert ours.extent([2]).bytes == 20 + 21 + 22
    assert len(list(ours.each_view([0, 2]))) == 2
    for touch in (ours.of_view, lambda view: list(ours.each_view([0, view]))):
        with pytest.raises(CacheError, match=r"logits/v00001\.json is not readable"):
            touch(1)


def test_records_of_another_view_are_not_taken_for_this_one(tmp_path: Path) -> None:
    commit(tmp_path, *((view, block) for view in range(2) for block in range(BLOCKS)))
    for view in range(2):
        log(tmp_path).compact(view)
    folder = tmp_path / "commits" / "logits"
    shutil.copy(folder / "v00000.json", folder / "v00001.json")

    with pytest.raises(CacheError, match=r"logits/v00001\.json is not readable"):
        log(tmp_path).of_view(1)
    records, damaged = readable(log(tmp_path))
    assert records == {(0, 0), (0, 1), (0, 2)}
    assert damaged == ["commits/logits/v00001.json"]


def test_names_that_are_nearly_those_of_views_are_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "commits" / "logits"
    folder.mkdir(parents=True)
    for name in ("v0.json", "v000000.json", "v00000.json.bak", "w00000.json"):
        (folder / name).write_bytes(WHOLE)
    (folder / "v00001").mkdir()  # what a killed writer leaves

    ours = log(tmp_path)
    assert ours.views == []
    assert not ours.is_complete(0)
    assert ours.records == {}
    assert readable(ours) == (set(), [])


def record(view: int, block: int) -> dict[str, Any]:
    return {"part": "logits", "view": view, "block": block}


def test_records_of_more_views_than_are_kept_in_memory(tmp_path: Path) -> None:
    views = range(2 * commits._VIEWS_KEPT + 1)
    for view in views:
        write_object(
            LocalStore(tmp_path),
            f"commits/logits/v{view:05d}.json",
            seal_records([record(view, block) for block in range(BLOCKS)]),
        )
    ours = log(tmp_path)

    expected = {view: {b: record(view, b) for b in range(BLOCKS)} for view in views}
    assert dict(ours.each_view()) == expected
    for _ in range(2):
        assert {view: ours.of_view(view) for view in views} == expected
    assert len(ours._known) <= commits._VIEWS_KEPT
    assert [view for view, _ in ours.each_view([70, 0, 99])] == [70, 0, 99]
