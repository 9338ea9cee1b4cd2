"""`pipeline verify`: what it answers, and with which exit code."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import flip, tree
from helpers import Answer, answer_to, cache_of
from PIL import Image

from stages.data import Splits
from stages.rectify import rectify
from stages.settings import DataSettings, RectifyConfig

Pipeline = Callable[..., Answer]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, teacher_run: Path, digits: Splits) -> Path:
    """A folder with 60 images, a teacher and a cache of two views, all by relative paths."""
    home = tmp_path_factory.mktemp("verify")
    shutil.copytree(teacher_run, home / "teacher")
    images = digits.train.images
    assert images is not None
    for number, label in enumerate(digits.train.labels[:60].tolist()):
        for split in ("train", "test"):
            file = home / f"data/{split}/{label}/{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number, 0].numpy()).save(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        data = DataSettings(dataset="folder:data", workers=0)
        cache_of("teacher", "cache.zarr", data=data, block_rows=30)
        rectify("cache.zarr", RectifyConfig())
    return home


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The same, of one's own."""
    return Path(shutil.copytree(made, tmp_path / "mine"))


@pytest.fixture
def pipeline(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Pipeline:
    """Runs `pipeline` with these words in that folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda words: answer_to(words.split(), monkeypatch, capsys)


def test_a_cache_in_order_ends_with_0(pipeline: Pipeline) -> None:
    answer = pipeline("verify cache.zarr")
    assert (answer.code, answer.err) == (0, "")
    assert "8 blocks" in answer.text
    assert "no faults found" in answer.text


def test_faults_end_with_1_and_name_the_block(pipeline: Pipeline, folder: Path) -> None:
    flip(folder / "cache.zarr/logits/c/1/0/0")
    before = tree(folder / "cache.zarr")

    answer = pipeline("verify cache.zarr")

    assert answer.code == 1
    assert "1 fault where" in answer.text
    assert "logits, view 1, block 0" in answer.text
    assert "logits/c/1/0/0 has another sha256" in answer.text
    assert "no faults found" not in answer.text
    assert "Traceback" not in answer.text
    assert tree(folder / "cache.zarr") == before


def test_repair_ends_with_0_and_every_byte_as_it_was(
    pipeline: Pipeline, folder: Path, made: Path
) -> None:
    flip(folder / "cache.zarr/logits/c/0/1/0")
    flip(folder / "cache.zarr/label/zarr.json")
    words = "--repair --live 10 --pixels --device cpu"
    answer = pipeline(f"verify cache.zarr {words}")
    assert answer.code == 0
    assert "label" in answer.text
    assert answer.out.rstrip().endswith("no faults found")
    assert tree(folder / "cache.zarr") == tree(made / "cache.zarr")


def test_repair_without_the_teacher_ends_with_2_and_says_what_to_give(
    pipeline: Pipeline, folder: Path, made: Path
) -> None:
    (folder / "teacher").rename(folder / "moved")
    repair = "verify cache.zarr --repair"
    assert pipeline(repair).code == 0  # not needed
    flip(folder / "cache.zarr/logits/c/0/1/0")

    answer = pipeline(repair)
    assert answer.code == 2
    assert "teacher" in answer.err
    assert "Traceback" not in answer.err

    assert pipeline(f"{repair} --weights moved --device cpu").code == 0
    assert tree(folder / "cache.zarr") == tree(made / "cache.zarr")


@pytest.mark.parametrize(
    "words",
    [
        *("nothing.zarr", "teacher", "ftp://host/c.zarr", "nothing.zarr --repair"),
        *("nothing.zarr --live 3", "cache.zarr --live 0"),
    ],
)
def test_where_there_is_no_cache_the_exit_code_is_2(pipeline: Pipeline, words: str) -> None:
    answer = pipeline(f"verify {words}")
    assert (answer.code, answer.out) == (2, "")
    assert 1 <= len(answer.err.strip().splitlines()) <= 3
    assert "Traceback" not in answer.err


@pytest.fixture
def elsewhere(folder: Path) -> Path:
    """The cache alone lies in the current folder of the command: what it was made from is moved."""
    for name in ("data", "teacher"):
        (folder / "new").mkdir(exist_ok=True)
        (folder / name).rename(folder / "new" / name)
    return folder


@pytest.mark.parametrize("options", ["--live 5", "--repair"])
def test_from_another_folder_the_options_that_help_are_named(
    pipeline: Pipeline, elsewhere: Path, options: str
) -> None:
    flip(elsewhere / "cache.zarr/label/zarr.json") if options == "--repair" else None
    words = f"verify cache.zarr {options} --device cpu"
    for given, place, option in (
        ("", str(elsewhere / "teacher"), "--weights"),
        (" --weights new/teacher", str(elsewhere / "data"), "--dataset folder:DIR"),
    ):
        answer = pipeline(words + given)

        assert answer.code == 2
        assert len(answer.err.strip().splitlines()) <= 3
        assert place in answer.err
        assert option in answer.err

    assert pipeline(words + " --weights new/teacher --dataset folder:new/data").code == 0
