"""The command line: what it answers to right and to wrong input, without starting what is wrong."""

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import Answer, Command, imported, outside, same_weights
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.cli import cli
from pipeline.options import GROUPS
from stages.cache import LogitCache
from stages.inputs.cifar_models import cifar_model
from stages.rectify import rectify
from stages.schema import settings_of
from stages.settings import CONFIGS, RectifyConfig

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
    for name in ("cache", "half"):
        shutil.copytree(finished_cache, folder / f"{name}.zarr")
    for name in ("rectified", "several"):
        shutil.copytree(rectified_cache, folder / f"{name}.zarr")
    rectify(folder / "several.zarr", RectifyConfig(method="swap"))
    LogitCache.open(folder / "half.zarr", writable=True).grow(5)

    weights = load_file(folder / "teacher" / "model.safetensors")
    save_file({"fc.weight": weights["fc.weight"]}, folder / "partial.safetensors")
    save_file(cifar_model("resnet8", 7, 1).state_dict(), folder / "seven.safetensors")
    torch.save(nn.Linear(1, 1), folder / "pickle.pt")
    (folder / "noise.safetensors").write_bytes(b"\x00\x01noise")
    (folder / "images" / "train" / "cat").mkdir(parents=True)
    (folder / "thesis").mkdir()
    for name, text in {
        "list.yaml": "- 1",
        "wrong.yaml": "train: {epoch: 3}",
        "thesis/chapter1.tex": "years of work",
        "my_broken_data.py": "def make(split):\n    return 1 / 0\n",
    }.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def my_pipeline(my_folder: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> Command:
    """`pipeline` in the working directory."""
    monkeypatch.chdir(my_folder)
    monkeypatch.setattr("stages.teacher.measure.MEASURED_SECONDS", 0.0)
    return command


def everything_in(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {
        str(path.relative_to(folder)): b"" if path.is_dir() else path.read_bytes() for path in paths
    }


WRONG = {
    # what is learned from: words, and the name that the error says
    "dataset-unknown": (f"{TEACH} --dataset cifar11", "cifar11"),
    "dataset-none": ("train-teacher --model resnet8 --out new", "data.dataset"),
    "dataset-raises": (f"{TEACH} --dataset my_broken_data:make", "my_broken_data.py:2"),
    "folder-missing": (f"{TEACH} --dataset folder:nowhere", "nowhere"),
    "folder-empty-class": (f"{TEACH} --dataset folder:images", "images"),
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
    "augment-value": (f"{TEACH} --augment pad-crop:pad=-1", "pad"),
    # caches
    "cache-of-another": (f"{CACHE} --seed 1 --out cache.zarr", "views.seed"),
    "cache-over-a-folder": (f"{CACHE} --out thesis", "thesis"),
    "cache-in-a-cache": (f"{CACHE} --out cache.zarr/new", "cache.zarr"),
    "plan-below-a-file": (f"{CACHE} --out list.yaml/c.zarr --dry-run", "list.yaml"),
    "cache-encoding": (f"{CACHE} --encoding zip", "zip"),
    "cache-check": (f"{CACHE} --check some", "some"),
    "inspect-missing": ("inspect gone.zarr", "gone.zarr"),
    "rectify-missing": ("rectify gone.zarr", "gone.zarr"),
    "rectify-incomplete": ("rectify half.zarr", "--views 3"),
    "rectify-method": (f"{RECTIFY} --method avarage", "pairwise, swap, blend"),
    "rectify-space": (f"{RECTIFY} --space logit --method blend", "--method pairwise"),
    "rectify-name-upwards": (f"{RECTIFY} --name ../x", "../x"),
    # the objective
    "bias-unknown": (f"{STUDY} --bias fix", "bias.mode"),
    "bias-with-ce": (f"{STUDY} --bias rectify --loss ce", "'ce'"),
    "until-nothing-held-out": (f"{STUDY} --until beats-teacher", "--val-fraction"),
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
    "one-to-train-on": (f"{TEACH} --val-fraction 0.999", "leaves 1 for training"),
    "device-unknown": (f"{TEACH} --device gpu", "gpu"),
    "device-not-there": (f"{STUDY} --device cuda:99", "cuda:99"),
    "mean-a-word": (f"{TEACH} --mean grey --std 1", "--mean"),
    "mean-alone": (f"{TEACH} --mean 0.5", "std"),
    "std-0": (f"{TEACH} --mean 0.5 --std 0", "std"),
    # configuration
    "config-unknown-key": (f"{TEACH} --config wrong.yaml", "'train.epochs'"),
    "config-of-another-kind": (f"{STUDY} --config teacher/config.yaml", "augment"),
    "config-of-no-command": ("config inspect", "train-student"),
    # where it goes
    "out-none": (TEACH.removesuffix(" --out new"), "--out"),
    "out-occupied": (f"{TEACH} --out teacher", "--overwrite"),
    "out-not-a-run": (f"{TEACH} --out thesis --overwrite", "thesis"),
    "out-a-file": (f"{TEACH} --out list.yaml", "list.yaml"),
    "resume-with-others": (f"{TEACH} --out teacher --resume --lr 0.3", "train.lr"),
    # commands
    "option-unknown": (f"{TEACH} --epoch 3", "--epoch"),
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
    my_pipeline: Command, my_folder: Path, words: str, name: str
) -> None:
    before = everything_in(my_folder)
    check_told(my_pipeline(words), name)
    assert everything_in(my_folder) == before


def test_an_unexpected_failure_keeps_its_traceback(
    my_pipeline: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.train_teacher.train_teacher", lambda *_, **__: 1 / 0)
    answer = my_pipeline(TEACH)
    assert answer.code == 1
    assert "ZeroDivisionError" in answer.err


def test_all_stages_from_the_command_line(my_pipeline: Command, tmp_path: Path) -> None:
    def said(words: str) -> str:
        answer = my_pipeline(words)
        assert answer.code == 0, answer.err
        assert all(c == "\n" or c.isprintable() for c in answer.out)
        return answer.out

    run, cache, again = (tmp_path / name for name in ("student", "own.zarr", "again"))
    said(f"{CACHE} --out {cache}")
    assert "wrong rows" in said(f"rectify {cache} --method swap")
    trained = said(
        f"train-student {cache} --dataset digits --student resnet8 --epochs 1 --batch-size 500 "
        f"--bias rectify --seed 3 --out {run}"
    )
    assert "rectified: swap-T4" in trained  # the resolved configuration is printed
    assert "test top-1" in trained
    said(f"train-student {cache} --config {run}/config.yaml --out {again}")
    assert same_weights(run, again)
    shown = said(f"inspect {cache}")
    for words in ("resnet8", "digits", "2 of 2 views, 2 of 2 blocks", "swap-T4"):
        assert words in shown


def test_a_dry_run_writes_nothing(my_pipeline: Command, my_folder: Path) -> None:
    before = everything_in(my_folder)
    answer = my_pipeline(f"{CACHE} --dry-run")
    assert answer.code == 0
    for words in ("1,000 x 2", "on disk", "files", "hours"):
        assert words in answer.out
    assert everything_in(my_folder) == before


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


def test_help_imports_nothing_heavy() -> None:
    done = outside("-X", "importtime", "-m", "pipeline", "train-student", "--help")
    assert "--student" in done.stdout
    heavy = {"torch", "torchvision", "zarr", "dask", "distributed", "numpy", "yaml", "click"}
    assert imported(done.stderr) & heavy == {"click"}


def test_as_a_process_of_its_own(tmp_path: Path) -> None:
    done = outside("-m", "pipeline", *f"{TEACH} --config gone.yaml".split(), folder=tmp_path)
    check_told(Answer(done.returncode, done.stdout, done.stderr), "gone.yaml")
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())
