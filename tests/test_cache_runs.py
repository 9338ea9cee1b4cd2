"""Several views of an image made while it is decoded: the same bytes, fewer decodes."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch import Tensor

from stages.cache.commits import CommitLog
from stages.cache.layout import BlockId
from stages.cache_teacher import cache_teacher
from stages.data import Splits
from stages.errors import ConfigError
from stages.teacher.blocks import BackgroundWriter, in_runs, runs_of
from stages.teacher.job import CacheJob
from stages.teacher.memory import held_bytes, views_at_once
from stages.teacher.plan import plan_cache

VIEWS = 5


class Decoded(Counter[int]):
    """Loads images and counts how often each was asked for."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.of = images

    def __call__(self, index: int) -> Tensor:
        self[index] += 1
        return self.of[index]


@pytest.fixture
def job(tiny_job: CacheJob) -> CacheJob:
    """Five views of 60 samples that are not in memory, in two blocks of 30 each."""
    return streamed(tiny_job)


def streamed(job: CacheJob) -> CacheJob:
    train, data = job.splits.train, msgspec.structs.replace(job.config.data, workers=0)
    assert train.images is not None
    train = dataclasses.replace(train, load=Decoded(train.images), images=None)
    config = msgspec.structs.replace(job.config, data=data, views=VIEWS, batch_size=16)
    return dataclasses.replace(job, splits=Splits(train, job.splits.test), config=config)


def with_views(job: CacheJob, at_once: int | None, **changes: Any) -> CacheJob:
    config = msgspec.structs.replace(job.config, views_at_once=at_once, **changes)
    return dataclasses.replace(job, config=config)


def decoded(job: CacheJob) -> Decoded:
    found = job.splits.train.load
    assert isinstance(found, Decoded)
    return found


def whole(store: Path) -> dict[str, bytes]:
    """Every file, commit records and provenance included."""
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def alone(tiny_job: CacheJob, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store that is made one view at a time."""
    out = tmp_path_factory.mktemp("alone") / "c.zarr"
    cache_teacher(with_views(streamed(tiny_job), 1), out)
    return whole(out)


@pytest.mark.parametrize(
    ("at_once", "passes"), [(3, 3), pytest.param(9, 2, marks=pytest.mark.slow)]
)
def test_the_store_does_not_depend_on_views_at_once(
    job: CacheJob, alone: dict[str, bytes], tmp_path: Path, at_once: int, passes: int
) -> None:
    """The encoding is fitted to view 0 of both blocks; the other four views come in runs."""
    cache_teacher(with_views(job, at_once), tmp_path / "c.zarr")

    assert whole(tmp_path / "c.zarr") == alone
    # beside probes, statistics and the fit, which look at some or at all of them
    assert min(decoded(job).values()) == passes


def test_half_a_run(
    job: CacheJob, alone: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends between two commits of one run of views, gone on with."""
    out, commit, done = tmp_path / "c.zarr", CommitLog.commit, []

    def stops(log: CommitLog, at: BlockId, record: Any) -> None:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(at)
        commit(log, at, record)

    monkeypatch.setattr(CommitLog, "commit", stops)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(with_views(job, 4), out)
    monkeypatch.setattr(CommitLog, "commit", commit)
    there = {view for view, _ in done}
    assert 1 < len(there) < VIEWS

    left = [at for at in in_runs(every_block(), 4) if at not in done]
    decoded(job).clear()
    cache_teacher(with_views(job, 3), out)
    assert whole(out) == alone
    assert min(decoded(job).values()) <= len(runs_of(left, 3))


def every_block() -> list[BlockId]:
    return [BlockId(view, block) for view in range(VIEWS) for block in range(2)]


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
def test_runs_hold_every_block_once_in_few_passes(at_once: int) -> None:
    blocks = [at for at in every_block() if at not in {(0, 0), (2, 1), (3, 1)}]

    runs = runs_of(blocks, at_once)

    found = [BlockId(view, run.block) for run in runs for view in run.views]
    assert sorted(found) == sorted(blocks)
    assert found == in_runs(blocks, at_once)
    for block in range(2):
        own = [run for run in runs if run.block == block]
        wanted = sum(at.block == block for at in blocks)
        assert len(own) == -(-wanted // at_once)
        assert all(len(run.views) <= at_once for run in own)
    if at_once == 1:
        assert found == sorted(blocks)


@pytest.mark.parametrize(
    ("free", "asked", "expected"),
    [
        pytest.param(2**40, None, 5, id="every-view-fits"),
        pytest.param(0, None, 1, id="no-memory"),
        pytest.param(2**40, 3, 3, id="asked"),
        pytest.param(2**40, 50, 5, id="no-more-than-there-are"),
        pytest.param(0, 1, 1, id="one-is-never-refused"),
    ],
)
def test_views_at_once_are_chosen_from_memory(
    job: CacheJob, free: int, asked: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.teacher.memory.free_memory", lambda: free)
    assert views_at_once(with_views(job, asked)) == expected
    in_memory = dataclasses.replace(
        job,
        splits=Splits(dataclasses.replace(job.splits.train, images=decoded(job).of), None),  # type: ignore[arg-type]
    )
    assert views_at_once(with_views(in_memory, None)) == 1


def test_what_is_held_is_bounded(job: CacheJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: blocks of 30 rows of 10 classes as float32, three of them beyond the run; batches
    of 16 images of 64 pixels.
    """
    assert held_bytes(job, 4) == (4 + 2 + 1) * 4 * 10 * 30 + 2 * 4 * 16 * 64
    monkeypatch.setattr("stages.teacher.memory.MOST_BYTES", held_bytes(job, 4) - 1)
    monkeypatch.setattr("stages.teacher.memory.free_memory", lambda: 2**40)
    assert views_at_once(job) == 3
    monkeypatch.setattr("stages.teacher.memory.free_memory", lambda: held_bytes(job, 4) - 1)
    with pytest.raises(ConfigError) as refused:
        views_at_once(with_views(job, 4))
    assert "--views-at-once" in refused.value.remedy


def test_the_plan_counts_decodes(
    job: CacheJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.teacher.measure.MEASURED_SECONDS", 0.05)
    plan = plan_cache(with_views(job, 3), tmp_path / "c.zarr")

    assert (plan.decodes, plan.singly_decodes) == (60 * 3, 60 * VIEWS)  # view 0; 1 to 3; 4
    assert plan.views_at_once == 3
    assert plan.hours > 0
    assert plan.singly_hours > 0


def test_a_writer_lets_as_many_wait_as_it_was_told() -> None:
    written: list[int] = []
    writer = BackgroundWriter(written.append, waiting=5)
    for i in range(5):
        writer.put(i)  # nobody takes them yet
    with writer.running():
        pass
    assert written == [*range(5)]
