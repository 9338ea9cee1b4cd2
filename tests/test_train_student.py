"""Stage three against the live teacher, against the paper's formula, and against itself resumed."""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from damage import flip
from helpers import (
    AtBatch,
    Runs,
    Words,
    assert_same_runs,
    cache_of,
    changed,
    cut,
    first,
    normed,
    refused,
    seen_batches,
    terminate,
    weights,
    without_times,
)
from torch import Tensor, nn

from stages.cache import LogitCache
from stages.cache.encoding.floats import Float32
from stages.cache.targets import ViewTargets
from stages.data import Splits, cached_policy
from stages.errors import CacheError, IdentityError, RunError
from stages.inputs.cifar_models import cifar_model
from stages.inputs.datasets import ImageDataset
from stages.inputs.feed import Normalise
from stages.inputs.views import view_policy
from stages.order import held_out
from stages.rectify import rectify
from stages.settings import BiasSettings, RectifyConfig
from stages.student_checks import check_students, complete
from stages.training.run_directory import RunDirectory

SAMPLES, VIEWS, CACHE_BATCH = 211, 6, 90
POLICY = "pad-crop:pad=2"
CPU = torch.device("cpu")


class World(Runs):
    """Small digits, a teacher that lives only in memory, and students of its cache."""

    teacher: nn.Module
    normalise: Normalise

    def images(self) -> Tensor:
        assert self.splits.train.images is not None
        return self.splits.train.images

    def pixels(self, samples: Tensor, view: int) -> Tensor:
        return view_policy(POLICY, seed=0).apply(self.images()[samples], samples, view)

    def shown(self, pixels: Tensor) -> Tensor:
        """As a student sees them: normalised as its own dataset says, in three channels."""
        return Normalise(*self.splits.train.statistics(), 3, CPU)(pixels)

    @torch.inference_mode()
    def live(self, samples: Tensor, view: int, batch_size: int) -> Tensor:
        """The teacher's logits (n, C), computed now, in batches of this size."""
        parts = samples.split(batch_size)
        return torch.cat([self.teacher(self.normalise(self.pixels(s, view))) for s in parts])


@pytest.fixture(scope="module")
def my_world(tmp_path_factory: pytest.TempPathFactory, teacher_run: Path, digits: Splits) -> World:
    folder, splits = tmp_path_factory.mktemp("student"), cut(digits, SAMPLES, 100)
    run, cache = Path(shutil.copytree(teacher_run, folder / "teacher")), folder / "digits.zarr"
    cache_of(run, cache, splits, views=VIEWS, encoding="float32", batch_size=CACHE_BATCH)
    rectify(cache, RectifyConfig())
    train = {"train__epochs": 3, "train__batch_size": 64, "train__checkpoint_seconds": 0}
    world = World(cache, splits, folder, model__architecture="helpers:normed", **train)
    identity, module = LogitCache.open(cache).identity.teacher, cifar_model("resnet8", 10, 1)
    module.load_state_dict(weights(run))
    shutil.rmtree(run)  # stage three never needs it again
    world.teacher = module.to(memory_format=torch.channels_last).eval()
    world.normalise = Normalise(identity.mean, identity.std, 1, CPU)
    return world


@pytest.fixture
def my_cache(my_world: World, tmp_path: Path) -> Path:
    """The cache, to be changed."""
    return Path(shutil.copytree(my_world.cache, tmp_path / "copy.zarr"))


STILL: dict[str, Any] = {
    "train__batch_size": SAMPLES,
    "train__lr": 1e-12,
    "train__weight_decay": 0,
    "train__schedule": "constant",
}
"""One batch an epoch at a rate of nothing: the weights stay the first ones."""


@pytest.fixture
def my_whole(my_world: World) -> Path:
    """An uninterrupted run of three epochs of four batches, with bias rectification. Read only."""
    return my_world.plain(my_world.student(bias__mode="rectify"))


def test_runs_are_equal_bit_for_bit_with_the_live_teacher_in_the_caches_batches(
    my_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = my_world.student(bias__mode="eliminate")
    cached, asked, labels = my_world.trained(config), list[int](), my_world.splits.train.labels
    row_order = LogitCache.open(my_world.cache).dataset_index

    def live_view(cache: LogitCache, view: int, *_: None) -> ViewTargets:
        asked.append(view)
        logits = torch.empty(SAMPLES, 10)
        logits[row_order] = my_world.live(row_order, view, CACHE_BATCH)
        arrays, in_dataset_order = {"logits": logits}, torch.arange(SAMPLES)
        return ViewTargets(Float32(), arrays, logits.argmax(1), labels, in_dataset_order)

    monkeypatch.setattr(LogitCache, "read_view", live_view)
    assert_same_runs(cached, my_world.trained(config))
    assert len(asked) == 3


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.max(1, keepdims=True)
    normalised: np.ndarray = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    return normalised


def paper_losses(
    z_s: np.ndarray, z_t: np.ndarray, labels: np.ndarray, mode: str, reduction: str, b: float
) -> tuple[float, float]:
    """Cross-entropy, and T^2 (b L_right + (1 - b) L_wrong), arXiv 2412.09874 as released."""
    p_t, log_s = np.exp(log_softmax(z_t / 4)), log_softmax(z_s / 4)
    every, taken = np.arange(len(labels)), z_t.argmax(1)
    wrong = taken != labels
    assert wrong.any()
    assert not wrong.all()
    if mode == "rectify":
        for i in np.flatnonzero(wrong):
            label, top = p_t[i, labels[i]], p_t[i, taken[i]]
            pair = label + top
            p_t[i, labels[i]], p_t[i, taken[i]] = (
                pair * (label + 1) / (pair + 1),
                pair * top / (pair + 1),
            )
    rows = 16 * (p_t * (np.log(p_t) - log_s)).sum(1)
    hard = -log_softmax(z_s)[every, labels].mean()
    if mode == "none":
        return hard, rows.mean()
    sizes = (len(rows),) * 2 if reduction == "batch" else ((~wrong).sum(), wrong.sum())
    right = rows[~wrong].sum() / sizes[0]
    return hard, b * right + (1 - b if mode == "rectify" else 0) * rows[wrong].sum() / sizes[1]


@pytest.mark.parametrize(
    ("mode", "schedule", "reduction"),
    [
        ("none", None, "subset"),
        ("eliminate", "constant", "subset"),
        ("rectify", "cosine", "subset"),
        ("rectify", "cosine", "batch"),
    ],
)
def test_reported_loss_is_the_papers(
    my_world: World, mode: Any, schedule: Any, reduction: Any
) -> None:
    """Whole-set batches and a rate of nothing: each epoch's loss is that of the first weights."""
    bias = BiasSettings(mode=mode, schedule=schedule, reduction=reduction)
    loss = {"loss__ce_weight": 0.3, "loss__weight": 0.6}
    run = my_world.trained(my_world.student(bias=bias, **loss, **STILL))
    torch.manual_seed(0)
    student, everything = normed(10), torch.arange(SAMPLES)
    for epoch, line in enumerate(without_times(run)):
        b = math.cos(math.pi / 2 * epoch / 3) ** 2 if schedule == "cosine" else 1.0
        with torch.no_grad():
            pixels = my_world.shown(my_world.pixels(everything, line["view"]))
            z_s = student.train()(pixels).double().numpy()
        z_t = my_world.live(everything, line["view"], SAMPLES).double().numpy()
        labels = my_world.splits.train.labels.numpy()
        hard, soft = paper_losses(z_s, z_t, labels, mode, reduction, b)
        assert line["loss_ce"] == pytest.approx(hard, rel=1e-5)
        assert line["loss_right"] + line["loss_wrong"] == pytest.approx(soft, rel=1e-4)
        assert line["loss"] == pytest.approx(0.3 * hard + 0.6 * soft, rel=1e-4)
        assert line["wrong_rate"] == pytest.approx((z_t.argmax(1) != labels).mean())


def test_a_corrected_student_learns_from_the_moved_target(my_world: World) -> None:
    """The target in closed form, of the live teacher: p + gamma p (a - <p, a>) / T."""
    bias = BiasSettings(mode="correct", alpha=0.05, gamma=0.5)
    run = my_world.trained(my_world.student(bias=bias, **STILL | {"train__epochs": 1}))
    torch.manual_seed(0)
    student, everything = normed(10), torch.arange(SAMPLES)
    (line,) = without_times(run)
    with torch.no_grad():
        z_s = student.train()(my_world.shown(my_world.pixels(everything, line["view"])))
    z_t, t = my_world.live(everything, line["view"], SAMPLES).double(), 4.0
    p, labels = (z_t / t).softmax(1), my_world.splits.train.labels
    a = F.one_hot(labels, 10) / z_t.softmax(1).clamp(0.05) - 1
    target = p + 0.5 * p * (a - (p * a).sum(1, keepdim=True)) / t
    expected = t**2 * (target * (p.log() - (z_s.double() / t).log_softmax(1))).sum(1).mean()
    assert line["loss_kd"] == pytest.approx(expected.item(), rel=1e-4)
    assert (line["weight_right"], line["weight_wrong"]) == (1, 1)


def test_ce_shows_the_views_of_kd_and_reads_no_targets(
    my_world: World, my_whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("targets are read")

    monkeypatch.setattr(LogitCache, "read_view", fail)
    found = without_times(my_world.trained(my_world.student(loss__name="ce")))
    assert found[-1]["loss"] < found[0]["loss"]
    assert [line["view"] for line in found] == [line["view"] for line in without_times(my_whole)]


def test_saved_weights_give_the_accuracy_that_was_reported(my_world: World, my_whole: Path) -> None:
    module = normed(10)
    module.load_state_dict(weights(my_whole))
    test = my_world.splits.test
    assert test.images is not None
    with torch.no_grad():
        logits = module.eval()(my_world.shown(test.images.clone()))
    top1 = (logits.argmax(1) == test.labels).double().mean().item()
    assert without_times(my_whole)[-1]["test_top1"] == pytest.approx(top1)


def test_held_out_samples_are_never_trained_on(
    my_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = seen_batches(monkeypatch)
    run = my_world.trained(my_world.student(data__val_fraction=0.25))
    training, _ = held_out(SAMPLES, 0.25, seed=0)
    assert {sample for batch in seen for sample in batch.samples.tolist()} == {*training.tolist()}
    selected = json.loads((run / "summary.json").read_text())["selected"]
    assert selected["val_top1"] == max(line["val_top1"] for line in without_times(run))


def test_the_two_seeds_are_separate(my_world: World) -> None:
    """At a rate of nothing the final weights are the first ones."""
    runs = [
        my_world.trained(my_world.student(seed__data=data, seed__init=init, **STILL))
        for data, init in ((0, 0), (1, 0), (0, 1))
    ]
    start, other_data, other_init = (weights(run)["0.weight"] for run in runs)
    torch.testing.assert_close(other_data, start, rtol=0, atol=1e-9)
    assert (other_init - start).abs().max() > 0.01
    views = [[line["view"] for line in without_times(run)] for run in runs]
    assert views[1] != views[0]
    assert views[2] == views[0]


class KilledError(BaseException):
    """Nobody catches it: the run ends as if its process had been killed."""


def kill() -> None:
    raise KilledError


@pytest.mark.parametrize("batches", [7, 12])
def test_a_resumed_run_is_an_uninterrupted_one(
    my_world: World, my_whole: Path, batches: int
) -> None:
    """The run of `my_whole`, stopped by SIGTERM after some batch of its 12 and resumed."""
    torch.manual_seed(999)  # whatever came before must not matter
    config, run = my_world.student(bias__mode="rectify"), my_world.new()
    with pytest.raises(RunError, match="SIGTERM"):
        my_world.trained(config, run, reporter=AtBatch(batches, terminate))
    assert not (run / "summary.json").exists()
    my_world.trained(config, run, resume=True)
    assert_same_runs(my_whole, run)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (my_whole, run)]
    for name in ("last", "best", "selected"):
        assert summaries[0][name] == summaries[1][name]
    rates = [line["lr"] for line in without_times(my_whole)]
    assert rates[0] > rates[1] > rates[2] > 0  # cosine


def test_stopped_after_a_last_batch_that_took_one_sample_more(my_world: World) -> None:
    """211 = 3 x 70 + 1: the third batch of an epoch has 71 samples."""
    config, run = my_world.student(train__epochs=2, train__batch_size=70), my_world.new()
    with pytest.raises(RunError, match="SIGTERM in epoch 1, after batch 3"):
        my_world.trained(config, run, reporter=AtBatch(3, terminate))
    my_world.trained(config, run, resume=True)
    assert_same_runs(my_world.trained(config), run)


@pytest.mark.parametrize(("seconds", "kept"), [(0, 2), (1000, 1)])
def test_killed_within_an_epoch_it_repeats_that_epoch(
    my_world: World, my_whole: Path, seconds: float, kept: int
) -> None:
    """And those since the last checkpoint, whose lines are dropped. It is killed in the third."""
    given = {"bias__mode": "rectify", "train__checkpoint_seconds": seconds}
    config, run = my_world.student(**given), my_world.new()
    with pytest.raises(KilledError):
        my_world.trained(config, run, reporter=AtBatch(10, kill))
    state = torch.load(run / "last.pt", weights_only=True)
    assert (state["position"]["epoch"], len(without_times(run))) == (kept, 2)
    my_world.trained(config, run, resume=True)
    assert_same_runs(my_whole, run)


def test_the_best_weights_wait_for_a_checkpoint(my_world: World) -> None:
    """Of the epoch that held-out samples choose, also where only the ends are written."""
    train = {"train__epochs": 6, "train__lr": 0.2, "data__val_fraction": 0.2}
    often, seldom = (
        my_world.trained(my_world.student(**train, train__checkpoint_seconds=seconds))
        for seconds in (0, 1000)
    )
    assert_same_runs(often, seldom)


@pytest.mark.parametrize("step", ["save_weights", "add_metrics", "save_checkpoint"])
def test_killed_between_epochs(my_world: World, my_whole: Path, step: str) -> None:
    """While the second epoch is being written down."""
    config, run = my_world.student(bias__mode="rectify"), my_world.new()
    calls, write = itertools.count(1), getattr(RunDirectory, step)

    def dies(run: RunDirectory, what: Any) -> None:
        if next(calls) == 2:
            raise KilledError
        write(run, what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, step, dies)
        with pytest.raises(KilledError):
            my_world.trained(config, run)
    my_world.trained(config, run, resume=True)
    assert_same_runs(my_whole, run)


def with_images(train: ImageDataset, images: Tensor, **changes: Any) -> ImageDataset:
    return dataclasses.replace(train, images=images, load=images.__getitem__, **changes)


def with_labels_swapped(train: ImageDataset) -> ImageDataset:
    return dataclasses.replace(train, labels=train.labels.flip(0))


def with_samples_reordered(train: ImageDataset) -> ImageDataset:
    assert train.images is not None
    reordered = {"labels": train.labels.flip(0), "images_digest": "another"}
    return with_images(train, train.images.flip(0), **reordered)


def with_pixels_changed(train: ImageDataset) -> ImageDataset:
    """As after a decoder upgrade: file sizes and paths say the same, pixels do not."""
    assert train.images is not None
    images = train.images.clone()
    images[::2, :, 4, 4] += 1  # every other image, in the middle, where every crop has it
    return with_images(train, images)


IMPOSTORS: dict[str, tuple[Callable[[ImageDataset], ImageDataset], str]] = {
    "name": (lambda train: dataclasses.replace(train, name="cifar10"), "name"),
    "size": (lambda train: first(train, 210), "num_samples"),
    "labels": (with_labels_swapped, "labels: "),
    "order": (with_samples_reordered, "images: another"),
    "classes": (
        lambda train: dataclasses.replace(train, class_names=tuple("1023456789")),
        "class_names: ",
    ),
    "content": (lambda train: dataclasses.replace(train, images_digest="x"), "images: x"),
    "pixels": (with_pixels_changed, r"\d+ of 256 pixel probes"),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_another_dataset_is_refused(my_world: World, name: str) -> None:
    change, message = IMPOSTORS[name]
    splits, run = Splits(change(my_world.splits.train), my_world.splits.test), my_world.new()
    with pytest.raises(IdentityError, match=message) as caught:
        my_world.trained(my_world.student(), run, splits=splits)
    assert caught.value.remedy
    assert ("--accept-pixel-drift" in caught.value.remedy) == (name == "pixels")
    assert not run.exists()


def test_pixel_drift_can_be_accepted(my_world: World) -> None:
    drifted, swapped = (
        Splits(change(my_world.splits.train), my_world.splits.test)
        for change in (with_pixels_changed, with_labels_swapped)
    )
    config, words = my_world.student(accept_pixel_drift=True, train__epochs=1), Words()
    my_world.trained(config, splits=drifted, reporter=words)
    (warning,) = [text for text in words.lines if "warning" in text]
    found = re.search(r"(\d+) of 256", warning)
    assert found is not None
    assert 64 < int(found[1]) < 192  # half of 256, give or take
    with pytest.raises(IdentityError, match="labels"):  # it accepts no more than that
        my_world.trained(config, splits=swapped)


def grown(cache: Path) -> None:
    LogitCache.open(cache, writable=True).grow(9)


def with_a_hole(cache: Path) -> None:
    """View 2 is missing: five are there, two of them in a row from the first."""
    (cache / "commits" / "logits" / "v00002.json").unlink()


def rectified_in_part(cache: Path) -> None:
    rectify(cache, RectifyConfig(name="part", views=2))


@pytest.mark.parametrize(
    ("change", "stage", "views"),
    [
        (grown, "cache-teacher", 6),
        (with_a_hole, "cache-teacher", 2),
        (rectified_in_part, "rectify", 2),
    ],
)
def test_what_is_incomplete_offers_what_it_has(
    my_world: World, my_cache: Path, change: Any, stage: str, views: int
) -> None:
    change(my_cache)
    bias = BiasSettings(mode="rectify", rectified="part") if stage == "rectify" else BiasSettings()
    config = my_world.student(cache=my_cache, bias=bias, train__epochs=1)
    with refused(CacheError, "view", f"pipeline {stage}", f"--views {views}"):
        my_world.trained(config)
    my_world.trained(changed(config, views=views))


@pytest.mark.parametrize("part", ["logits", "rectified/pairwise-T4"])
def test_damage_of_a_view_is_told_before_the_first_step(
    my_world: World, my_cache: Path, part: str
) -> None:
    """Whichever epoch the view comes in; and not where it is not used."""
    flip(my_cache / "commits" / part / "v00005.json")
    cache = LogitCache.open(my_cache)
    config, policy = my_world.student(bias__mode="rectify"), cached_policy(cache)
    with pytest.raises(CacheError, match=rf"commits/{part}/v00005\.json is not readable"):
        check_students([complete(config, cache)], [cache], policy)
    few = complete(changed(config, views=5), cache)
    assert check_students([few], [cache], policy).choices == [(0,), (1,), (2,), (3,), (4,)]
    next((my_cache / "prediction/c/4").rglob("0")).unlink()
    with pytest.raises(CacheError, match=r"prediction/c/4/\S* is missing"):
        check_students([few], [cache], policy)


def test_which_rectification_serves(my_world: World, my_cache: Path) -> None:
    """The only one need not be named; one that is free of its temperature serves any."""
    config = my_world.student(bias__mode="rectify")
    found = complete(config, LogitCache.open(my_cache)).config
    assert found.bias.rectified == "pairwise-T4"
    rectify(my_cache, RectifyConfig(space="probability-1"))
    for name in ("pairwise-T4", "pairwise-T4-probability-1"):
        other = changed(config, bias__rectified=name, loss__temperature=2.0)
        with contextlib.nullcontext() if "probability" in name else pytest.raises(CacheError):
            complete(other, LogitCache.open(my_cache))
