"""Event files as TensorBoard reads them, against metrics.jsonl."""

import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import RUN_FILES, metrics, prepared, refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.cli import cli
from stages.errors import RunError
from stages.training.run_directory import RunDirectory

CONFIG = {"kind": "teacher", "tensorboard": True}
Points = dict[str, list[tuple[int, float]]]


def read_events(run: Path) -> Points:
    """Every scalar by name: (step, value), as TensorBoard shows them."""
    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    names = reader.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in reader.Scalars(name)] for name in names}


def points(lines: list[dict[str, Any]]) -> Points:
    """The same from metrics.jsonl; event files hold float32."""
    names = [name for name in lines[0] if name != "epoch"]
    return {n: [(line["epoch"], pytest.approx(line[n], rel=1e-6)) for line in lines] for n in names}


def line(epoch: int, loss: float) -> dict[str, Any]:
    return {"epoch": epoch, "view": 3 * epoch, "loss": loss}


def started(
    path: Path, epochs: int, resume: bool = False, tensorboard: bool = True
) -> RunDirectory:
    """A run that goes on after so many epochs."""
    run = prepared(path, CONFIG | {"tensorboard": tensorboard}, resume=resume)
    run.begin(metrics(path)[:epochs] if resume else ())
    run.release()
    return run


def test_every_number_of_every_epoch_is_there_at_once(tmp_path: Path) -> None:
    run = started(tmp_path / "run", 0)
    for epoch in range(3):
        run.add_metrics(line(epoch, 1 / (epoch + 1)))
        assert read_events(run.path) == points(metrics(run.path))
    run.save_summary({})


def test_epochs_that_are_run_again_are_not_there_twice(tmp_path: Path) -> None:
    """And a run may ask for them when it is resumed."""
    for asked in (True, False):
        killed = started(tmp_path / f"{asked}", 0, tensorboard=asked)
        for epoch in range(3):
            killed.add_metrics(line(epoch, 1.0))
        again = started(killed.path, 2, resume=True)  # the kill came before the third checkpoint
        for epoch in (2, 3):
            again.add_metrics(line(epoch, 0.5))
        again.save_summary({})
        found = read_events(again.path)
        assert found == points(metrics(again.path))
        assert found["loss"] == [(0, 1.0), (1, 1.0), (2, 0.5), (3, 0.5)]


def test_nothing_is_written_where_tensorboard_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with refused(RunError, "needs tensorboard", "pip install 'teacher-cache[tensorboard]'"):
        prepared(tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()
    prepared(tmp_path / "run", CONFIG | {"tensorboard": False})


def test_the_command_writes_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = f"train-teacher --dataset digits --model resnet8 --epochs 2 --device cpu --out {run}"
    answer = CliRunner().invoke(cli, [*words.split(), "--batch-size", "500", "--tensorboard"])
    assert answer.exit_code == 0, answer.output
    found = read_events(run)
    assert found == points(metrics(run))
    assert {"loss", "lr", "test_top1", "images_per_second"} <= found.keys()
    assert {path.name for path in run.iterdir()} == RUN_FILES | {"tensorboard"}
