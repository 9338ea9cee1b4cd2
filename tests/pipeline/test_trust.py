"""Code that a stranger's cache or run names is run only if the user names its module too."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import DIGITS, Command, cache_of, teacher_of

from pipeline.sweep.worker import Place, settle
from stages.data import Splits
from stages.inputs.views import transforms
from stages.train_teacher import train_teacher
from stages.user_code import trusting

STRANGER = """
from pathlib import Path
from torch import nn
from torchvision.transforms import v2

(Path(__file__).parent / "it-ran").touch()

def net(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, num_classes))

def make():
    return v2.RandomHorizontalFlip()
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, teacher_run: Path, digits: Splits) -> Path:
    """A folder with a run whose model and a cache whose views are code of their own."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "stranger.py").write_text(STRANGER)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        config = teacher_of(model__architecture="stranger:net", augment="none", train__epochs=1)
        train_teacher(config, folder / "run", splits=digits)
        cache_of(teacher_run, folder / "c.zarr", digits, views=1, augment="v2:stranger:make")
    base = {"cache": "c.zarr", "data.dataset": "digits", "model.architecture": "resnet8"}
    sweep = {"base": base | {"train.epochs": 1}, "runs": [{"loss.name": "kd"}]}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    (folder / "it-ran").unlink()
    return folder


@pytest.fixture
def here(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in, where nothing of theirs has been imported yet."""
    folder = Path(shutil.copytree(theirs, tmp_path / "here"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    monkeypatch.setattr("stages.teacher.measure.MEASURED_SECONDS", 0.0)
    transforms._made.cache_clear()
    return folder


STUDENT = "train-student c.zarr --dataset digits --student resnet8 --epochs 1 --device cpu --out s"
TEACHER = "cache-teacher --dataset digits --weights run --augment none --views 1 --device cpu"


@pytest.mark.parametrize(
    "words",
    [
        "evaluate run --device cpu",
        f"{TEACHER} --out new.zarr",
        STUDENT,
        "sweep sweep.yaml --dry-run",
        "verify c.zarr --live 3 --device cpu",
    ],
)
def test_a_strangers_code_is_not_run(command: Command, here: Path, words: str) -> None:
    answer = command(words)
    assert answer.code == 2
    assert len(answer.err.splitlines()) <= 3
    assert "--trust stranger" in answer.err
    assert not (here / "it-ran").exists()


@pytest.mark.slow
def test_a_report_goes_on_without_it(command: Command, here: Path) -> None:
    assert command("report c.zarr run").code == 0
    assert not (here / "it-ran").exists()


@pytest.mark.parametrize(
    "words",
    [
        f"{TEACHER} --teacher stranger:net --out new.zarr --dry-run",
        "evaluate run --device cpu --trust stranger",
    ],
)
def test_code_that_the_user_names_is_run(command: Command, here: Path, words: str) -> None:
    assert command(words).code == 0
    assert (here / "it-ran").exists()


SHADOWS = ("json", "torch", "click", "yaml", "pickle", "socket", "selectors", "tempfile")


def beside_shadows(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """python with these words in a folder with modules named as libraries are, which say so."""
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"print('{name} beside the data was run')\n")
    (folder / "mine.py").touch()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_libraries_come_before_the_current_folder(tmp_path: Path) -> None:
    answer = beside_shadows(tmp_path, "-m", "pipeline", "config", "train-student")
    assert answer.returncode == 0, answer.stderr
    assert "beside the data" not in answer.stdout + answer.stderr
    assert "architecture:" in answer.stdout


def test_so_they_do_for_processes_that_are_spawned(tmp_path: Path) -> None:
    program = (
        "from pipeline.import_path import current_folder_last\n"
        "current_folder_last()\n"
        "import multiprocessing, json, yaml, mine\n"
        "p = multiprocessing.get_context('spawn').Process(target=print, args=('spawned',))\n"
        "p.start(); p.join(); print(p.exitcode)\n"
    )
    assert beside_shadows(tmp_path, "-c", program).stdout.split() == ["spawned", "0"]


def test_and_for_workers_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    settle(Place(str(tmp_path)))
    assert sys.path[-1] == str(tmp_path)


def test_a_library_call_trusts_within_a_block(here: Path) -> None:
    from stages import CachedDataset
    from stages.errors import ConfigError

    with pytest.raises(ConfigError, match="--trust stranger"):
        CachedDataset("c.zarr", DIGITS)
    sys.path.append(str(here))
    with trusting("stranger"):
        assert len(CachedDataset("c.zarr", DIGITS))
