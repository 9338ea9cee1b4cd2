"""Caches whose views depend on the first one: what is read, told, mended and computed again."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from damage import at_call, flip, tree
from helpers import Words, resized, same_weights, student_of
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.blocks import BlockGroup
from stages.cache.commits import CommitLog
from stages.cache.layout import BlockId
from stages.cache.records import seal_records, unsealed
from stages.cache_teacher import CacheJob, cache_teacher
from stages.cached_dataset import CachedDataset
from stages.cached_epochs import CachedEpochs
from stages.distributed import Ranks
from stages.errors import AnchorError, CacheError
from stages.inputs.datasets import load_splits
from stages.order import ViewSchedule
from stages.rectify import rectify
from stages.repair import repair
from stages.settings import DataSettings, LossSettings, RectifyConfig, TrainSettings
from stages.targets import in_place
from stages.targets.chunks import SlabPlan, plan_slabs, slab_bytes
from stages.targets.ensemble import EnsembleTargets
from stages.targets.in_place import kept_in_place, take
from stages.targets.reader import TargetReader
from stages.teacher.blocks import in_runs, my_anchor_runs, my_runs
from stages.teacher.logits import TeacherPass
from stages.teacher.plan import plan_cache
from stages.train_student import train_student, train_together
from stages.verify import verify, verify_live

SAMPLES, VIEWS, BLOCKS = 90, 3, 3
ALL = torch.arange(SAMPLES)
NAME = "pairwise-T4"
EVERY = [BlockId(view, block) for view in range(VIEWS) for block in range(BLOCKS)]


@pytest.fixture(scope="module")
def job(small_job: CacheJob) -> CacheJob:
    """Three views of 90 samples in three blocks each."""
    return resized(
        small_job, SAMPLES, 20, block_rows=30, views=VIEWS, encoding="klt-anchored:step=0.4,top=3"
    )


@pytest.fixture(scope="module")
def made(job: CacheJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a rectification. Read only."""
    path = tmp_path_factory.mktemp("anchored") / "c.zarr"
    cache_teacher(job, path)
    rectify(path, RectifyConfig())
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.teacher.measure.MEASURED_SECONDS", 0.05)


@pytest.fixture
def mine(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "c.zarr"))


def shards(store: Path, view: int, block: int) -> set[str]:
    """The arrays at the root that have an object for a block."""
    found = store.glob(f"*/c/{view}/{block}*")
    return {path.relative_to(store).parts[0] for path in found}


def reader_of(
    cache: LogitCache, schedule: ViewSchedule, name: str | None, memory: int | None = None
) -> tuple[TargetReader, SlabPlan]:
    """How views are read in batches of ten, in so many bytes."""
    train = TrainSettings(epochs=3, batch_size=10)
    bound = None if memory is None else str(memory)
    config = student_of(cache.path, train=train, slab_memory=bound)
    plan = plan_slabs([cache], schedule, ALL, config, torch.device("cpu"))
    return TargetReader([cache], name, schedule, plan, cache.labels), plan


OF_FIRST = {"prediction", *(f"anchor_{n}" for n in ("code", "pair", "three", "five", "top"))}
OF_OTHERS = {"prediction", *(f"logits_{n}" for n in ("code", "pair", "three", "five", "top"))}


# ---- what lies there, and who reads it ------------------------------------------------------


def test_a_block_has_the_arrays_of_its_view(made: Path, job: CacheJob) -> None:
    cache = LogitCache.open(made)

    assert cache.complete_views == list(range(VIEWS))
    for at in EVERY:
        arrays = OF_OTHERS if at.view else OF_FIRST
        assert shards(made, *at) & cache.blocks.specs.keys() == arrays
        record = cache.commits.of_view(at.view)[at.block]
        assert {key.partition("/")[0] for key in record["objects"]} == arrays
        assert ("anchor" in record) == (at.view > 0)
    assert verify(made).faults == []
    assert verify_live(cache, job, 60) == []
    plan = plan_cache(job, made)
    assert (plan.encoding, plan.missing_blocks) == ("klt-anchored", 0)


def test_rows_are_the_teachers(made: Path, job: CacheJob) -> None:
    cache, teacher = LogitCache.open(made), TeacherPass.of(job)
    for view in range(VIEWS):
        exact, targets = teacher.logits(ALL, view), cache.read_view(view)
        found = targets.rows(ALL)
        assert torch.equal(found.argmax(1), exact.argmax(1))
        assert torch.equal(targets.predictions[cache.row_of].long(), exact.argmax(1))
        blocks = torch.cat([cache.read_block(view, block).logits for block in range(BLOCKS)])
        assert torch.equal(blocks[cache.row_of], found)
        runs = [slice(60, 90), slice(5, 31)]
        some = cache.read_view(view, runs=runs)
        samples = cache.dataset_index[torch.cat([torch.arange(r.start, r.stop) for r in runs])]
        assert torch.equal(some.rows(samples), found[samples])
        again = cache.read_view(view, None, runs, some.anchor)
        assert torch.equal(again.rows(samples), found[samples])


def test_views_that_are_held_share_the_anchor(made: Path) -> None:
    """As many bytes as are counted: the anchor's once, whichever view is read first."""
    cache = LogitCache.open(made)
    schedule = ViewSchedule([(view,) for view in range(VIEWS)], 0, 2 * VIEWS)
    reader, plan = reader_of(cache, schedule, NAME)
    assert plan.resident
    storages: dict[int, int] = {}
    for epoch in range(VIEWS):
        targets: Any = reader.of_epoch(epoch)
        parts = [*targets.arrays.values(), *targets.anchor.values(), targets.predictions]
        parts += [targets.rectified.label_logit, targets.rectified.predicted_logit]
        parts += [targets.labels, targets.row_of]
        storages |= {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parts}
    counted = slab_bytes([cache], SAMPLES, VIEWS)
    anchor = SAMPLES * cache.anchor_row_bytes
    assert counted - 2 * anchor < sum(storages.values()) <= counted
    assert counted < VIEWS * slab_bytes([cache], SAMPLES)


def test_targets_in_groups_are_those_of_whole_views(made: Path) -> None:
    cache = LogitCache.open(made)
    schedule = ViewSchedule([(view,) for view in range(VIEWS)], 0, VIEWS)
    reader, plan = reader_of(cache, schedule, NAME, 2 * slab_bytes([cache], 30))
    assert plan.groups is not None
    for epoch in range(VIEWS):
        (view,) = schedule.of_epoch(epoch)
        order, whole = plan.order(ALL, 0, epoch), cache.read_view(view, NAME)
        for samples in order.split(10):
            found = reader.of_epoch(epoch).rectified_rows(samples)
            assert torch.equal(found, whole.rectified_rows(samples))


def test_a_pair_of_views_in_groups_reads_the_anchor_once(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, reads, read = LogitCache.open(made), [], BlockGroup.read_anchor

    def counted(blocks: BlockGroup, *what: Any) -> dict[str, Tensor]:
        reads.append(what)
        return read(blocks, *what)

    monkeypatch.setattr(BlockGroup, "read_anchor", counted)
    reader, _ = reader_of(cache, ViewSchedule([(1, 2)], 0, 1), None)

    both = reader.of_epoch(0).rows(ALL.repeat(2))

    assert len(reads) == 1
    assert torch.equal(both, torch.cat([cache.read_view(v).rows(ALL) for v in (1, 2)]))


# ---- in which order it is written -----------------------------------------------------------


def test_a_block_is_not_written_before_the_one_it_depends_on(made: Path, mine: Path) -> None:
    cache = LogitCache.open(mine, writable=True)
    rows = LogitCache.open(made).read_block(1, 2)
    cache.commits.forget(BlockId(0, 2))

    with pytest.raises(AnchorError, match="block 2 of view 0 is not there"):
        cache.write_block(1, 2, rows.logits, rows.predictions, {})
    assert cache.complete_views == []
    with pytest.raises(CacheError, match="view 0 of logits is not complete"):
        cache.read_view(1)
    with pytest.raises(AnchorError, match="not there"):
        cache.read_block(1, 2)
    assert torch.equal(cache.read_block(1, 1).logits, LogitCache.open(made).read_block(1, 1).logits)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("at_once", [1, 2, 9])
@pytest.mark.parametrize("fitted", [0, 4])
def test_ranks_share_the_first_view_with_all_that_is_decoded_with_it(
    world: int, at_once: int, fitted: int
) -> None:
    order = in_runs(EVERY, at_once)
    there, missing = order[:fitted], order[fitted:]

    shares = [my_anchor_runs(missing, at_once, Ranks(rank, world)) for rank in range(world)]

    assert all(run.views[0] == 0 for runs in shares for run in runs)
    every = [BlockId(v, run.block) for runs in shares for run in runs for v in run.views]
    assert len({*every}) == len(every)
    assert {at for at in missing if at.view == 0} <= {*every}
    assert {at.block for at in every} == {at.block for at in missing if at.view == 0}
    left = [at for at in missing if at not in every]
    rest = [
        BlockId(v, run.block)
        for rank in range(world)
        for run in my_runs(left, at_once, Ranks(rank, world))
        for v in run.views
    ]
    assert sorted([*every, *rest, *there]) == sorted(EVERY)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_view_alone_is_refused_before_anything_is_written(
    job: CacheJob, tmp_path: Path
) -> None:
    alone = resized(job, SAMPLES, 20, views=1)
    for run in (cache_teacher, plan_cache):
        with pytest.raises(CacheError, match="there is one view") as told:
            run(alone, tmp_path / "c.zarr")
        assert "--views 2" in told.value.remedy
    assert not LogitCache.exists(tmp_path / "c.zarr")


# ---- what is damaged, and made again --------------------------------------------------------


def forgotten(store: Path) -> None:
    LogitCache.open(store, writable=True).commits.forget(BlockId(0, 1))


@pytest.mark.parametrize(
    "harm",
    [
        lambda store: flip(store / "anchor_code/c/0/1/0"),
        pytest.param(forgotten, marks=pytest.mark.slow),
    ],
    ids=["flipped", "unmade"],
)
def test_a_damaged_block_of_the_first_view_is_told_alone_and_mended(
    made: Path, mine: Path, job: CacheJob, harm: Callable[[Path], object]
) -> None:
    """What depends on it is intact, and stays: on this machine the same bytes come back. Other
    objects: tests/test_fault_matrix.py.
    """
    others = [key for key in tree(mine) if "/c/1/" in key or "/c/2/" in key]
    before = {key: (mine / key).stat().st_mtime_ns for key in others}
    harm(mine)

    faults = verify(mine).faults
    assert {fault.part for fault in faults} <= {"logits", f"rectified/{NAME}"}
    assert {fault.at for fault in faults} == {BlockId(0, 1)}
    assert any(fault.part == "logits" for fault in faults)
    with pytest.raises(CacheError):
        LogitCache.open(mine).read_view(2)

    assert repair(mine, job, faults).faults == []

    assert tree(mine) == tree(made)
    assert {key: (mine / key).stat().st_mtime_ns for key in before} == before


@pytest.mark.slow
def test_what_it_was_fitted_to_is_fitted_again(made: Path, mine: Path, job: CacheJob) -> None:
    """With the parameters that were asked for, to the same two views."""
    flip(mine / "klt_predictor/c/0/0")
    assert repair(mine, job, verify(mine).faults).faults == []
    assert tree(mine) == tree(made)


def moved_anchor(store: Path) -> None:
    """Another block of the first view in the place of one, as another machine may compute it."""
    cache = LogitCache.open(store, writable=True)
    rows = cache.read_block(0, 1)
    cache.commits.forget(BlockId(0, 1))
    cache.write_block(0, 1, rows.logits * 1.2, rows.predictions, {})


def test_blocks_beside_another_first_view_are_refused_and_computed_again(
    made: Path, mine: Path, job: CacheJob
) -> None:
    moved_anchor(mine)
    beside = {BlockId(view, 1) for view in (1, 2)}

    cache, whole = LogitCache.open(mine), LogitCache.open(made)
    for read in (lambda: cache.read_view(1), lambda: cache.read_block(2, 1)):
        with pytest.raises(CacheError, match="beside another block of view 0"):
            read()
    assert torch.equal(cache.read_block(2, 0).logits, whole.read_block(2, 0).logits)
    assert {fault.at for fault in verify(mine).faults if fault.part == "logits"} == beside
    assert set(cache.blocks.stale()) == beside

    assert cache_teacher(job, mine).computed_blocks == 2

    cache = LogitCache.open(mine)
    assert cache.blocks.stale() == []
    assert {at for at in EVERY if not cache.rectification(NAME).commits.has(at)} == beside
    coding: Any = cache.encoding
    for view in (1, 2):
        ours, theirs = cache.read_view(view), whole.read_view(view)
        assert torch.equal(ours.predictions, theirs.predictions)
        apart = (ours.rows(ALL) - theirs.rows(ALL)).abs().max()
        assert float(apart) <= 4 * coding.others.step
    rectify(mine, RectifyConfig())
    left = {fault.at for fault in verify(mine).faults}
    assert left <= {BlockId(0, 1)}  # rectified from the rows before: that is told as well


@pytest.mark.slow
def test_repair_computes_what_stood_beside_another_first_view(
    made: Path, mine: Path, job: CacheJob
) -> None:
    moved_anchor(mine)
    assert repair(mine, job, verify(mine).faults).faults == []
    same = {key for key, content in tree(made).items() if tree(mine).get(key) == content}
    changed = {key for key in tree(made) if key not in same and "/c/" in key}
    assert changed
    assert all(key.split("/c/")[1].split("/")[1] == "1" for key in changed)


def test_an_anchor_of_another_record_is_told(mine: Path) -> None:
    """Records and objects of two blocks exchanged, each intact."""
    file = mine / "commits/logits/v00002.json"
    records = unsealed(file.read_bytes())
    records[0]["anchor"], records[1]["anchor"] = records[1]["anchor"], records[0]["anchor"]
    file.write_bytes(seal_records(records))
    assert {f.at for f in verify(mine).faults} == {BlockId(2, 0), BlockId(2, 1)}
    with pytest.raises(CacheError, match="beside another block"):
        LogitCache.open(mine).read_view(2)


def test_a_run_that_was_stopped_goes_on(
    job: CacheJob, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the objects of a block, before its record. Anywhere: tests/cache/test_kill.py."""
    out, stops = tmp_path / "c.zarr", at_call(3, KeyboardInterrupt, CommitLog.commit)
    monkeypatch.setattr(CommitLog, "commit", lambda *what: stops(*what))
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(job, out)
    monkeypatch.undo()
    words = Words()
    assert cache_teacher(job, out, words).computed_blocks == len(EVERY) - 2
    assert words.done[-1] == 1
    rectify(out, RectifyConfig())
    ours, whole = ({k: c for k, c in tree(p).items() if "/c/" in k} for p in (out, made))
    assert ours == whole


# ---- students -------------------------------------------------------------------------------


def test_targets_are_kept_in_place_where_they_are_decoded(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoded, the first view has other arrays than those beside it."""
    cache = LogitCache.open(made)
    views = [cache.read_view(view, NAME) for view in range(VIEWS)]
    kept = kept_in_place(views[0])
    assert kept is not None
    for view in (1, 0, 2):
        take(kept, views[view])
        assert torch.equal(kept.rows(ALL), views[view].rows(ALL))
        assert torch.equal(kept.rectified_rows(ALL), views[view].rectified_rows(ALL))
    both = EnsembleTargets([views[1], views[2]], cache.labels)
    assert kept_in_place(both) is not None

    monkeypatch.setattr(in_place, "DECODED_BYTES", 0)
    assert kept_in_place(views[0]) is None
    assert kept_in_place(both) is None


def ninety(split: str) -> list[tuple[Tensor, int]]:
    """A dataset by its name."""
    train, test = load_splits("digits")
    whole = train if split == "train" else test
    assert whole.images is not None
    return [(whole.images[i], int(whole.labels[i])) for i in range(SAMPLES)]


def test_a_dataset_gives_the_teachers_rows(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that mix the first view with another, and two others; epochs of one view each."""
    # The digest in its identity is of all digits; these are the first of them.
    monkeypatch.setattr("stages.data.check_identity", lambda *_: None)
    cache = LogitCache.open(made)
    data = DataSettings(dataset="test_anchored_caches:ninety", workers=0)
    dataset = CachedDataset(made, data, rectified=NAME)
    exact = [cache.read_view(view, NAME).rectified_rows(ALL, 4.0) for view in range(VIEWS)]
    for views in ((0, 1), (2, 1)):
        indices = [view * SAMPLES + sample for sample in (7, 3, 88) for view in views]
        for index, item in zip(indices, dataset.__getitems__(indices), strict=True):
            expected = exact[index // SAMPLES][index % SAMPLES]
            torch.testing.assert_close(item.teacher_logits, expected, rtol=0, atol=1e-5)
    epochs, seen = CachedEpochs(dataset, 30, device="cpu"), set()
    for epoch in range(VIEWS):
        for batch in epochs.epoch(epoch):
            rows, samples = batch.teacher_logits, batch.samples
            near = [torch.allclose(rows, view[samples], atol=1e-5) for view in exact]
            seen.add((epoch, near.index(True)))
    assert [len({*each}) for each in zip(*seen, strict=True)] == [VIEWS, VIEWS]
    assert len(seen) == VIEWS


def test_students_together_learn_what_each_learns_alone(
    made: Path, job: CacheJob, tmp_path: Path
) -> None:
    configs = [student_of(made, loss=LossSettings(name=name)) for name in ("kd", "dkd")]
    outs = [tmp_path / config.loss.name for config in configs]
    train_together(configs, outs, splits=job.splits)
    for config, out in zip(configs, outs, strict=True):
        train_student(config, tmp_path / f"{out.name}-alone", splits=job.splits)
        assert same_weights(out, tmp_path / f"{out.name}-alone")


def test_views_at_once_leave_the_same_bytes(made: Path, mine: Path, job: CacheJob) -> None:
    """Without what the encoding was fitted to: all blocks come in runs."""
    cache = LogitCache.open(mine, writable=True)
    for at in EVERY:
        cache.commits.forget(at)
    config = msgspec.structs.replace(job.config, views_at_once=2)
    summary = cache_teacher(dataclasses.replace(job, config=config), mine)
    assert summary.computed_blocks == len(EVERY)
    assert tree(mine) == tree(made)
