"""What a worker does with a task, without a cluster."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import DIGITS, changed, same_weights, student_of

from pipeline.sweep import worker
from pipeline.sweep.worker import Failure, Place, Watch, failure, train
from stages.cache.lock import Hold
from stages.data import Splits
from stages.errors import RunError
from stages.settings import StudentConfig
from stages.train_student import train_student


@pytest.fixture(autouse=True)
def here(tmp_path: Path) -> Iterator[None]:
    with contextlib.chdir(tmp_path):
        yield
    worker.splits_of.cache_clear()


@pytest.fixture
def config(finished_cache: Path) -> StudentConfig:
    return student_of(finished_cache, train__epochs=1)


def place() -> Place:
    return Place(os.getcwd())


def test_data_are_loaded_once_for_all_students(
    config: StudentConfig, monkeypatch: pytest.MonkeyPatch, digits: Splits
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(worker, "load_data", lambda data, skips: loaded.append(data) or digits)
    for out in ("a", "b"):
        (summary,) = train([config], [out], place())
        assert isinstance(summary, dict)
    assert loaded == [DIGITS]


def test_only_what_a_killed_run_has_left_is_replaced(config: StudentConfig) -> None:
    Path("run").mkdir()
    Path("run/config.yaml.partial").touch()
    (summary,) = train([config], ["run"], place())
    assert isinstance(summary, dict)
    assert not Path("run/config.yaml.partial").exists()
    Path("mine").mkdir()
    Path("mine/thesis.tex").touch()
    (message,) = train([config], ["mine"], place())
    assert isinstance(message, Failure)
    assert "mine holds something else than a run" in message.message
    assert not message.trace
    assert [file.name for file in Path("mine").iterdir()] == ["thesis.tex"]


def test_a_worker_that_does_not_see_the_folder_says_so(config: StudentConfig) -> None:
    (message,) = train([config], ["run"], Place("/nowhere/at/all"))
    assert message == Failure("/nowhere/at/all is not there: workers must see the same paths")


def test_a_group_that_cannot_go_together_is_trained_one_by_one(
    config: StudentConfig, digits: Splits
) -> None:
    broken = changed(config, model__architecture="resnet7")
    other = changed(config, loss__name="ce")
    first, message, last = train([config, broken, other], ["a", "b", "c"], place())
    assert isinstance(first, dict)
    assert isinstance(last, dict)
    assert isinstance(message, Failure)
    assert "unknown model 'resnet7'" in message.message
    train_student(config, "alone", splits=digits)
    assert same_weights(Path("a"), Path("alone"))


def test_a_run_waits_for_who_still_trains_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run").mkdir()
    with Hold(Path("run")) as hold:
        timer = threading.Timer(0.2, hold.release)
        timer.start()
        worker.wait_for(Path("run"))
        timer.join()
    monkeypatch.setattr(worker, "_LOCK_TIMEOUT", 0.0)
    with Hold(Path("run")), pytest.raises(RunError, match="another process is writing to run"):
        worker.wait_for(Path("run"))


def test_errors_are_one_line_and_faults_of_ours_keep_their_trace() -> None:
    assert failure(RunError("It broke.", "Mend it.")) == Failure("It broke. Mend it")
    assert failure(RunError("it broke")) == Failure("it broke")
    assert failure(KeyError()).message == "KeyError"
    assert failure(ValueError("one\ntwo")).message == "ValueError: one"
    assert "ValueError: one\ntwo" in failure(ValueError("one\ntwo")).trace


_begun, _stopped = threading.Event(), threading.Event()


def endless() -> None:
    """What a run does that would never end."""
    watch = Watch()
    _begun.set()
    try:
        while True:
            watch.progress("", 0, 1, "")
    except RunError:
        _stopped.set()


def test_a_cancelled_run_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import Client, LocalCluster

    monkeypatch.setattr(worker, "_POLL_SECONDS", 0.0)
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        future = client.submit(endless)
        assert _begun.wait(30)
        assert not _stopped.wait(0.3)
        future.cancel()
        assert _stopped.wait(30)
