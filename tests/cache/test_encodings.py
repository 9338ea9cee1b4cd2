"""Every encoding against what it promises, computed apart in NumPy or in plain Python."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers import SHARED_DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import Tensor

from stages.cache.encoding import (
    DEFAULT_BUDGET,
    ENCODINGS,
    Encoding,
    EncodingAttributes,
    Fidelity,
    combined,
    encoding_attributes,
    fit_encoding,
    measure,
    measure_all,
    restored,
    row_bytes_on_disk,
    row_kl,
    topk,
)
from stages.cache.encoding.base import PLAIN_BUDGET
from stages.cache.encoding.floats import Float16, Float32
from stages.cache.encoding.klt import Klt
from stages.cache.encoding.klt_anchored import KltAnchored
from stages.cache.encoding.klt_top import KltTop
from stages.cache.encoding.topk import TopK
from stages.cache.encoding.uint8 import Uint8
from stages.errors import CacheError, ConfigError, PipelineError

Rows = NDArray[np.float32]
HALF_MAX = 65_504.0
TEMPERATURES = (1.0, 2.0, 4.0, 10.0)
TAILS = (1.0, 2.0, 4.0)
"""At which `topk` knows the rest, where nothing else is asked for."""
PLAIN_KL = PLAIN_BUDGET[1.0]
often = settings(deadline=None, max_examples=60)


def rows_up_to(largest: float, classes: int | None = None) -> st.SearchStrategy[Rows]:
    """float32 (n, C), C from 2, every finite value up to `largest`, denormals and -0 included."""
    values = st.floats(-largest, largest, width=32)
    sides = st.tuples(st.integers(1, 6), st.integers(2, 9) if classes is None else st.just(classes))
    return sides.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=values))


def teacher_rows(count: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float32 (n, C) and labels (n,): a few directions carry most of the variance, as a trained
    teacher has it, and the label's logit is often the largest.
    """
    generator = torch.Generator().manual_seed(1000)  # of the teacher
    directions = torch.randn(classes, classes, generator=generator)
    directions *= 2.0 / torch.arange(1, classes + 1).sqrt()[:, None]
    offset = torch.randn(classes, generator=generator)
    generator.manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    rows = torch.randn(count, classes, generator=generator) @ directions * 0.7 + offset
    rows[torch.arange(count), labels] += 6.0
    return rows, labels


def numpy_kl(exact: Any, decoded: Any, temperature: float) -> NDArray[np.float64]:
    """Of every row, in float64."""
    scaled = (np.asarray(z, np.float64) / temperature for z in (exact, decoded))
    log_p, log_q = (log_softmax(z, axis=1) for z in scaled)
    kl: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(1)
    return kl


def round_trip(coding: Encoding, rows: Tensor, labels: Tensor | None = None) -> Tensor:
    return coding.decode(coding.encode(rows, labels))


FITTED = teacher_rows(200, 12)[0]
CODINGS: dict[str, Encoding] = {
    "float32": Float32(),
    "float16": Float16(),
    "uint8": Uint8(),
    "klt": Klt.fit(FITTED),
    "klt-int16": Klt.fit(FITTED, {1.0: 1e-8}),
    "klt-top": KltTop.fit(FITTED),
    "klt-top-3": KltTop.fit(FITTED, step=0.5, top=3),
    "klt-anchored": KltAnchored.fit(FITTED, second=FITTED.flip(1) + FITTED),
    "topk": TopK(12, 4),
    "topk-all": TopK(12, 12),
}


each_encoding = pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)


# ---- all ------------------------------------------------------------------------------------


def test_every_encoding_is_tried_here() -> None:
    assert {coding.name for coding in CODINGS.values()} == set(ENCODINGS)
    for name, dtype in (("klt", "int8"), ("klt-int16", "int16")):
        assert CODINGS[name].arrays()["logits_code"].dtype == dtype


@each_encoding
@pytest.mark.parametrize("count", [0, 37])
def test_arrays_are_those_that_are_declared(coding: Encoding, count: int) -> None:
    arrays = coding.encode(*teacher_rows(count, 12))

    sizes = {"view": 1, "sample": count, "class": 12, **coding.sizes}
    declared = {name: spec for name, spec in coding.arrays().items() if spec.of_view(0)}
    for specs, found, by_block in (
        (declared, {name: array[None] for name, array in arrays.items()}, True),
        (coding.calibration_arrays(), coding.calibration(), False),
    ):
        assert found.keys() == specs.keys()
        for name, spec in specs.items():
            assert spec.by_block == by_block
            assert tuple(found[name].shape) == spec.shape(sizes)
            assert str(found[name].dtype) == f"torch.{spec.dtype}"
    decoded = coding.decode(arrays)
    assert (decoded.shape, decoded.dtype) == ((count, 12), torch.float32)


@each_encoding
def test_rows_do_not_depend_on_each_other(coding: Encoding) -> None:
    rows, labels = teacher_rows(50, 12)
    arrays = coding.encode(rows, labels)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:9]
    some = coding.decode({name: array[order] for name, array in arrays.items()})
    torch.testing.assert_close(some, coding.decode(arrays)[order], rtol=0, atol=1e-5)
    alone = torch.cat([round_trip(coding, rows[i : i + 1], labels[i : i + 1]) for i in order])
    torch.testing.assert_close(alone, some, rtol=0, atol=1e-5)


@each_encoding
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(coding: Encoding, value: float) -> None:
    for where in (0, 11):
        rows, labels = teacher_rows(5, 12)
        rows[3, where] = value
        with pytest.raises(CacheError, match=coding.name) as caught:
            coding.encode(rows, labels)
        assert "Check the teacher" in caught.value.remedy


@pytest.mark.parametrize(
    ("coding", "largest"),
    [(Float16(), HALF_MAX), (Uint8(), HALF_MAX * 255 / 2), (TopK(2, 2), HALF_MAX)],
    ids=["float16", "uint8", "topk"],
)
def test_what_half_precision_cannot_hold_is_refused(coding: Encoding, largest: float) -> None:
    for sign in (1, -1):
        row = torch.tensor([[sign * largest, 0.0]])
        for held in (row, row + 1e6):  # the span decides
            assert bool(torch.isfinite(round_trip(coding, held)).all())
        for beyond in (row.nextafter(row * 2), row * 1e20):
            with pytest.raises(CacheError, match=coding.name) as caught:
                coding.encode(beyond)
            assert "--encoding float32" in caught.value.remedy


OFFSETS: dict[str, Callable[[int], Tensor]] = {
    "all-rows": lambda n: torch.full((n, 1), 4096.0),
    "negative": lambda n: torch.full((n, 1), -10_000.0),
    "each-row": lambda n: torch.arange(-n, n, 2)[:, None] * (1e4 / n),
}


@each_encoding
@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
def test_a_rows_offset_changes_no_distribution(
    coding: Encoding, offset: Callable[[int], Tensor]
) -> None:
    rows, labels = teacher_rows(200, 12, seed=7)
    rows = (rows * 256).round() / 256
    moved = rows + offset(200).round()
    assert torch.equal(moved - offset(200).round(), rows)  # nothing is lost before encoding

    alike, found = round_trip(coding, rows, labels), round_trip(coding, moved, labels)

    rounding = 1e-4 if coding.name == "topk" else 2e-3  # of 10,000 in single precision, twice
    for temperature in (1, 4):
        apart = numpy_kl(alike, found, temperature).max()
        own = numpy_kl(rows, alike, temperature)
        # A code half-way between two may be rounded the other way.
        assert apart <= rounding**2 + (
            2 * own.max() if "klt" in coding.name or coding.name == "uint8" else 0
        )
        assert numpy_kl(moved, found, temperature).mean() <= 1.1 * own.mean() + rounding**2
    if "klt" in coding.name:  # fitted to rows around 0, it says where it does not hold the offset
        assert coding.saturated(coding.encode(moved)) >= int((offset(200).abs() > 1000).sum())
    elif coding.keeps_offset:
        error = (round_trip(coding, rows) - rows).abs().max() + 2e-3
        assert float((found - moved).abs().max()) <= float(error)
    else:
        torch.testing.assert_close(found.mean(1), alike.mean(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("offset", [OFFSETS["negative"], OFFSETS["each-row"]], ids=["one", "each"])
def test_klt_is_fitted_alike_at_any_offset(offset: Callable[[int], Tensor]) -> None:
    rows, labels = teacher_rows(1000, 20)
    rows = (rows * 256).round() / 256
    shifted = rows + offset(1000).round()

    plain, moved = Klt.fit(rows), Klt.fit(shifted)

    assert moved.dtype == plain.dtype
    torch.testing.assert_close(moved.step[:-1], plain.step[:-1], rtol=0.1, atol=0)
    size = row_bytes_on_disk(moved, shifted, labels)
    # the offset itself has a component, of a byte
    assert size <= 1.02 * row_bytes_on_disk(plain, rows, labels) + 1
    assert kl_at(moved, shifted) <= PLAIN_KL
    half = float(moved.step[-1]) / 2 / math.sqrt(20)
    found, exact = round_trip(moved, shifted).double().mean(1), shifted.double().mean(1)
    torch.testing.assert_close(found, exact, rtol=0, atol=half + 2e-3)


# ---- float32, float16 -----------------------------------------------------------------------


@often
@given(rows_up_to(float(np.finfo(np.float32).max)))
def test_float32_is_exact(rows: Rows) -> None:
    assert round_trip(Float32(), torch.from_numpy(rows)).numpy().tobytes() == rows.tobytes()


@often
@given(rows_up_to(HALF_MAX / 2))
def test_float16_is_within_half_a_unit_in_the_last_place_of_the_distance(rows: Rows) -> None:
    decoded = round_trip(Float16(), torch.from_numpy(rows))
    exact = rows.astype(np.float64)
    error = np.abs(decoded.numpy().astype(np.float64) - exact)
    largest = exact.max(1, keepdims=True)
    # 11 significant bits; 2^-25 is half the spacing of half precision's denormals
    arithmetic = np.maximum(np.abs(largest), np.abs(exact)) * 2.0**-23
    assert np.all(error <= np.maximum((largest - exact) * 2**-11, 2.0**-25) + arithmetic)


# ---- uint8 ----------------------------------------------------------------------------------


@often
@given(rows_up_to(30.0) | rows_up_to(HALF_MAX / 2) | rows_up_to(2.0**-10))
def test_uint8_is_within_half_a_step(rows: Rows) -> None:
    """And what rounding the scale adds: 11 bits, and no denormals."""
    exact = rows.astype(np.float64)
    low, high = exact.min(1, keepdims=True), exact.max(1, keepdims=True)
    step = np.maximum((high - low) / 255 * (1 + 2**-9), 2.0**-14)
    arithmetic = np.maximum(np.abs(low), np.abs(high)) * 2.0**-22
    decoded = round_trip(Uint8(), torch.from_numpy(rows)).numpy().astype(np.float64)
    assert np.all(np.abs(decoded - rows) <= step / 2 + arithmetic)


# ---- klt ------------------------------------------------------------------------------------


def kl_at(coding: Encoding, rows: Tensor, temperature: float = 1.0) -> float:
    """Mean, in float64, in NumPy."""
    return float(numpy_kl(rows, coding.decode(coding.encode(rows)), temperature).mean())


@pytest.mark.parametrize("classes", [2, 11, 40])
def test_the_basis_of_klt_is_orthonormal_and_sorted_by_variance(classes: int) -> None:
    rows, _ = teacher_rows(500, classes)
    coding = Klt.fit(rows)

    assert Klt.fit(rows.clone()).digest() == coding.digest()
    basis, exact = coding.basis.double().numpy(), rows.double().numpy()
    np.testing.assert_allclose(basis @ basis.T, np.eye(classes), rtol=0, atol=1e-6)
    np.testing.assert_allclose(basis[:-1].sum(1), 0, atol=1e-6)  # no part of a row's offset
    np.testing.assert_allclose(basis[-1], classes**-0.5, rtol=1e-7)
    np.testing.assert_allclose(coding.mean.numpy(), exact.mean(0), atol=1e-5)
    components = (exact - exact.mean(0)) @ basis[:-1].T
    variances = components.var(0)
    assert np.all(np.diff(variances) <= 1e-6 * variances[0])
    correlation = components.T @ components / len(rows)
    np.testing.assert_allclose(correlation, np.diag(variances), rtol=0, atol=1e-4 * variances[0])


@pytest.mark.parametrize("budget", [0.5, PLAIN_KL, 1e-5, 1e-7])
@pytest.mark.parametrize("classes", [11, 30])
def test_klt_holds_its_budget_with_the_coarsest_step(budget: float, classes: int) -> None:
    rows, _ = teacher_rows(800, classes)
    coding = Klt.fit(rows, {1.0: budget})
    assert kl_at(coding, rows) <= 0.9 * budget
    limit = torch.iinfo(getattr(torch, coding.dtype)).max
    fits = ((rows - coding.mean) @ coding.basis.T).abs().amax(0) * 1.5 / limit
    coarser = fits.clamp(min=float(coding.step.min()) * 2 ** (1 / 8))
    assert kl_at(dataclasses.replace(coding, step=coarser), rows) > 0.9 * budget


def test_klt_keeps_to_one_byte_with_a_coarser_leading_component() -> None:
    """Two classes far below all others have a large variance, and hardly a part in the softmax."""
    rows, _ = teacher_rows(2000, 20)
    rows[:, :2] += 200 * torch.randn(2000, 1, generator=torch.Generator().manual_seed(3)) - 900
    coding = Klt.fit(rows)
    assert coding.dtype == "int8"
    assert float(coding.step[0]) > 3 * float(coding.step[1])
    assert kl_at(coding, rows) <= PLAIN_KL
    assert coding.saturated(coding.encode(rows)) == 0


@pytest.mark.parametrize("name", ["klt", "klt-int16"])
def test_codes_beyond_the_range_are_clamped_and_counted(name: str) -> None:
    coding: Any = CODINGS[name]
    rows, labels = teacher_rows(200, 12)
    assert coding.saturated(coding.encode(rows)) == 0
    places = [4, 17, 199]
    rows[places] = coding.mean + 1e6 * coding.basis[0] * torch.tensor([[1.0], [-1.0], [3.0]])

    arrays = coding.encode(rows)

    codes, limit = arrays["logits_code"].long(), torch.iinfo(getattr(torch, coding.dtype)).max
    assert codes[places, 0].tolist() == [limit, -limit, limit]
    assert int(codes.abs().max()) == limit  # -limit - 1 is never used
    assert coding.saturated(arrays) == measure(coding, rows, labels).saturated == 3


@pytest.mark.parametrize("name", ["klt", "klt-int16"])
def test_klt_against_numpy(name: str) -> None:
    coding: Any = CODINGS[name]
    rows, _ = teacher_rows(1000, 12, seed=4)
    basis, mean, step = (t.double().numpy() for t in (coding.basis, coding.mean, coding.step))
    limit = np.iinfo(coding.dtype).max
    components = (rows.double().numpy() - mean) @ basis.T / step
    expected = np.clip(np.rint(components), -limit, limit)

    codes = coding.encode(rows)["logits_code"].numpy()

    # float32 may round another way where a component lies half-way between two codes
    off = np.abs(np.abs(components - np.floor(components)) - 0.5)
    half_way = off < np.maximum(1e-3, 1e-5 * np.abs(components))
    assert half_way.mean() < 0.1
    assert np.array_equal(codes[~half_way], expected[~half_way])
    decoded = coding.decode({"logits_code": torch.from_numpy(codes)}).numpy()
    np.testing.assert_allclose(decoded, mean + (codes * step) @ basis, atol=2e-5, rtol=1e-5)


# ---- topk -----------------------------------------------------------------------------------


@st.composite
def topk_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, TopK]:
    """Rows with ties now and then, labels, an encoding that keeps part of them or all."""
    classes = draw(st.integers(2, 9))
    values = draw(st.sampled_from([rows_up_to(20.0, classes), rows_of_few_values(classes)]))
    rows = torch.from_numpy(draw(values))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=len(rows), max_size=len(rows)))
    return rows, torch.tensor(labels), TopK(classes, draw(st.integers(2, classes)))


def rows_of_few_values(classes: int) -> st.SearchStrategy[Rows]:
    values = st.sampled_from([-1.0, 0.0, 0.0, 2.5])
    return hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.just(classes)), elements=values)


def kept_of(row: list[float], label: int, k: int) -> list[int]:
    """Of equal logits the first class first, as argmax has it."""
    largest = sorted(range(len(row)), key=lambda c: (-row[c], c))[:k]
    return largest if label in largest else [*largest[:-1], label]


@often
@given(topk_cases())
def test_topk_keeps_the_largest_and_always_the_label(case: tuple[Tensor, Tensor, TopK]) -> None:
    rows, labels, coding = case
    arrays = coding.encode(rows, labels)
    for i, (row, label) in enumerate(zip(rows.tolist(), labels.tolist(), strict=True)):
        expected = kept_of(row, label, coding.k)
        assert arrays["topk_index"][i].tolist() == expected
        below = np.float32(row) - np.float32(max(row))
        assert arrays["topk_value"][i].tolist() == [float(np.float16(below[c])) for c in expected]


@often
@given(topk_cases())
def test_topk_knows_the_weight_of_the_rest(case: tuple[Tensor, Tensor, TopK]) -> None:
    rows, labels, coding = case

    arrays = coding.encode(rows, labels)

    exact = (rows - rows.amax(1, keepdim=True)).double().numpy()
    rest = np.array(
        [np.delete(row, kept) for row, kept in zip(exact, arrays["topk_index"], strict=True)]
    )
    for column, temperature in enumerate(coding.temperatures):
        found = arrays["topk_tail"][:, column].double().numpy()
        if coding.k == coding.num_classes:
            assert np.all(found == -np.inf)
            continue
        scaled = rest / temperature
        top = scaled.max(1)
        expected = top + np.log(np.exp(scaled - top[:, None]).sum(1))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("temperature", TAILS)
@pytest.mark.parametrize("k", [2, 4, 11])
def test_topk_is_exact_about_label_prediction_and_rest(k: int, temperature: float) -> None:
    rows, labels = teacher_rows(200, 12, seed=2)
    coding = TopK(12, k)
    arrays = coding.encode(rows, labels)

    decoded = coding.decode(arrays, temperature)

    found, exact = ((z.double() / temperature).softmax(1) for z in (decoded, rows))
    tolerance = {"rtol": 2 * float(rows.abs().max()) * 2**-11 / temperature, "atol": 0.0}
    kept = coding.kept(arrays)
    assert not coding.keeps_all
    assert bool((kept == labels[:, None]).any(1).all())
    torch.testing.assert_close(found.gather(1, kept), exact.gather(1, kept), **tolerance)
    rest = [z.scatter(1, kept, 0).sum(1) for z in (found, exact)]
    torch.testing.assert_close(*rest, **tolerance)
    for row, known in zip(decoded.tolist(), kept.tolist(), strict=True):  # spread evenly
        assert len({row[c] for c in range(12) if c not in known}) == 1
    if k > 2:  # with two, the label may have taken the prediction's neighbour, never its place
        assert bool((kept[:, 0] == rows.argmax(1)).all())


@pytest.mark.parametrize("coarseness", [0.0, 0.5, 4.0], ids=["distinct", "ties", "mostly-ties"])
def test_topk_of_many_rows_is_that_of_each_sorted_row(
    monkeypatch: pytest.MonkeyPatch, coarseness: float
) -> None:
    """Rows are encoded some at a time, and equal logits lie across the k-th place."""
    monkeypatch.setattr(topk, "_ENCODED", 7 * 40)
    rows, labels = teacher_rows(40, 40, seed=3)
    rows = (rows / coarseness).round() * coarseness if coarseness else rows
    coding = TopK(40, 5)

    arrays = coding.encode(rows, labels)

    for i, (row, label) in enumerate(zip(rows.tolist(), labels.tolist(), strict=True)):
        assert coding.kept(arrays)[i].tolist() == kept_of(row, label, 5)
        alone = coding.encode(rows[i : i + 1], labels[i : i + 1])
        for name, values in arrays.items():
            torch.testing.assert_close(values[i : i + 1], alone[name])


def test_topk_of_all_classes_is_half_precision() -> None:
    rows, labels = teacher_rows(100, 12)
    coding = TopK(12, 12)
    arrays = coding.encode(rows, labels)
    assert coding.keeps_all
    for temperature in (1.0, 3.7, 100.0):
        assert coding.holds(temperature)
        halves = Float16().encode(rows)["logits"].float()
        assert torch.equal(coding.decode(arrays, temperature), halves)


@pytest.mark.parametrize("temperature", [0.5, 4.0001])
def test_topk_refuses_a_temperature_it_does_not_know(temperature: float) -> None:
    coding = TopK(12, 4)
    assert not coding.holds(temperature)
    with pytest.raises(CacheError) as caught:
        coding.decode(coding.encode(*teacher_rows(5, 12)), temperature)
    assert "topk:temperatures=" in caught.value.remedy


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(256, torch.uint8), (257, torch.uint16), (65_536, torch.uint16), (65_537, torch.uint32)],
)
def test_indices_take_as_few_bytes_as_they_can(classes: int, dtype: torch.dtype) -> None:
    rows = torch.linspace(-4, 4, classes).flip(0).repeat(2, 1)
    rows[:, -1] = 9.0
    coding = TopK(classes, 3)

    arrays = coding.encode(rows, torch.tensor([classes - 1, classes - 2]))

    assert arrays["topk_index"].dtype == dtype
    expected = [[classes - 1, 0, 1], [classes - 1, 0, classes - 2]]
    assert arrays["topk_index"].long().tolist() == coding.kept(arrays).tolist() == expected
    decoded = coding.decode(arrays)
    assert decoded.argmax(1).tolist() == [classes - 1] * 2
    assert decoded[1, classes - 2] == np.float16(float(rows[1, classes - 2] - 9.0))


# ---- fidelity -------------------------------------------------------------------------------


@often
@given(rows_up_to(40.0, 5), st.sampled_from([0.5, 1.0, 4.0]), st.randoms(use_true_random=False))
def test_row_kl_is_the_formula(rows: Rows, temperature: float, random: Any) -> None:
    other = rows + np.float32(random.random() * 3) * rows[::-1]
    found = row_kl(torch.from_numpy(rows), torch.from_numpy(other), temperature)
    assert found.dtype == torch.float64
    assert bool((found >= 0).all())
    np.testing.assert_allclose(
        found.numpy(), numpy_kl(rows, other, temperature).clip(0), rtol=1e-9, atol=1e-12
    )


@each_encoding
def test_fidelity_is_what_numpy_measures(coding: Encoding) -> None:
    rows, labels = teacher_rows(300, 12, seed=5)
    arrays = coding.encode(rows, labels)

    found = measure(coding, rows, labels)

    assert found.rows == 300
    assert found.temperatures == tuple(t for t in TEMPERATURES if coding.holds(t))
    for column, temperature in enumerate(found.temperatures):
        kls = numpy_kl(rows, coding.decode(arrays, temperature), temperature).clip(0)
        assert found.mean_kl[column] == pytest.approx(kls.mean(), rel=1e-6, abs=1e-14)
        high = np.quantile(kls, 0.999)
        assert found.high_kl[column] == pytest.approx(high, rel=1e-6, abs=1e-14)
    decoded, leading = coding.decode(arrays, 1.0).numpy(), np.argsort(rows.numpy(), 1)[:, -5:]
    assert found.top1_agreement == (decoded.argmax(1) == leading[:, -1]).mean()
    least = np.take_along_axis(decoded, leading, 1).min(1)
    assert found.top5_agreement == pytest.approx((least >= np.sort(decoded, 1)[:, -5]).mean())
    assert found.saturated == coding.saturated(arrays)
    assert Fidelity.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert msgspec.json.decode(msgspec.json.encode(found), type=Fidelity) == found


def test_fidelity_is_measured_at_the_temperatures_that_are_held() -> None:
    rows, labels = teacher_rows(100, 12)
    for k, held, measured in ((4, (2.0, 8.0), (2.0,)), (12, (8.0,), TEMPERATURES)):
        assert measure(TopK(12, k, held), rows, labels).temperatures == measured


def test_fidelities_of_blocks_are_weighted_by_rows() -> None:
    """Also of an earlier version, at fewer temperatures."""
    one = Fidelity(100, (1.0, 4.0), (0.3, 0.1), (0.9, 0.2), 0.5, 2)
    for other in (
        Fidelity(300, (1.0, 4.0), (0.1, 0.5), (0.4, 0.6), 1.0, 3),
        Fidelity(300, (1.0, 2.0, 4.0), (0.1, 9.0, 0.5), (0.4, 9.0, 0.6), 1.0, 3, 0.5),
    ):
        whole = combined([one, other])

        assert whole.top5_agreement is None
        assert (whole.rows, whole.temperatures, whole.saturated) == (400, (1.0, 4.0), 5)
        assert whole.mean_kl == pytest.approx((0.15, 0.4))
        assert whole.high_kl == (0.9, 0.6)
        assert whole.top1_agreement == pytest.approx(0.875)
    assert combined([one]) == one
    assert combined([other, other]).top5_agreement == 0.5


# ---- what it is, in a store -----------------------------------------------------------------


def changed(tensor: Tensor, where: int) -> Tensor:
    """One value, in its last bit."""
    flat = tensor.clone().flatten()
    flat[where] = flat[where].nextafter(torch.tensor(9e9))
    return flat.reshape(tensor.shape)


def test_a_digest_changes_with_every_parameter_and_every_value() -> None:
    klt = Klt.fit(teacher_rows(100, 5)[0])
    several: list[Encoding] = [Float32(), Float16(), Uint8(), klt]
    several += [TopK(5, 2), TopK(5, 3), TopK(5, 2, (1.0,)), TopK(5, 2, (4.0, 2.0, 1.0))]
    several += [dataclasses.replace(klt, dtype="int16")]
    for name in ("basis", "mean", "step"):
        values = getattr(klt, name)
        for where in range(values.numel()):
            several.append(dataclasses.replace(klt, **{name: changed(values, where)}))

    digests = [coding.digest() for coding in several]

    assert len(set(digests)) == len(several)
    assert {len(digest) for digest in digests} == {32}


@each_encoding
def test_an_encoding_comes_back_from_its_attributes(coding: Encoding) -> None:
    text = json.dumps(encoding_attributes(coding))
    attributes = msgspec.json.decode(text, type=EncodingAttributes)
    again = restored(attributes, 12, lambda name: coding.calibration()[name].clone())
    assert type(again) is type(coding)
    assert (again.digest(), again.parameters) == (coding.digest(), coding.parameters)
    rows, labels = teacher_rows(50, 12, seed=6)
    assert torch.equal(round_trip(again, rows, labels), round_trip(coding, rows, labels))


"""More parameters: tests/cache/test_faults.py."""


HARMS: dict[str, Callable[[Tensor], Tensor]] = {
    "value": lambda t: changed(t, 3),
    "shape": lambda t: t[:-1],
    "dtype": lambda t: t.double(),
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
@pytest.mark.parametrize("array", ["klt_basis", "klt_mean", "klt_step"])
def test_a_damaged_calibration_is_told(array: str, harm: Callable[[Tensor], Tensor]) -> None:
    coding = CODINGS["klt"]
    attributes = msgspec.convert(encoding_attributes(coding), EncodingAttributes)
    values = {**coding.calibration(), array: harm(coding.calibration()[array])}
    with pytest.raises(CacheError, match="calibration"):
        restored(attributes, 12, values.__getitem__)


# ---- which one ------------------------------------------------------------------------------


CHOSEN = [
    *(("auto", 2, "float32"), ("auto", 10, "float32"), ("auto", 11, "klt-top")),
    *(("auto", 100, "klt-top"), ("auto", 4097, "klt-top"), ("float16", 10, "float16")),
    *(("float32", 100, "float32"), ("klt", 5, "klt"), ("klt:step=0.3", 5, "klt")),
    *(("klt:top=0", 5, "klt"), ("klt:top=2", 5, "klt-top"), ("klt-top", 2, "klt-top")),
    *(("klt-top", 4097, "klt-top"), ("topk", 5, "topk")),
]


@pytest.mark.parametrize(("spec", "classes", "chosen"), CHOSEN)
def test_an_encoding_is_chosen_by_name_and_by_classes(spec: str, classes: int, chosen: str) -> None:
    rows = torch.randn(40, classes, generator=torch.Generator().manual_seed(0))
    assert fit_encoding(spec, rows, torch.zeros(40, dtype=torch.int64)).name == chosen


@pytest.mark.parametrize(
    ("spec", "coding"),
    [
        ("topk", TopK(12, 10)),
        ("topk:k=4", TopK(12, 4)),
        ("topk:temperatures=1/3.5", TopK(12, 10, (1.0, 3.5))),
        ("topk:k=3,temperatures=2", TopK(12, 3, (2.0,))),
        ("topk", TopK(5, 5)),
    ],
)
def test_parameters_of_topk_come_with_its_name(spec: str, coding: TopK) -> None:
    rows, labels = teacher_rows(50, 12)
    classes = coding.num_classes
    assert fit_encoding(spec, rows[:, :classes], labels % classes) == coding


BAD_SPECS: dict[type[PipelineError], list[str]] = {
    CacheError: [
        *("float8", "", "topk:k=1", "topk:k=13", "topk:k=0", "topk:k=-4", "topk:temperatures=0"),
        *("topk:temperatures=1/-1", "topk:temperatures=inf", "topk:temperatures=nan"),
        *("klt:step=0", "klt:step=-1,top=3", "klt-top:step=inf", "klt-top:step=nan"),
        *("klt-top:top=0", "klt:top=-1", "klt:top=13"),
    ],
    ConfigError: [
        *("topk:k=many", "topk:depth=3", "topk:k", "topk:temperatures=1/warm", "klt:fine=1"),
        *("klt:top=1.5", "float32:k=2", "auto:k=2"),
    ],
}


@pytest.mark.parametrize(
    ("spec", "error"), [(spec, error) for error, specs in BAD_SPECS.items() for spec in specs]
)
@pytest.mark.parametrize("max_kl", [None, 0.1])
def test_an_encoding_that_cannot_be_is_refused(
    spec: str, error: type[PipelineError], max_kl: float | None
) -> None:
    with pytest.raises(error) as caught:
        fit_encoding(spec, *teacher_rows(50, 12), max_kl and {1.0: max_kl})
    assert caught.value.remedy
    if spec == "float8":
        assert all(name in caught.value.remedy for name in ("auto", *ENCODINGS))
    elif spec:
        assert spec.partition(":")[0] in str(caught.value)


def test_klt_is_not_for_thousands_of_classes() -> None:
    with pytest.raises(CacheError, match="4,097") as caught:
        fit_encoding("klt", torch.zeros(2, 4097), torch.zeros(2, dtype=torch.int64))
    assert "topk" in caught.value.remedy


@pytest.mark.parametrize("max_kl", [1.0, 5e-3, 1e-6, 1e-12])
def test_auto_with_a_budget_takes_the_smallest_that_holds_it(max_kl: float) -> None:
    rows, labels = teacher_rows(300, 30)
    chosen = fit_encoding("auto", rows, labels, {1.0: max_kl})
    assert measure(chosen, rows, labels).mean_kl[0] <= max_kl
    size = row_bytes_on_disk(chosen, rows, labels)
    for other in measure_all(rows, labels, {1.0: max_kl}):
        if other.fidelity.mean_kl[0] <= max_kl:
            assert size <= other.row_bytes
    assert chosen.name == "float32" or max_kl > 1e-12


@pytest.mark.parametrize(
    ("spec", "max_kl"),
    [("topk:k=2", 1e-6), ("uint8", 1e-9), ("klt", 1e-13), ("topk:temperatures=2/4", 1e9)],
)
def test_a_budget_that_is_not_held_is_refused(spec: str, max_kl: float) -> None:
    rows, labels = teacher_rows(100, 12)
    with pytest.raises(CacheError, match=r"holds a (mean )?KL of") as caught:
        fit_encoding(spec, rows, labels, max_kl and {1.0: max_kl})
    assert "float32" in caught.value.remedy


def test_all_encodings_are_measured() -> None:
    rows, labels = teacher_rows(300, 12)
    mine = TopK(12, 3)

    found = {m.coding.name: m for m in measure_all(rows, labels, more=mine)}

    assert list(found) == [name for name, made in ENCODINGS.items() if not made.of_anchor]
    assert found["topk"].coding is mine
    for measured in found.values():
        assert measured.fidelity == measure(measured.coding, rows, labels)
        assert measured.row_bytes == row_bytes_on_disk(measured.coding, rows, labels)
        assert measured.decoded_per_second > 0
    # those that cannot hold the rows are left out
    names = {m.coding.name for m in measure_all(rows * 1e5, labels, {1.0: 1e-9})}
    assert "float32" in names
    assert not {"float16", "topk"} & names


# ---- rows of a real teacher -----------------------------------------------------------------


@pytest.mark.slow
def test_the_default_on_rows_of_a_real_teacher() -> None:
    """A ResNet-9's logits of view 0 of CIFAR-100."""
    path = SHARED_DATA / "cifar100" / "logits-resnet9.npz"
    if not path.exists():
        pytest.skip(f"{path.name} of CIFAR-100 is not at hand")
    with np.load(path, allow_pickle=False) as found:
        rows, labels = torch.from_numpy(found["logits"][0]), torch.from_numpy(found["labels"])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rows, labels = rows[order].float(), labels[order].long()
    coding = fit_encoding("auto", rows[:8192], labels[:8192])

    fidelity = measure(coding, rows[-10_000:], labels[-10_000:])

    assert coding.name == "klt-top"
    assert row_bytes_on_disk(coding, rows[-10_000:], labels[-10_000:]) <= 17
    assert fidelity.holds(DEFAULT_BUDGET)
    assert fidelity.top1_agreement == 1
    assert fidelity.saturated <= 20
