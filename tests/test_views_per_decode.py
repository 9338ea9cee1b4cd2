"""Several views of each decoded image: --views-per-decode, against loops that render every view.

The truth of an order is written out here: lists of (sample, view), made by naive loops over epochs,
samples and views. Each image is rendered alone, and each row read alone.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

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
    plain,
    resized,
    same_weights,
    student_of,
    teacher_of,
    terminate,
    weights,
    without_times,
)
from torch import Tensor

from pipeline.runs import read_run
from stages.cache import LogitCache
from stages.cache.targets import ViewTargets
from stages.cache_teacher import CacheJob, cache_teacher
from stages.data import Splits, cached_policy
from stages.distributed import Ranks
from stages.errors import ConfigError, RunError
from stages.inputs.feed import Batch
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
from stages.targets.chunks import plan_of_rank, plan_slabs
from stages.targets.ensemble import mean_logits
from stages.train_student import student_trainer, train_student, train_together
from stages.train_teacher import train_teacher
from stages.training.run_directory import RunDirectory
from stages.training.stream import BatchStream, Showing, open_stream

CPU = torch.device("cpu")
SAMPLES, BATCH, VIEWS, EPOCHS = 36, 16, 3, 5
Pair = tuple[int, int]
"""A sample and the view it is shown in."""
Epochs = list[list[list[Pair]]]
"""The batches of every epoch."""


class World(NamedTuple):
    """A cache of 36 samples in four blocks, every view rendered and read alone."""

    job: CacheJob
    cache: Path
    splits: Splits
    pixels: dict[Pair, Tensor]
    views: list[ViewTargets]

    def trainer(self, config: StudentConfig, out: Path, **changes: Any) -> Any:
        splits = changes.pop("splits", self.splits)
        return student_trainer([config], [RunDirectory(out, **changes)], splits)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, small_job: CacheJob) -> World:
    job = resized(small_job, SAMPLES, 20, views=VIEWS, block_rows=9, encoding="float32")
    path, train = tmp_path_factory.mktemp("rounds") / "digits.zarr", job.splits.train
    cache_teacher(job, path)
    rectify(path, RectifyConfig())
    policy = cached_policy(LogitCache.open(path))
    pixels = {
        (sample, view): policy.apply(train.load(sample)[None], torch.tensor([sample]), view)[0]
        for sample in range(SAMPLES)
        for view in range(VIEWS)
    }
    views = [LogitCache.open(path).read_view(view, "pairwise-T4") for view in range(VIEWS)]
    return World(job, path, job.splits, pixels, views)


def student(cache: Path, per_decode: int | None = 2, **changes: Any) -> StudentConfig:
    """Five epochs, so that rounds end with the views (3) and with the run."""
    train: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 0.05}
    train |= {"views_per_decode": per_decode, **changes.pop("train", {})}
    return student_of(cache, train=TrainSettings(**train), **changes)


def naive_rounds(epochs: int, per_decode: int, num_views: int) -> list[list[int]]:
    """The epochs of each round."""
    rounds: list[list[int]] = []
    for epoch in range(epochs):
        if epoch % num_views == 0 or len(rounds[-1]) == per_decode:
            rounds.append([])
        rounds[-1].append(epoch)
    return rounds


def naive_run(samples: int, batch: int, per_decode: int, one_batch: bool = False) -> Epochs:
    """Every epoch's batches of (sample, view), with seed 0 and VIEWS views."""
    found = []
    for epochs_of_round in naive_rounds(EPOCHS, per_decode, VIEWS):
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


def pairs_of(epochs: Epochs) -> list[Pair]:
    return [pair for epoch in epochs for batch in epoch for pair in batch]


@pytest.mark.parametrize("views", [5, None])
@pytest.mark.parametrize("per_decode", [1, 2, 3, 5])
@pytest.mark.parametrize("epochs", [1, 4, 7, 12])
def test_rounds_are_the_naive_loops(per_decode: int, epochs: int, views: int | None) -> None:
    """Of views without number as well: there the run alone ends a round."""
    rounds = Rounds(per_decode, epochs, views)
    for expected in naive_rounds(epochs, per_decode, views or epochs):
        for place, epoch in enumerate(expected):
            assert [*rounds.of(epoch).epochs] == expected
            assert rounds.of(epoch).place == place


def pairs_in(batch: Batch) -> list[Pair]:
    size = len(batch.samples) // len(batch.views)
    views = [view for view in batch.views for _ in range(size)]
    return list(zip(batch.samples.tolist(), views, strict=True))


def shown_by(world: World, config: StudentConfig, out: Path, splits: Splits) -> Epochs:
    """Every epoch's batches, each pixel and target compared with those made alone."""
    trainer, epochs = world.trainer(config, out, splits=splits), []
    task, rectified = trainer.learner.task, config.bias.rectified is not None
    loss_parts, start = task.loss_parts, task.start_epoch

    def compare(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        pairs = pairs_in(batch)
        assert torch.equal(batch.pixels, torch.stack([world.pixels[pair] for pair in pairs]))
        rows = task.targets.shown(batch.views).of(batch.samples, rectified)
        expected = [world.views[v].of(torch.tensor([s]), rectified) for s, v in pairs]
        assert torch.equal(rows.at(), torch.cat([row.at() for row in expected]))
        assert torch.equal(rows.wrong(), torch.cat([row.wrong() for row in expected]))
        epochs[-1].append(pairs)
        found: dict[str, Tensor] = loss_parts(logits, batch)
        return found

    def start_epoch(epoch: int) -> tuple[int, ...]:
        epochs.append([])
        views: tuple[int, ...] = start(epoch)
        return views

    task.start_epoch, task.loss_parts = start_epoch, compare
    trainer.fit()
    return epochs


@pytest.mark.parametrize(
    ("per_decode", "one_batch", "streamed"),
    [(2, False, True), pytest.param(3, False, False, marks=pytest.mark.slow), (3, True, True)],
)
def test_pixels_rows_and_order_are_those_of_the_naive_loop(
    world: World, tmp_path: Path, per_decode: int, one_batch: bool, streamed: bool
) -> None:
    train = world.splits.train
    if streamed:  # decoded one by one, as large images are
        train = dataclasses.replace(train, images=None)
    bias, how = BiasSettings(mode="rectify", rectified="pairwise-T4"), one_batch
    config = student(world.cache, per_decode, train={"views_in_one_batch": how}, bias=bias)
    shown = shown_by(world, config, tmp_path / "run", Splits(train, world.splits.test))
    assert shown == naive_run(SAMPLES, BATCH, per_decode, one_batch)
    # As many images of every sample as without, in the same views.
    assert sorted(pairs_of(shown)) == sorted(pairs_of(naive_run(SAMPLES, BATCH, 1)))


def groups_of(world: World, config: StudentConfig) -> Any:
    """The groups of chunks that a student's targets are read in."""
    cache = LogitCache.open(world.cache)
    schedule = check_students([complete(config, cache)], [cache], cached_policy(cache))
    return plan_slabs([cache], schedule, torch.arange(SAMPLES), config, CPU).groups


@pytest.mark.parametrize("one_batch", [False, True])
def test_targets_in_groups(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_batch: bool
) -> None:
    """Two groups of chunks at a time; a batch may lie across them, with all of its views."""
    how = {"views_in_one_batch": one_batch}
    config = student(world.cache, 2, slab_memory="5kB", train=how)
    read_view, reads = LogitCache.read_view, []

    def spy(cache: LogitCache, view: int, *more: Any) -> Any:
        reads.append(view)
        return read_view(cache, view, *more)

    monkeypatch.setattr(LogitCache, "read_view", spy)
    shown = shown_by(world, config, tmp_path / "run", world.splits)
    assert sorted(pairs_of(shown)) == sorted(pairs_of(naive_run(SAMPLES, BATCH, 1)))
    groups = groups_of(world, config).num_groups
    assert groups > 1
    assert len(reads) == EPOCHS * groups  # each group of each view once an epoch


def stream_of(
    splits: Splits, samples: int, batch: int, per_decode: int, one_batch: bool = False
) -> BatchStream:
    own = {"views_per_decode": per_decode, "views_in_one_batch": one_batch}
    config = student("none", train={"batch_size": batch, **own})
    few = Splits(first(splits.train, samples), splits.test)
    every = few.train.shown
    showing = Showing(every, every[:0], rounds=Rounds(per_decode, EPOCHS, VIEWS))
    return open_stream(config, few, view_policy("pad-crop:pad=2", 0), None, showing, CPU)


@pytest.mark.parametrize(("samples", "batch"), [(33, 16), (17, 16), (36, 36), (32, 16), (5, 2)])
@pytest.mark.parametrize("one_batch", [False, True])
def test_any_size_is_cut_as_naively(
    world: World, samples: int, batch: int, one_batch: bool
) -> None:
    """Also where a last sample joins the batch before. From every step on, and counted."""
    stream = stream_of(world.splits, samples, batch, 2, one_batch)
    for epoch, expected in enumerate(naive_run(samples, batch, 2, one_batch)):
        order, within = stream.epoch_order(epoch), stream.rounds.of(epoch)
        views = tuple(view_order(0, each, VIEWS) for each in within.epochs)
        assert stream.steps == len(expected)
        for skip in range(len(expected) + 1):
            found = [pairs_in(b) for b in stream.batches(order, views, skip, within)]
            assert found == expected[skip:]
        showed = stream.showed(order, views, within)
        assert showed.images == sum(map(len, expected))
        assert showed.samples == len({sample for batch_ in expected for sample, _ in batch_})


@pytest.mark.parametrize("one_batch", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_weights_are_those_of_a_naive_loop(world: World, tmp_path: Path, one_batch: bool) -> None:
    """KD with SGD, written out: every view rendered alone, every row read alone."""
    simple = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    loss = LossSettings(name="kd", temperature=2.0, ce_weight=0.5, weight=0.5)
    config = student(world.cache, 3, train={"views_in_one_batch": one_batch, **simple}, loss=loss)
    train_student(config, tmp_path / "run", splits=world.splits)

    trainer = world.trainer(config, tmp_path / "first")
    model, normalise = plain(10), trainer.learner.normalise
    model.load_state_dict(trainer.learner.module.state_dict())
    trainer.close()
    losses, labels_of = [], world.splits.train.labels
    for epoch in naive_run(SAMPLES, BATCH, 3, one_batch):
        total, count = 0.0, 0
        for pairs in epoch:
            logits = model(normalise(torch.stack([world.pixels[pair] for pair in pairs])))
            teacher = torch.cat([world.views[v].rows(torch.tensor([s])) for s, v in pairs])
            labels = labels_of[[sample for sample, _ in pairs]]
            soft = F.kl_div(
                F.log_softmax(logits / 2, 1), F.softmax(teacher / 2, 1), reduction="batchmean"
            )
            found = 0.5 * F.cross_entropy(logits, labels) + 0.5 * 4 * soft
            gradients = torch.autograd.grad(found, [*model.parameters()])
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= 0.05 * gradient
            total, count = total + float(found.detach()) * len(pairs), count + len(pairs)
        losses.append(total / count)
    kept = weights(tmp_path / "run")
    for name, expected in model.state_dict().items():
        assert torch.allclose(kept[name], expected, atol=1e-5), name
    assert [line["loss"] for line in metrics(tmp_path / "run")] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("one_batch", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stopped_run_ends_with_the_weights(world: World, tmp_path: Path, one_batch: bool) -> None:
    """Stopped after every epoch and between, in rounds of three and two."""
    how = {"views_in_one_batch": one_batch, "checkpoint_seconds": 0}
    config = student(world.cache, 3, train=how)
    train_student(config, tmp_path / "whole", splits=world.splits)
    steps, out = len(naive_run(SAMPLES, BATCH, 3, one_batch)[0]), tmp_path / "stopped"
    for batches in (steps, steps + 1, 2 * steps - 1):
        trainer = world.trainer(config, out, resume=True)
        trainer.reporter = AtBatch(batches, terminate)
        with pytest.raises(RunError, match="SIGTERM"):
            trainer.fit()
    train_student(config, out, resume=True, splits=world.splits)
    assert same_weights(tmp_path / "whole", out)
    whole, stopped = without_times(tmp_path / "whole"), without_times(out)
    for one, other in zip(whole, stopped, strict=True):
        assert other.pop("views") == one.pop("views")
        assert other == pytest.approx(one, rel=1e-6)


def test_metrics_count_what_was_shown(world: World, tmp_path: Path) -> None:
    """Images, samples and views of each epoch; steps and rates as without."""
    words = Words()
    train_student(student(world.cache, 3), tmp_path / "run", splits=world.splits, reporter=words)
    train_student(student(world.cache, None), tmp_path / "singly", splits=world.splits)
    lines, expected = metrics(tmp_path / "run"), naive_run(SAMPLES, BATCH, 3)
    for line, epoch, rounds in zip(lines, expected, [3, 3, 3, 2, 2], strict=True):
        assert line["images"] == len(pairs_of([epoch]))
        assert line["samples"] == len({sample for sample, _ in pairs_of([epoch])})
        assert len(set(line["views"])) == len(line["views"]) == rounds
        assert {view for _, view in pairs_of([epoch])} <= {*line["views"]}
        assert line["images_per_second"] == pytest.approx(line["images"] / line["seconds"])
    singly = metrics(tmp_path / "singly")
    for name in ("lr", "view"):
        assert [line[name] for line in lines] == [line[name] for line in singly]
    assert "images" not in singly[0]
    message = " ".join(map(str, lines[0]["views"]))
    assert any(f"views {message} of" in text for text in words.lines)
    for name in ("run", "singly"):
        assert getattr(read_run(tmp_path / name, name), "config", {}).get("views") == VIEWS


def test_students_together_are_what_they_are_alone(world: World, tmp_path: Path) -> None:
    """Also one without a teacher: it is shown the same images."""
    configs = [
        student(world.cache, 3, train={"epochs": 3}, loss=LossSettings(name=name))
        for name in ("kd", "ce")
    ]
    outs = [tmp_path / f"{i}" for i in range(2)]
    train_together(configs, outs, splits=world.splits)
    for config, out in zip(configs, outs, strict=True):
        train_student(config, tmp_path / "alone", splits=world.splits, overwrite=True)
        assert same_weights(tmp_path / "alone", out)
    other = student(world.cache, 2, train={"epochs": 3})
    with pytest.raises(ConfigError, match="views_per_decode"):
        train_together([configs[0], other], outs, splits=world.splits)


def test_ranks_show_disjoint_samples_in_all_views(world: World) -> None:
    cache, train = LogitCache.open(world.cache), world.splits.train
    policy, chosen = cached_policy(cache), complete(student(world.cache, 2), cache)
    streams = []
    for rank in range(2):
        ranks = Ranks(rank, 2, rank)
        schedule = check_students([chosen], [cache], policy, ranks)
        order = plan_of_rank(cache, ranks).order
        showing = Showing(train.shown, train.shown[:0], order, ranks, schedule.rounds)
        streams.append(open_stream(chosen.config, world.splits, policy, None, showing, CPU))
    for epochs in naive_rounds(EPOCHS, 2, VIEWS):
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


def batches_of(trainer: Any, epoch: int = 0) -> list[Batch]:
    """What a trainer's student is shown in an epoch."""
    trainer.learner.position.epoch = epoch
    views, stream = trainer.learner.start_epoch(), trainer.stream
    found = [*stream.batches(stream.epoch_order(epoch), views, 0, stream.rounds.of(epoch))]
    assert len(found) == stream.steps
    return found


def test_several_teachers_are_averaged_in_every_view(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other.zarr"
    half = msgspec.structs.replace(world.job.config, encoding="float16")
    cache_teacher(dataclasses.replace(world.job, config=half), other)
    config = student(world.cache, 2, also=(str(other),), loss=LossSettings(temperature=2.0))
    trainer, caches = world.trainer(config, tmp_path / "run"), [world.cache, other]
    for batch in batches_of(trainer):
        (view,) = batch.views
        rows = trainer.learner.task.targets.shown((view,)).rows(batch.samples, 2.0)
        read = [LogitCache.open(cache).read_view(view).rows(batch.samples) for cache in caches]
        assert torch.allclose(rows, mean_logits(read, 2.0), atol=1e-6)
    trainer.close()


@pytest.mark.parametrize("one_batch", [pytest.param(False, marks=pytest.mark.slow), True])
def test_pairs_stay_pairs(world: World, teacher_run: Path, tmp_path: Path, one_batch: bool) -> None:
    """First the weak views of a batch, then the strong ones of the same samples."""
    augment, splits = "pad-crop:pad=1|pad-crop:pad=2", world.splits
    path = cache_of(teacher_run, tmp_path / "p.zarr", splits, views=8, augment=augment)
    how = {"epochs": 4, "views_in_one_batch": one_batch}
    trainer = world.trainer(
        student(path, 2, train=how, loss=LossSettings(name="mlkd")), tmp_path / "run"
    )
    cache, shown = LogitCache.open(path), list[Pair]()
    for epoch in range(4):
        for batch in batches_of(trainer, epoch):
            half = len(batch.samples) // 2
            assert torch.equal(batch.samples[:half], batch.samples[half:])
            both = len(batch.views) // 2
            assert [view + 1 for view in batch.views[:both]] == [*batch.views[both:]]
            each = [*zip(batch.views, batch.samples.chunk(len(batch.views)), strict=True)]
            rows = torch.cat([cache.read_view(view).rows(some) for view, some in each])
            targets = trainer.learner.task.targets.shown(batch.views)
            assert torch.equal(targets.rows(batch.samples), rows)
            pixels = [
                cached_policy(cache).apply(splits.train.images[some], some, view)
                for view, some in each
            ]
            assert torch.equal(batch.pixels, torch.cat(pixels))
            shown += pairs_in(batch)
    assert sorted(shown) == [(s, v) for s in range(SAMPLES) for v in range(8)]
    trainer.close()


@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "unlabelled"])
def test_mixed_or_unlabelled(teacher_run: Path, world: World, tmp_path: Path, mixed: bool) -> None:
    """With every row and pixel as single views have them; partners and shares too."""
    train = dataclasses.replace(world.splits.train, labelled=mixed)
    splits = Splits(train, world.splits.test)
    augment = "pad-crop:pad=2+mixup" if mixed else "pad-crop:pad=2"
    path = cache_of(teacher_run, tmp_path / "m.zarr", splits, views=3, augment=augment)
    config = student(path, 3, train={"epochs": 3})
    trainer = world.trainer(config, tmp_path / "run", splits=splits)
    for batch in batches_of(trainer):
        feed = trainer.stream.feed
        (single,) = feed.batches(batch.samples, batch.views[0], len(batch.samples))
        assert torch.equal(batch.pixels, single.pixels)
        assert (batch.partners is None) == (not mixed)
        if batch.partners is not None and batch.shares is not None:
            assert torch.equal(batch.partners, single.partners)
            assert torch.equal(batch.shares, single.shares)
    trainer.close()


def test_a_teacher_is_shown_rounds_as_well(world: World, tmp_path: Path) -> None:
    """And ends with the same weights after a stop."""
    model = ModelSettings(architecture="helpers:plain")
    train = TrainSettings(epochs=5, batch_size=BATCH, views_per_decode=3)
    config = teacher_of(model=model, augment="pad-crop:pad=1", train=train)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_teacher(config, whole, splits=world.splits)
    singly = [view_order(0, epoch, 9) for epoch in range(5)]
    assert [line["views"] for line in metrics(whole)] == [singly[:3]] * 3 + [singly[3:]] * 2
    assert sum(line["images"] for line in metrics(whole)) == 5 * SAMPLES
    with pytest.raises(RunError, match="SIGTERM"):
        train_teacher(config, stopped, splits=world.splits, reporter=AtBatch(6, terminate))
    train_teacher(config, stopped, resume=True, splits=world.splits)
    assert same_weights(whole, stopped)


def test_one_view_a_decode_is_the_setting_left_out() -> None:
    """So that a run that was started with the one goes on with the other."""
    assert TrainSettings(views_per_decode=1) == TrainSettings()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--views-per-decode 0", "train.views_per_decode must be positive, was 0"),
        ("--views-per-decode 6", "views_per_decode is 6, and views to show: 3"),
        ("--views-per-decode 3 --views 2", "views to show: 2"),
        ("--views-in-one-batch --views-per-decode 1", "views_in_one_batch"),
    ],
)
def test_what_cannot_be_is_told_in_three_lines(
    world: World,
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = f"train-student {world.cache} --dataset digits --student helpers:plain --epochs 7"
    asked += f" --out {tmp_path / 'run'} --device cpu {words}"
    answer = answer_to(asked.split(), monkeypatch, capsys)
    assert answer.code == 2
    assert message in answer.text
    assert len(answer.err.strip().splitlines()) <= 3
    assert not (tmp_path / "run").exists()


def test_another_number_of_epochs_would_be_another_last_round(world: World, tmp_path: Path) -> None:
    config = student(world.cache, 3, train={"schedule": "constant"})
    train_student(config, tmp_path / "run", splits=world.splits)
    longer = student(world.cache, 3, train={"schedule": "constant", "epochs": 9})
    with pytest.raises(RunError, match="the last round of train"):
        train_student(longer, tmp_path / "run", resume=True, splits=world.splits)


def test_a_batch_of_less_than_an_image_is_refused(world: World) -> None:
    assert stream_of(world.splits, 36, 4, 3, one_batch=True).steps == 9
    with pytest.raises(ConfigError, match="less than an image for a batch: 36 images in 54 batch"):
        stream_of(world.splits, 36, 2, 3, one_batch=True)
