"""Every encoding through all three stages, in this process: digits, few of them."""

import itertools
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import at_call, tree
from helpers import first, job_of, metrics, student_of

from stages.cache import LogitCache
from stages.cache.blocks import BlockGroup
from stages.cache.encoding import Fidelity, row_kl
from stages.cache.encoding.base import PLAIN_BUDGET
from stages.cache_teacher import CacheJob, cache_teacher
from stages.data import Splits
from stages.errors import CacheError, IdentityError, PipelineError
from stages.rectify import rectify
from stages.settings import (
    BiasSettings,
    LossSettings,
    RectifyConfig,
    StudentConfig,
    TrainSettings,
)
from stages.sizes import parse_budget
from stages.train_student import train_student

SAMPLES, VIEWS, BLOCKS = 150, 2, 3
ANCHORED = "klt-anchored:top=3"
ENCODINGS = ["auto", "float16", "uint8", "klt", "klt:top=3", "topk:k=4", "topk:k=10"]
ENCODINGS += [ANCHORED]
each_encoding = pytest.mark.parametrize("spec", ENCODINGS)
ALL = torch.arange(SAMPLES)

Objects = Callable[[Path], dict[str, bytes]]
Job = Callable[..., CacheJob]


@pytest.fixture(scope="module")
def my_splits(digits: Splits) -> Splits:
    return Splits(first(digits.train, SAMPLES), first(digits.test, 20))


@pytest.fixture(scope="module")
def my_job(teacher_run: Path, my_splits: Splits) -> Job:
    known = {"views": VIEWS, "augment": "pad-crop:pad=1", "block_rows": 55, "batch_size": 64}
    return lambda **changes: job_of(teacher_run, my_splits, **known | changes)


@pytest.fixture(scope="module")
def my_cache(tmp_path_factory: pytest.TempPathFactory, my_job: Job) -> Callable[[str], Path]:
    """A finished cache with such an encoding and a rectification. Read only: made once each."""

    @cache
    def made(spec: str) -> Path:
        path = tmp_path_factory.mktemp("encoded") / "c.zarr"
        cache_teacher(my_job(encoding=spec), path)
        rectify(path, RectifyConfig())
        return path

    return made


@pytest.fixture(scope="module")
def exact(my_cache: Callable[[str], Path]) -> LogitCache:
    """The same views in float32, which `auto` takes for ten classes."""
    cache = LogitCache.open(my_cache("auto"))
    assert cache.encoding.name == "float32"
    return cache


# ---- what is in it --------------------------------------------------------------------------


@each_encoding
def test_declared_fidelity_holds_on_every_block(
    my_cache: Callable[[str], Path], exact: LogitCache, spec: str
) -> None:
    cache = LogitCache.open(my_cache(spec))
    declared = cache.fidelity
    assert declared is not None
    assert declared.rows == VIEWS * SAMPLES
    partial = not cache.encoding.keeps_all
    assert declared.temperatures == ((1.0, 2.0, 4.0) if partial else (1.0, 2.0, 4.0, 10.0))
    means = []
    for view, block in itertools.product(range(VIEWS), range(BLOCKS)):
        known = Fidelity.from_json(cache.commits.records[view, block])
        true = exact.read_block(view, block).logits
        assert known.rows == len(true) == cache.grid.length(block)
        decoded = [cache.read_block(view, block, t).logits for t in known.temperatures]
        kls = [row_kl(true, d, t).mean() for d, t in zip(decoded, known.temperatures, strict=True)]
        np.testing.assert_allclose(kls, known.mean_kl, rtol=1e-3, atol=1e-10)
        same = float((decoded[0].argmax(1) == true.argmax(1)).double().mean())
        assert known.top1_agreement == pytest.approx(same)
        least = decoded[0].gather(1, true.topk(5).indices).amin(1)
        shared = float((least >= decoded[0].sort().values[:, -5]).double().mean())
        assert known.top5_agreement == pytest.approx(shared)
        assert known.saturated == 0
        means.append(kls)
    np.testing.assert_allclose(declared.mean_kl, np.mean(means, 0), rtol=1e-3, atol=1e-10)
    if spec == "klt":
        assert declared.mean_kl[0] <= 1.5 * PLAIN_BUDGET[1.0]
    if spec == "auto":
        assert declared.mean_kl == (0, 0, 0, 0)
        assert declared.top5_agreement == declared.top1_agreement == 1


@each_encoding
def test_rows_are_what_the_encoding_makes_of_the_exact_ones(
    my_cache: Callable[[str], Path], exact: LogitCache, spec: str
) -> None:
    """And predictions are the teacher's own, whatever the encoding."""
    cache = LogitCache.open(my_cache(spec))
    labels, some = cache.labels, torch.tensor([7, 7, 149, 0, 75])
    for view in range(VIEWS):
        targets, whole = cache.read_view(view), exact.read_view(view)
        assert torch.equal(targets.predictions, whole.predictions)
        assert torch.equal(targets.wrong(ALL), whole.wrong(ALL))
        right = sum(cache.commits.records[view, block]["right"] for block in range(BLOCKS))
        assert cache.top1(view) == exact.top1(view) == pytest.approx(right / SAMPLES)
        arrays = cache.encoding.encode(exact.read_view(0).rows(ALL), labels)
        if view:
            anchor = cache.encoding.as_anchor(arrays)
            arrays = cache.encoding.encode_beside(anchor, whole.rows(ALL), labels)
        for temperature in (1.0, 4.0):
            expected = cache.encoding.decode(arrays, temperature)
            found = targets.rows(ALL, temperature)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            few = targets.rows(some, temperature)
            torch.testing.assert_close(few, found[some], rtol=0, atol=1e-5)
            distribution = cache.distribution(view, temperature=temperature)
            torch.testing.assert_close(distribution, (found / temperature).softmax(1))


# ---- running again --------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["klt:top=3", "topk:k=4"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    my_job: Job,
    my_cache: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    array_bytes: Objects,
    spec: str,
) -> None:
    """Others are killed anywhere by tests/cache/test_kill.py."""
    job, out = my_job(encoding=spec), tmp_path / "c.zarr"
    write = BlockGroup.write
    for stop_at in (1, 3, 2):
        stopped = at_call(stop_at, KeyboardInterrupt, write)
        monkeypatch.setattr(BlockGroup, "write", lambda *what, stopped=stopped: stopped(*what))
        with pytest.raises(KeyboardInterrupt):
            cache_teacher(job, out)
    monkeypatch.undo()
    assert len(LogitCache.open(out).commits.records) == 3

    assert cache_teacher(job, out).computed_blocks == VIEWS * BLOCKS - 3
    whole = array_bytes(my_cache(spec))
    assert array_bytes(out) == {n: b for n, b in whole.items() if "rectified/pairwise" not in n}
    assert LogitCache.open(out).fidelity == LogitCache.open(my_cache(spec)).fidelity


@pytest.mark.parametrize(("spec", "views"), [("topk:k=4", 1), (ANCHORED, 2)])
def test_views_that_are_appended_keep_the_calibration(
    my_job: Job, tmp_path: Path, array_bytes: Objects, spec: str, views: int
) -> None:
    out = tmp_path / "c.zarr"
    cache_teacher(my_job(encoding=spec, views=views), out)
    before, coding = array_bytes(out), LogitCache.open(out).encoding

    summary = cache_teacher(my_job(encoding="auto", views=3), out)

    after = array_bytes(out)
    assert summary.computed_blocks == (3 - views) * BLOCKS
    kept = {name: content for name, content in before.items() if "/c/" in name}
    assert kept.items() <= after.items()
    cache = LogitCache.open(out)
    assert cache.encoding.digest() == coding.digest()
    assert cache.complete_views == [0, 1, 2]
    assert cache.fidelity is not None
    assert cache.fidelity.rows == 3 * SAMPLES
    cache_teacher(my_job(encoding=spec, views=3), tmp_path / "at-once.zarr")
    assert after == array_bytes(tmp_path / "at-once.zarr")


@pytest.mark.parametrize(
    ("spec", "others"),
    [
        ("klt", ["float32"]),
        ("auto", ["klt"]),
        ("topk:k=4", ["uint8", "topk:k=5", "topk:temperatures=1/2"]),
        ("klt:top=3", ["klt:top=4", "klt"]),
        (ANCHORED, ["klt:top=3", "klt-anchored:top=4"]),
    ],
)
def test_another_encoding_is_refused(
    my_job: Job, my_cache: Callable[[str], Path], spec: str, others: list[str]
) -> None:
    """And the same one by another spelling computes nothing."""
    path = my_cache(spec)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    for other in others:
        with pytest.raises(IdentityError) as caught:
            cache_teacher(my_job(encoding=other), path)
        assert "--encoding" in caught.value.remedy
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before
    for again in (spec, LogitCache.open(path).encoding.name, "auto"):
        assert cache_teacher(my_job(encoding=again), path).computed_blocks == 0


@pytest.mark.parametrize(
    ("max_kl", "chosen"),
    [(0.01, {"klt", "klt-top", "topk"}), ("9@1,0.005@4", {"klt", "klt-top"}), (1e-13, {"float32"})],
)
def test_a_budget_decides_what_auto_is(
    my_job: Job, tmp_path: Path, max_kl: float | str, chosen: set[str]
) -> None:
    """One that another encoding does not hold leaves nothing in the way."""
    out = tmp_path / "c.zarr"
    with pytest.raises(CacheError):
        cache_teacher(my_job(encoding="uint8", max_kl=1e-12), out)
    assert list(out.rglob("*")) == []

    cache_teacher(my_job(max_kl=max_kl, views=1), out)

    cache = LogitCache.open(out)
    assert cache.encoding.name in chosen
    assert cache.fidelity is not None
    assert cache.fidelity.holds(parse_budget(max_kl, "max_kl"))


# ---- stages two and three -------------------------------------------------------------------


@each_encoding
def test_rectified_rows_of_any_encoding(my_cache: Callable[[str], Path], spec: str) -> None:
    cache = LogitCache.open(my_cache(spec))
    labels = cache.labels
    for view in range(VIEWS):
        targets = cache.read_view(view, "pairwise-T4")
        wrong = targets.wrong(ALL)
        assert 0 < int(wrong.sum()) < SAMPLES
        before = (targets.rows(ALL, 4.0).double() / 4).softmax(1)
        after = (targets.rectified_rows(ALL, 4.0).double() / 4).softmax(1)

        assert torch.equal(after[~wrong], before[~wrong])
        rows = torch.arange(SAMPLES)[wrong]
        label = labels[rows]
        predicted = cache.read_view(view).predictions[cache.row_of[rows]]
        pair = before[rows, label] + before[rows, predicted]
        expected = pair * (before[rows, label] + 1) / (pair + 1)
        torch.testing.assert_close(after[rows, label], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after[rows, predicted], pair - expected, rtol=1e-4, atol=1e-6)
        assert bool((after[rows, label] > after[rows, predicted]).all())


@pytest.mark.parametrize("temperature", [4.0, 1.0])
def test_what_topk_rectifies_is_what_the_exact_rows_give(
    my_cache: Callable[[str], Path], tmp_path: Path, temperature: float
) -> None:
    """Label, prediction and the weight of the rest are known: nothing else decides."""
    caches = []
    for spec in ("topk:k=4", "auto"):
        path = Path(shutil.copytree(my_cache(spec), tmp_path / spec))
        rectify(path, RectifyConfig(temperature=temperature, name="check"))
        caches.append(LogitCache.open(path))
    for view in range(VIEWS):
        kept = caches[0].read_view(view).kept(ALL)
        found, expected = (
            cache.distribution(view, "check", temperature).gather(1, kept) for cache in caches
        )
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-6)


@pytest.fixture(scope="module")
def exact_epoch(
    tmp_path_factory: pytest.TempPathFactory, my_cache: Callable[[str], Path], my_splits: Splits
) -> dict[str, Any]:
    """What a student's epoch measures from exact, rectified rows."""
    run = tmp_path_factory.mktemp("exact") / "run"
    train_student(student(my_cache("auto")), run, splits=my_splits)
    (found,) = metrics(run)
    return found


@pytest.mark.parametrize("spec", [spec for spec in ENCODINGS if spec != "auto"])
def test_a_student_learns_from_any_encoding(
    my_cache: Callable[[str], Path],
    my_splits: Splits,
    exact_epoch: dict[str, Any],
    tmp_path: Path,
    spec: str,
) -> None:
    train_student(student(my_cache(spec)), tmp_path / "run", splits=my_splits)
    (epoch,) = metrics(tmp_path / "run")
    assert epoch["loss_ce"] == pytest.approx(exact_epoch["loss_ce"], rel=0.02)
    assert epoch["wrong_rate"] == exact_epoch["wrong_rate"]
    if spec == "topk:k=4":  # blind to how the rest divides: less of a loss
        assert 0 < epoch["loss"] < exact_epoch["loss"]
    else:
        assert epoch["loss"] == pytest.approx(exact_epoch["loss"], rel=0.02)


def student(cache: Path, **changes: Any) -> StudentConfig:
    """One epoch, of rectified rows unless it is told otherwise."""
    settings = {
        "train": TrainSettings(epochs=1, batch_size=50, lr=0.01),
        "bias": BiasSettings(mode="rectify", rectified="pairwise-T4"),
    }
    return student_of(cache, **settings | changes)


def by_logits(cache: Path) -> StudentConfig:
    """A student whose loss reads logits themselves."""
    return student(cache, loss=LossSettings(name="lr"), bias=BiasSettings())


@pytest.fixture(scope="module")
def exact_offset(
    exact: LogitCache, my_splits: Splits, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with exact.zarr, rectified among logits, and a student's run by its logits."""
    folder = tmp_path_factory.mktemp("offset")
    path = Path(shutil.copytree(exact.path, folder / "exact.zarr"))
    offset_sensitive(path, my_splits, folder / "run")
    return folder


def offset_sensitive(path: Path, splits: Splits, run: Path) -> None:
    """What reads logits themselves: a loss, and a space of rectification."""
    train_student(by_logits(path), run, splits=splits)
    rectify(path, RectifyConfig(space="logit"))


@pytest.mark.parametrize("spec", ["float16", "klt", "topk:k=4", ANCHORED])
def test_what_reads_the_offset_of_rows_has_it_or_is_refused(
    my_cache: Callable[[str], Path],
    exact_offset: Path,
    my_splits: Splits,
    tmp_path: Path,
    spec: str,
) -> None:
    path = Path(shutil.copytree(my_cache(spec), tmp_path / "c.zarr"))
    coding: Any = LogitCache.open(path).encoding
    if not coding.keeps_offset:
        with pytest.raises(PipelineError, match="the loss 'lr'") as caught:
            train_student(by_logits(path), tmp_path / "run", splits=my_splits)
        assert "--encoding" in caught.value.remedy
        with pytest.raises(CacheError, match="the space 'logit'"):
            rectify(path, RectifyConfig(space="logit"))
        rectify(path, RectifyConfig(space="logit", method="swap"))  # which ignores it
        return
    offset_sensitive(path, my_splits, tmp_path / "run")
    (ours,), (theirs,) = metrics(tmp_path / "run"), metrics(exact_offset / "run")
    # `lr` squares errors of logits, and those of klt are rounded.
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.15 if "klt" in spec else 0.01)
    step = getattr(getattr(coding, "others", coding), "step", 0.05 / 3)
    for view in range(VIEWS):
        found, expected = (
            LogitCache.open(store).read_view(view, "pairwise-T4-logit").rectified_rows(ALL)
            for store in (path, exact_offset / "exact.zarr")
        )
        within = 3 * float(torch.as_tensor(step).max())
        torch.testing.assert_close(found, expected, rtol=0.02, atol=within)


def test_topk_refuses_a_temperature_before_anything_is_written(
    my_job: Job, my_splits: Splits, tmp_path: Path
) -> None:
    path = tmp_path / "c.zarr"
    cache_teacher(my_job(encoding="topk:k=4,temperatures=1/4", views=1), path)
    before = tree(tmp_path)
    config = student(path, loss=LossSettings(temperature=3.0), bias=BiasSettings())
    for work in (
        lambda: train_student(config, tmp_path / "run", splits=my_splits),
        lambda: rectify(path, RectifyConfig(temperature=3.0)),
    ):
        with pytest.raises(CacheError, match="not at 3"):
            work()
    assert tree(tmp_path) == before
