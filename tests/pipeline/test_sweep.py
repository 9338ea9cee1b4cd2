"""Whole sweeps on processes: what they leave behind, and what happens when a process dies."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from helpers import RUN_FILES, same_weights

from pipeline.console import Console
from pipeline.sweep.check import check_runs
from pipeline.sweep.grid import expand, read_sweep
from pipeline.sweep.run import run_sweep
from stages.data import Splits
from stages.errors import RunError
from stages.rectify import rectify
from stages.settings import RectifyConfig
from stages.train_student import train_student

MODELS = '''
"""Students that kill the worker that builds them, or fail there, unless the file 'safe' exists."""
import os, pathlib, signal
from distributed import get_worker
from stages.inputs.cifar_models import cifar_model

def dies(classes):
    if in_worker():
        deaths = pathlib.Path("deaths")
        (deaths / str(len(list(deaths.iterdir())))).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return cifar_model("resnet8", classes, 3)

def broken(classes):
    if in_worker():
        raise ZeroDivisionError("of the model's own")
    return cifar_model("resnet8", classes, 3)

def in_worker():
    try:
        get_worker()
    except ValueError:
        return False
    return not pathlib.Path("safe").exists()
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, finished_cache: Path) -> Iterator[Path]:
    """The working directory of all sweeps here, with a cache that is rectified."""
    folder = tmp_path_factory.mktemp("sweeps")
    shutil.copytree(finished_cache, folder / "digits.zarr")
    rectify(folder / "digits.zarr", RectifyConfig())
    (folder / "fatal.py").write_text(MODELS)
    (folder / "deaths").mkdir()
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)  # as the command does with its working directory
        yield folder


def sweep_file(name: str, runs: list[dict[str, Any]], **values: Any) -> Path:
    base = {
        "cache": "digits.zarr",
        "data": {"dataset": "digits", "workers": 0},
        "model.architecture": "resnet8",
        "train.epochs": 2,
        "train.batch_size": 250,
        "device": "cpu",
    }
    file = Path(f"{name}.yaml")
    base |= values.pop("base", {})
    file.write_text(yaml.safe_dump({"base": base, "runs": runs, **values}, sort_keys=False))
    return file


def lines(out: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {line["name"]: line for line in found}


def train_alone(file: Path, out: Path, digits: Splits) -> None:
    """Every run of a sweep, one after another and without Dask."""
    for run in check_runs(expand(read_sweep(file))).runs:
        train_student(run.config, out / run.name, splits=digits)


@pytest.fixture
def scheduler() -> Iterator[str]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster.scheduler_address


# ---- one sweep in which everything happens, killed in its last run ----------------------------


def started(file: Path, **how: Any) -> subprocess.Popen[str]:
    """A sweep as a process of its own, whose workers can be counted."""
    command = [sys.executable, "-m", "pipeline", "sweep", str(file)]
    return subprocess.Popen(command, text=True, **how)


def wait_for(path: Path, sweep: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 250
    while not path.exists():
        assert sweep.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=20)
    return not alive


@dataclass(frozen=True)
class Killed:
    """What a killed sweep has left: its folder, what it said, and whether its workers ended."""

    file: Path
    out: Path
    said: str
    lines: dict[str, dict[str, Any]]
    table: str
    workers_ended: bool


@pytest.fixture(scope="module")
def killed(folder: Path) -> Killed:
    """A good run, one that diverges, one whose worker dies, one that breaks, and a long one that
    is at work when the sweep is killed.

    Dask would forget a worker that takes longer than this to start again, which on a busy machine
    any worker may: the sweep has to wait for it.
    """
    runs: list[dict[str, Any]] = [
        {"loss.name": "ce"},
        {"label": "diverges", "loss.name": "kd", "train.lr": 1e9},
        {"label": "dies", "model.architecture": "fatal:dies"},
        {"label": "breaks", "model.architecture": "fatal:broken", "loss.name": "ce"},
        {"label": "long", "bias.mode": "rectify", "train.epochs": 12},
    ]
    base = {"model.mean": [0.5], "model.std": [0.5]}
    file, out = sweep_file("eventful", runs, base=base), Path("runs/eventful")
    impatient = os.environ | {"DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "0.1s"}
    with Path("said.txt").open("w") as said:
        sweep = started(file, stdout=said, stderr=subprocess.STDOUT, env=impatient)
        try:
            wait_for(out / "long-s0" / "last.pt", sweep)
        finally:
            told = Path("said.txt").read_text()
            workers = psutil.Process(sweep.pid).children(recursive=True)
            sweep.kill()
            sweep.wait()
    ended, table = gone(workers), (out / "table.md").read_text()
    return Killed(file, out, told, lines(out), table, ended)


def test_failed_runs_are_told_and_stop_no_other(killed: Killed) -> None:
    found = killed.lines
    assert list(found) == ["ce-s0", "diverges-s0", "dies-s0", "breaks-s0"]
    assert [line["status"] for line in found.values()] == ["done", *["failed"] * 3]
    assert "not finite after epoch 1" in found["diverges-s0"]["error"]
    assert "ZeroDivisionError" in found["breaks-s0"]["error"]
    assert "fatal.py:" in found["breaks-s0"]["error"]
    assert re.search(r"failed: breaks-s0: .*ZeroDivisionError", killed.table)
    assert "Warning" not in killed.said
    assert [f"[{n}/5]" in killed.said for n in range(1, 6)] == [True] * 4 + [False]


def test_a_run_whose_worker_died_is_tried_once_more(killed: Killed) -> None:
    assert "its worker process died again" in killed.lines["dies-s0"]["error"]
    assert len(list(Path("deaths").iterdir())) == 2


def test_a_killed_sweep_goes_on_bit_by_bit(
    killed: Killed,
    scheduler: str,
    digits: Splits,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = killed.out
    assert killed.workers_ended
    assert not (out / "long-s0" / "summary.json").exists()
    finished = (out / "ce-s0" / "last.pt").stat().st_mtime_ns

    Path("safe").touch()
    with pytest.raises(RunError) as told:
        run_sweep(killed.file, Console(), scheduler=scheduler)

    assert told.value.cause.startswith("1 of 5 runs failed: diverges-s0 (")
    assert "1 of 5 runs are finished already" in capsys.readouterr().out
    assert (out / "ce-s0" / "last.pt").stat().st_mtime_ns == finished
    for run in check_runs(expand(read_sweep(killed.file))).runs:
        if run.name in ("ce-s0", "long-s0"):
            summary = train_student(run.config, tmp_path / run.name, splits=digits)
            assert {file.name for file in (out / run.name).iterdir()} == RUN_FILES
            assert same_weights(out / run.name, tmp_path / run.name)
            assert lines(out)[run.name]["summary"]["last"] == summary["last"]
            kept = json.loads((out / run.name / "summary.json").read_text())
            kept.pop("digests")
            assert lines(out)[run.name]["summary"] == kept


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_ends_its_workers_and_says_how_to_go_on(
    folder: Path, number: signal.Signals
) -> None:
    file = sweep_file(f"stopped{number}", [{"loss.name": "kd"}], base={"train.epochs": 500})
    sweep = started(
        file,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # a shell lets what it starts in the background ignore Ctrl+C, and tests may be that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(Path(f"runs/{file.stem}/kd-s0/last.pt"), sweep)
    workers = psutil.Process(sweep.pid).children(recursive=True)
    os.killpg(sweep.pid, number)  # as a terminal does it: to all of them

    _, told = sweep.communicate(timeout=60)
    assert sweep.returncode == 128 + number
    assert told.splitlines()[0].startswith("error: sweep was stopped by ")
    assert "same command" in told.splitlines()[1]
    assert gone(workers)


@pytest.mark.slow
def test_a_group_that_is_killed_goes_on_bit_by_bit(
    folder: Path, scheduler: str, digits: Splits, tmp_path: Path
) -> None:
    file = sweep_file(
        "group", [{"loss.name": ["ce", "kd", "dkd"]}], base={"train.epochs": 12}, together=True
    )
    sweep, out = started(file), Path("runs/group")
    wait_for(out / "ce-s0" / "last.pt", sweep)
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()

    run_sweep(file, Console(), scheduler=scheduler)

    train_alone(file, tmp_path, digits)
    for run in tmp_path.iterdir():
        assert same_weights(out / run.name, run)


# ---- on an existing cluster -----------------------------------------------------------------


def test_an_existing_scheduler_gives_the_same(
    folder: Path, scheduler: str, digits: Splits, tmp_path: Path
) -> None:
    file = sweep_file("cluster", [{"loss.name": ["ce", "kd"]}], seeds=[0, 1])

    results = run_sweep(file, Console(), scheduler=scheduler)

    assert [result.error for result in results] == [None] * 4
    train_alone(file, tmp_path, digits)
    for run in tmp_path.iterdir():
        assert same_weights(Path("runs/cluster") / run.name, run)

    # nothing is left to do: no process is started, the same results are written again
    before = Path("runs/cluster/results.jsonl").read_text()
    assert [r.summary for r in run_sweep(file, Console())] == [r.summary for r in results]
    assert Path("runs/cluster/results.jsonl").read_text() == before


def test_students_trained_together_are_what_they_are_alone(
    folder: Path, scheduler: str, digits: Splits, tmp_path: Path
) -> None:
    grid = {"loss.name": ["ce", "kd", "dkd"], "train.lr": [0.1, 1e9]}
    file = sweep_file("together", [grid], together=4)

    with pytest.raises(RunError, match="3 of 6 runs failed"):
        run_sweep(file, Console(), scheduler=scheduler)

    out = Path("runs/together")
    for run in check_runs(expand(read_sweep(file))).runs:
        if run.config.train.lr < 1:
            train_student(run.config, tmp_path / run.name, splits=digits)
            assert same_weights(out / run.name, tmp_path / run.name)
        else:
            assert "not finite" in lines(out)[run.name]["error"]
