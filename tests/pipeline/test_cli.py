"""The command line: what it answers to right and to wrong input, without starting what is wrong."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import Answer, answer_to
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.cli import cli
from pipeline.options import GROUPS
from stages.cache import LogitCache
from stages.inputs.cifar_models import cifar_model
from stages.rectify import rectify
from stages.schema import settings_of
from stages.settings import (
    CONFIGS,
    RectifyConfig,
)

ROOT = Path(__file__).parents[2]
VIEWS = "pad-crop:pad=2"
POLICY = f"--augment {VIEWS}"

TEACH = f"train-teacher --dataset digits --model resnet8 {POLICY} --epochs 1 --out new"
CACHE = f"cache-teacher --dataset digits --weights teacher --views 2 {POLICY} --out new"
STUDY = "train-student cache.zarr --dataset digits --student resnet8 --epochs 1 --out new"
CORRECTED = STUDY.replace("cache.zarr", "rectified.zarr")
RECTIFY = "rectify cache.zarr"


@pytest.fixture(scope="module")
def my_folder(
    tmp_path_factory: pytest.TempPathFactory,
    teacher_run: Path,
    finished_cache: Path,
    rectified_cache: Path,
) -> Path:
    """A working directory with a teacher, a cache of three of its views, and things gone wrong."""
    folder = tmp_path_factory.mktemp("cli")
    shutil.copytree(teacher_run, folder / "teacher")
    shutil.copytree(finished_cache, folder / "cache.zarr")
    shutil.copytree(rectified_cache, folder / "rectified.zarr")
    shutil.copytree(folder / "rectified.zarr", folder / "several.zarr")
    rectify(folder / "several.zarr", RectifyConfig(method="swap"))
    shutil.copytree(folder / "cache.zarr", folder / "half.zarr")
    LogitCache.open(folder / "half.zarr", writable=True).grow(5)

    weights = load_file(folder / "teacher" / "model.safetensors")
    save_file({"fc.weight": weights["fc.weight"]}, folder / "partial.safetensors")
    save_file(cifar_model("resnet8", 7, 1).state_dict(), folder / "seven.safetensors")
    torch.save(nn.Linear(1, 1), folder / "pickle.pt")
    (folder / "noise.safetensors").write_bytes(b"\x00\x01noise")
    (folder / "list.yaml").write_text("- 1")
    (folder / "wrong.yaml").write_text("train: {epoch: 3}")
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter1.tex").write_text("years of work")
    (folder / "images" / "train" / "cat").mkdir(parents=True)
    (folder / "my_broken_data.py").write_text("def make(split):\n    return 1 / 0\n")
    return folder


@pytest.fixture
def my_pipeline(
    my_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """Runs `pipeline` with these words, in this process, in the working directory."""
    monkeypatch.chdir(my_folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("stages.teacher.measure.MEASURED_SECONDS", 0.0)

    return lambda words: answer_to(words.split(), monkeypatch, capsys)


def everything_in(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {
        str(path.relative_to(folder)): b"" if path.is_dir() else path.read_bytes() for path in paths
    }


# ---- wrong input ----------------------------------------------------------------------------

WRONG = {
    # what is learned from: words, and the name that the error says
    "dataset-unknown": (f"{TEACH} --dataset cifar11", "cifar11"),
    "dataset-none": ("train-teacher --model resnet8 --out new", "data.dataset"),
    "dataset-raises": (f"{TEACH} --dataset my_broken_data:make", "my_broken_data.py:2"),
    "folder-missing": (f"{TEACH} --dataset folder:nowhere", "nowhere"),
    "folder-empty-class": (f"{TEACH} --dataset folder:images", "images"),
    "dataset-not-there": (f"{TEACH} --dataset cifar10 --root empty", "cifar10"),
    "dataset-not-importable": (f"{TEACH} --dataset nowhere:make", "nowhere"),
    # models and weights
    "model-unknown": (f"{TEACH} --model resnet8x", "resnet8x"),
    "model-none": ("train-teacher --dataset digits --out new", "--model"),
    "model-not-importable": (f"{TEACH} --model nowhere:net", "nowhere:net"),
    "student-unknown": (f"{STUDY} --student wrn_17_2", "wrn_17_2"),
    "weights-missing": (f"{CACHE} --weights gone.pt --teacher resnet8", "gone.pt"),
    "weights-pickled": (f"{CACHE} --weights pickle.pt --teacher resnet8", "pickle.pt"),
    "weights-noise": (f"{CACHE} --weights noise.safetensors --teacher resnet8", "noise"),
    "weights-partial": (f"{CACHE} --weights partial.safetensors --teacher resnet8", "partial"),
    "weights-other-classes": (
        f"{CACHE} --weights seven.safetensors --teacher resnet8",
        "7 classes",
    ),
    "weights-without-name": (f"{CACHE} --weights seven.safetensors", "which model"),
    "weights-not-a-run": (f"{CACHE} --weights thesis", "thesis"),
    "weights-other-model": (f"{CACHE} --teacher resnet20", "resnet20"),
    "weights-none": (f"cache-teacher --dataset digits --views 1 {POLICY} --out new", "weights"),
    "init-missing": (f"{TEACH} --init gone.pt", "gone.pt"),
    # views
    "views-0": (f"{CACHE} --views 0", "views"),
    "views-too-many": (f"{CACHE} --views 26", "--views 25"),
    "views-none": (f"cache-teacher --dataset digits --weights teacher {POLICY} --out new", "views"),
    "views-a-word": (f"{CACHE} --views many", "--views"),
    "augment-unknown": (f"{TEACH} --augment pad-corp", "pad-crop"),
    "augment-parameter": (f"{TEACH} --augment pad-crop:pud=2", "pud=2"),
    "augment-value": (f"{TEACH} --augment pad-crop:pad=-1", "pad"),
    "student-views-0": (f"{STUDY} --views 0", "0 views"),
    "student-views-too-many": (f"{STUDY} --views 4", "4 views"),
    # caches
    "also-missing": (f"{STUDY} --also gone.zarr", "gone.zarr"),
    "slab-memory": (f"{STUDY} --slab-memory 1kB", "1kB is too small"),
    "cache-missing": (STUDY.replace("cache.zarr", "gone.zarr"), "gone.zarr"),
    "cache-is-a-folder": (STUDY.replace("cache.zarr", "thesis"), "thesis"),
    "cache-incomplete": (STUDY.replace("cache.zarr", "half.zarr"), "--views 3"),
    "cache-of-another": (f"{CACHE} --seed 1 --out cache.zarr", "views.seed"),
    "cache-over-a-folder": (f"{CACHE} --out thesis", "thesis"),
    "cache-in-a-cache": (f"{CACHE} --out cache.zarr/new", "cache.zarr"),
    "plan-below-a-file": (f"{CACHE} --out list.yaml/c.zarr --dry-run", "list.yaml"),
    "cache-encoding": (f"{CACHE} --encoding zip", "zip"),
    "cache-check": (f"{CACHE} --check some", "some"),
    "inspect-missing": ("inspect gone.zarr", "gone.zarr"),
    "inspect-a-folder": ("inspect thesis", "thesis"),
    "rectify-missing": ("rectify gone.zarr", "gone.zarr"),
    "rectify-incomplete": ("rectify half.zarr", "--views 3"),
    "rectify-method": (f"{RECTIFY} --method avarage", "pairwise, swap, blend"),
    "rectify-space": (f"{RECTIFY} --space logit --method blend", "--method pairwise"),
    "rectify-views": (f"{RECTIFY} --views 4", "3 views"),
    "rectify-name-upwards": (f"{RECTIFY} --name ../x", "../x"),
    # the objective
    "loss-unknown": (f"{STUDY} --loss kl", "kl"),
    "bias-unknown": (f"{STUDY} --bias fix", "bias.mode"),
    "bias-with-ce": (f"{STUDY} --bias rectify --loss ce", "'ce'"),
    "until-nothing-held-out": (f"{STUDY} --until beats-teacher", "--val-fraction"),
    "until-later": (f"{STUDY} --until later", "'later'"),
    "rectification-missing": (f"{STUDY} --bias rectify", "pipeline rectify"),
    "rectification-unknown": (f"{CORRECTED} --bias rectify --rectified swap-T4", "pairwise-T4"),
    "rectification-of-several": (
        f"{STUDY.replace('cache.zarr', 'several.zarr')} --bias rectify",
        "--rectified",
    ),
    "rectification-unused": (f"{CORRECTED} --rectified pairwise-T4", "--bias rectify"),
    "correction-with-ce": (f"{STUDY} --bias correct --loss ce", "kd"),
    "a-bound-for-nothing": (f"{STUDY} --bias eliminate --set bias.alpha=0.1", "bias.alpha"),
    "eliminate-with-ce": (f"{STUDY} --bias eliminate --loss ce", "'eliminate'"),
    "rectification-temperature": (f"{CORRECTED} --bias rectify --temperature 2", "temperature 4"),
    # training
    "nesterov-alone": (f"{TEACH} --set train.nesterov=1 --set train.momentum=0", "train.momentum"),
    "nothing-left-to-train-on": (f"{TEACH} --val-fraction 0.9995", "data.val_fraction"),
    "one-to-train-on": (f"{TEACH} --val-fraction 0.999", "leaves 1 for training"),
    "nothing-held-out": (f"{TEACH} --val-fraction 0.0004", "data.val_fraction"),
    "lr-a-word": (f"{TEACH} --lr fast", "--lr"),
    "schedule-unknown": (f"{TEACH} --set train.schedule=step", "cosine"),
    "dtype-unknown": (f"{TEACH} --dtype float8", "bfloat16"),
    "device-unknown": (f"{TEACH} --device gpu", "gpu"),
    "device-not-there": (f"{STUDY} --device cuda:99", "cuda:99"),
    "mean-a-word": (f"{TEACH} --mean grey --std 1", "--mean"),
    "mean-alone": (f"{TEACH} --mean 0.5", "std"),
    "mean-too-long": (f"{TEACH} --mean 1,2,3,4 --std 1,1,1,1", "mean"),
    "mean-inf": (f"{TEACH} --mean=-inf --std 1", "mean must be finite"),
    "std-inf": (f"{TEACH} --mean 0 --std inf", "std must be finite"),
    "teacher-std-nan": (f"{CACHE} --mean 0 --std nan", "std"),
    "std-0": (f"{TEACH} --mean 0.5 --std 0", "std"),
    # configuration
    "config-missing": (f"{TEACH} --config gone.yaml", "gone.yaml"),
    "config-unknown-key": (f"{TEACH} --config wrong.yaml", "'train.epochs'"),
    "config-of-another-kind": (f"{STUDY} --config teacher/config.yaml", "augment"),
    "config-of-no-command": ("config inspect", "train-student"),
    # where it goes
    "out-none": (TEACH.removesuffix(" --out new"), "--out"),
    "out-occupied": (f"{TEACH} --out teacher", "--overwrite"),
    "out-not-a-run": (f"{TEACH} --out thesis --overwrite", "thesis"),
    "out-a-file": (f"{TEACH} --out list.yaml", "list.yaml"),
    "out-below-a-file": (f"{TEACH} --out list.yaml/run", "list.yaml/run"),
    "resume-with-others": (f"{TEACH} --out teacher --resume --lr 0.3", "train.lr"),
    "resume-and-overwrite": (f"{TEACH} --out teacher --resume --overwrite", "overwritten"),
    # commands
    "command-unknown": ("distil", "distil"),
    "option-unknown": (f"{TEACH} --epoch 3", "--epoch"),
    "argument-missing": ("inspect", "CACHE"),
}


def check_told(answer: Answer, name: str) -> None:
    """Exit code 2 and one clear error: cause and remedy in at most three lines, or click's."""
    assert answer.code == 2, answer.err
    assert "Traceback" not in answer.err
    lines = answer.err.splitlines()
    errors = [line for line in lines if line.lower().startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith("Error:") or (lines[0] == errors[0] and len(lines) <= 3)
    assert name in answer.err


@pytest.mark.parametrize(("words", "name"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_clear_error_and_leaves_nothing(
    my_pipeline: Callable[..., Answer], my_folder: Path, words: str, name: str
) -> None:
    before = everything_in(my_folder)
    check_told(my_pipeline(words), name)
    assert everything_in(my_folder) == before


def test_an_unexpected_failure_keeps_its_traceback(
    my_pipeline: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.train_teacher.train_teacher", lambda *_, **__: 1 / 0)
    answer = my_pipeline(TEACH)
    assert answer.code == 1
    assert "ZeroDivisionError" in answer.err


# ---- right input ----------------------------------------------------------------------------


def test_all_stages_from_the_command_line(
    my_pipeline: Callable[..., Answer], my_folder: Path, tmp_path: Path
) -> None:
    run, cache = tmp_path / "student", tmp_path / "own.zarr"
    assert my_pipeline(f"{CACHE} --out {cache}").code == 0
    answer = my_pipeline(f"rectify {cache} --method swap")
    assert answer.code == 0
    assert "wrong rows" in answer.out
    answer = my_pipeline(
        f"train-student {cache} --dataset digits --student resnet8 --epochs 1 --batch-size 500 "
        f"--bias rectify --seed 3 --out {run}"
    )
    assert answer.code == 0
    assert "rectified: swap-T4" in answer.out  # the resolved configuration is printed
    assert "test top-1" in answer.out
    assert all(c == "\n" or c.isprintable() for c in answer.out)

    again = my_pipeline(
        f"train-student {cache} --config {run}/config.yaml --out {tmp_path / 'again'}"
    )
    assert again.code == 0
    one, other = (load_file(r / "model.safetensors") for r in (run, tmp_path / "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)

    answer = my_pipeline(f"inspect {cache}")
    assert answer.code == 0
    for words in ("resnet8", "digits", "2 of 2 views, 2 of 2 blocks", "swap-T4"):
        assert words in answer.out


def test_a_dry_run_writes_nothing(my_pipeline: Callable[..., Answer], my_folder: Path) -> None:
    before = everything_in(my_folder)
    answer = my_pipeline(f"{CACHE} --dry-run")
    assert answer.code == 0
    for words in ("1,000 x 2", "on disk", "files", "hours"):
        assert words in answer.out
    assert everything_in(my_folder) == before


# ---- help -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [*cli.commands])
def test_help_says_what_is_required_and_what_is_left_out(command: str) -> None:
    answer = CliRunner().invoke(cli, [command, "-h"], terminal_width=100)
    assert answer.exit_code == 0
    lines = answer.output.splitlines()
    assert all(len(line) <= 100 for line in lines)
    said = " ".join(answer.output.split())
    for kind in [CONFIGS[command]] if command in CONFIGS else []:
        for setting in settings_of(kind).values():
            assert setting.flag is None or setting.flag.partition("/")[0] in said
            if setting.flag and setting.kind in (int, float) and setting.default is not None:
                assert setting.required or f"[default: {setting.default}]" in said
        titles = [line.partition(" options:")[0].lower() for line in lines if "options:" in line]
        assert titles == [group for group in GROUPS if group in titles]


def test_help_of_everything() -> None:
    answers = [CliRunner().invoke(cli, [flag]).output for flag in ("--help", "-h")]
    assert answers[0] == answers[1]
    assert all(name in answers[0] for name in cli.commands)
    assert CliRunner().invoke(cli, ["--version"]).output.strip()[-1].isdigit()


def outside(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """python with these words, as a process of its own."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_imports_nothing_heavy() -> None:
    done = outside("-X", "importtime", "-m", "pipeline", "train-student", "--help")
    assert "--student" in done.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"torch", "torchvision", "zarr", "dask", "distributed", "numpy", "yaml"}


def test_as_a_process_of_its_own(tmp_path: Path) -> None:
    done = outside("-m", "pipeline", *f"{TEACH} --config gone.yaml".split(), folder=tmp_path)
    check_told(Answer(done.returncode, done.stdout, done.stderr), "gone.yaml")
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())
