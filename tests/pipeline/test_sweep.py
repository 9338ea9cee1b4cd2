"""Whole sweeps on processes: what they leave behind, and what happens when somebody dies."""

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
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from helpers import RUN_FILES, same_weights

from pipeline.console import Console
from pipeline.sweep.check import check_runs
from pipeline.sweep.file import read_sweep
from pipeline.sweep.grid import expand
from pipeline.sweep.run import run_sweep
from stages.data import Splits
from stages.errors import RunError
from stages.rectify import rectify
from stages.settings import RectifyConfig
from stages.train_student import train_student

MODELS = '''
"""Students that kill the process that builds them: once, or every time, but only in a worker."""
import os, pathlib, signal
from distributed import get_worker
from stages.inputs.cifar_models import cifar_model

def once(classes):
    return dying(classes, 1)

def always(classes):
    return dying(classes, 99)

def dying(classes, times):
    deaths = pathlib.Path("deaths")
    try:
        get_worker()
    except ValueError:
        return cifar_model("resnet8", classes, 3)
    if (died := len(list(deaths.glob(f"{times}-*")))) < times:
        (deaths / f"{times}-{died}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return cifar_model("resnet8", classes, 3)

def broken(classes):
    try:
        get_worker()
    except ValueError:
        return cifar_model("resnet8", classes, 3)
    raise ZeroDivisionError("of the model's own")
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


# ---- one sweep in which everything happens ---------------------------------------------------


@pytest.fixture(scope="module")
def eventful(folder: Path) -> tuple[Path, str, str]:
    """A sweep of good runs, runs that fail and runs whose worker dies: its folder, what it told at
    the end, and what it said.
    """
    file = sweep_file(
        "eventful",
        [
            {"loss.name": "ce"},
            {"label": "rectify", "loss.name": "kd", "bias.mode": "rectify"},
            {"label": "diverges", "loss.name": "kd", "train.lr": 1e9},
            {"label": "dies", "model.architecture": ["fatal:once", "fatal:always"]},
            {"label": "breaks", "model.architecture": "fatal:broken", "loss.name": "ce"},
        ],
        seeds=[0],
        base={"model.mean": [0.5], "model.std": [0.5]},
    )
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline", "sweep", str(file)],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    return Path("runs/eventful"), ended.stderr, ended.stdout


def test_good_runs_are_ordinary_runs(
    eventful: tuple[Path, str, str], digits: Splits, tmp_path: Path
) -> None:
    out, *_ = eventful
    for run in check_runs(expand(read_sweep("eventful.yaml"))).runs[:2]:
        summary = train_student(run.config, tmp_path / run.name, splits=digits)

        told = lines(out)[run.name]
        assert {file.name for file in (out / run.name).iterdir()} == RUN_FILES
        assert same_weights(out / run.name, tmp_path / run.name)
        assert told["summary"]["last"] == summary["last"]
        kept = json.loads((out / run.name / "summary.json").read_text())
        kept.pop("digests")
        assert told["summary"] == kept


def test_failed_runs_are_named_and_stop_nobody(eventful: tuple[Path, str, str]) -> None:
    out, told, said = eventful
    found = lines(out)

    assert list(found) == [
        "ce-s0",
        "rectify-s0",
        "diverges-s0",
        "dies-fatal-once-s0",
        "dies-fatal-always-s0",
        "breaks-s0",
    ]
    failed = [name for name, line in found.items() if line["status"] == "failed"]
    assert failed == ["diverges-s0", "dies-fatal-always-s0", "breaks-s0"]
    assert "not finite after epoch 1" in found["diverges-s0"]["error"]
    assert "ZeroDivisionError: of the model's own" in found["breaks-s0"]["error"]
    assert "fatal.py:" in found["breaks-s0"]["error"]
    assert told.startswith("error: 3 of 6 runs failed: diverges-s0 (")
    assert len(told.splitlines()) == 2  # and no warnings
    table = (out / "table.md").read_text()
    assert re.search(r"failed: breaks-s0: .*ZeroDivisionError", table)
    assert said.count("] ") == 6
    assert "[6/6]" in said


def test_a_run_whose_worker_died_is_tried_once_more(eventful: tuple[Path, str, str]) -> None:
    out, *_ = eventful

    assert lines(out)["dies-fatal-once-s0"]["status"] == "done"
    assert "its worker process died again" in lines(out)["dies-fatal-always-s0"]["error"]
    assert len(list(Path("deaths").glob("1-*"))) == 1
    assert len(list(Path("deaths").glob("99-*"))) == 2


# ---- killed and started again ---------------------------------------------------------------


def started(file: Path) -> subprocess.Popen[bytes]:
    """A sweep as a process of its own, whose workers can be counted."""
    return subprocess.Popen([sys.executable, "-m", "pipeline", "sweep", str(file)])


def wait_for(path: Path, sweep: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 250
    while not path.exists():
        assert sweep.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=20)
    return not alive


def test_a_killed_sweep_goes_on_bit_by_bit(
    folder: Path,
    scheduler: str,
    digits: Splits,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = sweep_file("killed", [{"loss.name": ["ce", "kd"]}], base={"train.epochs": 12})
    sweep, out = started(file), Path("runs/killed")
    wait_for(out / "kd-s0" / "last.pt", sweep)
    workers = psutil.Process(sweep.pid).children(recursive=True)
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()

    assert workers
    assert gone(workers)
    assert not (out / "kd-s0" / "summary.json").exists()
    assert lines(out)["ce-s0"]["status"] == "done"
    finished = (out / "ce-s0" / "last.pt").stat().st_mtime_ns

    results = run_sweep(file, Console(), scheduler=scheduler)

    said = capsys.readouterr().out
    assert "1 of 2 runs are finished already" in said
    assert [result.run.name for result in results] == ["ce-s0", "kd-s0"]
    assert (out / "ce-s0" / "last.pt").stat().st_mtime_ns == finished
    train_alone(file, tmp_path, digits)
    assert same_weights(out / "ce-s0", tmp_path / "ce-s0")
    assert same_weights(out / "kd-s0", tmp_path / "kd-s0")

    # nothing is left to do: no process is started, the same results are written again
    before = (out / "results.jsonl").read_text()
    assert [r.summary for r in run_sweep(file, Console())] == [r.summary for r in results]
    assert (out / "results.jsonl").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_ends_its_workers_and_says_how_to_go_on(
    folder: Path, number: signal.Signals
) -> None:
    file = sweep_file(f"stopped{number}", [{"loss.name": "kd"}], base={"train.epochs": 500})
    sweep = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "sweep", str(file)],
        stderr=subprocess.PIPE,
        text=True,
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
