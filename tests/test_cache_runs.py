"""Several views of an image made while it is decoded: the same bytes, fewer decodes."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from helpers import resized
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.commits import CommitLog
from stages.cache.layout import BlockId
from stages.cache_teacher import cache_teacher
from stages.data import Splits
from stages.errors import ConfigError
from stages.inputs.feed import ViewFeed
from stages.inputs.views import view_policy
from stages.teacher.blocks import BackgroundWriter
from stages.teacher.job import CacheJob
from stages.teacher.logits import TeacherPass
from stages.teacher.plan import plan_cache
from stages.teacher.runs import held_bytes, in_runs, runs_of, views_at_once

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
    return with_views(streamed(resized(tiny_job, 60, 20, block_rows=30)), None)


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


@pytest.fixture
def alone(job: CacheJob, tmp_path: Path) -> dict[str, bytes]:
    """The store that is made one view at a time."""
    cache_teacher(with_views(job, 1), tmp_path / "alone.zarr")
    decoded(job).clear()
    return whole(tmp_path / "alone.zarr")


@pytest.mark.parametrize(("at_once", "passes"), [(2, 3), (3, 3), (9, 2)])
def test_the_store_does_not_depend_on_views_at_once(
    job: CacheJob, alone: dict[str, bytes], tmp_path: Path, at_once: int, passes: int
) -> None:
    """The encoding is fitted to view 0 of both blocks; the other four views come in runs."""
    cache_teacher(with_views(job, at_once), tmp_path / "c.zarr")

    assert whole(tmp_path / "c.zarr") == alone
    # beside probes, statistics and the fit, which look at some or at all of them
    assert min(decoded(job).values()) == passes


@pytest.mark.parametrize("at_once", [2, 4])
def test_some_blocks_of_a_run_may_be_there(
    job: CacheJob,
    alone: dict[str, bytes],
    tmp_path: Path,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
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
        cache_teacher(with_views(job, at_once), out)
    monkeypatch.setattr(CommitLog, "commit", commit)
    there = {view for view, _ in done}
    assert 1 < len(there) < VIEWS

    left = [at for at in in_runs(every_block(), at_once) if at not in done]
    decoded(job).clear()
    cache_teacher(with_views(job, 3), out)
    assert whole(out) == alone
    assert min(decoded(job).values()) <= len(runs_of(left, 3))


def every_block() -> list[BlockId]:
    return [BlockId(view, block) for view in range(VIEWS) for block in range(2)]


@pytest.mark.parametrize("policy", ["resized-crop-flip+erasing", "pad-crop|pad-crop-flip+erasing"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_a_feed_shows_each_view_as_if_it_were_alone(
    job: CacheJob, policy: str, workers: int
) -> None:
    made, order = view_policy(policy, 3), torch.arange(60).flip(0)
    for train in (job.splits.train, dataclasses.replace(job.splits.train, images=decoded(job).of)):
        feed = ViewFeed(train, made, torch.device("cpu"), 8, workers)
        shown = list(feed.views(order, (4, 1, 2), 13, skip=1))
        singly = [list(feed.batches(order, view, 13, skip=1)) for view in (4, 1, 2)]
        feed.close()
        assert len(shown) == 4
        for at_once, one_by_one in zip(shown, zip(*singly, strict=True), strict=True):
            for one, other in zip(at_once, one_by_one, strict=True):
                assert torch.equal(one.pixels, other.pixels)
                assert torch.equal(one.samples, other.samples)


def test_partners_of_mixed_views_are_those_of_each_view(job: CacheJob) -> None:
    made, order = view_policy("resized-crop-flip+mixup:alpha=0.8"), torch.arange(20)
    feed = ViewFeed(job.splits.train, made, torch.device("cpu"), 8, 0)
    at_once = list(feed.views(order, (1, 3), 7))
    singly = zip(*(list(feed.batches(order, view, 7)) for view in (1, 3)), strict=True)
    for both, apart in zip(at_once, singly, strict=True):
        for mine, theirs in zip(both, apart, strict=True):
            for name in ("samples", "pixels", "partners", "shares"):
                assert torch.equal(getattr(mine, name), getattr(theirs, name))


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
    monkeypatch.setattr("stages.teacher.runs.free_memory", lambda: free)
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
    monkeypatch.setattr("stages.teacher.runs.MOST_BYTES", held_bytes(job, 4) - 1)
    monkeypatch.setattr("stages.teacher.runs.free_memory", lambda: 2**40)
    assert views_at_once(job) == 3
    monkeypatch.setattr("stages.teacher.runs.free_memory", lambda: held_bytes(job, 4) - 1)
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


def test_probes_are_those_of_views_alone(job: CacheJob, tmp_path: Path) -> None:
    """The pixel rule: what a cache was made from at three views at once is what it says it is."""
    cache_teacher(with_views(job, 3), tmp_path / "c.zarr")
    cache = LogitCache.open(tmp_path / "c.zarr")
    teacher = TeacherPass.of(job)
    samples = cache.dataset_index[:16]
    for view in range(VIEWS):
        live = teacher.logits(samples, view)
        stored = cache.read_view(view).rows(samples)
        torch.testing.assert_close(stored, live, rtol=1e-5, atol=1e-5)
