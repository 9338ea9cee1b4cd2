"""The temperature of a teacher: against a grid, against a known one, and as students use it."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    Answer,
    Command,
    Runs,
    assert_same_runs,
    changed,
    metrics,
    naive_softmax,
    resized,
    student_of,
)
from test_cache_format import assert_fields, fields
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.calibrated import Calibrated
from stages.cache_teacher import CacheJob, cache_teacher
from stages.calibrate import calibrate, fit_temperature, with_calibration
from stages.errors import CacheError, RunError, ViewError
from stages.inputs.feed import Batch
from stages.rectify import rectify, rectify_rows
from stages.settings import BiasSettings, RectifyConfig, StudentConfig
from stages.verify import verify


@pytest.fixture(scope="module")
def my_cache(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Path:
    """Calibrated, with the rectification of calibrated rows beside pairwise-T4. Read only."""
    path = Path(shutil.copytree(tiny_cache, tmp_path_factory.mktemp("calibrated") / "digits.zarr"))
    calibrate(path)
    rectify(path, RectifyConfig(calibrate=True))
    return path


def nll(logits: Tensor, labels: Tensor, temperature: float) -> float:
    """A row at a time."""
    rows = zip(logits.double().tolist(), labels.tolist(), strict=True)
    return -sum(math.log(naive_softmax(row, temperature)[y]) for row, y in rows) / len(labels)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_no_temperature_of_a_grid_is_better(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 5, generator=generator) * scale
    right = torch.rand(200, generator=generator) < 0.6
    labels = torch.where(right, logits.argmax(1), torch.arange(200) % 5)
    found, grid = fit_temperature(logits, labels), np.geomspace(0.05, 20, 400)
    losses = [nll(logits, labels, t) for t in grid]
    assert nll(logits, labels, found) <= min(losses) + 1e-9
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.02)


@pytest.mark.parametrize(("gap", "right"), [(4.0, 75), (1.0, 90), (6.0, 60)])
def test_two_classes_by_hand(gap: float, right: int) -> None:
    """Right in `right` of 100 rows that all differ by `gap`: sigmoid(gap / T) is that share."""
    logits = torch.tensor([[gap + 7, 7.0]]).repeat(100, 1)
    labels = (torch.arange(100) >= right).long()
    share = right / 100
    expected = gap / math.log(share / (1 - share))
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["right", "wrong"])
def test_rows_without_a_temperature(kind: str) -> None:
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(2))
    labels = logits.argmax(1) if kind == "right" else logits.argmin(1)
    with pytest.raises(CacheError, match="no temperature from"):
        fit_temperature(logits, labels)


def test_what_a_cache_keeps(
    tiny_copy: Path, array_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    """Of all rows of both views, beside logits that nobody touches."""
    before = array_bytes(tiny_copy)
    found = calibrate(tiny_copy)
    assert array_bytes(tiny_copy) == before
    cache = LogitCache.open(tiny_copy)
    assert cache.calibrated == found
    assert cache.calibration == found.temperature
    logits = torch.cat([cache.read_view(v).rows(torch.arange(60)) for v in range(2)])
    labels = cache.labels.repeat(2)
    assert found.temperature == pytest.approx(fit_temperature(logits, labels), rel=1e-6)
    assert (found.on, found.rows) == ("train", 120)
    assert found.nll == pytest.approx(nll(logits, labels, found.temperature))
    assert found.nll_before == pytest.approx(nll(logits, labels, 1.0))
    assert not verify(tiny_copy).faults
    kept = json.loads((tiny_copy / "zarr.json").read_text())["attributes"]["calibrated"]
    assert_fields(kept, fields("calibrated"))
    assert kept.keys() == set(Calibrated.__struct_fields__)


def test_on_the_test_split_which_replaces_the_other(tiny_copy: Path, tiny_job: CacheJob) -> None:
    """More views keep what there is."""
    calibrate(tiny_copy)
    found = calibrate(tiny_copy, on="test")
    cache_teacher(resized(tiny_job, 60, 20, views=3), tiny_copy)
    cache = LogitCache.open(tiny_copy)
    assert cache.calibrated == found
    logits, labels = cache.eval_logits()
    assert (found.on, found.rows) == ("test", 20)
    assert found.temperature == pytest.approx(fit_temperature(logits, labels))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "part of each row": ({"encoding": "topk:k=3"}, CacheError, "part of each row"),
    "mixed views": ({"augment": "pad-crop+mixup"}, ViewError, "calibration"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_caches_that_cannot_be_calibrated(name: str, tiny_job: CacheJob, tmp_path: Path) -> None:
    """Rows of mixed views have two labels each; those of the test split have one."""
    changes, error, message = REFUSED[name]
    path = tmp_path / "c.zarr"
    cache_teacher(resized(tiny_job, 60, 20, **changes), path)
    for on in ("train",) if error is ViewError else ("train", "test"):  # no student could use it
        with pytest.raises(error, match=message):
            calibrate(path, on=on)
    if error is ViewError:
        assert calibrate(path, on="test").rows == 20
    assert (LogitCache.open(path).calibrated is None) is (error is CacheError)


def student(cache: Path, calibrated: bool = True, **changes: Any) -> StudentConfig:
    train = {"train__batch_size": 30, "train__lr": 0.02}
    return student_of(cache, **{"loss__calibrate": calibrated, **train, **changes})


RECTIFIED = BiasSettings(
    mode="rectify", schedule="constant", reduction="subset", rectified="pairwise-T4-calibrated"
)


def task_and_view(runs: Runs, config: StudentConfig) -> tuple[Any, int]:
    """The task of a student in its first epoch, and the epoch's view."""
    trainer = runs.trainer(config)
    task: Any = trainer.learner.task
    (view,) = task.start_epoch(0)
    trainer.close()
    return task, view


@pytest.mark.parametrize("mode", ["none", "rectify"])
def test_the_loss_is_of_divided_logits(mode: str, my_cache: Path, tiny_runs: Runs) -> None:
    """KD by its formula, and pairwise rectification of the divided rows' distributions."""
    bias = RECTIFIED if mode == "rectify" else BiasSettings()
    task, view = task_and_view(tiny_runs, student(my_cache, bias=bias))
    cache, samples = LogitCache.open(my_cache), torch.arange(60)
    answers = torch.randn(60, 10, generator=torch.Generator().manual_seed(3))
    found = task.loss_parts(answers, Batch(samples, torch.empty(60)))["loss_kd"]

    divided = cache.read_view(view).rows(samples) / cache.calibration
    assert abs(cache.calibration - 1) > 0.05
    p = (divided.double() / 4).softmax(1)
    wrong = cache.read_view(view).wrong(samples)
    if mode == "rectify":
        p = rectify_rows(p, cache.labels, "pairwise", cache.predictions(view)[cache.row_of])
    rows = 16 * (p * (p.log() - (answers.double() / 4).log_softmax(1))).sum(1)
    of_kinds = rows[wrong].mean() + rows[~wrong].mean()
    expected = of_kinds if mode == "rectify" else rows.mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_several_teachers_are_divided_each_by_its_own(
    my_cache: Path, tiny_runs: Runs, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(my_cache, tmp_path / "other.zarr"))
    calibrate(other, on="test")
    by = [LogitCache.open(path).calibration for path in (my_cache, other)]
    assert by[0] != by[1]
    task, view = task_and_view(tiny_runs, student(my_cache, also=(str(other),)))
    samples, logits = torch.arange(60), LogitCache.open(my_cache).read_view(view)
    mean = sum((logits.rows(samples) / t / 4).softmax(1) for t in by) / 2
    found = task.targets.of(samples, calibrated=True).at(4.0)
    torch.testing.assert_close((found / 4).softmax(1), mean)


def test_it_is_refused_where_it_cannot_be(my_cache: Path, tiny_runs: Runs) -> None:
    plain = BiasSettings(mode="rectify", rectified="pairwise-T4")
    for message, config in {
        "is not calibrated": student(tiny_runs.cache),
        "--calibrate": student(my_cache, bias=plain),
        "belongs to temperature": student(my_cache, False, bias=RECTIFIED),
    }.items():
        with pytest.raises(CacheError, match=message):
            tiny_runs.trained(config)


def test_together_with_one_that_is_not(my_cache: Path, tiny_runs: Runs) -> None:
    """They read one slab; it has the weights that it has alone."""
    students = [student(my_cache, bias=RECTIFIED), student(my_cache, False)]
    assert_same_runs(tiny_runs.trained(students[0]), tiny_runs.together(students)[0])


def test_a_run_goes_on_with_the_same_temperature_only(
    my_cache: Path, tiny_runs: Runs, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(my_cache, tmp_path / "copy.zarr"))
    calibrated, plain = (tiny_runs.trained(student(cache, asked)) for asked in (True, False))
    tiny_runs.trained(student(cache), calibrated, resume=True)
    calibrate(cache, on="test")
    with pytest.raises(RunError, match="another calibration"):
        tiny_runs.trained(student(cache), calibrated, resume=True)
    tiny_runs.trained(student(cache, False), plain, resume=True)
    assert len(metrics(plain)) == 2


def test_a_rectification_of_calibrated_rows(my_cache: Path) -> None:
    """Is one at the product of both temperatures, and verify computes the same."""
    cache = LogitCache.open(my_cache)
    config = with_calibration(RectifyConfig(temperature=2.0, calibrate=True), cache)
    assert config.temperature == 2.0 * cache.calibration
    assert config.name == "pairwise-T2-calibrated"
    settings = cache.rectification("pairwise-T4-calibrated").settings
    assert settings.temperature == 4.0 * cache.calibration
    assert not verify(my_cache).faults
    named = RectifyConfig(name="mine", calibrate=True)
    assert with_calibration(named, cache).chosen_name == "mine"
    assert with_calibration(RectifyConfig(), cache) == RectifyConfig()


def test_the_commands(tiny_copy: Path, command: Command) -> None:
    def message(name: str, *words: str) -> Answer:
        return command([name, str(tiny_copy), *words])

    assert "pipeline calibrate" in message("rectify", "--calibrate").text
    answer = message("calibrate")
    found = LogitCache.open(tiny_copy).calibration
    assert answer.code == 0
    assert f"temperature {found:.4g}" in answer.text
    assert "been trained on" in answer.text
    assert f"temperature {found:.4g}, train rows" in message("inspect").text
    assert message("rectify", "--calibrate").code == 0
    assert "pairwise-T4-calibrated" in LogitCache.open(tiny_copy).rectifications


def test_rectified_again_after_another_calibration(
    my_cache: Path, tiny_runs: Runs, tmp_path: Path, command: Command
) -> None:
    """The usual name is taken: the error has the command and the name that lead on."""
    cache = Path(shutil.copytree(my_cache, tmp_path / "copy.zarr"))
    calibrate(cache, on="test")
    with pytest.raises(CacheError) as raised:
        tiny_runs.trained(student(cache, bias=RECTIFIED))
    found = re.search(r"`pipeline (.*)`.*--rectified (\S+)\.", raised.value.remedy)
    assert found is not None
    assert command(found[1]).code == 0
    settings = LogitCache.open(cache).rectification(found[2]).settings
    assert settings.temperature == 4.0 * LogitCache.open(cache).calibration
    named = changed(student(cache, bias=RECTIFIED), bias__rectified=found[2])
    task_and_view(tiny_runs, named)
