"""Shared by all tests: the digits, a small teacher trained on them, a complete cache of it.

Session fixtures are never written to: take `cache_copy`, or copy with shutil.copytree.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from helpers import (
    DIGITS,
    Answer,
    Command,
    Runs,
    answer_to,
    cache_config_of,
    cut,
    job_of,
    resized,
    teacher_of,
)
from hypothesis import settings
from safetensors.torch import load_file, save_file

from stages.cache_teacher import CacheJob, cache_teacher, prepare
from stages.data import Splits, load_data
from stages.rectify import rectify
from stages.settings import CacheConfig, RectifyConfig
from stages.train_teacher import train_teacher

# Nothing is timed in a test: a busy machine must not fail one.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
torch.set_num_threads(1)  # small models on few cores: threads cost more than they bring


@pytest.fixture(scope="session", autouse=True)
def no_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in, or read from, the caches of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest.fixture(autouse=True)
def safe_path_is_of_one_command() -> Iterator[None]:
    """A command run in this process leaves no variable behind for programs that tests start."""
    yield
    os.environ.pop("PYTHONSAFEPATH", None)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(words: str | Sequence[str]) -> Answer:
        given = words.split() if isinstance(words, str) else words
        return answer_to(given, monkeypatch, capsys)

    return run


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where whoever runs the tests ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def digits() -> Splits:
    """1,000 training and 797 test images of 8 x 8."""
    return load_data(DIGITS)


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory: pytest.TempPathFactory, digits: Splits) -> Path:
    """The run directory of a resnet8 after two epochs: right on some rows, wrong on many."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    train_teacher(teacher_of(), run, splits=digits)
    return run


@pytest.fixture(scope="session")
def other_teacher_run(tmp_path_factory: pytest.TempPathFactory, teacher_run: Path) -> Path:
    """The run directory of one that has its architecture, and other weights in the last layer."""
    run = Path(shutil.copytree(teacher_run, tmp_path_factory.mktemp("other") / "run"))
    weights = load_file(run / "model.safetensors")
    last = [name for name in weights if weights[name].ndim == 2][-1]
    save_file({**weights, last: -weights[last]}, run / "model.safetensors")
    (run / "summary.json").unlink()  # which has a digest of the old ones
    return run


@pytest.fixture(scope="session")
def cache_config(teacher_run: Path) -> CacheConfig:
    """Three views of three blocks each: 334, 334 and 332 rows."""
    return cache_config_of(teacher_run, views=3, block_rows=350)


@pytest.fixture(scope="session")
def finished_cache(
    tmp_path_factory: pytest.TempPathFactory, cache_config: CacheConfig, digits: Splits
) -> Path:
    """A complete float32 cache. Read only: many tests share it."""
    path = tmp_path_factory.mktemp("cache") / "digits.zarr"
    cache_teacher(prepare(cache_config, digits), path)
    return path


@pytest.fixture(scope="session")
def rectified_cache(tmp_path_factory: pytest.TempPathFactory, finished_cache: Path) -> Path:
    """The same with the rectification pairwise-T4. Read only."""
    path = Path(shutil.copytree(finished_cache, tmp_path_factory.mktemp("cache") / "digits.zarr"))
    rectify(path, RectifyConfig())
    return path


@pytest.fixture
def cache_copy(finished_cache: Path, tmp_path: Path) -> Path:
    """A complete cache of one's own."""
    return Path(shutil.copytree(finished_cache, tmp_path / "copy.zarr"))


@pytest.fixture(scope="session")
def small_splits(digits: Splits) -> Splits:
    """300 training and 100 test images: those of `small_cache`."""
    return cut(digits, 300, 100)


@pytest.fixture(scope="session")
def tiny_splits(digits: Splits) -> Splits:
    """60 training and 20 test images: those of `tiny_cache`."""
    return cut(digits, 60, 20)


@pytest.fixture(scope="session")
def small_job(teacher_run: Path, small_splits: Splits) -> CacheJob:
    """Two views of 300 samples in three blocks each, as klt."""
    return job_of(teacher_run, small_splits, encoding="klt", block_rows=100)


def finished(job: CacheJob, path: Path) -> Path:
    """A complete cache with the rectification pairwise-T4."""
    cache_teacher(job, path)
    rectify(path, RectifyConfig())
    return path


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory, small_job: CacheJob) -> Path:
    """A complete cache with the rectification pairwise-T4. Read only: many tests share it."""
    return finished(small_job, tmp_path_factory.mktemp("small") / "small.zarr")


@pytest.fixture(scope="session")
def small_runs(
    tmp_path_factory: pytest.TempPathFactory, small_cache: Path, small_splits: Splits
) -> Runs:
    """Students of the small cache."""
    return Runs(small_cache, small_splits, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def small_copy(small_cache: Path, tmp_path: Path) -> Path:
    """A small cache of one's own."""
    return Path(shutil.copytree(small_cache, tmp_path / "small.zarr"))


@pytest.fixture(scope="session")
def tiny_job(small_job: CacheJob) -> CacheJob:
    """Two views of 60 samples in two blocks each, as float32."""
    return resized(small_job, 60, 20, block_rows=30, encoding="float32")


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory, tiny_job: CacheJob) -> Path:
    """A complete cache with the rectification pairwise-T4. Read only: many tests share it."""
    return finished(tiny_job, tmp_path_factory.mktemp("tiny") / "tiny.zarr")


@pytest.fixture(scope="session")
def tiny_runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path, tiny_splits: Splits
) -> Runs:
    """Students of the tiny cache."""
    folder = tmp_path_factory.mktemp("tiny-runs")
    return Runs(tiny_cache, tiny_splits, folder, train__batch_size=30, train__lr=0.02)


@pytest.fixture
def tiny_copy(tiny_cache: Path, tmp_path: Path) -> Path:
    """A tiny cache of one's own."""
    return Path(shutil.copytree(tiny_cache, tmp_path / "tiny.zarr"))


@pytest.fixture(scope="session")
def array_bytes() -> Callable[[Path], dict[str, bytes]]:
    """Everything under a store but its commit records: relative path -> content.

    The root's zarr.json is left out as well: it holds provenance.
    """

    def read(store: Path) -> dict[str, bytes]:
        files = [path for path in store.rglob("*") if path.is_file()]
        contents = {str(path.relative_to(store)): path.read_bytes() for path in files}
        return {
            name: content
            for name, content in contents.items()
            if not name.startswith("commits/") and name != "zarr.json"
        }

    return read
