"""Several caches of the same views, averaged: against a loop over rows, members and classes."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import yaml
from helpers import (
    first,
    metrics,
    seen_batches,
    student_of,
    teacher_of,
)
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.encoding.floats import Float32
from stages.cache.targets import ViewTargets
from stages.cache_teacher import cache_teacher, prepare
from stages.data import Splits, usable_views
from stages.errors import CacheError, ConfigError, IdentityError, RunError
from stages.order import sample_order
from stages.settings import (
    BiasSettings,
    CacheConfig,
    LossSettings,
    StudentConfig,
    TrainSettings,
)
from stages.targets.ensemble import EnsembleTargets, check_members
from stages.train_student import student_trainer, train_student
from stages.train_teacher import train_teacher
from stages.training.run_directory import RunDirectory

SAMPLES, CLASSES, VIEWS, IMAGES = 60, 7, 3, 150


def member(seed: int, scale: float, labels: Tensor) -> ViewTargets:
    """Random logits in a row order of its own."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(SAMPLES, CLASSES, generator=generator) * scale
    row_of = torch.randperm(SAMPLES, generator=generator)
    of_row = row_of.argsort()
    return ViewTargets(
        Float32(), {"logits": logits[of_row]}, logits[of_row].argmax(1), labels[of_row], row_of
    )


def ensemble(*scales: float) -> EnsembleTargets:
    labels = torch.arange(SAMPLES) % CLASSES
    return EnsembleTargets([member(i, s, labels) for i, s in enumerate(scales)], labels)


def naive_mean(targets: EnsembleTargets, sample: int, temperature: float) -> list[float]:
    """mean_k softmax(z_k / T) of one sample, a number at a time."""
    total = [0.0] * CLASSES
    for one in targets.members:
        row = one.rows(torch.tensor([sample]))[0].double().tolist()
        weights = [math.exp((z - max(row)) / temperature) for z in row]
        for c in range(CLASSES):
            total[c] += weights[c] / sum(weights) / len(targets.members)
    return total


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("scales", [(2.0,), (1.0, 3.0), (0.1, 5.0, 9.0), (1e4, 1e4)])
def test_rows_are_the_mean_probabilities(scales: tuple[float, ...], temperature: float) -> None:
    targets, samples = ensemble(*scales), torch.tensor([5, 59, 0, 5])
    found = torch.softmax(targets.rows(samples, temperature) / temperature, dim=1)
    expected = [naive_mean(targets, int(sample), temperature) for sample in samples]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)


def test_wrong_is_where_the_mean_at_one_has_another_answer() -> None:
    targets, samples = ensemble(1.0, 3.0, 2.0), torch.arange(SAMPLES).flip(0)
    expected = []
    for sample in samples.tolist():
        mean = naive_mean(targets, sample, 1.0)
        expected.append(mean.index(max(mean)) != sample % CLASSES)
    assert targets.wrong(samples).tolist() == expected
    assert any(one.wrong(samples).tolist() != expected for one in targets.members)


def test_there_is_no_rectification() -> None:
    with pytest.raises(ConfigError, match="belongs to one cache"):
        ensemble(1.0, 2.0).rectified_rows(torch.arange(3))


# ---- whole runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def my_splits(digits: Splits) -> Splits:
    return Splits(first(digits.train, IMAGES), first(digits.test, 30))


@pytest.fixture(scope="module")
def my_caches(
    cache_config: CacheConfig,
    my_splits: Splits,
    tmp_path_factory: pytest.TempPathFactory,
) -> Mapping[str, Path]:
    """`first`, and caches of another teacher: `other` in half precision and in other blocks, `two`
    with two views, `seed` of other views.
    """
    folder = tmp_path_factory.mktemp("ensemble")
    teacher = teacher_of(train=TrainSettings(epochs=1, lr=0.05))
    train_teacher(teacher, folder / "run", splits=my_splits)
    weights = msgspec.structs.replace(cache_config.teacher, weights=str(folder / "run"))
    changes: dict[str, dict[str, Any]] = {
        "first": {"teacher": cache_config.teacher},
        "other": {"encoding": "float16", "block_rows": 25},
        "two": {"views": 2},
        "seed": {"seed": 1, "views": 1},
    }
    for name, changed in changes.items():
        own = {"teacher": weights, "block_rows": 50, **changed}
        config = msgspec.structs.replace(cache_config, **own)
        cache_teacher(prepare(config, my_splits), folder / name)
    return {name: folder / name for name in changes}


def student_config(caches: Mapping[str, Path], *names: str, **changes: Any) -> StudentConfig:
    first, *others = (str(caches[name]) for name in names)
    train = TrainSettings(epochs=2, batch_size=128, lr=0.05)
    return student_of(first, **{"also": tuple(others), "train": train, **changes})


@pytest.mark.parametrize("mode", ["none", "eliminate"])
def test_two_teachers(
    my_caches: Mapping[str, Path],
    my_splits: Splits,
    tmp_path: Path,
    mode: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a rate of nothing in one batch: the loss is that of the mean, worked out in numpy."""
    config = student_config(
        my_caches,
        "first",
        "other",
        bias=BiasSettings(mode=mode),
        loss=LossSettings(ce_weight=0.0, weight=1.0),
        train=TrainSettings(epochs=1, batch_size=IMAGES, lr=1e-12, weight_decay=0),
    )
    shown = seen_batches(monkeypatch)
    train_student(config, tmp_path / "run", splits=my_splits)
    ((_, samples, logits),) = shown
    logits = logits.double()
    (line,) = metrics(tmp_path / "run")
    caches = [LogitCache.open(my_caches[name]) for name in ("first", "other")]
    means = {}
    for temperature in (1.0, 4.0):
        rows = [c.read_view(line["view"]).rows(samples).double() / temperature for c in caches]
        means[temperature] = sum(torch.softmax(z, 1) for z in rows).numpy() / 2
    wrong = means[1.0].argmax(1) != my_splits.train.labels[samples].numpy()
    assert line["wrong_rate"] == pytest.approx(wrong.mean(), abs=1e-6)
    student = torch.log_softmax(logits / 4, 1).numpy()
    rows = 16 * (means[4.0] * (np.log(means[4.0]) - student)).sum(1)
    expected = rows.mean() if mode == "none" else rows[~wrong].mean()
    assert line["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_run_resumes_and_leaves_a_record(
    my_caches: Mapping[str, Path], my_splits: Splits, tmp_path: Path
) -> None:
    config = student_config(my_caches, "first", "other", bias=BiasSettings(mode="eliminate"))
    train_student(config, tmp_path / "run", splits=my_splits)
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert kept["also"] == [str(my_caches["other"])]
    alone = student_config(my_caches, "first", bias=BiasSettings(mode="eliminate"))
    with pytest.raises(RunError, match=r"other caches .*--also"):
        train_student(alone, tmp_path / "run", resume=True, splits=my_splits)
    train_student(config, tmp_path / "run", resume=True, splits=my_splits)


def test_in_groups_of_the_firsts_chunks(
    my_caches: Mapping[str, Path], my_splits: Splits, tmp_path: Path
) -> None:
    """The members have other chunks; every sample is shown once, to the same effect at rate 0."""
    still = TrainSettings(epochs=1, batch_size=40, lr=1e-12, weight_decay=0)
    lines = {}
    for name, memory in (("whole", None), ("groups", "20kB")):
        config = student_config(my_caches, "first", "other", train=still, slab_memory=memory)
        trainer = student_trainer([config], [RunDirectory(tmp_path / name)], my_splits)
        trainer.fit()
        (lines[name],) = metrics(tmp_path / name)
        order = trainer.stream.order(torch.arange(IMAGES), 0, 0)
        assert torch.equal(order, sample_order(torch.arange(IMAGES), 0, 0)) == (memory is None)
    assert lines["groups"]["wrong_rate"] == pytest.approx(lines["whole"]["wrong_rate"], abs=1e-6)
    assert lines["groups"]["loss"] == pytest.approx(lines["whole"]["loss"], rel=0.1)


# ---- what is refused ------------------------------------------------------------------------


def test_caches_of_other_views_or_another_dataset(
    my_caches: Mapping[str, Path],
) -> None:
    first, other = (LogitCache.open(my_caches[name]) for name in ("first", "other"))
    with pytest.raises(IdentityError, match=r"not of the same views: .*views\.seed: 1, not 0"):
        check_members([first, LogitCache.open(my_caches["seed"])], [4.0])
    dataset = msgspec.structs.replace(other.identity.dataset, labels="of others")
    other.identity = msgspec.structs.replace(other.identity, dataset=dataset)
    with pytest.raises(IdentityError, match=r"dataset\.labels: of others, not "):
        check_members([first, other], [4.0])


def test_caches_of_other_numbers_of_views(
    my_caches: Mapping[str, Path], my_splits: Splits, tmp_path: Path
) -> None:
    caches = [LogitCache.open(my_caches[name]) for name in ("first", "two")]
    with pytest.raises(ConfigError, match=r"have 2 and 3 views\n.*--views 2"):
        usable_views(caches, None, [None])
    assert usable_views(caches, 2, [None]) == [0, 1]
    with pytest.raises(ConfigError, match="3 views were asked for, the cache has 2"):
        usable_views(caches, 3, [None])


def test_a_member_that_is_not_complete(my_caches: Mapping[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(my_caches["other"], broken)
    (record,) = (broken / "commits/logits").glob("v00001*")
    record.unlink()
    caches = [LogitCache.open(path) for path in (my_caches["first"], broken)]
    with pytest.raises(CacheError, match=r"broken is not complete: 2 of 3"):
        usable_views(caches, None, [None])


def test_rectification_is_refused(
    my_caches: Mapping[str, Path], my_splits: Splits, tmp_path: Path
) -> None:
    config = student_config(my_caches, "first", "other", bias=BiasSettings(mode="rectify"))
    with pytest.raises(ConfigError, match=r"belongs to one cache.*\n.*--bias eliminate"):
        train_student(config, tmp_path / "run", splits=my_splits)
    assert not (tmp_path / "run").exists()


def test_rows_whose_rest_is_unknown_at_one(
    cache_config: CacheConfig, my_caches: Mapping[str, Path], my_splits: Splits, tmp_path: Path
) -> None:
    config = msgspec.structs.replace(cache_config, views=1, encoding="topk:k=3,temperatures=4")
    cache_teacher(prepare(config, my_splits), tmp_path / "topk")
    members = [LogitCache.open(path) for path in (my_caches["first"], tmp_path / "topk")]
    with pytest.raises(CacheError, match=r"topk keeps part of each row, without its rest at T = 1"):
        check_members(members, [4.0])
    with pytest.raises(CacheError, match=r"without its rest at T = 2"):
        check_members(members, [2.0])
