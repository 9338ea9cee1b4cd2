"""Whole sweeps on processes: what they leave behind, and what happens when a process dies."""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import forks
import psutil
import pytest
import yaml
from helpers import DIGITS, RUN_FILES, same_weights

from pipeline.console import Console
from pipeline.sweep import cluster
from pipeline.sweep.check import check_runs
from pipeline.sweep.grid import Run, expand, read_sweep
from pipeline.sweep.run import run_sweep
from pipeline.sweep.worker import Failure
from stages.data import Splits
from stages.errors import RunError
from stages.settings import ModelSettings, StudentConfig
from stages.train_student import train_student

MODELS = '''
from distributed import get_worker
from stages.inputs.cifar_models import cifar_model

def broken(classes):
    """A model that fails, but only in a worker."""
    try:
        get_worker()
    except ValueError:
        return cifar_model("resnet8", classes, 3)
    raise ZeroDivisionError("of the model's own")
'''
DYING = '''
import os, pathlib, signal

def train(configs, outs, place):
    """Kills its worker as often as the name of the run says: "b-1" once."""
    (out,) = map(pathlib.Path, outs)
    deaths = len(list(out.parent.glob(f"{out.name}.*")))
    if deaths < int(out.name.partition("-")[2]):
        pathlib.Path(f"{out}.{deaths}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [out.name]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rectified_cache: Path) -> Iterator[Path]:
    """The working directory of all sweeps here, with a cache that is rectified."""
    folder = tmp_path_factory.mktemp("sweeps")
    shutil.copytree(rectified_cache, folder / "digits.zarr")
    (folder / "models.py").write_text(MODELS)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)  # as the command does with its working directory
        yield folder


SMALL = {"model.architecture": "helpers:plain"}


def sweep_file(name: str, runs: list[dict[str, Any]], **values: Any) -> Path:
    base = {
        "cache": "digits.zarr",
        "data": {"dataset": "digits", "workers": 0},
        "model.architecture": "resnet8",
        "train.epochs": 1,
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


@pytest.fixture
def scheduler() -> Iterator[str]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster.scheduler_address


def wait_for(path: Path, sweep: forks.Started) -> None:
    deadline = time.monotonic() + 250
    while not path.exists():
        assert sweep.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=20)
    return not alive


@pytest.mark.slow
def test_a_killed_sweep_tells_what_failed_and_goes_on_bit_by_bit(
    folder: Path, scheduler: str, digits: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A good run, one that diverges, one that breaks, and a long one that is at work when the sweep
    is killed.
    """
    runs: list[dict[str, Any]] = [
        {"loss.name": "ce", **SMALL},
        {"label": "diverges", "loss.name": "kd", "train.lr": 1e38, **SMALL},
        {"label": "breaks", "model.architecture": "models:broken", "loss.name": "ce"},
        {"label": "long", "bias.mode": "rectify", "train.epochs": 4},
    ]
    base = {"model.mean": [0.5], "model.std": [0.5]}
    file, out = sweep_file("eventful", runs, base=base), Path("runs/eventful")
    names = [run.name for run in expand(read_sweep(file))]
    sweep = forks.Started(["-m", "pipeline", "sweep", str(file)])
    try:
        wait_for(out / names[3] / "last.pt", sweep)
    finally:
        said = sweep.stdout + sweep.stderr
        workers = psutil.Process(sweep.pid).children(recursive=True)
        sweep.kill()
        sweep.wait()
    assert gone(workers)
    assert not (out / names[3] / "summary.json").exists()
    found = lines(out)
    assert list(found) == names[:3]
    assert [line["status"] for line in found.values()] == ["done", "failed", "failed"]
    assert "not finite after epoch 1" in found[names[1]]["error"]
    assert "ZeroDivisionError" in found[names[2]]["error"]
    assert "models.py:" in found[names[2]]["error"]
    table = (out / "table.md").read_text()
    assert re.search(rf"failed: {names[2]}: .*ZeroDivisionError", table)
    assert "Warning" not in said
    assert [f"[{n}/4]" in said for n in range(1, 5)] == [True] * 3 + [False]

    finished = (out / names[0] / "last.pt").stat().st_mtime_ns
    with pytest.raises(RunError) as caught:
        run_sweep(file, Console(), scheduler=scheduler)
    assert caught.value.cause.startswith(f"2 of 4 runs failed: {names[1]} (")
    assert "1 of 4 runs are finished already" in capsys.readouterr().out
    assert (out / names[0] / "last.pt").stat().st_mtime_ns == finished
    for run in check_runs(expand(read_sweep(file))).runs:
        if run.name in (names[0], names[3]):
            summary = train_student(run.config, tmp_path / run.name, splits=digits)
            assert {file.name for file in (out / run.name).iterdir()} == RUN_FILES
            assert same_weights(out / run.name, tmp_path / run.name)
            assert lines(out)[run.name]["summary"]["last"] == summary["last"]
            kept = json.loads((out / run.name / "summary.json").read_text())
            kept.pop("digests")
            assert lines(out)[run.name]["summary"] == kept


@pytest.mark.slow
def test_a_stopped_sweep_ends_its_workers_and_says_how_to_go_on(folder: Path) -> None:
    """By Ctrl-C; test_ending.py has what other signals end a command with."""
    file = sweep_file("stopped", [{"loss.name": "kd"}], base={"train.epochs": 500} | SMALL)
    sweep = forks.Started(["-m", "pipeline", "sweep", str(file)])
    wait_for(Path("runs/stopped/kd-s0/last.pt"), sweep)
    workers = psutil.Process(sweep.pid).children(recursive=True)
    for process in (sweep.pid, *(worker.pid for worker in workers)):  # as a terminal does it
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGINT)
    assert sweep.wait(60) == 130
    assert re.search(r"error: sweep was stopped by .*\n.*same command", sweep.stderr)
    assert gone(workers)


@pytest.mark.slow
def test_a_run_whose_worker_died_is_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask would forget a worker that takes longer than `lost-worker-timeout` to start again, as on
    a busy machine any may, and wait for another one for ever.
    """
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cluster, "train", importlib.import_module("dying").train)
    place: Any = None  # it would import torch in every worker
    config = StudentConfig(cache="", data=DIGITS, model=ModelSettings(architecture=""))
    groups = [[Run(name, "", {}, config)] for name in ("a-0", "b-1", "c-2", "d-0")]
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "0.1s"}),
        cluster.local_cluster(1) as client,
    ):
        found = {
            runs[0].name: out for runs, out in cluster.trained(client, groups, tmp_path, place)
        }
        client.cluster.scale(0)
        while client.cluster.workers or client.nthreads():
            time.sleep(0.05)
        with pytest.raises(RunError):  # no worker is left to wait for
            list(cluster.trained(client, groups[:1], tmp_path, place))
    (message,) = found.pop("c-2")
    assert isinstance(message, Failure)
    assert "died again" in message.message
    assert found == {name: [name] for name in ("a-0", "b-1", "d-0")}


def test_a_finished_sweep_starts_nothing_and_writes_the_same(folder: Path, scheduler: str) -> None:
    file = sweep_file("cluster", [{"loss.name": ["ce", "kd"]}], base=SMALL)
    results = run_sweep(file, Console(), scheduler=scheduler)
    assert [result.error for result in results] == [None, None]
    before = Path("runs/cluster/results.jsonl").read_text()
    assert [r.summary for r in run_sweep(file, Console())] == [r.summary for r in results]
    assert Path("runs/cluster/results.jsonl").read_text() == before


def test_students_trained_together_are_what_they_are_alone(
    folder: Path, scheduler: str, digits: Splits, tmp_path: Path
) -> None:
    grid = {"loss.name": ["ce", "dkd"], "train.lr": [0.1, 1e38]}
    file = sweep_file("together", [grid], together=4, base=SMALL)
    with pytest.raises(RunError, match="2 of 4 runs failed"):
        run_sweep(file, Console(), scheduler=scheduler)
    out = Path("runs/together")
    for run in check_runs(expand(read_sweep(file))).runs:
        if run.config.train.lr < 1:
            train_student(run.config, tmp_path / run.name, splits=digits)
            assert same_weights(out / run.name, tmp_path / run.name)
        else:
            assert "not finite" in lines(out)[run.name]["error"]
            assert f"failed: {run.name}: " in (out / "table.md").read_text()
