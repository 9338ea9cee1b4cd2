"""The whole pipeline on the embedded digits: one teacher pass, many cheap students.

The images are 8 x 8 and shifted by up to three pixels: 49 views, all of them cached. A shift that
far cuts a digit in half, so that even a good teacher is wrong on a few percent of the views.
"""

import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.console import Console, duration
from pipeline.report import write_report
from pipeline.sweep.directory import Result, as_lines
from pipeline.sweep.grid import Run
from pipeline.sweep.table import percent_text
from stages.cache.lock import exclusive
from stages.cache_teacher import cache_teacher, prepare
from stages.data import load_data
from stages.errors import RunError
from stages.files import replace_file
from stages.rectify import rectify
from stages.settings import (
    BiasSettings,
    CacheConfig,
    DataSettings,
    LossSettings,
    ModelSettings,
    RectifyConfig,
    SeedSettings,
    StudentConfig,
    TeacherConfig,
    TeacherSettings,
    TrainSettings,
)
from stages.train_student import train_student
from stages.train_teacher import train_teacher
from stages.training.run_folder import foreign_files, held, remove_run

DATA = DataSettings(dataset="digits")
AUGMENT = "pad-crop:pad=3"
VIEWS = 49
RECIPE: dict[str, Any] = {"batch_size": 64, "lr": 0.02, "schedule": "onecycle"}
TEACHER = TeacherConfig(
    data=DATA,
    model=ModelSettings(architecture="resnet9_w16"),
    augment=AUGMENT,
    train=TrainSettings(epochs=25, **RECIPE),
)
STUDENT = ModelSettings(architecture="resnet8")
STUDENT_TRAIN = TrainSettings(epochs=10, **{**RECIPE, "lr": 0.05})
HALF = LossSettings(ce_weight=0.5, weight=0.5)
STUDENTS: dict[str, tuple[LossSettings, BiasSettings]] = {
    "hard labels": (LossSettings(name="ce"), BiasSettings()),
    "KD": (HALF, BiasSettings()),
    "KD, bias-aware": (HALF, BiasSettings(mode="rectify")),
}


def run_demo(out: str, console: Console, overwrite: bool = False, seeds: int = 3) -> None:
    """Teacher, cache, rectification, students, a table and a page; everything under `out`.

    Raises RunError if `out` is used by another demo, or holds anything but an earlier one.
    """
    folder = Path(out)
    with held(folder):
        _make_room(folder, overwrite)
        _run(folder, console, seeds)


def _run(folder: Path, console: Console, seeds: int) -> None:
    cache = folder / "digits.zarr"
    splits = load_data(DATA)
    seconds: dict[str, float] = {}

    console.say("1) training a teacher on hard labels")
    with _timed(seconds, "teacher training"):
        teacher = train_teacher(TEACHER, folder / "teacher", splits=splits)

    console.say(f"2) stage one: caching the teacher's logits for {VIEWS} views of every sample")
    with _timed(seconds, "stage one"):
        weights = TeacherSettings(weights=str(folder / "teacher"))
        config = CacheConfig(data=DATA, teacher=weights, views=VIEWS, augment=AUGMENT)
        cached = cache_teacher(prepare(config, splits), cache, console)

    console.say("3) stage two: rectifying what the teacher has wrong")
    with _timed(seconds, "stage two"):
        wrong = rectify(cache, RectifyConfig(), console)["wrong_rate"]
    console.say(f"   the teacher is wrong on {wrong:.1%} of the views")

    console.say(f"4) stage three: {len(STUDENTS)} kinds of students, {seeds} seeds each")
    students: dict[str, list[dict[str, Any]]] = {name: [] for name in STUDENTS}
    ended: list[Result] = []
    for seed in range(seeds):
        for name in STUDENTS:
            run = f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            student = _student(cache, name, seed)
            summary = train_student(student, folder / "students" / run, splits=splits)
            students[name].append(summary)
            ended.append(Result(Run(run, name, {}, student), cached.test_top1, summary))
            done = sum(map(len, students.values()))
            console.progress("students", done, seeds * len(STUDENTS), "runs")

    _show(console, teacher, students, seconds)
    results = {"teacher": teacher, "students": students, "seconds": seconds}
    replace_file(folder / "students" / "results.jsonl", as_lines(ended).encode())
    replace_file(folder / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    page = write_report([str(folder)], str(folder / "report.html"))
    console.say(f"\nEverything lies in {folder}; `pipeline inspect {cache}` shows the cache.")
    console.say(f"All of it on one page: {page}")


def _student(cache: Path, name: str, seed: int) -> StudentConfig:
    loss, bias = STUDENTS[name]
    return StudentConfig(
        cache=str(cache),
        data=DATA,
        model=STUDENT,
        train=STUDENT_TRAIN,
        seed=SeedSettings(data=seed, init=seed),
        loss=loss,
        bias=bias,
    )


def _show(
    console: Console,
    teacher: dict[str, Any],
    students: dict[str, list[dict[str, Any]]],
    seconds: dict[str, float],
) -> None:
    top1 = {name: [s["last"]["test_top1"] for s in runs] for name, runs in students.items()}
    rows = [
        ("teacher", f"{teacher['parameters']:,}", f"{teacher['last']['test_top1']:.2%}", "", "")
    ]
    for name, values in top1.items():
        gain = statistics.mean(values) - statistics.mean(top1["hard labels"])
        epochs = [summary["epoch_seconds"] for summary in students[name]]
        rows.append(
            (
                name,
                f"{students[name][0]['parameters']:,}",
                percent_text(values),
                "" if name == "hard labels" else f"{100 * gain:+.2f}",
                f"{statistics.mean(epochs):.2g} s",
            )
        )
    columns = ("", "parameters", "test top-1, last epoch", "gain", "time an epoch")
    n = len(top1["hard labels"])
    over = f"n={n}" if n == 1 else f"mean ± standard deviation over n={n} seeds"
    console.table(f"on digits: {over}; time of the median epoch but the first", columns, rows)
    steps = [(step, duration(s)) for step, s in seconds.items()]
    console.table("done once, for all students", ("step", "time"), steps)


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - started


# ---- what an earlier demo has left ----------------------------------------------------------

_FILES = ("results.json", "report.html")


def _make_room(folder: Path, overwrite: bool) -> None:
    """Remove an earlier demo by the names of its files. Raises RunError, before anything is
    removed, unless it is wanted and nothing else lies there.
    """
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise RunError(f"{folder} is not empty", "Add --overwrite, or choose another --out.")
    runs = [folder / "teacher", *_folders(folder / "students")]
    if foreign := [*_foreign(folder, runs)]:
        raise RunError(
            f"{folder} holds what no demo has made: {', '.join(map(str, foreign[:3]))}"
            + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""),
            "Move it elsewhere, or choose another --out.",
        )
    with contextlib.ExitStack() as stack:
        for run in runs:
            if run.exists():
                stack.enter_context(held(run))
        for run in runs:
            if run.exists():
                remove_run(run)
        cache = folder / "digits.zarr"
        if cache.exists():
            with exclusive(cache):
                shutil.rmtree(cache)
        files = [folder / "students" / "results.jsonl", *(folder / name for name in _FILES)]
        for file in files:
            file.unlink(missing_ok=True)


def _foreign(folder: Path, runs: list[Path]) -> Iterator[Path]:
    """What lies in a demo's folder and is not of a demo."""
    known = {"teacher", "students", "digits.zarr", *_FILES}
    for path in (folder, *runs, folder / "students", folder / "digits.zarr"):
        if path.is_symlink() and path != folder:
            yield path
    yield from (path for path in sorted(folder.iterdir()) if path.name not in known)
    for run in runs:
        if run.exists():
            yield from (run / name for name in foreign_files(run))
    if (students := folder / "students").exists():
        files = (path for path in sorted(students.iterdir()) if not path.is_dir())
        yield from (path for path in files if path.name != "results.jsonl")
    if (cache := folder / "digits.zarr").exists():
        yield from (path for path in sorted(cache.iterdir()) if not _of_a_cache(path))


def _of_a_cache(path: Path) -> bool:
    """Whether it is a part of a store: its document, its records, or an array or a group."""
    return path.name in ("zarr.json", "commits") or (path / "zarr.json").is_file()


def _folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
