"""Benchmarks of a GPU, without one: parts in bounds, and a rehearsal of what they would run."""

import math
import shutil
import time
from pathlib import Path

import forks
import msgspec
import pytest

from benchmarks import epochs, rates, smoke, training
from benchmarks.book import Book, Result, Run, code_digest, read_runs
from benchmarks.measure import Figure, Ratio
from benchmarks.parts import Where
from benchmarks.table import tables

SCRIPT = Path(__file__).parent / "bounded_parts.py"


class Measured:
    """What one command of `bounded_parts.py` left."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.book = folder, folder / "book.json"

    def words(self, *names: str, seconds: float = 100) -> list[str]:
        return [str(SCRIPT), str(self.book), str(self.folder), str(seconds), *names]

    @property
    def results(self) -> dict[str, Result]:
        runs = read_runs(self.book) if self.book.exists() else []
        return {part.name: part for run in runs for part in run.parts}

    @property
    def begun(self) -> list[list[str]]:
        """Name and process of every part that was begun."""
        file = self.folder / "begun"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.slow
def test_a_part_that_fails_hangs_or_dies_costs_only_itself(tmp_path: Path) -> None:
    measured = Measured(tmp_path)
    names = ["well-1", "well-2", "fails", "well-3", "hangs", "dies", "cannot", "well-4"]
    done = forks.run(measured.words(*names))
    assert done.returncode == 3, done.stderr  # how many failed
    results = measured.results
    assert [*results] == names
    bad = dict.fromkeys(("fails", "hangs", "dies"), "failed") | {"cannot": "skipped"}
    assert {n: result.state for n, result in results.items()} == dict.fromkeys(names, "ok") | bad
    assert results["fails"].message == "ValueError: no such kernel"
    assert "in fails" in results["fails"].trace
    assert "given up" in results["hangs"].message
    assert "exit code 7" in results["dies"].message
    assert results["cannot"].message == "needs CUDA"
    assert results["well-4"].figures == [Figure(name="answer", value=42, unit="")]
    lines = [line.split() for line in done.stdout.splitlines() if " s  " in line]
    assert [(line[3], line[0]) for line in lines] == [(n, r.state) for n, r in results.items()]
    processes = dict(measured.begun)
    assert processes["well-1"] == processes["well-2"] == processes["fails"]
    assert processes["cannot"] == processes["well-4"]  # one that is skipped has done no harm
    assert len(set(processes.values())) == 4


def test_a_killed_measurement_leaves_what_it_had_and_goes_on(tmp_path: Path) -> None:
    measured = Measured(tmp_path)
    words = measured.words("well-1", "fails", "waits", "well-2")
    first = forks.Started(words)
    deadline = time.monotonic() + 60
    while len(measured.begun) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert {name: result.state for name, result in measured.results.items()} == {
        "well-1": "ok",
        "fails": "failed",
    }
    (tmp_path / "go").touch()  # also lets the process go that was left alone
    again = forks.run(words)
    assert "1 of 4 parts" in again.stdout
    assert [name for name, _ in measured.begun[3:]] == ["fails", "waits", "well-2"]
    assert {result.state for result in measured.results.values()} == {"ok", "failed"}


def test_no_part_is_begun_when_time_is_up(tmp_path: Path) -> None:
    measured = Measured(tmp_path)
    assert forks.run(measured.words("well-1", "well-2", seconds=0.5)).returncode == 0
    assert {result.message for result in measured.results.values()} == {"no time is left"}
    assert measured.begun == []


def a_run(device: str, code: str = "abc", kind: str = "rates") -> Run:
    return Run(kind=kind, machine={"device": device}, versions={"torch": "2"}, code=code)


def test_results_belong_to_a_device_and_a_state_of_the_code(tmp_path: Path) -> None:
    path, ok = tmp_path / "gpu.json", Result(name="a", state="ok", seconds=1)
    Book(path, a_run("H100")).add(ok)
    book = Book(path, a_run("H100"))
    assert book.done == {"a"}
    book.add(Result(name="a", state="failed", seconds=1))  # does not replace what was measured
    assert read_runs(path) == [msgspec.structs.replace(a_run("H100"), parts=[ok])]
    for other in (a_run("H200"), a_run("H100", code="def"), a_run("H100", kind="smoke")):
        assert Book(path, other).done == set()
        Book(path, other).add(ok)
    assert len(read_runs(path)) == 4
    digests = []  # of sources, which change with them
    (tmp_path / "stages").mkdir()
    for content in ("a = 1", "a = 2", "a = 1"):
        (tmp_path / "stages" / "a.py").write_text(content)
        digests.append(code_digest(tmp_path))
    assert digests[0] == digests[2] != digests[1]


def test_the_table_shows_the_last_run_of_every_device(tmp_path: Path) -> None:
    def measured(value: float) -> Result:
        ratio = Ratio(name="a / b", ours=(value,), yardstick=(1.0,))
        return Result(name="part", state="ok", seconds=1, ratios=[ratio])

    path = tmp_path / "gpu.json"
    Book(path, a_run("H100", "old")).add(measured(7.77))
    Book(path, a_run("H100", "new")).add(measured(1.25))
    Book(path, a_run("H100", kind="smoke")).add(measured(8.88))
    failed = Result(name="hung", state="failed", seconds=1, message="given up after 9 s")
    Book(path, a_run("H200")).add(failed)
    text = tables(tmp_path)
    assert "| a / b | 1.250 |" in text
    assert "7.77" not in text
    assert "8.88" not in text
    assert "device H100" in text
    assert "- hung: failed, given up after 9 s" in text
    assert text.count("Not measured yet.") == 1  # on a CPU


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory, teacher_run: Path) -> Where:
    """With the teacher that the smoke test would train."""
    folder = tmp_path_factory.mktemp("gpu")
    shutil.copytree(teacher_run, folder / "teacher")
    return Where("cpu", folder, quick=True)


@pytest.mark.slow
def test_the_smoke_test_rehearsed(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device agrees with itself; and what does not agree is noticed."""
    message, _ = smoke.stage_one(where, "float32")
    assert message == "logits within 0, 0 of 2,000 masks flip"
    monkeypatch.setitem(smoke.CLOSE, "bfloat16", 1e-6)
    with pytest.raises(AssertionError, match="logits differ"):
        smoke.stage_one(where, "bfloat16")
    message, _ = smoke.student_steps(where, "float32", smoke.KD[1:])
    assert "20 steps, within 0" in message
    other = smoke.losses_of(smoke.trainer_of(where, smoke.student(where, "cpu", lr=0.03)))
    ours = smoke.losses_of(smoke.trainer_of(where, smoke.student(where, "cpu")))
    with pytest.raises(AssertionError, match="losses differ"):
        smoke.close(other, ours, "float32", "another rate")


@pytest.mark.parametrize("losses", [[], [1.0], [1.0, math.nan]])
def test_missing_and_infinite_losses_are_not_close(losses: list[float]) -> None:
    with pytest.raises(AssertionError):
        smoke.close(losses, [1.0, 1.0], "float32", "a student")


@pytest.mark.slow
def test_the_rates_rehearsed(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epochs, "_TRIED_BATCHES", 1)
    monkeypatch.setattr(training, "_LOSS_TURNS", 1)
    _, found = rates.steps(where, "resnet8", 64)
    of = "resnet8, batch 64: "
    ratios = {one.name for one in found if isinstance(one, Ratio)}
    assert {
        of + "cached epoch / hard-label epoch",
        of + "online epoch / cached epoch",
        of + "online / cached, of the ideal (student + teacher forward) / student",
    } <= ratios
    images = [one for one in found if one.name == of + "cached student, training images"]
    assert [isinstance(one, Figure) and one.value > 0 for one in images] == [True]
