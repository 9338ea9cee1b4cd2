"""Stage three against the live teacher, against the paper's formula, and against itself resumed."""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from damage import flip
from helpers import (
    DIGITS,
    AtBatch,
    Words,
    cache_of,
    first,
    same_weights,
    seen_batches,
    student_of,
    teacher_of,
    terminate,
    weights,
    without_times,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.cache import LogitCache
from stages.cache.encoding.floats import Float32
from stages.cache.targets import ViewTargets
from stages.data import Splits, cached_policy, load_data
from stages.errors import CacheError, IdentityError, RunError
from stages.inputs.cifar_models import cifar_model
from stages.inputs.datasets import ImageDataset
from stages.inputs.feed import Normalise
from stages.inputs.views import view_policy
from stages.objectives.losses import kd
from stages.order import held_out
from stages.rectify import rectify
from stages.settings import (
    BiasSettings,
    LossSettings,
    ModelSettings,
    RectifyConfig,
    SeedSettings,
    StudentConfig,
    TrainSettings,
)
from stages.student_checks import check_students, complete
from stages.train_student import train_student
from stages.train_teacher import train_teacher
from stages.training import run_directory

SAMPLES, VIEWS, CACHE_BATCH = 211, 6, 90
POLICY = "pad-crop:pad=2"


@dataclass
class World:
    """Small digits, a teacher that lives only in memory, and its cache with one rectification."""

    splits: Splits
    teacher: nn.Module
    normalise: Normalise
    cache: Path

    def images(self) -> Tensor:
        assert self.splits.train.images is not None
        return self.splits.train.images

    def pixels(self, samples: Tensor, view: int) -> Tensor:
        return view_policy(POLICY, seed=0).apply(self.images()[samples], samples, view)

    @torch.inference_mode()
    def live(self, samples: Tensor, view: int, batch_size: int) -> Tensor:
        """The teacher's logits (n, C), computed now, in batches of this size."""
        parts = samples.split(batch_size)
        return torch.cat([self.teacher(self.normalise(self.pixels(s, view))) for s in parts])


@pytest.fixture(scope="module")
def my_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("student")
    splits = load_data(DIGITS)
    splits = Splits(first(splits.train, SAMPLES), first(splits.test, 100))
    run, cache = folder / "teacher", folder / "digits.zarr"
    train = TrainSettings(epochs=3, batch_size=16, lr=0.05)
    teacher = teacher_of(augment=POLICY, train=train)
    train_teacher(teacher, run, splits=splits)
    cache_of(run, cache, splits, views=VIEWS, encoding="float32", batch_size=CACHE_BATCH)
    rectify(cache, RectifyConfig())

    identity = LogitCache.open(cache).identity.teacher
    module = cifar_model("resnet8", 10, 1)
    module.load_state_dict(load_file(run / "model.safetensors"))
    module = module.to(memory_format=torch.channels_last).eval()
    shutil.rmtree(run)  # stage three never needs it again
    normalise = Normalise(identity.mean, identity.std, 1, torch.device("cpu"))
    return World(splits, module, normalise, cache)


@pytest.fixture
def my_cache(my_world: World, tmp_path: Path) -> Path:
    """The cache, to be changed."""
    return Path(shutil.copytree(my_world.cache, tmp_path / "copy.zarr"))


def student_config(cache: Path, **changes: Any) -> StudentConfig:
    train = TrainSettings(epochs=3, batch_size=64, lr=0.05, checkpoint_seconds=0)
    model = ModelSettings(architecture="resnet8")
    return student_of(cache, **{"model": model, "train": train, **changes})


RECTIFY = BiasSettings(mode="rectify")


@pytest.fixture(scope="module")
def my_whole(my_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of three epochs of four batches, with bias rectification."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train_student(student_config(my_world.cache, bias=RECTIFY), run, splits=my_world.splits)
    return run


# ---- the cache and the live teacher ---------------------------------------------------------


def test_loss_from_the_cache_is_the_loss_with_the_live_teacher(my_world: World) -> None:
    """At each of 100 steps, on the same student weights, to float32 rounding.

    The loop is written here: the student follows the live loss, the cached one stands beside it.
    """
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.002, momentum=0.9)
    cache, labels = LogitCache.open(my_world.cache), my_world.splits.train.labels
    generator = torch.Generator().manual_seed(1)
    cached = [cache.read_view(view) for view in range(VIEWS)]
    live_losses, cached_losses = [], []
    for step in range(100):
        view = step // 2 % VIEWS
        samples = torch.randperm(SAMPLES, generator=generator)[:32]
        z_s = student.train()(my_world.normalise(my_world.pixels(samples, view)))
        z_t = my_world.live(samples, view, batch_size=32).clone()
        divergence = F.kl_div(
            F.log_softmax(z_s / 4, 1), F.softmax(z_t / 4, 1), reduction="batchmean"
        )
        loss = 16 * divergence
        with torch.no_grad():
            cached_losses.append(kd(z_s, cached[view].rows(samples), labels[samples], 4.0).item())
        live_losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(cached_losses, live_losses, rtol=2e-5, atol=2e-5)
    assert np.mean(live_losses[-10:]) < np.mean(live_losses[:10])  # and it did learn


def test_runs_are_equal_bit_for_bit_with_the_live_teacher_in_the_caches_batches(
    my_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = student_config(my_world.cache, bias=BiasSettings(mode="eliminate"))
    train_student(config, tmp_path / "cached", splits=my_world.splits)

    row_order = LogitCache.open(my_world.cache).dataset_index
    asked: list[int] = []
    labels = my_world.splits.train.labels

    def live_view(cache: LogitCache, view: int, *_: None) -> ViewTargets:
        asked.append(view)
        logits = torch.empty(SAMPLES, 10)
        logits[row_order] = my_world.live(row_order, view, CACHE_BATCH)
        in_dataset_order = torch.arange(SAMPLES)
        arrays = {"logits": logits}
        return ViewTargets(Float32(), arrays, logits.argmax(1), labels, in_dataset_order)

    monkeypatch.setattr(LogitCache, "read_view", live_view)
    train_student(config, tmp_path / "live", splits=my_world.splits)
    assert len(asked) == 3
    assert same_weights(tmp_path / "cached", tmp_path / "live")
    assert without_times(tmp_path / "cached") == without_times(tmp_path / "live")


# ---- the objective, end to end --------------------------------------------------------------


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
    my_world: World, tmp_path: Path, mode: Any, schedule: Any, reduction: Any
) -> None:
    """Whole-set batches and a rate of nothing: each epoch's loss is that of the first weights."""
    config = student_config(
        my_world.cache,
        bias=BiasSettings(mode=mode, schedule=schedule, reduction=reduction),
        loss=LossSettings(ce_weight=0.3, weight=0.6),
        train=TrainSettings(
            epochs=3, batch_size=SAMPLES, lr=1e-12, weight_decay=0, schedule="constant"
        ),
    )
    train_student(config, tmp_path / "run", splits=my_world.splits)
    torch.manual_seed(0)
    student, everything = cifar_model("resnet8", 10, 1), torch.arange(SAMPLES)
    for epoch, line in enumerate(without_times(tmp_path / "run")):
        progress = epoch / 3
        b = math.cos(math.pi / 2 * progress) ** 2 if schedule == "cosine" else 1.0
        with torch.no_grad():
            pixels = my_world.normalise(my_world.pixels(everything, line["view"]))
            z_s = student.train()(pixels).double().numpy()
        z_t = my_world.live(everything, line["view"], SAMPLES).double().numpy()
        labels = my_world.splits.train.labels.numpy()
        hard, soft = paper_losses(z_s, z_t, labels, mode, reduction, b)
        assert line["loss_ce"] == pytest.approx(hard, rel=1e-5)
        assert line["loss_right"] + line["loss_wrong"] == pytest.approx(soft, rel=1e-4)
        assert line["loss"] == pytest.approx(0.3 * hard + 0.6 * soft, rel=1e-4)
        assert line["wrong_rate"] == pytest.approx((z_t.argmax(1) != labels).mean())


def test_a_corrected_student_learns_from_the_moved_target(my_world: World, tmp_path: Path) -> None:
    """The target in closed form, of the live teacher: p + gamma p (a - <p, a>) / T."""
    config = student_config(
        my_world.cache,
        bias=BiasSettings(mode="correct", alpha=0.05, gamma=0.5),
        train=TrainSettings(
            epochs=1, batch_size=SAMPLES, lr=1e-12, weight_decay=0, schedule="constant"
        ),
    )
    train_student(config, tmp_path / "run", splits=my_world.splits)
    torch.manual_seed(0)
    student, everything = cifar_model("resnet8", 10, 1), torch.arange(SAMPLES)
    (line,) = without_times(tmp_path / "run")
    with torch.no_grad():
        z_s = student.train()(my_world.normalise(my_world.pixels(everything, line["view"])))
    z_t, t = my_world.live(everything, line["view"], SAMPLES).double(), 4.0
    p, labels = (z_t / t).softmax(1), my_world.splits.train.labels
    a = F.one_hot(labels, 10) / z_t.softmax(1).clamp(0.05) - 1
    target = p + 0.5 * p * (a - (p * a).sum(1, keepdim=True)) / t
    expected = t**2 * (target * (p.log() - (z_s.double() / t).log_softmax(1))).sum(1).mean()
    assert line["loss_kd"] == pytest.approx(expected.item(), rel=1e-4)
    assert (line["weight_right"], line["weight_wrong"]) == (1, 1)


def test_ce_shows_the_views_of_kd_and_reads_no_targets(
    my_world: World, my_whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("targets are read")

    monkeypatch.setattr(LogitCache, "read_view", fail)
    config = student_config(my_world.cache, loss=LossSettings(name="ce"))
    train_student(config, tmp_path / "run", splits=my_world.splits)
    found = without_times(tmp_path / "run")
    assert found[-1]["loss"] < found[0]["loss"]
    assert [line["view"] for line in found] == [line["view"] for line in without_times(my_whole)]


# ---- what a run leaves ----------------------------------------------------------------------


def test_saved_weights_give_the_accuracy_that_was_reported(my_world: World, my_whole: Path) -> None:
    module = cifar_model("resnet8", 10, 1)
    module.load_state_dict(weights(my_whole))
    test = my_world.splits.test
    assert test.images is not None
    with torch.no_grad():
        logits = module.eval()(my_world.normalise(test.images.clone()))
    top1 = (logits.argmax(1) == test.labels).double().mean().item()
    assert without_times(my_whole)[-1]["test_top1"] == pytest.approx(top1)


def test_held_out_samples_are_never_trained_on(
    my_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = seen_batches(monkeypatch)
    data = msgspec.structs.replace(DIGITS, val_fraction=0.25)
    summary = train_student(
        student_config(my_world.cache, data=data), tmp_path / "run", splits=my_world.splits
    )
    training, _ = held_out(SAMPLES, 0.25, seed=0)
    assert {sample for batch in seen for sample in batch.samples.tolist()} == {*training.tolist()}
    assert summary["selected"]["val_top1"] == max(
        line["val_top1"] for line in without_times(tmp_path / "run")
    )


# ---- seeds ----------------------------------------------------------------------------------


def test_the_two_seeds_are_separate(my_world: World, tmp_path: Path) -> None:
    """At a rate of nothing the final weights are the first ones."""
    still = TrainSettings(epochs=2, batch_size=SAMPLES, lr=1e-12, weight_decay=0)
    runs = {}
    for data, init in ((0, 0), (1, 0), (0, 1)):
        config = student_config(
            my_world.cache, train=still, seed=SeedSettings(data=data, init=init)
        )
        runs[data, init] = tmp_path / f"{data}{init}"
        train_student(config, runs[data, init], splits=my_world.splits)
    start, other_data, other_init = (weights(run)["conv1.weight"] for run in runs.values())
    torch.testing.assert_close(other_data, start, rtol=0, atol=1e-9)
    assert (other_init - start).abs().max() > 0.01
    views = [[line["view"] for line in without_times(run)] for run in runs.values()]
    assert views[1] != views[0]
    assert views[2] == views[0]


# ---- stopping and going on ------------------------------------------------------------------


class KilledError(BaseException):
    """Nobody catches it: the run ends as if its process had been killed."""


def kill() -> None:
    raise KilledError


@pytest.mark.parametrize("batches", [7, 12])
def test_a_resumed_run_is_an_uninterrupted_one(
    my_world: World, my_whole: Path, tmp_path: Path, batches: int
) -> None:
    """The run of `my_whole`, stopped by SIGTERM after some batch of its 12 and resumed."""
    torch.manual_seed(999)  # whatever came before must not matter
    config, run = student_config(my_world.cache, bias=RECTIFY), tmp_path / "run"
    stops = AtBatch(batches, terminate)
    with pytest.raises(RunError, match="SIGTERM"):
        train_student(config, run, splits=my_world.splits, reporter=stops)
    assert not (run / "summary.json").exists()
    train_student(config, run, resume=True, splits=my_world.splits)
    assert same_weights(my_whole, run)
    assert without_times(run) == without_times(my_whole)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (my_whole, run)]
    for name in ("last", "best", "selected"):
        assert summaries[0][name] == summaries[1][name]
    rates = [line["lr"] for line in without_times(my_whole)]
    assert rates[0] > rates[1] > rates[2] > 0  # cosine


def test_stopped_after_a_last_batch_that_took_one_sample_more(
    my_world: World, tmp_path: Path
) -> None:
    """211 = 3 x 70 + 1: the third batch of an epoch has 71 samples."""
    config = student_config(my_world.cache, train=TrainSettings(epochs=2, batch_size=70, lr=0.05))
    train_student(config, tmp_path / "whole", splits=my_world.splits)
    with pytest.raises(RunError, match="SIGTERM in epoch 1, after batch 3"):
        train_student(
            config, tmp_path / "run", splits=my_world.splits, reporter=AtBatch(3, terminate)
        )
    train_student(config, tmp_path / "run", resume=True, splits=my_world.splits)
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "run")


@pytest.mark.parametrize(("seconds", "kept", "message"), [(0, 2, 2), (1000, 1, 2)])
def test_killed_within_an_epoch_it_repeats_that_epoch(
    my_world: World, my_whole: Path, tmp_path: Path, seconds: float, kept: int, message: int
) -> None:
    """And those since the last checkpoint, whose lines are dropped. It is killed in the third."""
    config, run = student_config(my_world.cache, bias=RECTIFY), tmp_path / "run"
    train = msgspec.structs.replace(config.train, checkpoint_seconds=seconds)
    config = msgspec.structs.replace(config, train=train)
    with pytest.raises(KilledError):
        train_student(config, run, splits=my_world.splits, reporter=AtBatch(10, kill))
    state = torch.load(run / "last.pt", weights_only=True)
    assert (state["position"]["epoch"], len(without_times(run))) == (kept, message)
    train_student(config, run, resume=True, splits=my_world.splits)
    assert same_weights(my_whole, run)
    assert without_times(my_whole) == without_times(run)


def test_the_best_weights_wait_for_a_checkpoint(my_world: World, tmp_path: Path) -> None:
    """Of the epoch that held-out samples choose, also where only the ends are written."""
    runs = {}
    for seconds in (0, 1000):
        train = TrainSettings(epochs=6, batch_size=64, lr=0.2, checkpoint_seconds=seconds)
        data = msgspec.structs.replace(DIGITS, val_fraction=0.2)
        config = student_config(my_world.cache, train=train, data=data)
        runs[seconds] = tmp_path / str(seconds)
        train_student(config, runs[seconds], splits=my_world.splits)
    assert same_weights(*runs.values())
    assert without_times(runs[0]) == without_times(runs[1000])


@pytest.mark.parametrize("step", ["save_weights", "add_metrics", "save_checkpoint"])
def test_killed_between_epochs(my_world: World, my_whole: Path, tmp_path: Path, step: str) -> None:
    """While the second epoch is being written down."""
    config = student_config(my_world.cache, bias=RECTIFY)
    calls: list[object] = []

    def dies(run: run_directory.RunDirectory, what: Any) -> None:
        calls.append(what)
        if len(calls) == 2:
            raise KilledError
        write(run, what)

    write = getattr(run_directory.RunDirectory, step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory.RunDirectory, step, dies)
        with pytest.raises(KilledError):
            train_student(config, tmp_path / "run", splits=my_world.splits)
    train_student(config, tmp_path / "run", resume=True, splits=my_world.splits)
    assert same_weights(my_whole, tmp_path / "run")
    assert without_times(my_whole) == without_times(tmp_path / "run")


# ---- is it the dataset that the teacher saw? ------------------------------------------------


def with_labels_swapped(train: ImageDataset) -> ImageDataset:
    return dataclasses.replace(train, labels=train.labels.flip(0))


def with_samples_reordered(train: ImageDataset) -> ImageDataset:
    assert train.images is not None
    images = train.images.flip(0)
    return dataclasses.replace(
        train,
        images=images,
        labels=train.labels.flip(0),
        load=images.__getitem__,
        images_digest="another",
    )


def with_pixels_changed(train: ImageDataset) -> ImageDataset:
    """As after a decoder upgrade: file sizes and paths say the same, pixels do not."""
    assert train.images is not None
    images = train.images.clone()
    images[::2, :, 4, 4] += 1  # every other image, in the middle, where every crop has it
    return dataclasses.replace(train, images=images, load=images.__getitem__)


def with_classes_renamed(train: ImageDataset) -> ImageDataset:
    return dataclasses.replace(train, class_names=tuple("1023456789"))


IMPOSTORS: dict[str, tuple[Callable[[ImageDataset], ImageDataset], str]] = {
    "name": (lambda train: dataclasses.replace(train, name="cifar10"), "name"),
    "size": (lambda train: first(train, 210), "num_samples"),
    "labels": (with_labels_swapped, "labels: "),
    "order": (with_samples_reordered, "images: another"),
    "classes": (with_classes_renamed, "class_names: "),
    "content": (lambda train: dataclasses.replace(train, images_digest="x"), "images: x"),
    "pixels": (with_pixels_changed, r"\d+ of 256 pixel probes"),
}


@pytest.mark.parametrize(("change", "message"), IMPOSTORS.values(), ids=IMPOSTORS)
def test_another_dataset_is_refused(
    my_world: World,
    tmp_path: Path,
    change: Callable[[ImageDataset], ImageDataset],
    message: str,
) -> None:
    splits = Splits(change(my_world.splits.train), my_world.splits.test)
    with pytest.raises(IdentityError, match=message) as refused:
        train_student(student_config(my_world.cache), tmp_path / "run", splits=splits)
    assert refused.value.remedy
    assert not (tmp_path / "run").exists()


def test_pixel_drift_can_be_accepted(my_world: World, tmp_path: Path) -> None:
    splits = Splits(with_pixels_changed(my_world.splits.train), my_world.splits.test)
    with pytest.raises(IdentityError) as refused:
        train_student(student_config(my_world.cache), tmp_path / "run", splits=splits)
    assert "--accept-pixel-drift" in refused.value.remedy
    differing = int(str(refused.value).split()[0])
    assert 64 < differing < 192  # half of 256, give or take

    listener = Words()
    config = student_config(
        my_world.cache, accept_pixel_drift=True, train=TrainSettings(epochs=1, batch_size=200)
    )
    train_student(config, tmp_path / "run", splits=splits, reporter=listener)
    (warning,) = [text for text in listener.lines if "warning" in text]
    assert f"{differing} of 256" in warning
    other = Splits(with_labels_swapped(my_world.splits.train), my_world.splits.test)
    with pytest.raises(IdentityError, match="labels"):  # it accepts no more than that
        train_student(config, tmp_path / "other", splits=other)


# ---- what the cache has ---------------------------------------------------------------------


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
    my_world: World, my_cache: Path, tmp_path: Path, change: Any, stage: str, views: int
) -> None:
    change(my_cache)
    bias = BiasSettings(mode="rectify", rectified="part") if stage == "rectify" else BiasSettings()
    config = student_config(my_cache, bias=bias, train=TrainSettings(epochs=1, batch_size=200))
    with pytest.raises(CacheError) as refused:
        train_student(config, tmp_path / "run", splits=my_world.splits)
    assert f"pipeline {stage}" in refused.value.remedy
    assert f"--views {views}" in refused.value.remedy
    offered = msgspec.structs.replace(config, views=views)
    train_student(offered, tmp_path / "run", splits=my_world.splits)


@pytest.mark.parametrize("part", ["logits", "rectified/pairwise-T4"])
def test_damage_of_a_view_is_told_before_the_first_step(my_cache: Path, part: str) -> None:
    """Whichever epoch the view comes in; and not where it is not used."""
    flip(my_cache / "commits" / part / "v00005.json")
    cache = LogitCache.open(my_cache)
    policy = cached_policy(cache)
    all_views = complete(student_config(my_cache, bias=RECTIFY), cache)
    with pytest.raises(CacheError, match=rf"commits/{part}/v00005\.json is not readable"):
        check_students([all_views], [cache], policy)
    few = complete(student_config(my_cache, bias=RECTIFY, views=5), cache)
    assert check_students([few], [cache], policy).choices == [(0,), (1,), (2,), (3,), (4,)]
    next((my_cache / "prediction/c/4").rglob("0")).unlink()
    with pytest.raises(CacheError, match=r"prediction/c/4/\S* is missing"):
        check_students([few], [cache], policy)


def test_the_only_rectification_need_not_be_named(my_cache: Path) -> None:
    cache = LogitCache.open(my_cache)
    found = complete(student_config(my_cache, bias=RECTIFY), cache).config
    assert found.bias.rectified == "pairwise-T4"


def test_a_temperature_free_rectification_serves_any_temperature(my_cache: Path) -> None:
    rectify(my_cache, RectifyConfig(space="probability-1"))
    cache, loss = LogitCache.open(my_cache), LossSettings(temperature=2.0)
    for name in ("pairwise-T4", "pairwise-T4-probability-1"):
        bias = BiasSettings(mode="rectify", rectified=name)
        with contextlib.nullcontext() if "probability" in name else pytest.raises(CacheError):
            complete(student_config(my_cache, bias=bias, loss=loss), cache)
