"""Several caches of the same views, averaged: against a loop over rows, members and classes."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import yaml
from helpers import Runs, changed, cut, job_of, metrics, naive_softmax, seen_batches, teacher_of
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.encoding.floats import Float32
from stages.cache.targets import ViewTargets
from stages.cache_teacher import cache_teacher
from stages.data import Splits, usable_views
from stages.errors import CacheError, ConfigError, IdentityError, RunError
from stages.order import sample_order
from stages.settings import CacheConfig
from stages.targets.ensemble import EnsembleTargets, check_members
from stages.train_teacher import train_teacher

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
    rows = [one.rows(torch.tensor([sample]))[0].tolist() for one in targets.members]
    shares = [naive_softmax(row, temperature) for row in rows]
    return [sum(of_class) / len(shares) for of_class in zip(*shares, strict=True)]


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


@pytest.fixture(scope="module")
def runs(
    cache_config: CacheConfig, digits: Splits, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    """Students of `first` in a folder with caches of another teacher: `other` in half precision and
    in other blocks, `two` with two views, `seed` of other views, `topk` with part of each row.
    """
    folder, splits = tmp_path_factory.mktemp("ensemble"), cut(digits, IMAGES, 30)
    train_teacher(teacher_of(train__epochs=1, train__lr=0.05), folder / "run", splits=splits)
    changes: dict[str, dict[str, Any]] = {
        "first": {"teacher__weights": cache_config.teacher.weights},
        "other": {"encoding": "float16", "block_rows": 25},
        "two": {"views": 2},
        "seed": {"seed": 1, "views": 1},
        "topk": {"views": 1, "encoding": "topk:k=3,temperatures=4"},
    }
    for name, own in changes.items():
        job = job_of(folder / "run", splits, **{"views": 3, "block_rows": 50, **own})
        cache_teacher(job, folder / name)
    also = (str(folder / "other"),)
    return Runs(folder / "first", splits, folder, also=also, train__batch_size=128)


def opened(runs: Runs, *names: str) -> list[LogitCache]:
    return [LogitCache.open(runs.folder / name) for name in names]


STILL: dict[str, Any] = {"train__epochs": 1, "train__lr": 1e-12, "train__weight_decay": 0}


@pytest.mark.parametrize("mode", ["none", "eliminate"])
def test_two_teachers(runs: Runs, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate of nothing in one batch: the loss is that of the mean, worked out in numpy."""
    loss, shown = {"loss__ce_weight": 0.0, "loss__weight": 1.0}, seen_batches(monkeypatch)
    config = runs.student(bias__mode=mode, train__batch_size=IMAGES, **loss, **STILL)
    (line,) = metrics(runs.trained(config))
    ((_, samples, logits),) = shown
    means = {}
    for temperature in (1.0, 4.0):
        views = [c.read_view(line["view"]) for c in opened(runs, "first", "other")]
        rows = [torch.softmax(v.rows(samples).double() / temperature, 1) for v in views]
        means[temperature] = sum(rows).numpy() / 2  # type: ignore[union-attr]
    wrong = means[1.0].argmax(1) != runs.splits.train.labels[samples].numpy()
    assert line["wrong_rate"] == pytest.approx(wrong.mean(), abs=1e-6)
    student = torch.log_softmax(logits.double() / 4, 1).numpy()
    losses = 16 * (means[4.0] * (np.log(means[4.0]) - student)).sum(1)
    expected = losses.mean() if mode == "none" else losses[~wrong].mean()
    assert line["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_run_resumes_and_leaves_a_record(runs: Runs) -> None:
    config = runs.student(bias__mode="eliminate")
    run = runs.trained(config)
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["also"] == [str(runs.folder / "other")]
    with pytest.raises(RunError, match=r"other caches .*--also"):
        runs.trained(changed(config, also=()), run, resume=True)
    runs.trained(config, run, resume=True)


def test_in_groups_of_the_firsts_chunks(runs: Runs) -> None:
    """The members have other chunks; every sample is shown once, to the same effect at rate 0."""
    lines = {}
    for memory in (None, "20kB"):
        config = runs.student(slab_memory=memory, train__batch_size=40, **STILL)
        run = runs.new()
        trainer = runs.trainer(config, run)
        trainer.fit()
        (lines[memory],) = metrics(run)
        order = trainer.stream.order(torch.arange(IMAGES), 0, 0)
        assert torch.equal(order, sample_order(torch.arange(IMAGES), 0, 0)) == (memory is None)
    whole, groups = lines.values()
    assert groups["wrong_rate"] == pytest.approx(whole["wrong_rate"], abs=1e-6)
    assert groups["loss"] == pytest.approx(whole["loss"], rel=0.1)


def test_members_that_do_not_fit(runs: Runs) -> None:
    first, other, seed, topk = opened(runs, "first", "other", "seed", "topk")
    with pytest.raises(IdentityError, match=r"not of the same views: .*views\.seed: 1, not 0"):
        check_members([first, seed], [4.0])
    dataset = msgspec.structs.replace(other.identity.dataset, labels="of others")
    other.identity = msgspec.structs.replace(other.identity, dataset=dataset)
    with pytest.raises(IdentityError, match=r"dataset\.labels: of others, not "):
        check_members([first, other], [4.0])
    with pytest.raises(CacheError, match=r"topk keeps part of each row, without its rest at T = 1"):
        check_members([first, topk], [4.0])
    with pytest.raises(CacheError, match=r"without its rest at T = 2"):
        check_members([first, topk], [2.0])


def test_views_that_not_all_have(runs: Runs, tmp_path: Path) -> None:
    caches = opened(runs, "first", "two")
    with pytest.raises(ConfigError, match=r"have 2 and 3 views\n.*--views 2"):
        usable_views(caches, None, [None])
    assert usable_views(caches, 2, [None]) == [0, 1]
    with pytest.raises(ConfigError, match="3 views were asked for, the cache has 2"):
        usable_views(caches, 3, [None])
    broken = Path(shutil.copytree(runs.folder / "other", tmp_path / "broken"))
    (record,) = (broken / "commits/logits").glob("v00001*")
    record.unlink()
    with pytest.raises(CacheError, match=r"broken is not complete: 2 of 3"):
        usable_views([caches[0], LogitCache.open(broken)], None, [None])


def test_rectification_is_refused(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"belongs to one cache.*\n.*--bias eliminate"):
        runs.trained(runs.student(bias__mode="rectify"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
