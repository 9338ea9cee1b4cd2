import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from damage import harmed
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


def whole_views(path: Path, views: int) -> None:
    """Complete and compacted."""
    for view in range(views):
        commit(path, *((view, block) for block in range(BLOCKS)))
        log(path).compact(view)


def files(path: Path) -> set[str]:
    return {str(p.relative_to(path / "commits")) for p in path.rglob("*") if p.is_file()}


def sealed(text: bytes) -> bytes:
    """A file of records with this text and its digest."""
    digest = hashlib.sha256(text).hexdigest().encode()
    return b'{"digest":"%s","records":%s}' % (digest, text)


WHOLE = seal_records([{"view": 0, "block": 0}])


def test_a_block_exists_once_it_is_committed(tmp_path: Path) -> None:
    before = log(tmp_path)
    assert before.records == {}
    assert not before.has(BlockId(0, 1))

    before.commit(BlockId(0, 1), {"rows": [4, 8]})

    known = {"part": "logits", "view": 0, "block": 1, "rows": [4, 8]}
    for seen in (before, log(tmp_path)):
        assert seen.has(BlockId(0, 1))
        assert not seen.has(BlockId(1, 0))
        assert not seen.is_complete(0)
        assert dict(seen.records) == {(0, 1): known}


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
    contents = {file.name: file.read_bytes() for file in sorted(view.iterdir())}
    log(tmp_path).compact(0)

    for left in (3, 2, 1, 0):  # the folder is removed file by file
        shutil.rmtree(view, ignore_errors=True)
        view.mkdir()
        for name in [*contents][:left]:
            (view / name).write_bytes(contents[name])
        assert dict(log(tmp_path).records) == before

    log(tmp_path).compact(0)
    assert dict(log(tmp_path).records) == before


def test_foreign_files_are_ignored(tmp_path: Path) -> None:
    commit(tmp_path, (0, 0))
    folder = tmp_path / "commits" / "logits"
    (folder / "v00000" / "deeper").mkdir()
    (folder / "v00001").mkdir()  # what a killed writer leaves
    for name in (
        *(".DS_Store", "README.json", "v00000.json.bak", "v00000/b00001.json~", "v0.json"),
        *("v00000/.b00001.json.swp", "v00000/b00001.0123abcd.partial", "w00000.json"),
        *("v00000/deeper/b00002.json", "v000000.json"),
    ):
        (folder / name).write_bytes(WHOLE)

    ours = log(tmp_path)
    assert set(ours.records) == {(0, 0)}
    assert ours.views == [0]
    assert not ours.is_complete(0)
    assert readable(ours) == ({(0, 0)}, [])


UNREADABLE = {
    "empty": b"",
    "null": b"null",
    "bytes": b"\xff\xfe\x00",
    "not-sealed": b'{"view": 0, "block": 0}',
    "cut-off": WHOLE[:-1],
    "longer": WHOLE + b"\n",
    "indented": b" " + WHOLE,
    "another-view": WHOLE.replace(b'"view":0', b'"view":1'),
    "another-digest": b'{"digest":"%064d","records":[]}' % 0,
    "list-of-numbers": sealed(b"[7]"),
    "text": sealed(b'["record"]'),
    "list-of-nulls": sealed(b"[null]"),
    "no-block": sealed(b'[{"view": 0}]'),
    "no-number": sealed(b'[{"view": "first", "block": 0}]'),
    "no-json": sealed(b"[}]"),
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("name", ["v00000.json", "v00000/b00000.json"])
def test_an_unreadable_record_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / "commits" / "logits" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(CacheError, match=f"commits/logits/{name}"):
        _ = log(tmp_path).records


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
    key = "commits/logits/v00001/b00000.json"
    (tmp_path / key).write_bytes(b"{")
    ours = log(tmp_path)
    assert readable(ours) == ({(0, 0)}, [key])
    ours.discard(key)
    assert not (tmp_path / key).exists()
    assert set(ours.records) == set(log(tmp_path).records) == {(0, 0)}


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
    commit(tmp_path, (0, 0), (0, 1), (0, 2))
    expected = dict(log(tmp_path).records)
    folder = tmp_path / "commits" / "logits" / "v00000"
    shutil.copytree(folder, tmp_path / "aside")
    log(tmp_path).compact(0)
    shutil.copytree(tmp_path / "aside", folder)  # compaction writes the one file first

    def compacted_now(store: Any, key: str) -> bytes | None:
        if "/b" in key:
            shutil.rmtree(folder, ignore_errors=True)
        return read_object(store, key)

    for reader in (commits, records):
        monkeypatch.setattr(reader, "read_object", compacted_now)

    assert dict(log(tmp_path).records) == expected


@pytest.mark.parametrize("content", [None, bytes(9), bytes(11)], ids=["gone", "cut-off", "longer"])
def test_objects_of_another_size_are_noticed(tmp_path: Path, content: bytes | None) -> None:
    for block in range(BLOCKS):
        key = f"a/c/0/{block}"
        write_object(LocalStore(tmp_path), key, bytes(10))
        log(tmp_path).commit(BlockId(0, block), {"objects": {key: described(bytes(10))}})
    log(tmp_path).check_all_objects()

    with harmed(tmp_path / "a/c/0/1", content):
        with pytest.raises(CacheError, match="a/c/0/1"):
            log(tmp_path).check_all_objects([0])
        log(tmp_path).check_all_objects([1])


def test_forgotten_records_are_gone_and_those_of_other_parts_stay(tmp_path: Path) -> None:
    commit(tmp_path, (0, 0), (1, 0))
    log(tmp_path, "rectified/a").commit(BlockId(0, 0), {})
    log(tmp_path, "rectified/ab").commit(BlockId(0, 1), {})
    cleared = log(tmp_path, "rectified/a")

    cleared.clear()
    cleared.clear()  # nothing is there: nothing happens

    assert cleared.records == log(tmp_path, "rectified/a").records == {}
    assert set(log(tmp_path, "rectified/ab").records) == {(0, 1)}
    assert set(log(tmp_path).records) == {(0, 0), (1, 0)}


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
    whole_views(tmp_path, 5)
    commit(tmp_path, (7, 1))
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
    whole_views(tmp_path, 3)
    (tmp_path / "commits/logits/v00001.json").write_bytes(b"{")
    ours = log(tmp_path)
    assert ours.extent([2]).bytes == 20 + 21 + 22
    assert len(list(ours.each_view([0, 2]))) == 2
    for touch in (ours.of_view, lambda view: list(ours.each_view([0, view]))):
        with pytest.raises(CacheError, match=r"logits/v00001\.json is not readable"):
            touch(1)


def test_records_of_another_view_are_not_taken_for_this_one(tmp_path: Path) -> None:
    whole_views(tmp_path, 2)
    folder = tmp_path / "commits" / "logits"
    shutil.copy(folder / "v00000.json", folder / "v00001.json")
    with pytest.raises(CacheError, match=r"logits/v00001\.json is not readable"):
        log(tmp_path).of_view(1)
    records, damaged = readable(log(tmp_path))
    assert records == {(0, 0), (0, 1), (0, 2)}
    assert damaged == ["commits/logits/v00001.json"]


def test_records_of_more_views_than_are_kept_in_memory(tmp_path: Path) -> None:
    views = range(2 * commits._VIEWS_KEPT + 1)
    expected = {
        view: {b: {"part": "logits", "view": view, "block": b} for b in range(BLOCKS)}
        for view in views
    }
    for view, blocks in expected.items():
        key = f"commits/logits/v{view:05d}.json"
        write_object(LocalStore(tmp_path), key, seal_records([*blocks.values()]))
    ours = log(tmp_path)

    assert dict(ours.each_view()) == expected
    for _ in range(2):
        assert {view: ours.of_view(view) for view in views} == expected
    assert len(ours._known) <= commits._VIEWS_KEPT
    assert [view for view, _ in ours.each_view([7, 0, 9])] == [7, 0, 9]
