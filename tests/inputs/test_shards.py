"""Which tar files a pattern stands for, and which of them are a split."""

import subprocess
from pathlib import Path

import pytest

from stages.errors import DatasetError
from stages.inputs.datasets import Source, Split
from stages.inputs.datasets.shards import common_folder, expanded, fixed_folder, shards_of


@pytest.mark.parametrize(
    "pattern", ["a-{08..11}.tar", "a-{3..1}.tar", "{x,y}/a-{0..1}-{b,c,}.tar", "a-{0..00}.tar"]
)
def test_braces_are_those_of_bash(pattern: str) -> None:
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True
    )
    assert expanded(pattern) == shown.stdout.splitlines()


def test_patterns_may_be_joined() -> None:
    assert expanded("a{0..1}.tar::b.tar") == ["a0.tar", "a1.tar", "b.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a-{0..1.tar", "cannot be expanded"),
        ("a-{{0..1},b}.tar", "cannot be expanded"),
        ("a-{}.tar", "cannot be expanded"),
        ("{0..99999999999}", "more than 1,000,000"),
        ("{0..9999}{0..9999}", "more than 1,000,000"),
    ],
)
def test_patterns_that_are_none(pattern: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        expanded(pattern)


LAYOUTS = {
    "hf": ["i-train-0000.tar", "i-train-0001.tar", "i-validation-00.tar"],
    "folders": ["train/0.tar", "train/1.tar", "val/0.tar"],
    "test-before-val": ["test-0.tar", "train-0.tar", "val-0.tar"],
    "unnamed": ["0.tar", "1.tar"],
    "file-before-folder": ["train/val-0.tar", "train/x.tar"],
}


@pytest.mark.parametrize(
    ("layout", "pattern", "split", "test", "expected"),
    [
        ("hf", "", "train", None, [0, 1]),
        ("hf", "", "test", None, [2]),
        ("hf", "i-train-0001.tar", "test", "i-validation-{00..00}.tar", [2]),
        ("hf", "*-train-*.tar", "test", "wds:*-val*.tar", [2]),
        ("folders", "", "train", None, [0, 1]),
        ("folders", "", "test", None, [2]),
        ("folders", "train/*.tar", "train", None, [0, 1]),
        ("folders", "", "train", "0.5", [0, 1]),
        ("test-before-val", "", "test", None, [0]),
        ("test-before-val", "", "train", None, [1]),
        ("test-before-val", "val-0.tar", "train", "none", [2]),
        ("unnamed", "", "train", None, [0, 1]),
        ("unnamed", "?.tar", "train", "none", [0, 1]),
        ("file-before-folder", "", "train", None, [1]),
        ("file-before-folder", "", "test", None, [0]),
    ],
)
def test_splits(
    tmp_path: Path, layout: str, pattern: str, split: Split, test: str | None, expected: list[int]
) -> None:
    for name in LAYOUTS[layout]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if test and test.endswith(".tar"):
        name = test.removeprefix("wds:")
        test = test.replace(name, f"{tmp_path}/{name}")
    found = shards_of(Source(f"wds:{tmp_path / pattern}", split, test=test))
    assert found == [tmp_path / LAYOUTS[layout][i] for i in expected]


@pytest.mark.parametrize(
    ("pattern", "split", "message"),
    [
        ("t-train-{0..2}.tar", "train", r"no shard .*t-train-2\.tar\n"),
        ("t-train-{0..7}.tar", "train", r"no shard .*t-train-2\.tar and 5 more of 8\n"),
        ("nothing-*.tar", "train", "no shard matches .*nothing-"),
        ("empty", "train", r"has no shards \*\.tar"),
        ("nowhere", "train", "no shard .*nowhere\n"),
        ("t-train-{0,0}.tar", "train", "t-train-0.tar twice"),
        ("t-train-*.tar", "test", r"2 shards, none of them called test or val\n.*--test"),
        ("t-val-0.tar", "train", r"1 shards, none of them called train\n"),
    ],
)
def test_shards_that_are_missing(tmp_path: Path, pattern: str, split: Split, message: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("t-train-0.tar", "t-train-1.tar", "t-val-0.tar"):
        (tmp_path / name).touch()
    with pytest.raises(DatasetError, match=message) as raised:
        shards_of(Source(f"wds:{tmp_path / pattern}", split))
    assert str(raised.value).count("\n") <= 2


def test_no_pattern_is_not_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t-train-0.tar").touch()
    monkeypatch.chdir(tmp_path)
    assert shards_of(Source("wds:.", "train")) == [Path("t-train-0.tar")]
    with pytest.raises(DatasetError, match="no pattern"):
        shards_of(Source("wds:", "train"))


def test_folders_of_patterns() -> None:
    assert common_folder([Path("/a/b/0.tar"), Path("/a/c/0.tar")]) == Path("/a")
    assert common_folder([Path("b/0.tar")]) == Path("b")
    places = ["/a/b-{0..1}.tar", "/a/{b,c}/0.tar", "x-*.tar", "/a/b.tar", "/a/b", "/a/b.tar::c.tar"]
    assert [fixed_folder(p) for p in places] == ["/a", "/a", ".", "/a/b.tar", "/a/b", "/a"]
