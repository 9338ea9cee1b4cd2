"""Going on with a run: what may have moved, what must be the same, what a damaged run says."""

import contextlib
import errno
import io
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    AtBatch,
    Command,
    Runs,
    Words,
    assert_same_runs,
    changed,
    metrics,
    refused,
    resized,
    same_weights,
    student_of,
)

from stages.cache_teacher import CacheJob, cache_teacher
from stages.errors import ConfigError, RunError
from stages.inputs.run_files import read_config, sha256
from stages.rectify import rectify
from stages.settings import BiasSettings, RectifyConfig, StudentConfig
from stages.train_student import train_together


def config_of(cache: Path | str, **changes: Any) -> StudentConfig:
    train = {"train__batch_size": 150, "train__schedule": "constant"}
    return student_of(cache, **{**train, **changes})


@pytest.fixture
def two_epochs(small_runs: Runs) -> Path:
    """A finished run. Read only."""
    return small_runs.plain(config_of(small_runs.cache))


@pytest.fixture
def three_epochs(small_runs: Runs) -> Path:
    """A finished run of one epoch more. Read only."""
    return small_runs.plain(config_of(small_runs.cache, train__epochs=3))


@pytest.fixture
def my_run(two_epochs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_epochs, tmp_path / "run"))


def contents(run: Path) -> dict[str, bytes]:
    """Every file but the log, which says when."""
    return {file.name: file.read_bytes() for file in run.iterdir() if file.name != "log.txt"}


def test_a_finished_run_says_so_and_is_given_more_epochs(
    small_runs: Runs, my_run: Path, three_epochs: Path
) -> None:
    words, before, cache = Words(), contents(my_run), small_runs.cache
    small_runs.trained(config_of(cache), my_run, resume=True, reporter=words)
    assert any("is finished already: 2 epochs" in line for line in words.lines)
    with pytest.raises(RunError, match="has had 2 epochs already, not 1"):
        small_runs.trained(config_of(cache, train__epochs=1), my_run, resume=True)
    assert contents(my_run) == before
    small_runs.trained(config_of(cache, train__epochs=3), my_run, resume=True)
    assert len(metrics(my_run)) == 3
    assert same_weights(my_run, three_epochs)
    assert read_config(my_run) == read_config(three_epochs)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"train__schedule": "cosine"}, "the learning rate of train.schedule=cosine"),
        (
            {"bias": BiasSettings(mode="rectify", as_published=True)},
            "the weights of bias.schedule=cosine",
        ),
    ],
)
def test_epochs_that_others_depend_on_cannot_be_changed(
    small_runs: Runs, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    config = config_of(small_runs.cache, **changes)
    small_runs.trainer(config, tmp_path / "run").learner.begin()
    config = changed(config, train__epochs=3)
    with refused(RunError, f"2 epochs and cannot have 3: {why}", "--epochs 2"):
        small_runs.trainer(config, tmp_path / "run", resume=True)


def test_a_run_goes_on_where_its_cache_has_moved_to(
    small_runs: Runs, my_run: Path, three_epochs: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_runs.cache, tmp_path / "moved.zarr")
    with contextlib.chdir(tmp_path):
        small_runs.trained(config_of("./moved.zarr/", train__epochs=3), my_run, resume=True)
    assert same_weights(my_run, three_epochs)
    assert read_config(my_run)["cache"] == "./moved.zarr/"


def test_weights_to_start_from_may_move(
    small_runs: Runs, two_epochs: Path, three_epochs: Path, tmp_path: Path
) -> None:
    def starting_from(weights: Path) -> StudentConfig:
        return config_of(small_runs.cache, model__init=str(weights))

    weights, run = tmp_path / "w.safetensors", tmp_path / "run"
    shutil.copy(two_epochs / "model.safetensors", weights)
    small_runs.trainer(starting_from(two_epochs), run).learner.begin()
    small_runs.trainer(starting_from(weights), run, resume=True)
    with pytest.raises(RunError, match=r"other settings: other weights"):
        small_runs.trainer(starting_from(three_epochs), run, resume=True)


def test_another_cache_in_the_same_place_is_refused(
    small_runs: Runs, tiny_job: CacheJob, tmp_path: Path
) -> None:
    cache, run = tmp_path / "cache.zarr", tmp_path / "run"
    tiny_runs = Runs(cache, tiny_job.splits, tmp_path)
    for encoding in ("float32", "float16"):
        shutil.rmtree(cache, ignore_errors=True)
        cache_teacher(resized(tiny_job, 60, 20, encoding=encoding, views=1), cache)
        if encoding == "float32":
            tiny_runs.trainer(config_of(cache), run).learner.begin()
    with pytest.raises(RunError, match=r"other settings: other caches"):
        tiny_runs.trainer(config_of(cache), run, resume=True)


def test_another_rectification_of_the_same_name_is_refused(
    small_runs: Runs, small_copy: Path, tmp_path: Path
) -> None:
    config = config_of(small_copy, bias=BiasSettings(mode="rectify", schedule="constant"))
    small_runs.trainer(config, tmp_path / "run").learner.begin()
    shutil.rmtree(small_copy / "rectified")
    rectify(small_copy, RectifyConfig(method="swap", name="pairwise-T4"))
    with pytest.raises(RunError, match=r"other settings: made_from\.rectified\.method"):
        small_runs.trainer(config, tmp_path / "run", resume=True)


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
    small_runs: Runs, my_run: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    rewritten(my_run, change)
    before = contents(my_run)
    with pytest.raises(RunError, match=r"last\.pt (does not fit|is damaged)") as caught:
        small_runs.trained(config_of(small_runs.cache, train__epochs=3), my_run, resume=True)
    assert len(str(caught.value).splitlines()) <= 3
    assert contents(my_run) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "model.safetensors", "summary.json"])
def test_what_a_checkpoint_knows_is_mended(small_runs: Runs, my_run: Path, name: str) -> None:
    before = contents(my_run)
    (my_run / name).write_bytes(b"damaged")
    small_runs.trained(config_of(small_runs.cache), my_run, resume=True)
    assert contents(my_run) == before


def test_a_second_training_of_the_same_run_is_refused(
    small_runs: Runs, two_epochs: Path, tmp_path: Path
) -> None:
    config, run = config_of(small_runs.cache), tmp_path / "run"

    def second() -> None:
        outs = [tmp_path / "new", run]
        for way in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(RunError, match="another process is writing to"):
                small_runs.trained(config, run, **way)
            with pytest.raises(RunError, match="another process is writing to"):
                train_together([config, config], outs, splits=small_runs.splits, **way)

    small_runs.trained(config, run, reporter=AtBatch(3, second))
    assert_same_runs(run, two_epochs)
    small_runs.trainer(config, tmp_path / "new").learner.begin()  # let go of with the refusal


def test_a_full_disk_keeps_the_epochs_before(
    small_runs: Runs, three_epochs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = config_of(small_runs.cache, train__epochs=3), tmp_path / "run"
    replaced: list[str] = []

    def replace(temporary: Path, to: Path) -> None:
        replaced.append(to.name)
        if to.name == "last.pt" and replaced.count("last.pt") == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.rename(temporary, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(RunError, match="cannot be written: No space left") as caught:
            small_runs.trained(config, run)
    assert "Epochs up to 1 are kept" in caught.value.remedy
    assert "--resume" in caught.value.remedy
    small_runs.trained(config, run, resume=True)
    assert same_weights(run, three_epochs)


def test_a_disk_that_takes_no_more_is_one_error(tmp_path: Path, command: Command) -> None:
    """The kernel's own refusal: a limit on the size of files, below that of a checkpoint."""
    words = "train-teacher --dataset digits --model resnet8 --augment none --epochs 1 --device cpu"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        answer = command([*words.split(), "--out", str(tmp_path / "run")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert answer.code == 2, answer.err
    assert "cannot be written: File too large" in answer.err
    assert "--resume" in answer.err
    assert "Traceback" not in answer.err
    assert not list((tmp_path / "run").glob("*.partial"))


class Flat(torch.nn.Sequential):
    """Batch norm over one value a channel and image."""

    def __init__(self, num_classes: int) -> None:
        layers = torch.nn.Linear(3 * 64, num_classes), torch.nn.BatchNorm1d(num_classes)
        super().__init__(torch.nn.Flatten(), *layers)


def test_batch_norm_over_one_value_is_told_before_training(
    small_runs: Runs, tmp_path: Path
) -> None:
    flat = config_of(small_runs.cache, model__architecture=f"{__name__}:Flat")
    with refused(ConfigError, "cannot train on batches of one image", "--batch-size 2"):
        small_runs.trained(changed(flat, train__batch_size=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # 299 of 300 samples in a batch leave one: it joins them
    small_runs.trained(changed(flat, train__batch_size=299, train__epochs=1))
