"""Going on with a run: what may have moved, what must be the same, what a damaged run says."""

import contextlib
import dataclasses
import errno
import io
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from helpers import AtBatch, Words, first, metrics, same_weights, student_of

from pipeline.cli import main
from stages.cache_teacher import CacheJob, cache_teacher
from stages.data import Splits
from stages.errors import ConfigError, RunError
from stages.inputs.run_files import read_config, sha256
from stages.rectify import rectify
from stages.settings import BiasSettings, ModelSettings, RectifyConfig, StudentConfig, TrainSettings
from stages.train_student import student_trainer, train_student, train_together
from stages.training.run_directory import RunDirectory

TRAIN = TrainSettings(epochs=2, batch_size=150, schedule="constant", lr=0.05)


@pytest.fixture(scope="module")
def splits(digits: Splits) -> Splits:
    """Those of `small_cache`."""
    return Splits(first(digits.train, 300), first(digits.test, 100))


def config_of(cache: Path | str, **changes: Any) -> StudentConfig:
    return student_of(cache, **{"train": TRAIN, **changes})


def trained_for(epochs: int, **changes: Any) -> TrainSettings:
    return msgspec.structs.replace(TRAIN, epochs=epochs, **changes)


@pytest.fixture(scope="module")
def two_epochs(small_cache: Path, splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Read only."""
    run = tmp_path_factory.mktemp("two") / "run"
    train_student(config_of(small_cache), run, splits=splits)
    return run


@pytest.fixture(scope="module")
def three_epochs(
    small_cache: Path, splits: Splits, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run of one epoch more. Read only."""
    run = tmp_path_factory.mktemp("three") / "run"
    train_student(config_of(small_cache, train=trained_for(3)), run, splits=splits)
    return run


@pytest.fixture
def my_run(two_epochs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_epochs, tmp_path / "run"))


def contents(run: Path) -> dict[str, bytes]:
    """Every file but the log, which says when."""
    return {file.name: file.read_bytes() for file in run.iterdir() if file.name != "log.txt"}


# ---- more epochs ----------------------------------------------------------------------------


def test_a_finished_run_is_given_more_epochs(
    small_cache: Path, splits: Splits, my_run: Path, three_epochs: Path
) -> None:
    summary = train_student(
        config_of(small_cache, train=trained_for(3)), my_run, resume=True, splits=splits
    )
    assert summary["epochs"] == 3
    assert same_weights(my_run, three_epochs)
    assert read_config(my_run) == read_config(three_epochs)


def test_a_finished_run_says_so(small_cache: Path, splits: Splits, my_run: Path) -> None:
    words, before = Words(), contents(my_run)
    train_student(config_of(small_cache), my_run, resume=True, splits=splits, reporter=words)
    assert any("is finished already: 2 epochs" in line for line in words.lines)
    assert contents(my_run) == before


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"train": trained_for(2, schedule="cosine")},
            "the learning rate of train.schedule=cosine",
        ),
        (
            {"bias": BiasSettings(mode="rectify", as_published=True)},
            "the weights of bias.schedule=cosine",
        ),
    ],
)
def test_epochs_that_others_depend_on_cannot_be_changed(
    small_cache: Path, splits: Splits, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    config = config_of(small_cache, **changes)
    student_trainer([config], [RunDirectory(tmp_path / "run")], splits).learner.begin()
    more = msgspec.structs.replace(config.train, epochs=3)
    with pytest.raises(RunError, match=f"2 epochs and cannot have 3: {why}") as refused:
        student_trainer(
            [msgspec.structs.replace(config, train=more)],
            [RunDirectory(tmp_path / "run", resume=True)],
            splits,
        )
    assert "--epochs 2" in refused.value.remedy


def test_epochs_that_are_done_cannot_be_taken_back(
    small_cache: Path, splits: Splits, my_run: Path
) -> None:
    before = contents(my_run)
    with pytest.raises(RunError, match="has had 2 epochs already, not 1"):
        train_student(
            config_of(small_cache, train=trained_for(1)), my_run, resume=True, splits=splits
        )
    assert contents(my_run) == before


# ---- what has moved -------------------------------------------------------------------------


def test_a_run_goes_on_where_its_cache_has_moved_to(
    small_cache: Path, splits: Splits, my_run: Path, three_epochs: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_cache, tmp_path / "moved.zarr")
    with contextlib.chdir(tmp_path):
        config = config_of("./moved.zarr/", train=trained_for(3))
        train_student(config, my_run, resume=True, splits=splits)
    assert same_weights(my_run, three_epochs)
    assert read_config(my_run)["cache"] == "./moved.zarr/"


def test_weights_to_start_from_may_move(
    small_cache: Path, splits: Splits, two_epochs: Path, three_epochs: Path, tmp_path: Path
) -> None:
    def starting_from(weights: Path) -> StudentConfig:
        return config_of(
            small_cache, model=ModelSettings(architecture="helpers:plain", init=str(weights))
        )

    weights = tmp_path / "w.safetensors"
    shutil.copy(two_epochs / "model.safetensors", weights)
    student_trainer(
        [starting_from(two_epochs)], [RunDirectory(tmp_path / "run")], splits
    ).learner.begin()
    student_trainer([starting_from(weights)], [RunDirectory(tmp_path / "run", resume=True)], splits)
    with pytest.raises(RunError, match=r"other settings: other weights"):
        student_trainer(
            [starting_from(three_epochs)], [RunDirectory(tmp_path / "run", resume=True)], splits
        )


def test_another_cache_in_the_same_place_is_refused(
    small_job: CacheJob, splits: Splits, tmp_path: Path
) -> None:
    cache, run = tmp_path / "cache.zarr", tmp_path / "run"
    for encoding in ("float32", "float16"):
        shutil.rmtree(cache, ignore_errors=True)
        job = msgspec.structs.replace(small_job.config, encoding=encoding, views=1)
        cache_teacher(dataclasses.replace(small_job, config=job), cache)
        if encoding == "float32":
            student_trainer([config_of(cache)], [RunDirectory(run)], splits).learner.begin()
    with pytest.raises(RunError, match=r"other settings: other caches"):
        student_trainer([config_of(cache)], [RunDirectory(run, resume=True)], splits)


def test_another_rectification_of_the_same_name_is_refused(
    small_copy: Path, splits: Splits, tmp_path: Path
) -> None:
    config = config_of(small_copy, bias=BiasSettings(mode="rectify", schedule="constant"))
    student_trainer([config], [RunDirectory(tmp_path / "run")], splits).learner.begin()
    shutil.rmtree(small_copy / "rectified")
    rectify(small_copy, RectifyConfig(method="swap", name="pairwise-T4"))
    with pytest.raises(RunError, match=r"other settings: made_from\.rectified\.method"):
        student_trainer([config], [RunDirectory(tmp_path / "run", resume=True)], splits)


# ---- damage ---------------------------------------------------------------------------------


def rewritten(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """last.pt with something changed, whole."""
    state = torch.load(run / "last.pt", weights_only=True)
    change(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    (run / "last.pt").write_bytes(content + b"\nsha256 " + sha256(content).encode() + b"\n")


MISFITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no-model": lambda state: state.pop("model"),
    "another-shape": lambda state: state["model"].update(
        {name: tensor[:1] for name, tensor in state["model"].items() if tensor.dim() == 2}
    ),
    "another-optimizer": lambda state: state.update(
        optimizer=torch.optim.SGD(torch.nn.Linear(2, 2, bias=False).parameters()).state_dict()
    ),
    "an-epoch-missing": lambda state: state["history"].pop(),
    "words": lambda state: state.update(position="first"),
}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_a_checkpoint_that_does_not_fit_is_one_error(
    small_cache: Path, splits: Splits, my_run: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    rewritten(my_run, change)
    before = contents(my_run)
    with pytest.raises(RunError, match=r"last\.pt (does not fit|is damaged)") as caught:
        train_student(
            config_of(small_cache, train=trained_for(3)), my_run, resume=True, splits=splits
        )
    assert len(str(caught.value).splitlines()) <= 3
    assert contents(my_run) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "model.safetensors", "summary.json"])
def test_what_a_checkpoint_knows_is_mended(
    small_cache: Path, splits: Splits, my_run: Path, name: str
) -> None:
    before = contents(my_run)
    (my_run / name).write_bytes(b"damaged")
    train_student(config_of(small_cache), my_run, resume=True, splits=splits)
    assert contents(my_run) == before


# ---- one writer, and a disk that is full ----------------------------------------------------


def test_a_second_training_of_the_same_run_is_refused(
    small_cache: Path, splits: Splits, two_epochs: Path, tmp_path: Path
) -> None:
    config, run = config_of(small_cache), tmp_path / "run"

    def second() -> None:
        outs = [tmp_path / "new", run]
        for way in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(RunError, match="another process is writing to"):
                train_student(config, run, splits=splits, **way)
            with pytest.raises(RunError, match="another process is writing to"):
                train_together([config, config], outs, splits=splits, **way)

    train_student(config, run, splits=splits, reporter=AtBatch(3, second))
    assert same_weights(run, two_epochs)
    assert [line["epoch"] for line in metrics(run)] == [0, 1]
    new = RunDirectory(tmp_path / "new")
    student_trainer([config], [new], splits).learner.begin()  # let go of with the refusal


def test_a_full_disk_keeps_the_epochs_before(
    small_cache: Path,
    splits: Splits,
    three_epochs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, run = config_of(small_cache, train=trained_for(3)), tmp_path / "run"
    replaced: list[str] = []

    def replace(temporary: Path, to: Path) -> None:
        replaced.append(to.name)
        if to.name == "last.pt" and replaced.count("last.pt") == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.rename(temporary, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(RunError, match="cannot be written: No space left") as caught:
            train_student(config, run, splits=splits)
    assert "Epochs up to 1 are kept" in caught.value.remedy
    assert "--resume" in caught.value.remedy
    train_student(config, run, resume=True, splits=splits)
    assert same_weights(run, three_epochs)


def test_a_disk_that_takes_no_more_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The kernel's own refusal: a limit on the size of files, below that of a checkpoint."""
    words = "train-teacher --dataset digits --model resnet8 --augment none --epochs 1 --device cpu"
    monkeypatch.setattr(sys, "argv", ["pipeline", *words.split(), "--out", str(tmp_path / "run")])
    monkeypatch.setattr(sys, "path", [*sys.path])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capfd.readouterr().err
    assert ended.value.code == 2, message
    assert "cannot be written: File too large" in message
    assert "--resume" in message
    assert "Traceback" not in message
    assert not list((tmp_path / "run").glob("*.partial"))


# ---- batches of one -------------------------------------------------------------------------


class Flat(torch.nn.Sequential):
    """Batch norm over one value a channel and image."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            torch.nn.Flatten(),
            torch.nn.Linear(3 * 64, num_classes),
            torch.nn.BatchNorm1d(num_classes),
        )


def test_batch_norm_over_one_value_is_told_before_training(
    small_cache: Path, splits: Splits, tmp_path: Path
) -> None:
    model = ModelSettings(architecture=f"{__name__}:Flat")
    one = msgspec.structs.replace(TRAIN, batch_size=1)
    config = config_of(small_cache, model=model, train=one)
    with pytest.raises(ConfigError, match="cannot train on batches of one image") as refused:
        train_student(config, tmp_path / "run", splits=splits)
    assert "--batch-size 2" in refused.value.remedy
    assert not (tmp_path / "run").exists()
    # 299 of 300 samples in a batch leave one: it joins them
    left = msgspec.structs.replace(TRAIN, batch_size=299, epochs=1)
    train_student(config_of(small_cache, model=model, train=left), tmp_path / "run", splits=splits)
