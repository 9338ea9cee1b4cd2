"""Views that mix two samples, through all stages: the cached row is the mixed image's."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from helpers import first, job_of, metrics, student_of, teacher_of
from torch import Tensor

from stages.cache import LogitCache
from stages.cache_teacher import CacheJob, cache_teacher, prepare
from stages.data import Splits, cached_policy
from stages.errors import ViewError
from stages.inputs.feed import Batch, ViewFeed
from stages.inputs.model_outputs import logits_of
from stages.inputs.views import Mixed, Paired
from stages.objectives.losses import ce, kd, mixed_ce
from stages.rectify import rectify
from stages.settings import (
    BiasSettings,
    LossSettings,
    RectifyConfig,
    StudentConfig,
    TrainSettings,
)
from stages.train_student import student_trainer, train_student
from stages.train_teacher import LabelTask, train_teacher
from stages.training.run_directory import RunDirectory

AUGMENT = "pad-crop:pad=1+mixup"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def my_splits(digits: Splits) -> Splits:
    return Splits(first(digits.train, 120), first(digits.test, 60))


@pytest.fixture(scope="module")
def my_job(teacher_run: Path, my_splits: Splits) -> CacheJob:
    changes = {"views": 11, "augment": AUGMENT, "encoding": "float32"}  # more than the nine crops
    return job_of(teacher_run, my_splits, block_rows=50, batch_size=32, **changes)


@pytest.fixture(scope="module")
def my_cache(tmp_path_factory: pytest.TempPathFactory, my_job: CacheJob) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "digits.zarr"
    cache_teacher(my_job, path)
    return path


def student_config(cache: object) -> StudentConfig:
    train, loss = TrainSettings(epochs=2, batch_size=32), LossSettings(ce_weight=0.5, weight=0.5)
    return student_of(str(cache), train=train, loss=loss)


def naive_ce(logits: Tensor, batch: Batch, labels: Tensor) -> float:
    """Share times the own label's loss and the rest times the partner's, one row at a time."""
    assert batch.partners is not None
    assert batch.shares is not None
    total = 0.0
    for i, row in enumerate(logits.double().numpy()):
        log_p = row - row.max() - np.log(np.exp(row - row.max()).sum())
        own, other = int(labels[batch.samples[i]]), int(labels[batch.partners[i]])
        share = float(batch.shares[i])
        total -= share * log_p[own] + (1 - share) * log_p[other]
    return total / len(logits)


def test_mixed_cross_entropy_is_a_naive_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 7, generator=generator) * 3
    labels = torch.randint(7, (100,), generator=generator)
    samples, partners = torch.randint(100, (2, 40), generator=generator)
    shares = torch.rand(40, generator=generator) / 2 + 0.5
    batch = Batch(samples, torch.empty(0), partners, shares)
    ours = mixed_ce(logits, *batch.hard_labels(labels))
    assert float(ours) == pytest.approx(naive_ce(logits, batch, labels), rel=1e-6)
    alone = Batch(samples, torch.empty(0))  # without a partner it is cross-entropy
    assert torch.equal(
        mixed_ce(logits, *alone.hard_labels(labels)), ce(logits, None, labels[samples])
    )


def test_both_tasks(my_cache: Path, my_splits: Splits, my_job: CacheJob, tmp_path: Path) -> None:
    labels, cache = my_splits.train.labels, LogitCache.open(my_cache)
    feed = ViewFeed(my_splits.train, my_job.policy, CPU, workers=0)
    logits = torch.randn(120, 10, generator=torch.Generator().manual_seed(1))
    task = student_trainer(
        [student_config(my_cache)], [RunDirectory(tmp_path / "run")], my_splits
    ).learner.task
    (view,) = task.start_epoch(0)
    (batch,) = feed.batches(torch.arange(120), view, 120)
    hard = naive_ce(logits, batch, labels)
    teacher = LabelTask(labels, None, 0)
    assert float(teacher.loss_parts(logits, batch)["loss"]) == pytest.approx(hard, rel=1e-6)
    parts = task.loss_parts(logits, batch)
    assert float(parts["loss_ce"]) == pytest.approx(hard, rel=1e-6)
    rows = cache.distribution(view, temperature=4.0).log()
    soft = float(kd(logits, rows * 4, labels, 4.0))  # log-probabilities times T are logits
    assert float(parts["loss"]) == pytest.approx(0.5 * hard + 0.5 * soft, rel=1e-4)


@pytest.mark.parametrize("view", [5, 10])
def test_rows_are_of_mixed_images(
    my_cache: Path, my_job: CacheJob, my_splits: Splits, view: int
) -> None:
    cache = LogitCache.open(my_cache)
    policy = cached_policy(cache)
    assert isinstance(policy, Mixed)
    assert my_splits.train.images is not None
    # Mixed here from the two crops and not by the feed.
    samples = torch.arange(120)
    partners = policy.partners(samples, view, 120)
    assert not torch.equal(samples, partners)
    own, other = (
        policy.base.apply(my_splits.train.images[who], who, view % 9).int()
        for who in (samples, partners)
    )
    (batch,) = my_job.feed(my_splits.train, my_job.policy).batches(samples, view, 120)
    assert batch.shares is not None
    keep = (batch.shares * 256).int().view(-1, 1, 1, 1)
    pixels = ((keep * own + (256 - keep) * other + 128) // 256).to(torch.uint8)
    with torch.inference_mode():
        live = logits_of(my_job.model.module(my_job.normalise(pixels)))
    ours = cache.distribution(view, temperature=1.0)
    torch.testing.assert_close(ours, live.softmax(1), rtol=1e-4, atol=1e-6)


def test_both_train_on_mixed_views(my_cache: Path, my_splits: Splits, tmp_path: Path) -> None:
    train_student(student_config(my_cache), tmp_path / "s", splits=my_splits)
    train = TrainSettings(epochs=2, batch_size=32, lr=0.02)
    config = teacher_of(augment="pad-crop:pad=1+erasing+cutmix", train=train)
    train_teacher(config, tmp_path / "t", splits=my_splits)
    assert [line["view"] for line in metrics(tmp_path / "t")] == [0, 1]
    for run in ("s", "t"):
        first, second = (line["loss"] for line in metrics(tmp_path / run))
        assert second < first


def test_weak_and_strong_rows_are_pairs(
    my_job: CacheJob, my_splits: Splits, tmp_path: Path
) -> None:
    spec = "pad-crop:pad=1|pad-crop:pad=1+erasing:p=1+cutmix"
    config = msgspec.structs.replace(my_job.config, augment=spec, views=4)
    job = prepare(config, my_splits)
    cache_teacher(job, tmp_path / "pairs.zarr")
    cache = LogitCache.open(tmp_path / "pairs.zarr")
    policy = cached_policy(cache)
    assert isinstance(policy, Paired)
    weak_and_strong = policy.paired_views(2)
    assert weak_and_strong == (2, 3)
    feed, samples = ViewFeed(my_splits.train, policy, CPU, workers=0), torch.arange(120)
    for view in weak_and_strong:
        (batch,) = feed.batches(samples, view, 120)
        assert (batch.partners is None) == (view % 2 == 0)
        with torch.inference_mode():
            live = logits_of(job.model.module(job.normalise(batch.pixels)))
        ours = cache.distribution(view, temperature=1.0)
        torch.testing.assert_close(ours, live.softmax(1), rtol=1e-4, atol=1e-6)


def test_rectification_is_refused(my_cache: Path) -> None:
    with pytest.raises(ViewError, match=r"needs one label a row, .*'pad-crop\+mixup'"):
        rectify(my_cache, RectifyConfig())
    assert LogitCache.open(my_cache).rectifications == []


@pytest.mark.parametrize("mode", ["eliminate", "rectify"])
def test_bias_is_refused(my_cache: Path, my_splits: Splits, tmp_path: Path, mode: str) -> None:
    bias = msgspec.convert({"mode": mode}, BiasSettings)
    config = msgspec.structs.replace(student_config(my_cache), bias=bias)
    with pytest.raises(ViewError, match=f"bias '{mode}' needs one label a row(.|\n)*--bias none"):
        student_trainer([config], [RunDirectory(tmp_path / "run")], my_splits)
    assert not (tmp_path / "run").exists()
