"""Several views of each decoded image: --views-per-decode, against loops that render every view.

The truth of an order is written out here: lists of (sample, view), made by naive loops over epochs,
samples and views. Each image is rendered alone, and each row read alone.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    AtBatch,
    Words,
    answer_to,
    cache_of,
    first,
    metrics,
    resized,
    same_weights,
    student_of,
    teacher_of,
    terminate,
    weights,
    without_times,
)
from torch import Tensor, nn

from pipeline.runs import read_run
from stages.cache import LogitCache
from stages.cache.targets import ViewTargets
from stages.cache_teacher import CacheJob, cache_teacher
from stages.data import Splits, cached_policy
from stages.distributed import Ranks
from stages.errors import ConfigError, RunError
from stages.inputs.feed import Batch, Normalise
from stages.inputs.views import view_policy
from stages.order import Rounds, sample_order, view_order
from stages.rectify import rectify
from stages.settings import (
    BiasSettings,
    LossSettings,
    ModelSettings,
    RectifyConfig,
    StudentConfig,
    TrainSettings,
)
from stages.student_checks import check_students, complete
from stages.targets.chunks import plan_of_rank, plan_slabs, slab_bytes
from stages.targets.ensemble import mean_logits
from stages.train_student import student_trainer, train_student, train_together
from stages.train_teacher import train_teacher
from stages.training.run_directory import RunDirectory
from stages.training.stream import BatchStream, Showing, open_stream

CPU = torch.device("cpu")
SAMPLES, BATCH, VIEWS = 50, 16, 5
Pair = tuple[int, int]
"""A sample and the view it is shown in."""


@pytest.fixture(scope="module")
def my_job(small_job: CacheJob) -> CacheJob:
    """50 samples in five blocks."""
    return resized(small_job, SAMPLES, 20, views=VIEWS, block_rows=10, encoding="float32")


@pytest.fixture(scope="module")
def my_splits(my_job: CacheJob) -> Splits:
    return my_job.splits


@pytest.fixture(scope="module")
def my_cache(tmp_path_factory: pytest.TempPathFactory, my_job: CacheJob) -> Path:
    path = tmp_path_factory.mktemp("rounds") / "digits.zarr"
    cache_teacher(my_job, path)
    rectify(path, RectifyConfig())
    return path


def student(cache: Path, per_decode: int | None = 2, **changes: Any) -> StudentConfig:
    """Seven epochs, so that rounds end with the views (5) and with the run."""
    train: dict[str, Any] = {"epochs": 7, "batch_size": BATCH, "lr": 0.05}
    train |= {"views_per_decode": per_decode, **changes.pop("train", {})}
    return student_of(cache, train=TrainSettings(**train), **changes)


# ---- the order, by naive loops ------------------------------------------------------------------


def naive_rounds(epochs: int, per_decode: int, num_views: int) -> list[list[int]]:
    """The epochs of each round."""
    rounds: list[list[int]] = []
    for epoch in range(epochs):
        if epoch % num_views == 0 or len(rounds[-1]) == per_decode:
            rounds.append([])
        rounds[-1].append(epoch)
    return rounds


def naive_run(
    samples: int, batch: int, per_decode: int, epochs: int, one_batch: bool = False
) -> list[list[list[Pair]]]:
    """Every epoch's batches of (sample, view), with seed 0 and VIEWS views."""
    found = []
    for epochs_of_round in naive_rounds(epochs, per_decode, VIEWS):
        order = sample_order(torch.arange(samples), 0, epochs_of_round[0]).tolist()
        views = [view_order(0, epoch, VIEWS) for epoch in epochs_of_round]
        whole = [order[i : i + batch] for i in range(0, samples, batch)]
        if len(whole) > 1 and len(whole[-1]) == 1:
            whole[-2:] = [whole[-2] + whole[-1]]
        steps: list[list[Pair]] = []
        if one_batch and len(views) > 1:
            parts = torch.tensor(order).tensor_split(len(whole) * len(views))
            steps += [[(sample, view) for view in views for sample in p.tolist()] for p in parts]
        else:
            for part in whole:
                steps += [[(sample, view) for sample in part] for view in views]
        found += [steps[i : i + len(whole)] for i in range(0, len(steps), len(whole))]
    return found


@pytest.mark.parametrize("per_decode", [1, 2, 3, 5])
@pytest.mark.parametrize("epochs", [1, 4, 7, 12])
def test_rounds_are_those_of_the_naive_loop(per_decode: int, epochs: int) -> None:
    rounds = Rounds(per_decode, epochs, VIEWS)
    for expected in naive_rounds(epochs, per_decode, VIEWS):
        for place, epoch in enumerate(expected):
            assert [*rounds.of(epoch).epochs] == expected
            assert rounds.of(epoch).place == place


def test_unbounded_views_are_cut_by_the_run_alone() -> None:
    rounds = Rounds(4, 10)
    assert [[*rounds.of(e).epochs] for e in (0, 3, 4, 9)] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]


# ---- what is shown, and what is learned from it -------------------------------------------------


@pytest.fixture(scope="module")
def pixels_alone(my_cache: Path, my_splits: Splits) -> dict[Pair, Tensor]:
    """Every view of every image, rendered alone: uint8 (C, H, W)."""
    policy, load = cached_policy(LogitCache.open(my_cache)), my_splits.train.load
    return {
        (sample, view): policy.apply(load(sample)[None], torch.tensor([sample]), view)[0]
        for sample in range(SAMPLES)
        for view in range(VIEWS)
    }


@pytest.fixture(scope="module")
def views_alone(my_cache: Path) -> list[ViewTargets]:
    """Every view's targets, read alone."""
    return [LogitCache.open(my_cache).read_view(view, "pairwise-T4") for view in range(VIEWS)]


def pairs_in(batch: Batch) -> list[Pair]:
    size = len(batch.samples) // len(batch.views)
    views = [view for view in batch.views for _ in range(size)]
    return list(zip(batch.samples.tolist(), views, strict=True))


def shown_by(
    config: StudentConfig,
    splits: Splits,
    out: Path,
    pixels: dict[Pair, Tensor],
    views: Sequence[ViewTargets],
) -> list[list[list[Pair]]]:
    """Every epoch's batches, each pixel and target compared with those made alone."""
    trainer = student_trainer([config], [RunDirectory(out)], splits)
    task, epochs = trainer.learner.task, []
    loss_parts, rectified = task.loss_parts, config.bias.rectified is not None

    def compare(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        pairs = pairs_in(batch)
        assert torch.equal(batch.pixels, torch.stack([pixels[pair] for pair in pairs]))
        targets = task.targets.shown(batch.views)  # type: ignore[attr-defined]
        rows = targets.of(batch.samples, rectified)
        expected = [views[v].of(torch.tensor([s]), rectified) for s, v in pairs]
        assert torch.equal(rows.at(), torch.cat([row.at() for row in expected]))
        assert torch.equal(rows.wrong(), torch.cat([row.wrong() for row in expected]))
        epochs[-1].append(pairs)
        return loss_parts(logits, batch)

    def start_epoch(epoch: int) -> tuple[int, ...]:
        epochs.append([])
        return start(epoch)

    start, task.start_epoch = task.start_epoch, start_epoch  # type: ignore[method-assign]
    task.loss_parts = compare  # type: ignore[method-assign]
    trainer.fit()
    return epochs


@pytest.mark.parametrize(
    ("per_decode", "one_batch", "streamed"),
    [
        (2, False, True),
        pytest.param(5, False, False, marks=pytest.mark.slow),
        pytest.param(2, True, False, marks=pytest.mark.slow),
        (3, True, True),
    ],
)
def test_pixels_rows_and_order_are_those_of_the_naive_loop(
    my_cache: Path,
    my_splits: Splits,
    tmp_path: Path,
    pixels_alone: dict[Pair, Tensor],
    views_alone: list[ViewTargets],
    per_decode: int,
    one_batch: bool,
    streamed: bool,
) -> None:
    train = my_splits.train
    if streamed:  # decoded one by one, as large images are
        train = dataclasses.replace(train, images=None)
    config = student(
        my_cache,
        per_decode,
        train={"views_in_one_batch": one_batch},
        bias=BiasSettings(mode="rectify", rectified="pairwise-T4"),
    )
    splits = Splits(train, my_splits.test)
    shown = shown_by(config, splits, tmp_path / "run", pixels_alone, views_alone)
    assert shown == naive_run(SAMPLES, BATCH, per_decode, 7, one_batch)
    # As many images of every sample as without, in the same views.
    singly = naive_run(SAMPLES, BATCH, 1, 7)
    assert sorted(pairs_of(shown)) == sorted(pairs_of(singly))


def pairs_of(epochs: Sequence[Sequence[Sequence[Pair]]]) -> list[Pair]:
    return [pair for epoch in epochs for batch in epoch for pair in batch]


@pytest.mark.parametrize(("samples", "batch"), [(49, 16), (17, 16), (50, 50), (48, 16), (5, 2)])
@pytest.mark.parametrize("one_batch", [False, True])
def test_any_size_is_cut_as_the_naive_loop_cuts_it(
    my_splits: Splits, samples: int, batch: int, one_batch: bool
) -> None:
    """Also where a last sample joins the batch before. From every step on, and counted."""
    stream = stream_of(my_splits, samples, batch, 2, one_batch)
    for epoch, expected in enumerate(naive_run(samples, batch, 2, 7, one_batch)):
        order, within = stream.epoch_order(epoch), stream.rounds.of(epoch)
        views = tuple(view_order(0, each, VIEWS) for each in within.epochs)
        assert stream.steps == len(expected)
        for skip in range(len(expected) + 1):
            found = [pairs_in(b) for b in stream.batches(order, views, skip, within)]
            assert found == expected[skip:]
        showed = stream.showed(order, views, within)
        assert showed.images == sum(map(len, expected))
        assert showed.samples == len({sample for batch_ in expected for sample, _ in batch_})


def stream_of(
    splits: Splits, samples: int, batch: int, per_decode: int, one_batch: bool = False
) -> BatchStream:
    train = TrainSettings(
        epochs=7, batch_size=batch, views_per_decode=per_decode, views_in_one_batch=one_batch
    )
    config = student_of("none", train=train)
    few = Splits(first(splits.train, samples), splits.test)
    every = few.train.shown
    showing = Showing(every, every[:0], rounds=Rounds(per_decode, 7, VIEWS))
    return open_stream(config, few, view_policy("pad-crop:pad=2", 0), None, showing, CPU)


@pytest.mark.parametrize("one_batch", [False, True])
def test_the_weights_are_those_of_a_naive_loop(
    my_cache: Path,
    my_splits: Splits,
    tmp_path: Path,
    pixels_alone: dict[Pair, Tensor],
    views_alone: list[ViewTargets],
    one_batch: bool,
) -> None:
    """KD with SGD, written out: every view rendered alone, every row read alone."""
    config = student(
        my_cache,
        3,
        train={
            "views_in_one_batch": one_batch,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "schedule": "constant",
        },
        loss=LossSettings(name="kd", temperature=2.0, ce_weight=0.5, weight=0.5),
    )
    summary = train_student(config, tmp_path / "run", splits=my_splits)

    labels_of = my_splits.train.labels
    model = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, 10))
    trainer = student_trainer([config], [RunDirectory(tmp_path / "first")], my_splits)
    model.load_state_dict(trainer.learner.module.state_dict())
    trainer.close()
    normalise: Normalise = trainer.learner.normalise
    losses = []
    for epoch in naive_run(SAMPLES, BATCH, 3, 7, one_batch):
        total, count = 0.0, 0
        for pairs in epoch:
            logits = model(normalise(torch.stack([pixels_alone[pair] for pair in pairs])))
            teacher = torch.cat([views_alone[v].rows(torch.tensor([s])) for s, v in pairs])
            labels = labels_of[[sample for sample, _ in pairs]]
            soft = F.kl_div(
                F.log_softmax(logits / 2, 1), F.softmax(teacher / 2, 1), reduction="batchmean"
            )
            loss = 0.5 * F.cross_entropy(logits, labels) + 0.5 * 4 * soft
            gradients = torch.autograd.grad(loss, [*model.parameters()])
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= 0.05 * gradient
            total, count = total + float(loss.detach()) * len(pairs), count + len(pairs)
        losses.append(total / count)
    kept = weights(tmp_path / "run")
    for name, expected in model.state_dict().items():
        assert torch.allclose(kept[name], expected, atol=1e-5), name
    assert [line["loss"] for line in metrics(tmp_path / "run")] == pytest.approx(losses, rel=1e-4)
    assert summary["epochs"] == 7


# ---- as one run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("one_batch", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stopped_run_ends_with_the_same_weights(
    my_cache: Path, my_splits: Splits, tmp_path: Path, one_batch: bool
) -> None:
    """Stopped after every epoch and between, in rounds of three, two, and one epoch."""
    config = student(my_cache, 3, train={"views_in_one_batch": one_batch, "checkpoint_seconds": 0})
    train_student(config, tmp_path / "whole", splits=my_splits)
    steps = len(naive_run(SAMPLES, BATCH, 3, 7, one_batch)[0])
    out = tmp_path / "stopped"
    for batches in (steps, steps + 1, 2 * steps - 1, steps):
        trainer = student_trainer([config], [RunDirectory(out, resume=True)], my_splits)
        trainer.reporter = AtBatch(batches, terminate)
        with pytest.raises(RunError, match="SIGTERM"):
            trainer.fit()
    train_student(config, out, resume=True, splits=my_splits)
    assert same_weights(tmp_path / "whole", out)
    whole, stopped = without_times(tmp_path / "whole"), without_times(out)
    for one, other in zip(whole, stopped, strict=True):
        assert other.pop("views") == one.pop("views")
        assert other == pytest.approx(one, rel=1e-6)


def test_metrics_count_what_was_shown(my_cache: Path, my_splits: Splits, tmp_path: Path) -> None:
    """Images, samples and views of each epoch; steps and rates as without."""
    words = Words()
    train_student(student(my_cache, 3), tmp_path / "run", splits=my_splits, reporter=words)
    train_student(student(my_cache, None), tmp_path / "singly", splits=my_splits)
    lines, expected = metrics(tmp_path / "run"), naive_run(SAMPLES, BATCH, 3, 7)
    for line, epoch, rounds in zip(lines, expected, [3, 3, 3, 2, 2, 2, 2], strict=True):
        assert line["images"] == len(pairs_of([epoch]))
        assert line["samples"] == len({sample for sample, _ in pairs_of([epoch])})
        assert len(set(line["views"])) == len(line["views"]) == rounds
        assert {view for _, view in pairs_of([epoch])} <= {*line["views"]}
        assert line["images_per_second"] == pytest.approx(line["images"] / line["seconds"])
    assert sum(line["images"] for line in lines) == 7 * SAMPLES
    singly = metrics(tmp_path / "singly")
    assert [line["lr"] for line in lines] == [line["lr"] for line in singly]
    assert [line["view"] for line in lines] == [line["view"] for line in singly]
    assert "images" not in singly[0]
    message = " ".join(map(str, lines[0]["views"]))
    assert any(f"views {message} of" in text for text in words.lines)
    read = [read_run(tmp_path / name, name) for name in ("run", "singly")]
    assert [getattr(run, "config", {}).get("views") for run in read] == [VIEWS, VIEWS]


def test_the_baseline_sees_the_same_images(
    my_cache: Path, my_splits: Splits, tmp_path: Path
) -> None:
    streams = [
        student_trainer([config], [RunDirectory(tmp_path / config.loss.name)], my_splits).stream
        for config in (student(my_cache, 2), student(my_cache, 2, loss=LossSettings(name="ce")))
    ]
    for epoch in range(7):
        one, other = (stream.epoch_order(epoch) for stream in streams)
        assert torch.equal(one, other)
        assert streams[0].rounds.of(epoch) == streams[1].rounds.of(epoch)


def test_students_together_are_what_they_are_alone(
    my_cache: Path, my_splits: Splits, tmp_path: Path
) -> None:
    configs = [
        student(my_cache, 3, train={"epochs": 3}),
        student(my_cache, 3, train={"epochs": 3}, loss=LossSettings(name="ce")),
    ]
    outs = [tmp_path / f"{i}" for i in range(2)]
    train_together(configs, outs, splits=my_splits)
    for config, out in zip(configs, outs, strict=True):
        train_student(config, tmp_path / "alone", splits=my_splits, overwrite=True)
        assert same_weights(tmp_path / "alone", out)
    other = student(my_cache, 2, train={"epochs": 3})
    with pytest.raises(ConfigError, match="views_per_decode"):
        train_together([configs[0], other], outs, splits=my_splits)


# ---- groups, ranks, several teachers, pairs, mixed and unlabelled images ------------------------


def test_targets_in_groups_are_the_same_rows(
    my_cache: Path, my_splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups of chunks at a time; every row compared with the one read alone."""
    config = student(my_cache, 2, slab_memory="10kB", loss=LossSettings(temperature=2.0))
    reads = []
    read_view = LogitCache.read_view

    def spy(cache: LogitCache, view: int, *more: Any) -> Any:
        reads.append(view)
        return read_view(cache, view, *more)

    trainer = student_trainer([config], [RunDirectory(tmp_path / "run")], my_splits)
    groups = trainer.learner.task._reader._groups  # type: ignore[attr-defined]
    assert groups.num_groups > 1
    cache, task = LogitCache.open(my_cache), trainer.learner.task
    whole = [cache.read_view(view) for view in range(VIEWS)]
    monkeypatch.setattr(LogitCache, "read_view", spy)
    loss_parts, shown = task.loss_parts, []

    def compare(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        (view,) = batch.views
        rows = task.targets.shown(batch.views).rows(batch.samples)  # type: ignore[attr-defined]
        assert torch.equal(rows, whole[view].rows(batch.samples))
        shown.extend((sample, view) for sample in batch.samples.tolist())
        return loss_parts(logits, batch)

    task.loss_parts = compare  # type: ignore[method-assign]
    trainer.fit()
    assert sorted(shown) == sorted(pairs_of(naive_run(SAMPLES, BATCH, 1, 7)))
    assert len(reads) == 7 * groups.num_groups  # each group of each view once an epoch


def test_views_in_one_batch_are_read_in_groups_too(
    my_cache: Path,
    my_splits: Splits,
    tmp_path: Path,
    pixels_alone: dict[Pair, Tensor],
    views_alone: list[ViewTargets],
) -> None:
    """A batch may lie across two groups, with all of its views."""
    config = student(my_cache, 2, slab_memory="10kB", train={"views_in_one_batch": True})
    shown = shown_by(config, my_splits, tmp_path / "run", pixels_alone, views_alone)
    assert sorted(pairs_of(shown)) == sorted(pairs_of(naive_run(SAMPLES, BATCH, 1, 7)))


def test_ranks_show_disjoint_samples_in_all_views(my_cache: Path, my_splits: Splits) -> None:
    cache = LogitCache.open(my_cache)
    policy, every = cached_policy(cache), my_splits.train.shown
    chosen = complete(student(my_cache, 2), cache)
    streams = []
    for rank in range(2):
        ranks = Ranks(rank, 2, rank)
        schedule = check_students([chosen], [cache], policy, ranks)
        order = plan_of_rank(cache, ranks).order
        showing = Showing(every, every[:0], order, ranks, schedule.rounds)
        streams.append(open_stream(chosen.config, my_splits, policy, None, showing, CPU))
    for epochs in naive_rounds(7, 2, VIEWS):
        shown: list[list[Pair]] = [[], []]
        for epoch in epochs:
            views = schedule.of_epoch(epoch)
            for rank, stream in enumerate(streams):
                order, within = stream.epoch_order(epoch), stream.rounds.of(epoch)
                for batch in stream.batches(order, views, 0, within):
                    assert len(batch.samples) <= BATCH // 2 + 1
                    shown[rank] += ((s, batch.views[0]) for s in batch.samples.tolist())
        mine, others = ({sample for sample, _ in pairs} for pairs in shown)
        assert not mine & others
        for pairs, samples in zip(shown, (mine, others), strict=True):
            every = [(s, view_order(0, e, VIEWS)) for s in samples for e in epochs]
            assert sorted(pairs) == sorted(every)


def test_several_teachers_are_averaged_in_every_view(
    my_cache: Path, my_job: CacheJob, my_splits: Splits, tmp_path: Path
) -> None:
    other = tmp_path / "other.zarr"
    cache_teacher(
        dataclasses.replace(
            my_job, config=msgspec.structs.replace(my_job.config, encoding="float16")
        ),
        other,
    )
    config = student(my_cache, 2, also=(str(other),), loss=LossSettings(temperature=2.0))
    trainer = student_trainer([config], [RunDirectory(tmp_path / "run")], my_splits)
    task, caches = trainer.learner.task, [LogitCache.open(my_cache), LogitCache.open(other)]
    views, seen = trainer.learner.start_epoch(), 0
    order, within = trainer.stream.epoch_order(0), trainer.stream.rounds.of(0)
    for batch in trainer.stream.batches(order, views, 0, within):
        (view,) = batch.views
        rows = task.targets.shown((view,)).rows(batch.samples, 2.0)  # type: ignore[attr-defined]
        read = [cache.read_view(view).rows(batch.samples) for cache in caches]
        assert torch.allclose(rows, mean_logits(read, 2.0), atol=1e-6)
        seen += 1
    assert seen == trainer.stream.steps
    trainer.close()


@pytest.fixture(scope="module")
def my_pairs(
    tmp_path_factory: pytest.TempPathFactory, teacher_run: Path, my_splits: Splits
) -> Path:
    """Four weak views and four strong ones."""
    path, augment = tmp_path_factory.mktemp("pairs") / "p.zarr", "pad-crop:pad=1|pad-crop:pad=2"
    return cache_of(teacher_run, path, my_splits, views=8, augment=augment, encoding="float32")


@pytest.mark.parametrize("one_batch", [pytest.param(False, marks=pytest.mark.slow), True])
def test_pairs_of_views_stay_pairs(
    my_pairs: Path, my_splits: Splits, tmp_path: Path, one_batch: bool
) -> None:
    """First the weak views of a batch, then the strong ones of the same samples."""
    path = my_pairs
    config = student(
        path,
        2,
        train={"epochs": 4, "views_in_one_batch": one_batch},
        loss=LossSettings(name="mlkd"),
    )
    trainer = student_trainer([config], [RunDirectory(tmp_path / "run")], my_splits)
    task, cache, shown = trainer.learner.task, LogitCache.open(path), []
    for epoch in range(4):
        trainer.learner.position.epoch = epoch
        views = trainer.learner.start_epoch()
        order, within = trainer.stream.epoch_order(epoch), trainer.stream.rounds.of(epoch)
        for batch in trainer.stream.batches(order, views, 0, within):
            each = batch.samples.chunk(len(batch.views))
            half = len(batch.samples) // 2
            assert torch.equal(batch.samples[:half], batch.samples[half:])
            weak, strong = (batch.views[: len(each) // 2], batch.views[len(each) // 2 :])
            assert [view + 1 for view in weak] == [*strong]
            rows = torch.cat(
                [cache.read_view(v).rows(s) for v, s in zip(batch.views, each, strict=True)]
            )
            targets = task.targets.shown(batch.views)  # type: ignore[attr-defined]
            assert torch.equal(targets.rows(batch.samples), rows)
            pixels = [
                cached_policy(cache).apply(my_splits.train.images[s], s, v)
                for v, s in zip(batch.views, each, strict=True)
            ]
            assert torch.equal(batch.pixels, torch.cat(pixels))
            shown += [
                (s, v) for v, some in zip(batch.views, each, strict=True) for s in some.tolist()
            ]
    assert sorted(shown) == [(s, v) for s in range(SAMPLES) for v in range(8)]
    trainer.close()


@pytest.mark.parametrize("images_are", ["mixed", "unlabelled"])
def test_mixed_and_unlabelled_images(
    teacher_run: Path, my_splits: Splits, tmp_path: Path, images_are: str
) -> None:
    """With every row and pixel as single views have them; partners and shares too."""
    mixed = images_are == "mixed"
    splits = my_splits
    if not mixed:
        train = dataclasses.replace(splits.train, labelled=False)
        splits = Splits(train, splits.test)
    augment = "pad-crop:pad=2+mixup" if mixed else "pad-crop:pad=2"
    path = cache_of(teacher_run, tmp_path / "m.zarr", splits, views=3, augment=augment)
    config = student(path, 3, train={"epochs": 3})
    trainer = student_trainer([config], [RunDirectory(tmp_path / "run")], splits)
    views, stream = trainer.learner.start_epoch(), trainer.stream
    order, within = stream.epoch_order(0), stream.rounds.of(0)
    for batch in stream.batches(order, views, 0, within):
        (single,) = stream.feed.batches(batch.samples, batch.views[0], len(batch.samples))
        assert torch.equal(batch.pixels, single.pixels)
        assert (batch.partners is None) == (not mixed)
        if batch.partners is not None and batch.shares is not None:
            assert torch.equal(batch.partners, single.partners)
            assert torch.equal(batch.shares, single.shares)
    trainer.close()
    assert train_student(config, tmp_path / "run", splits=splits, overwrite=True)["epochs"] == 3


def test_a_teacher_is_shown_rounds_as_well(my_splits: Splits, tmp_path: Path) -> None:
    """And ends with the same weights after a stop."""
    model = ModelSettings(architecture="helpers:plain")
    train = TrainSettings(epochs=5, batch_size=BATCH, views_per_decode=3)
    config = teacher_of(model=model, augment="pad-crop:pad=1", train=train)
    train_teacher(config, tmp_path / "whole", splits=my_splits)
    lines = metrics(tmp_path / "whole")
    singly = [view_order(0, epoch, 9) for epoch in range(5)]
    assert [line["views"] for line in lines] == [singly[:3]] * 3 + [singly[3:]] * 2
    assert sum(line["images"] for line in lines) == 5 * SAMPLES
    with pytest.raises(RunError, match="SIGTERM"):
        train_teacher(
            config, tmp_path / "stopped", splits=my_splits, reporter=AtBatch(6, terminate)
        )
    train_teacher(config, tmp_path / "stopped", resume=True, splits=my_splits)
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_one_view_a_decode_is_the_setting_left_out() -> None:
    """So that a run that was started with the one goes on with the other."""
    assert TrainSettings(views_per_decode=1) == TrainSettings()


# ---- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--views-per-decode", "0"], "train.views_per_decode must be positive, was 0"),
        (["--views-per-decode", "-1"], "train.views_per_decode must be positive, was -1"),
        (["--views-per-decode", "6"], "views_per_decode is 6, and views to show: 5"),
        (["--views-per-decode", "3", "--views", "2"], "views to show: 2"),
        (["--views-in-one-batch"], "views_in_one_batch"),
        (["--views-in-one-batch", "--views-per-decode", "1"], "views_in_one_batch"),
    ],
)
def test_what_cannot_be_is_told_in_three_lines(
    my_cache: Path,
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = [
        "train-student",
        str(my_cache),
        "--dataset",
        "digits",
        "--student",
        "helpers:plain",
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--epochs",
        "7",
    ]
    answer = answer_to([*asked, *words], monkeypatch, capsys)
    assert answer.code == 2
    assert message in answer.text
    assert len(answer.err.strip().splitlines()) <= 3
    assert not (tmp_path / "run").exists()


def test_another_number_of_epochs_would_be_another_last_round(
    my_cache: Path, my_splits: Splits, tmp_path: Path
) -> None:
    config = student(my_cache, 3, train={"schedule": "constant"})
    train_student(config, tmp_path / "run", splits=my_splits)
    longer = student(my_cache, 3, train={"schedule": "constant", "epochs": 9})
    with pytest.raises(RunError, match="the last round of train"):
        train_student(longer, tmp_path / "run", resume=True, splits=my_splits)


def test_a_batch_of_less_than_an_image_is_refused(my_splits: Splits) -> None:
    assert stream_of(my_splits, 50, 5, 5, one_batch=True).steps == 10
    with pytest.raises(ConfigError, match="less than an image for a batch: 50 images in 65 batch"):
        stream_of(my_splits, 50, 4, 5, one_batch=True)


def test_groups_hold_all_views_of_a_round(my_cache: Path) -> None:
    """Two groups are within the memory given, and as large as whole chunks allow."""
    cache = LogitCache.open(my_cache)
    for per_decode, memory in ((1, 5_000), (2, 10_000)):
        caches, every = [cache], torch.arange(cache.num_samples)
        chosen = complete(student(my_cache, per_decode, slab_memory=f"{memory}B"), cache)
        schedule = check_students([chosen], caches, cached_policy(cache))
        plan = plan_slabs(caches, schedule, every, chosen.config, CPU)
        assert plan.groups is not None
        rows = plan.groups.most * plan.groups.chunk_rows
        assert 2 * slab_bytes(caches, rows, per_decode) <= memory
        more = rows + plan.groups.chunk_rows
        assert 2 * slab_bytes(caches, more, per_decode) > memory
