"""Every encoding through all three stages, in this process: digits, few of them."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import torch
import xarray
from helpers import first, job_of, metrics, student_of
from numpy.typing import NDArray
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.blocks import BlockGroup
from stages.cache.encoding import Fidelity
from stages.cache.encoding.base import PLAIN_BUDGET
from stages.cache.encoding.klt import Klt
from stages.cache.encoding.klt_anchored import KltAnchored
from stages.cache.encoding.klt_top import KltTop
from stages.cache_teacher import CacheJob, cache_teacher
from stages.data import Splits
from stages.errors import CacheError, IdentityError, PipelineError
from stages.rectify import rectify
from stages.settings import (
    BiasSettings,
    LossSettings,
    ModelSettings,
    RectifyConfig,
    StudentConfig,
    TrainSettings,
)
from stages.sizes import parse_budget
from stages.train_student import train_student

SAMPLES, VIEWS, BLOCKS = 300, 2, 3
ANCHORED = "klt-anchored:top=3"
ENCODINGS = ["auto", "float16", "uint8", "klt", "klt:top=3", "topk:k=4", "topk:k=10"]
ENCODINGS += [ANCHORED]
each_encoding = pytest.mark.parametrize("spec", ENCODINGS)
ALIKE = ("float16", "uint8", "topk:k=10")
"""Written as others are: float16 and uint8 as float32, whole rows of topk as its first four."""
KILLED = ("auto", "klt", ANCHORED)
"""Killed anywhere by tests/cache/test_kill.py."""
each_way_of_writing = pytest.mark.parametrize(
    "spec",
    [pytest.param(s, marks=pytest.mark.slow if s in ALIKE + KILLED else []) for s in ENCODINGS],
)
ALL = torch.arange(SAMPLES)

Objects = Callable[[Path], dict[str, bytes]]
Job = Callable[..., CacheJob]


@pytest.fixture(scope="module")
def my_splits(digits: Splits) -> Splits:
    return Splits(first(digits.train, SAMPLES), first(digits.test, 60))


@pytest.fixture(scope="module")
def my_job(teacher_run: Path, my_splits: Splits) -> Job:
    known = {"views": VIEWS, "augment": "pad-crop:pad=1", "block_rows": 110, "batch_size": 64}
    return lambda **changes: job_of(teacher_run, my_splits, **known | changes)


@pytest.fixture(scope="module")
def my_cache(tmp_path_factory: pytest.TempPathFactory, my_job: Job) -> Callable[[str], Path]:
    """A finished cache with such an encoding and a rectification. Read only: made once each."""
    known: dict[str, Path] = {}

    def made(spec: str) -> Path:
        if spec not in known:
            path = tmp_path_factory.mktemp("encoded") / "c.zarr"
            cache_teacher(my_job(encoding=spec), path)
            rectify(path, RectifyConfig())
            known[spec] = path
        return known[spec]

    return made


@pytest.fixture(scope="module")
def exact(my_cache: Callable[[str], Path]) -> LogitCache:
    """The same views in float32, which `auto` takes for ten classes."""
    cache = LogitCache.open(my_cache("auto"))
    assert cache.encoding.name == "float32"
    return cache


def log_softmax(rows: Tensor, temperature: float) -> NDArray[np.float64]:
    scaled = rows.double().numpy() / temperature
    scaled = scaled - scaled.max(1, keepdims=True)
    normal: NDArray[np.float64] = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
    return normal


def kl(target: Tensor, decoded: Tensor, temperature: float) -> NDArray[np.float64]:
    exact, ours = log_softmax(target, temperature), log_softmax(decoded, temperature)
    rows: NDArray[np.float64] = (np.exp(exact) * (exact - ours)).sum(1)
    return rows


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
    for view in range(VIEWS):
        for block in range(BLOCKS):
            known = Fidelity.from_json(cache.commits.records[view, block])
            true = exact.read_block(view, block).logits
            assert known.rows == len(true) == cache.grid.length(block)
            decoded = [cache.read_block(view, block, t).logits for t in known.temperatures]
            found = [
                kl(true, d, t).mean() for d, t in zip(decoded, known.temperatures, strict=True)
            ]
            np.testing.assert_allclose(found, known.mean_kl, rtol=1e-3, atol=1e-10)
            same = float((decoded[0].argmax(1) == true.argmax(1)).double().mean())
            assert known.top1_agreement == pytest.approx(same)
            least = decoded[0].gather(1, true.topk(5).indices).amin(1)
            shared = float((least >= decoded[0].sort().values[:, -5]).double().mean())
            assert known.top5_agreement == pytest.approx(shared)
            assert known.saturated == 0
            means.append((len(true), found))
    rows = [n for n, _ in means]
    whole = np.average([found for _, found in means], axis=0, weights=rows)
    np.testing.assert_allclose(declared.mean_kl, whole, rtol=1e-3, atol=1e-10)
    if spec == "klt":
        assert declared.mean_kl[0] <= 1.5 * PLAIN_BUDGET[1.0]
    if spec == "auto":
        assert declared.mean_kl == (0, 0, 0, 0)
        assert declared.top5_agreement == 1
        assert declared.top1_agreement == 1


@each_encoding
def test_predictions_are_the_teachers_own_whatever_the_encoding(
    my_cache: Callable[[str], Path], exact: LogitCache, spec: str
) -> None:
    cache = LogitCache.open(my_cache(spec))

    assert cache.complete_views == list(range(VIEWS))
    for view in range(VIEWS):
        ours, theirs = cache.read_view(view), exact.read_view(view)
        assert torch.equal(ours.predictions, theirs.predictions)
        assert torch.equal(ours.wrong(ALL), theirs.wrong(ALL))
        assert cache.top1(view) == exact.top1(view)
        right = sum(cache.commits.records[view, block]["right"] for block in range(BLOCKS))
        assert cache.top1(view) == pytest.approx(right / SAMPLES)


@each_encoding
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_rows_are_what_the_encoding_makes_of_the_exact_ones(
    my_cache: Callable[[str], Path], exact: LogitCache, spec: str, temperature: float
) -> None:
    cache = LogitCache.open(my_cache(spec))
    labels = cache.labels
    some = torch.tensor([7, 7, 299, 0, 150])
    for view in range(VIEWS):
        true = exact.read_view(view).rows(ALL)
        arrays = cache.encoding.encode(exact.read_view(0).rows(ALL), labels)
        if view:
            anchor = cache.encoding.as_anchor(arrays)
            arrays = cache.encoding.encode_beside(anchor, true, labels)
        expected = cache.encoding.decode(arrays, temperature)

        targets = cache.read_view(view)

        found = targets.rows(ALL, temperature)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(targets.rows(some, temperature), found[some], rtol=0, atol=1e-5)
        distribution = cache.distribution(view, temperature=temperature)
        torch.testing.assert_close(distribution, (found / temperature).softmax(1))


def test_xarray_alone_decodes_klt(my_cache: Callable[[str], Path]) -> None:
    path = my_cache("klt")
    with xarray.open_zarr(path, consolidated=False) as found:
        assert found["logits_code"].dims == ("view", "sample", "component")
        assert found["klt_basis"].dims == ("component", "class")
        assert (found["klt_mean"].dims, found["klt_step"].dims) == (("class",), ("component",))
        assert str(found["logits_code"].dtype) == "int8"
        values = {str(name): array.to_numpy() for name, array in found.items()}
    assert "logits" not in values

    decoded = (
        values["klt_mean"] + (values["logits_code"] * values["klt_step"]) @ values["klt_basis"]
    )

    for view in range(VIEWS):
        rows = LogitCache.open(path).read_view(view).rows(torch.from_numpy(values["dataset_index"]))
        np.testing.assert_allclose(decoded[view], rows.numpy(), rtol=0, atol=1e-4)


def test_xarray_alone_reads_topk(my_cache: Callable[[str], Path]) -> None:
    path = my_cache("topk:k=4")
    with xarray.open_zarr(path, consolidated=False) as found:
        assert found["topk_index"].dims == found["topk_value"].dims == ("view", "sample", "k")
        assert found["topk_tail"].dims == ("view", "sample", "temperature")
        dtypes = [str(found[f"topk_{n}"].dtype) for n in ("index", "value", "tail")]
        values = {str(name): array.to_numpy() for name, array in found.items()}
    assert dtypes == ["uint8", "float16", "float32"]

    index = values["topk_index"].astype(int)
    assert bool((index == values["label"][None, :, None]).any(2).all())
    assert np.array_equal(index[:, :, 0], values["prediction"])
    for view in range(VIEWS):
        rows = LogitCache.open(path).read_view(view).rows(torch.from_numpy(values["dataset_index"]))
        kept = np.take_along_axis(rows.numpy(), index[view], 1)
        assert np.array_equal(kept, values["topk_value"][view].astype(np.float32))


@each_encoding
def test_only_codecs_of_the_specification(my_cache: Callable[[str], Path], spec: str) -> None:
    def names(codecs: list[dict[str, Any]]) -> set[str]:
        inner = [c for codec in codecs for c in codec.get("configuration", {}).get("codecs", [])]
        return {codec["name"] for codec in codecs} | (names(inner) if inner else set())

    for file in my_cache(spec).rglob("zarr.json"):
        document = json.loads(file.read_text())
        if document["node_type"] == "array":
            known = {"bytes", "transpose", "zstd", "crc32c", "sharding_indexed"}
            assert names(document["codecs"]) <= known


# ---- running again --------------------------------------------------------------------------


@each_way_of_writing
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    my_job: Job,
    my_cache: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    array_bytes: Objects,
    spec: str,
) -> None:
    job, calls = my_job(encoding=spec), 0

    def stopped(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return write(*arguments)

    write = BlockGroup.write
    with monkeypatch.context() as patch:
        patch.setattr(BlockGroup, "write", stopped)
        for stop_at in (1, 3, 2):  # noqa: B007, read by `stopped`
            calls = 0
            with pytest.raises(KeyboardInterrupt):
                cache_teacher(job, tmp_path / "c.zarr")
    assert len(LogitCache.open(tmp_path / "c.zarr").commits.records) == 3

    summary = cache_teacher(job, tmp_path / "c.zarr")

    assert summary.computed_blocks == VIEWS * BLOCKS - 3
    ours, whole = array_bytes(tmp_path / "c.zarr"), array_bytes(my_cache(spec))
    assert ours == {n: b for n, b in whole.items() if not n.startswith("rectified/pairwise")}
    undisturbed = LogitCache.open(my_cache(spec))
    assert LogitCache.open(tmp_path / "c.zarr").fidelity == undisturbed.fidelity


@pytest.mark.parametrize(
    ("spec", "views"),
    [
        ("klt:top=3", 1),
        (ANCHORED, 2),
        *(pytest.param(s, 1, marks=pytest.mark.slow) for s in ("klt", "topk:k=4")),
    ],
)
def test_views_that_are_appended_keep_the_calibration(
    my_job: Job, tmp_path: Path, array_bytes: Objects, spec: str, views: int
) -> None:
    out = tmp_path / "c.zarr"
    cache_teacher(my_job(encoding=spec, views=views), out)
    before, coding = array_bytes(out), LogitCache.open(out).encoding

    summary = cache_teacher(my_job(encoding="auto", views=3), out)

    after = array_bytes(out)
    kept = [name for name in before if "/c/" in name]
    assert summary.computed_blocks == (3 - views) * BLOCKS
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    cache = LogitCache.open(out)
    assert cache.encoding.digest() == coding.digest()
    assert cache.complete_views == [0, 1, 2]
    assert cache.fidelity is not None
    assert cache.fidelity.rows == 3 * SAMPLES
    cache_teacher(my_job(encoding=spec, views=3), tmp_path / "at-once.zarr")
    assert after == array_bytes(tmp_path / "at-once.zarr")


@pytest.mark.parametrize(
    ("spec", "other"),
    [
        pytest.param("klt", "float32", id="name"),
        pytest.param("auto", "klt", id="chosen-by-classes"),
        pytest.param("topk:k=4", "uint8", id="topk"),
        pytest.param("topk:k=4", "topk:k=5", id="another-k"),
        pytest.param("klt:top=3", "klt:top=4", id="another-top"),
        pytest.param("klt:top=3", "klt", id="refined"),
        pytest.param(ANCHORED, "klt:top=3", id="anchored"),
        pytest.param(ANCHORED, "klt-anchored:top=4", id="anchored-another-top"),
        pytest.param("topk:k=4", "topk:temperatures=1/2", id="other-temperatures"),
    ],
)
def test_another_encoding_is_refused(
    my_job: Job, my_cache: Callable[[str], Path], spec: str, other: str
) -> None:
    path = my_cache(spec)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}

    with pytest.raises(IdentityError, match="is encoded as") as caught:
        cache_teacher(my_job(encoding=other), path)

    assert "--encoding" in caught.value.remedy
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before


@pytest.mark.parametrize("spec", ["klt:top=3", "topk:k=4", ANCHORED])
def test_the_same_encoding_by_another_spelling_computes_nothing(
    my_job: Job, my_cache: Callable[[str], Path], spec: str
) -> None:
    path = my_cache(spec)
    for again in (spec, LogitCache.open(path).encoding.name, "auto"):
        assert cache_teacher(my_job(encoding=again), path).computed_blocks == 0


@pytest.mark.parametrize(("spec", "max_kl"), [("topk:k=2", 1e-9), ("uint8", 1e-12), ("klt", 1e-14)])
def test_a_budget_that_is_not_held_leaves_nothing_in_the_way(
    my_job: Job, tmp_path: Path, spec: str, max_kl: float
) -> None:
    out = tmp_path / "c.zarr"

    with pytest.raises(CacheError, match=r"holds a (mean )?KL of"):
        cache_teacher(my_job(encoding=spec, max_kl=max_kl), out)

    assert not LogitCache.exists(out)
    assert list(out.rglob("*")) == []
    assert cache_teacher(my_job(encoding=spec, views=1), out).computed_blocks == BLOCKS


@pytest.mark.parametrize(
    ("max_kl", "chosen"),
    [(0.01, {"klt", "klt-top", "topk"}), ("9@1,0.005@4", {"klt", "klt-top"}), (1e-13, {"float32"})],
)
def test_a_budget_decides_what_auto_is(
    my_job: Job, tmp_path: Path, max_kl: float | str, chosen: set[str]
) -> None:
    cache_teacher(my_job(max_kl=max_kl, views=1), tmp_path / "c.zarr")

    cache = LogitCache.open(tmp_path / "c.zarr")
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


@pytest.mark.parametrize("temperature", [4.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_what_topk_rectifies_is_what_the_exact_rows_give(
    my_cache: Callable[[str], Path], tmp_path: Path, temperature: float
) -> None:
    """Label, prediction and the weight of the rest are known: nothing else decides."""
    ours, theirs = tmp_path / "topk.zarr", tmp_path / "exact.zarr"
    for path, spec in ((ours, "topk:k=4"), (theirs, "auto")):
        shutil.copytree(my_cache(spec), path)
        rectify(path, RectifyConfig(temperature=temperature, name="check"))
    for view in range(VIEWS):
        kept = LogitCache.open(ours).read_view(view).kept(ALL)
        rows = [LogitCache.open(p).distribution(view, "check", temperature) for p in (ours, theirs)]

        found, expected = (row.gather(1, kept) for row in rows)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-6)


@pytest.fixture(scope="module")
def exact_epoch(
    tmp_path_factory: pytest.TempPathFactory, my_cache: Callable[[str], Path], my_splits: Splits
) -> dict[str, dict[str, Any]]:
    """What a student's epoch measures from exact rows, by bias."""
    found = {}
    for bias in ("none", "rectify"):
        run = tmp_path_factory.mktemp("exact") / "run"
        train_student(student(my_cache("auto"), bias), run, splits=my_splits)
        (found[bias],) = metrics(run)
    return found


@pytest.mark.parametrize(
    ("spec", "bias"),
    [
        *((spec, "rectify") for spec in ENCODINGS if spec != "auto"),
        *((spec, "none") for spec in ("klt", "topk:k=4")),
        *(pytest.param(spec, "none", marks=pytest.mark.slow) for spec in ALIKE),
    ],
)
def test_a_student_learns_from_any_encoding(
    my_cache: Callable[[str], Path],
    my_splits: Splits,
    exact_epoch: dict[str, dict[str, Any]],
    tmp_path: Path,
    spec: str,
    bias: Literal["none", "rectify"],
) -> None:
    train_student(student(my_cache(spec), bias), tmp_path / "run", splits=my_splits)

    (epoch,) = metrics(tmp_path / "run")
    assert all(math.isfinite(epoch[name]) for name in ("loss", "loss_ce"))
    assert epoch["wrong_rate"] == exact_epoch[bias]["wrong_rate"]
    if spec == "topk:k=4":  # blind to how the rest divides: less of a loss
        assert 0 < epoch["loss"] < exact_epoch[bias]["loss"]
    else:
        assert epoch["loss"] == pytest.approx(exact_epoch[bias]["loss"], rel=0.02)


def student(
    cache: Path, bias: Literal["none", "rectify"] = "none", temperature: float = 4.0
) -> StudentConfig:
    return student_of(
        cache,
        model=ModelSettings(architecture="resnet8"),
        train=TrainSettings(epochs=1, batch_size=100, lr=0.01),
        loss=LossSettings(temperature=temperature),
        bias=BiasSettings(mode=bias, rectified="pairwise-T4" if bias == "rectify" else None),
    )


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
    loss = LossSettings(name="lr")
    train_student(msgspec.structs.replace(student(path), loss=loss), run, splits=splits)
    rectify(path, RectifyConfig(space="logit"))


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, marks=[] if spec in ("klt", "topk:k=4") else pytest.mark.slow)
        for spec in ENCODINGS
        if spec != "auto"
    ],
)
def test_what_reads_the_offset_of_rows_has_it_or_is_refused(
    my_cache: Callable[[str], Path],
    exact_offset: Path,
    my_splits: Splits,
    tmp_path: Path,
    spec: str,
) -> None:
    path = Path(shutil.copytree(my_cache(spec), tmp_path / "c.zarr"))
    if not LogitCache.open(path).encoding.keeps_offset:
        words = "the loss 'lr' (reads logits themselves|needs whole teacher rows)"
        config = msgspec.structs.replace(student(path), loss=LossSettings(name="lr"))
        with pytest.raises(PipelineError, match=words) as caught:
            train_student(config, tmp_path / "run", splits=my_splits)
        assert "--encoding" in caught.value.remedy
        with pytest.raises(CacheError, match="the space 'logit' reads logits themselves"):
            rectify(path, RectifyConfig(space="logit"))
        rectify(path, RectifyConfig(space="logit", method="swap"))  # which ignores it
        return
    offset_sensitive(path, my_splits, tmp_path / "run")
    (ours,), (theirs,) = metrics(tmp_path / "run"), metrics(exact_offset / "run")
    # `lr` squares errors of logits, and those of klt are rounded.
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.15 if "klt" in spec else 0.01)
    for view in range(VIEWS):
        found, expected = (
            LogitCache.open(store).read_view(view, "pairwise-T4-logit").rectified_rows(ALL)
            for store in (path, exact_offset / "exact.zarr")
        )
        coding = LogitCache.open(path).encoding
        steps = 0.05
        coding = coding.others if isinstance(coding, KltAnchored) else coding
        if isinstance(coding, Klt | KltTop):
            steps = 3 * float(torch.as_tensor(coding.step).max())
        torch.testing.assert_close(found, expected, rtol=0.02, atol=steps)


def test_topk_refuses_a_temperature_before_anything_is_written(
    my_job: Job, my_splits: Splits, tmp_path: Path
) -> None:
    path = tmp_path / "c.zarr"
    cache_teacher(my_job(encoding="topk:k=4,temperatures=1/4", views=1), path)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}

    with pytest.raises(CacheError, match="not at 3") as caught:
        train_student(student(path, temperature=3.0), tmp_path / "run", splits=my_splits)
    assert "another --encoding" in caught.value.remedy
    assert not (tmp_path / "run").exists()

    with pytest.raises(CacheError, match="at T = 1, 4, not at 3"):
        rectify(path, RectifyConfig(temperature=3.0))
    assert LogitCache.open(path).rectifications == []
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before
