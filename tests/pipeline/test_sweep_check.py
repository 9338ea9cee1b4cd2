"""What a sweep is told before it starts: of caches, losses, models, and of its folder."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from helpers import Words
from reports import epoch, summary_of

from pipeline.cli import cli
from pipeline.console import Console
from pipeline.sweep.check import check_runs
from pipeline.sweep.directory import Progress, SweepDirectory
from pipeline.sweep.grid import Run, expand, read_sweep
from pipeline.sweep.run import run_sweep
from stages.cache import LogitCache
from stages.errors import PipelineError, RunError


@pytest.fixture
def folder(finished_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with caches, whole, rectified and unfinished."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_cache, "whole.zarr")
    shutil.copytree(finished_cache, "half.zarr")
    LogitCache.open("half.zarr", writable=True).grow(5)
    return tmp_path


def sweep_file(runs: list[dict[str, Any]], name: str = "ablation", **values: Any) -> Path:
    base = {"cache": "whole.zarr", "data.dataset": "digits", "model.architecture": "resnet8"}
    base |= values.pop("base", {})
    file = Path(f"{name}.yaml")
    file.write_text(yaml.safe_dump({"base": base, "runs": runs, **values}, sort_keys=False))
    return file


def runs_of(runs: list[dict[str, Any]], **values: Any) -> list[Run]:
    return expand(read_sweep(sweep_file(runs, **values)))


# ---- caches, losses, models -----------------------------------------------------------------


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cache": "none.zarr"}, "none.zarr"),
    ({"cache": "half.zarr"}, "3 of 5 views"),
    ({"views": 9}, "9 views"),
    ({"loss.name": "kdd"}, "'kdd'"),
    ({"bias.mode": "rectify"}, "rectifications"),
    ({"slab_memory": "1kB"}, "1kB"),
    ({"model.architecture": "resnet7"}, "'resnet7'"),
    ({"model.init": "gone"}, "gone"),
    ({"data.dataset": "digit"}, "digit"),
    ({"data.dataset": "other:make"}, "another dataset"),
]
OTHER = """
from torchvision.transforms.functional import to_pil_image
import torch
def make(split):
    return [(to_pil_image(torch.zeros(1, 8, 8)), n % 10) for n in range(20)]
"""


@pytest.mark.parametrize(("grid", "named"), REFUSED, ids=str)
def test_refused_before_anything_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, grid: dict[str, Any], named: str
) -> None:
    (folder / "other.py").write_text(OTHER)
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(PipelineError) as caught:
        run_sweep(sweep_file([{"loss.name": "dkd"}, {"label": "the culprit"} | grid]), Console())
    assert named in caught.value.cause
    assert caught.value.cause.startswith("the-culprit-s0: ")
    assert not Path("runs").exists()


def test_a_rectification_is_filled_in_and_makes_runs_equal(
    folder: Path, rectified_cache: Path
) -> None:
    shutil.copytree(rectified_cache, "rectified.zarr")
    base, grid = {"cache": "rectified.zarr"}, {"bias.mode": "rectify"}
    (run,) = check_runs(runs_of([grid], base=base)).runs
    assert run.config.bias.rectified == "pairwise-T4"
    named = {**grid, "bias.rectified": "pairwise-T4"}
    with pytest.raises(PipelineError, match="two runs are the same: 'rectify' and 'rectify, pair"):
        check_runs(runs_of([grid, named], base=base))


def test_the_teachers_are_measured_on_the_test_split(folder: Path) -> None:
    shutil.copytree("whole.zarr", "twin.zarr")
    logits, labels = LogitCache.open("whole.zarr").eval_logits()
    right = sum(int(row.argmax() == label) for row, label in zip(logits, labels, strict=True))
    checked = check_runs(runs_of([{}, {"loss.name": "dkd", "also": ["twin.zarr"]}]))
    assert list(checked.teacher_top1.values()) == [pytest.approx(right / 797)] * 2


def test_pixels_that_have_drifted_are_told_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, grid = Words(), {"accept_pixel_drift": True}
    monkeypatch.setattr("stages.inputs.probes.pixel_probes", lambda *_: [1] * 256)
    with pytest.raises(PipelineError, match="256 of 256 pixel probes"):
        check_runs(runs_of([{}]))
    check_runs(runs_of([grid], seeds=[0, 1, 2]), words)
    assert len(words.lines) == 1


def recorded(out: Path, runs: list[Run]) -> SweepDirectory:
    directory = SweepDirectory(out)
    with directory.held():
        directory.record("", runs)
    return directory


def summary(epochs: int) -> dict[str, Any]:
    """Of a run that took two seconds an epoch."""
    return summary_of([epoch(n, 0.5) for n in range(epochs)]) | {"train_seconds": 2.0 * epochs}


def start(
    directory: SweepDirectory, run: Run, epochs: int = 0, done: bool = False, text: str = ""
) -> None:
    """What a run leaves that is so far. text: of its summary, where another one is meant."""
    folder = directory.run(run.name)
    folder.mkdir()
    (folder / "config.yaml").write_text("kind: student\n")
    if epochs:
        (folder / "last.pt").touch()
        (folder / "metrics.jsonl").write_text("{}\n" * epochs)
    if done or text:
        (folder / "summary.json").write_text(text or json.dumps(summary(epochs)))


def test_how_far_runs_are(folder: Path) -> None:
    """A run with a damaged summary is not finished."""
    runs = runs_of([{"loss.temperature": [1, 2, 3, 4, 5, 6]}])
    assert set(SweepDirectory("new").progress(runs).values()) == {Progress()}
    directory = recorded(folder / "out", runs)
    start(directory, runs[0], epochs=30, done=True)
    start(directory, runs[1], epochs=3)
    start(directory, runs[2])
    start(directory, runs[3], epochs=30, text='{"epochs"')
    start(directory, runs[4], epochs=30, text='{"last": 3}')
    found = list(directory.progress(runs).values())
    whole, none = Progress(summary=summary(30)), Progress()
    assert found == [whole, Progress(3), none, Progress(30), Progress(30), none]


def test_a_sweep_inside_a_cache_is_refused(folder: Path) -> None:
    with pytest.raises(RunError, match=r"lies inside the cache .*whole\.zarr"):
        SweepDirectory("whole.zarr/runs").progress(runs_of([{}]))


def test_runs_and_seeds_may_be_added_and_runs_that_never_started_left_out(folder: Path) -> None:
    runs = runs_of([{}, {"loss.name": ["dkd", "ce"]}])
    directory = recorded(folder / "out", runs)
    start(directory, runs[0], epochs=30, done=True)
    more = runs_of([{"loss.name": "dist"}, {}, {"loss.name": "dkd"}], seeds=[1, 0])
    assert directory.progress(more)[runs[0].name].summary is not None
    constant = {"train.schedule": "constant"}
    runs = runs_of([{}], base=constant)
    directory = recorded(folder / "constant", runs)
    start(directory, runs[0], epochs=30, done=True)
    more = runs_of([{}], base=constant | {"train.epochs": 40})
    assert list(directory.progress(more).values()) == [Progress(30)]  # it can be given more


def test_a_folder_of_another_sweep_is_refused(folder: Path) -> None:
    runs = runs_of([{"loss.name": "dkd"}])
    directory = recorded(folder / "out", runs)
    start(directory, runs[0], epochs=1)
    with pytest.raises(RunError, match="another sweep: its run dkd-s0 is not in this one"):
        directory.progress(runs_of([{"loss.name": "ce"}]))
    with pytest.raises(RunError, match=r"was started with other settings: train\.lr"):
        directory.progress(runs_of([{"loss.name": "dkd"}], base={"train.lr": 7}))
    with pytest.raises(RunError, match="was started for 30 epochs and cannot have 7: the learning"):
        directory.progress(runs_of([{"loss.name": "dkd"}], base={"train.epochs": 7}))


def test_a_cache_may_move_and_not_become_another(folder: Path) -> None:
    runs = runs_of([{}])
    directory = recorded(folder / "out", runs)
    start(directory, runs[0], epochs=30, done=True)
    of = {runs[0].name: {"caches": ["one"], "views": 3}}
    config = directory.run(runs[0].name) / "config.yaml"
    config.write_text("kind: student\nmade_from: {caches: [one], views: 3, init: null}\n")
    moved = runs_of([{}], base={"cache": f"{folder}/elsewhere/"})
    assert directory.progress(moved, of)[runs[0].name].summary is not None
    of[runs[0].name]["caches"] = ["another"]
    with pytest.raises(RunError, match=r"other settings: other caches"):
        directory.progress(runs, of)


def test_a_folder_that_holds_something_else_is_refused(folder: Path) -> None:
    runs = runs_of([{}])
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter1.tex").touch()
    (folder / "results").mkdir()
    (folder / "results" / "sweep.json").write_text("[1, 2]")
    for name in ("thesis", "results", "ablation.yaml"):
        with pytest.raises(RunError, match=f"{name} holds something else than a sweep"):
            SweepDirectory(name).progress(runs)
    (folder / "begun").mkdir()
    (folder / "begun" / "sweep.json.partial").touch()
    assert SweepDirectory("begun").progress(runs) == {runs[0].name: Progress()}


def test_a_sweep_is_held_by_one_process(folder: Path) -> None:
    file = sweep_file([{}], out="out")
    (folder / "out").mkdir()
    held = os.open("out", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(PipelineError, match="another process is writing to out"):
        run_sweep(file, Console())
    os.close(held)


def test_a_dry_run_tells_what_would_be_done_and_writes_nothing(folder: Path) -> None:
    file = sweep_file([{"loss.name": ["ce", "kd"]}], seeds=[0, 1], out="out", workers=2)
    answer = CliRunner().invoke(cli, ["sweep", str(file), "--dry-run"], catch_exceptions=False)
    assert answer.exit_code == 0
    assert "4 runs" in answer.output
    assert "kd-s1" in answer.output
    assert "loss.name=kd" in answer.output
    assert "unknown until the first run has finished, with 2 workers" in answer.output
    assert not (folder / "out").exists()
    runs = check_runs(expand(read_sweep(file))).runs
    directory = recorded(folder / "out", runs)
    start(directory, runs[0], epochs=30, done=True)
    start(directory, runs[1], epochs=15)
    answer = CliRunner().invoke(
        cli, ["sweep", str(file), "--dry-run", "--workers", "1"], catch_exceptions=False
    )
    assert "done" in answer.output
    assert "15 of 30 epochs" in answer.output
    assert "estimated time: 2 min 30 s, with 1 worker\n" in answer.output  # 30 s, 60 s, 60 s


def test_settings_that_hard_labels_ignore_are_named_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {"loss.name": ["ce", "kd"], "loss.temperature": 2.0}
    run_sweep(sweep_file([grid], seeds=[0, 1]), Console(), dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if "loss ce" in line] == ["ce, temperature=2.0"]


def test_a_sweep_is_not_started_by_torchrun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(PipelineError, match="processes of its own"):
        run_sweep(sweep_file([{}]), Console())
