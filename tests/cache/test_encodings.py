"""Every encoding against what it promises, computed apart in NumPy or in plain Python."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
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
from torch import Tensor

from stages.cache.encoding import (
    DEFAULT_BUDGET,
    ENCODINGS,
    Encoding,
    EncodingAttributes,
    Fidelity,
    checked_rows,
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
    def log_softmax(rows: Any) -> NDArray[np.float64]:
        scaled = np.asarray(rows, np.float64) / temperature
        scaled -= scaled.max(1, keepdims=True)
        normal: NDArray[np.float64] = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
        return normal

    target, given_rows = log_softmax(exact), log_softmax(decoded)
    kl: NDArray[np.float64] = (np.exp(target) * (target - given_rows)).sum(1)
    return kl


def round_trip(coding: Encoding, rows: Tensor, labels: Tensor | None = None) -> Tensor:
    return coding.decode(coding.encode(rows, labels))


def some_encodings(classes: int = 12) -> dict[str, Encoding]:
    rows, _ = teacher_rows(200, classes)
    return {
        "float32": Float32(),
        "float16": Float16(),
        "uint8": Uint8(),
        "klt": Klt.fit(rows),
        "klt-int16": Klt.fit(rows, {1.0: 1e-8}),
        "klt-top": KltTop.fit(rows),
        "klt-top-3": KltTop.fit(rows, step=0.5, top=3),
        "klt-anchored": KltAnchored.fit(rows, second=rows.flip(1) + rows),
        "topk": TopK(classes, 4),
        "topk-all": TopK(classes, classes),
    }


CODINGS = some_encodings()
each_encoding = pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)


# ---- all ------------------------------------------------------------------------------------


def test_every_encoding_is_tried_here() -> None:
    assert {coding.name for coding in CODINGS.values()} == set(ENCODINGS)
    assert {c.arrays()["logits_code"].dtype for c in CODINGS.values() if c.name == "klt"} == {
        "int8",
        "int16",
    }


@each_encoding
@pytest.mark.parametrize("count", [0, 1, 37])
def test_arrays_are_those_that_are_declared(coding: Encoding, count: int) -> None:
    rows, labels = teacher_rows(count, 12)

    arrays = coding.encode(rows, labels)

    sizes = {"view": 1, "sample": count, "class": 12, **coding.sizes}
    specs = {name: spec for name, spec in coding.arrays().items() if spec.of_view(0)}
    assert arrays.keys() == specs.keys()
    for name, spec in specs.items():
        assert spec.by_block
        assert (1, *arrays[name].shape) == spec.shape(sizes)
        assert str(arrays[name].dtype) == f"torch.{spec.dtype}"
    assert coding.calibration().keys() == coding.calibration_arrays().keys()
    for name, spec in coding.calibration_arrays().items():
        assert not spec.by_block
        assert tuple(coding.calibration()[name].shape) == spec.shape(sizes)
        assert str(coding.calibration()[name].dtype) == f"torch.{spec.dtype}"
    decoded = coding.decode(arrays)
    assert decoded.shape == (count, 12)
    assert decoded.dtype == torch.float32


@each_encoding
def test_rows_do_not_depend_on_each_other(coding: Encoding) -> None:
    rows, labels = teacher_rows(50, 12)
    arrays = coding.encode(rows, labels)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:20]

    some = coding.decode({name: array[order] for name, array in arrays.items()})

    torch.testing.assert_close(some, coding.decode(arrays)[order], rtol=0, atol=1e-5)
    alone = torch.cat([round_trip(coding, rows[i : i + 1], labels[i : i + 1]) for i in order])
    torch.testing.assert_close(alone, some, rtol=0, atol=1e-5)


@each_encoding
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 11])
def test_what_is_not_finite_is_refused(coding: Encoding, value: float, where: int) -> None:
    rows, labels = teacher_rows(5, 12)
    rows[3, where] = value

    with pytest.raises(CacheError, match=f"does not fit in {coding.name}") as caught:
        coding.encode(rows, labels)
    assert "Check the teacher" in caught.value.remedy


@pytest.mark.parametrize(
    ("coding", "largest"),
    [
        pytest.param(Float16(), HALF_MAX, id="float16"),
        pytest.param(Uint8(), HALF_MAX * 255 / 2, id="uint8"),
        pytest.param(TopK(2, 2), HALF_MAX, id="topk"),
    ],
)
def test_what_half_precision_cannot_hold_is_refused(coding: Encoding, largest: float) -> None:
    for sign in (1, -1):
        row = torch.tensor([[sign * largest, 0.0]])
        assert bool(torch.isfinite(round_trip(coding, row + 1e6)).all())  # the span decides
        assert bool(torch.isfinite(round_trip(coding, row)).all())
        for beyond in (row.nextafter(row * 2), row * 1e20):
            with pytest.raises(CacheError, match=f"does not fit in {coding.name}") as caught:
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


@pytest.mark.parametrize("each", [False, True], ids=["one", "each-row"])
def test_klt_is_fitted_alike_at_any_offset(each: bool) -> None:
    rows, labels = teacher_rows(2000, 20)
    rows = (rows * 256).round() / 256
    offset = OFFSETS["each-row" if each else "negative"](2000).round()

    plain, moved = Klt.fit(rows), Klt.fit(rows + offset)

    assert moved.dtype == plain.dtype
    torch.testing.assert_close(moved.step[:-1], plain.step[:-1], rtol=0.1, atol=0)
    sizes = [
        row_bytes_on_disk(plain, rows, labels),
        row_bytes_on_disk(moved, rows + offset, labels),
    ]
    assert sizes[1] <= 1.02 * sizes[0] + each  # the offset itself has a component, of a byte
    assert kl_at(moved, rows + offset) <= PLAIN_KL
    found = round_trip(moved, rows + offset).double().mean(1)
    exact = (rows + offset).double().mean(1)
    half = float(moved.step[-1]) / 2 / math.sqrt(20)
    torch.testing.assert_close(found, exact, rtol=0, atol=half + 2e-3)


# ---- float32, float16 -----------------------------------------------------------------------


@often
@given(rows_up_to(float(np.finfo(np.float32).max)))
def test_float32_is_exact(rows: Rows) -> None:
    decoded = round_trip(Float32(), torch.from_numpy(rows)).numpy()

    assert decoded.dtype == np.float32
    assert decoded.tobytes() == rows.tobytes()


@often
@given(rows_up_to(HALF_MAX / 2))
def test_float16_is_within_half_a_unit_in_the_last_place_of_the_distance(rows: Rows) -> None:
    decoded = round_trip(Float16(), torch.from_numpy(rows))

    assert decoded.dtype == torch.float32
    exact = rows.astype(np.float64)
    error = np.abs(decoded.numpy().astype(np.float64) - exact)
    largest = exact.max(1, keepdims=True)
    # 11 significant bits; 2^-25 is half the spacing of half precision's denormals
    arithmetic = np.maximum(np.abs(largest), np.abs(exact)) * 2.0**-23
    assert np.all(error <= np.maximum((largest - exact) * 2**-11, 2.0**-25) + arithmetic)


# ---- uint8 ----------------------------------------------------------------------------------


def uint8_error(rows: Rows) -> NDArray[np.float64]:
    """(n, 1), the most that an entry may be off: half a step, and what rounding the scale (11 bits,
    and no denormals) adds.
    """
    exact = rows.astype(np.float64)
    low, high = exact.min(1, keepdims=True), exact.max(1, keepdims=True)
    step = np.maximum((high - low) / 255 * (1 + 2**-9), 2.0**-14)
    arithmetic = np.maximum(np.abs(low), np.abs(high)) * 2.0**-22
    error: NDArray[np.float64] = step / 2 + arithmetic
    return error


@often
@given(rows_up_to(30.0) | rows_up_to(HALF_MAX / 2) | rows_up_to(2.0**-10))
def test_uint8_is_within_half_a_step(rows: Rows) -> None:
    decoded = round_trip(Uint8(), torch.from_numpy(rows)).numpy().astype(np.float64)

    assert np.all(np.abs(decoded - rows) <= uint8_error(rows))


@often
@given(rows_up_to(30.0), st.integers(0, 8))
def test_uint8_keeps_the_argmax_where_the_gap_exceeds_a_step(rows: Rows, winner: int) -> None:
    rows[:, winner % rows.shape[1]] = rows.max(1) + rows.std(1) * 0.02
    first, second = -np.sort(-rows, axis=1)[:, :2].astype(np.float64).T
    sure = first - second > 2 * uint8_error(rows)[:, 0]

    decoded = round_trip(Uint8(), torch.from_numpy(rows)).numpy()

    assert np.array_equal(decoded.argmax(1)[sure], rows.argmax(1)[sure])


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.7, 1234.5, 1e-30, -32_752.0])
def test_uint8_of_a_constant_row_is_constant(value: float) -> None:
    decoded = round_trip(Uint8(), torch.full((2, 5), value))

    assert bool((decoded == decoded[0, 0]).all())
    assert float(decoded[0, 0]) == np.float32(value)


def test_uint8_reaches_both_ends_of_a_row() -> None:
    rows = torch.tensor([[-32_752.0, 0.0, 32_752.0], [0.0, 0.5, 1.0], [-5.0, -4.0, 10.0]])

    codes = Uint8().encode(rows)["logits_code"]

    assert codes[:, 0].tolist() == [0, 0, 0]
    assert codes[:, 2].min() >= 253
    assert bool((round_trip(Uint8(), rows).diff(dim=1) > 0).all())


# ---- klt ------------------------------------------------------------------------------------


def kl_at(coding: Encoding, rows: Tensor, temperature: float = 1.0) -> float:
    """Mean, in float64, in NumPy."""
    return float(numpy_kl(rows, coding.decode(coding.encode(rows)), temperature).mean())


@pytest.mark.parametrize("classes", [2, 11, 40])
def test_the_basis_of_klt_is_orthonormal_and_sorted_by_variance(classes: int) -> None:
    rows, _ = teacher_rows(500, classes)
    coding = Klt.fit(rows)

    basis = coding.basis.double().numpy()
    np.testing.assert_allclose(basis @ basis.T, np.eye(classes), rtol=0, atol=1e-6)
    np.testing.assert_allclose(basis[:-1].sum(1), 0, atol=1e-6)  # no part of a row's offset
    np.testing.assert_allclose(basis[-1], classes**-0.5, rtol=1e-7)
    exact = rows.double().numpy()
    np.testing.assert_allclose(coding.mean.numpy(), exact.mean(0), atol=1e-5)
    components = (exact - exact.mean(0)) @ basis[:-1].T
    variances = components.var(0)
    assert np.all(np.diff(variances) <= 1e-6 * variances[0])
    correlation = components.T @ components / len(rows)
    np.testing.assert_allclose(correlation, np.diag(variances), rtol=0, atol=1e-4 * variances[0])


def test_fitting_klt_again_gives_the_same_bits() -> None:
    rows, _ = teacher_rows(300, 20)

    assert Klt.fit(rows.clone()).digest() == Klt.fit(rows).digest()
    assert Klt.fit(rows, {1.0: 1e-3}).digest() != Klt.fit(rows).digest()


@pytest.mark.parametrize("budget", [0.5, 5e-2, PLAIN_KL, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("classes", [11, 30])
def test_klt_holds_its_budget_with_the_coarsest_step(budget: float, classes: int) -> None:
    rows, _ = teacher_rows(800, classes)

    coding = Klt.fit(rows, {1.0: budget})

    assert kl_at(coding, rows) <= 0.9 * budget
    limit = torch.iinfo(getattr(torch, coding.dtype)).max
    fits = ((rows - coding.mean) @ coding.basis.T).abs().amax(0) * 1.5 / limit
    coarser = fits.clamp(min=float(coding.step.min()) * 2 ** (1 / 8))
    assert kl_at(dataclasses.replace(coding, step=coarser), rows) > 0.9 * budget


def test_klt_never_takes_a_step_above_the_coarsest() -> None:
    rows, _ = teacher_rows(100, 11)

    assert float(Klt.fit(rows * 1e-3, {1.0: 10.0}).step.max()) == 8.0


def test_klt_keeps_to_one_byte_with_a_coarser_leading_component() -> None:
    """Two classes far below all others have a large variance, and hardly a part in the softmax."""
    rows, _ = teacher_rows(2000, 20)
    rows[:, :2] += 200 * torch.randn(2000, 1, generator=torch.Generator().manual_seed(3)) - 900

    coding = Klt.fit(rows)

    assert coding.dtype == "int8"
    assert float(coding.step[0]) > 3 * float(coding.step[1])
    assert kl_at(coding, rows) <= PLAIN_KL
    assert coding.saturated(coding.encode(rows)) == 0


@pytest.mark.parametrize(("budget", "dtype"), [(PLAIN_KL, "int8"), (1e-8, "int16")])
def test_klt_takes_two_bytes_for_tiny_budgets_alone(budget: float, dtype: str) -> None:
    rows, _ = teacher_rows(500, 20)

    coding = Klt.fit(rows, {1.0: budget})

    assert coding.dtype == dtype
    assert coding.encode(rows)["logits_code"].dtype == getattr(torch, dtype)


def test_a_budget_below_the_finest_step_is_refused() -> None:
    rows, _ = teacher_rows(500, 20)

    with pytest.raises(
        CacheError, match="no step of the encoding klt holds a KL of 1e-13"
    ) as caught:
        Klt.fit(rows, {1.0: 1e-13})
    assert "--encoding float32" in caught.value.remedy


@pytest.mark.parametrize("budget", [PLAIN_KL, 1e-8], ids=["int8", "int16"])
def test_codes_beyond_the_range_are_clamped_and_counted(budget: float) -> None:
    rows, _ = teacher_rows(300, 12)
    coding = Klt.fit(rows, {1.0: budget})
    assert coding.saturated(coding.encode(rows)) == 0
    far = rows.clone()
    far[[4, 17, 200]] = coding.mean + 1e6 * coding.basis[0] * torch.tensor([[1.0], [-1.0], [3.0]])

    arrays = coding.encode(far)

    codes = arrays["logits_code"].long()
    limit = torch.iinfo(getattr(torch, coding.dtype)).max
    assert codes[[4, 17, 200], 0].tolist() == [limit, -limit, limit]
    assert int(codes.abs().max()) == limit  # -limit - 1 is never used
    assert coding.saturated(arrays) == 3
    assert measure(coding, far, torch.zeros(300, dtype=torch.int64)).saturated == 3


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(teacher_rows(5, 20)[0], id="fewer-rows-than-classes"),
        pytest.param(teacher_rows(1, 20)[0], id="one-row"),
        pytest.param(teacher_rows(1, 20)[0].expand(50, 20), id="all-the-same"),
        pytest.param(torch.zeros(50, 20), id="zeros"),
        pytest.param(teacher_rows(50, 20)[0][:, :1].expand(50, 20), id="constant-rows"),
    ],
)
def test_klt_is_fitted_to_rows_of_low_rank(rows: Tensor) -> None:
    coding = Klt.fit(rows)

    basis = coding.basis.double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(20).double(), rtol=0, atol=1e-6)
    assert float(basis[:-1].sum(1).abs().max()) < 1e-6
    assert bool((coding.step > 0).all())
    assert kl_at(coding, rows) <= PLAIN_KL
    assert bool(torch.isfinite(round_trip(coding, teacher_rows(100, 20, seed=1)[0])).all())


@pytest.mark.parametrize("budget", [PLAIN_KL, 1e-4])
@pytest.mark.parametrize("classes", [11, 50])
def test_klt_holds_its_budget_on_rows_it_has_not_seen(budget: float, classes: int) -> None:
    coding = Klt.fit(teacher_rows(2000, classes)[0], {1.0: budget})
    unseen, _ = teacher_rows(4000, classes, seed=9)

    assert kl_at(coding, unseen) <= 1.5 * budget
    assert coding.saturated(coding.encode(unseen)) <= 8


@pytest.mark.parametrize("name", ["klt", "klt-int16"])
def test_klt_against_numpy(name: str) -> None:
    coding = CODINGS[name]
    assert isinstance(coding, Klt)
    rows, _ = teacher_rows(1000, 12, seed=4)
    basis, mean, step = (t.double().numpy() for t in (coding.basis, coding.mean, coding.step))
    limit = np.iinfo(coding.dtype).max
    exact = rows.double().numpy()
    components = (exact - mean) @ basis.T / step
    expected = np.clip(np.rint(components), -limit, limit)

    codes = coding.encode(rows)["logits_code"]

    # float32 may round another way where a component lies half-way between two codes
    half_way = np.abs(np.abs(components - np.floor(components)) - 0.5) < 1e-5 * np.abs(components)
    half_way |= np.abs(np.abs(components - np.floor(components)) - 0.5) < 1e-3
    assert half_way.mean() < 0.1
    assert np.array_equal(codes.numpy()[~half_way], expected[~half_way])
    decoded = coding.decode({"logits_code": codes}).numpy()
    np.testing.assert_allclose(decoded, mean + (codes.numpy() * step) @ basis, atol=2e-5, rtol=1e-5)


def test_a_step_is_the_same_error_in_every_direction() -> None:
    """A rotation keeps lengths: the error of a row is that of its codes."""
    rows, _ = teacher_rows(2000, 30)
    coding = Klt.fit(rows, {1.0: 1e-3})
    error = (round_trip(coding, rows) - rows).double()

    lengths = error.square().sum(1)
    assert float(lengths.max()) <= float((coding.step.double() / 2).square().sum()) * 1.0001
    # rounding errors are spread evenly over a step
    expected = float((coding.step.double().square() / 12).sum())
    assert float(lengths.mean()) == pytest.approx(expected, rel=0.05)


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


@often
@given(topk_cases())
def test_topk_keeps_the_largest_and_always_the_label(case: tuple[Tensor, Tensor, TopK]) -> None:
    rows, labels, coding = case

    arrays = coding.encode(rows, labels)

    for row, label, index, value in zip(
        rows.tolist(), labels.tolist(), arrays["topk_index"].tolist(),
        arrays["topk_value"].tolist(), strict=True,
    ):  # fmt: skip
        # of equal logits the first class first, as argmax has it
        largest = sorted(range(len(row)), key=lambda c: (-row[c], c))[: coding.k]
        if label not in largest:
            largest[-1] = label
        assert index == largest
        below = np.float32(row) - np.float32(max(row))
        assert value == [float(np.float16(below[c])) for c in largest]


@often
@given(topk_cases())
def test_topk_knows_the_weight_of_the_rest(case: tuple[Tensor, Tensor, TopK]) -> None:
    rows, labels, coding = case

    arrays = coding.encode(rows, labels)

    exact = (rows - rows.amax(1, keepdim=True)).double().numpy()
    index = arrays["topk_index"].numpy()
    rest = np.array(
        [[row[c] for c in range(len(row)) if c not in set(kept)]
         for row, kept in zip(exact, index.tolist(), strict=True)]
    )  # fmt: skip
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
    rows, labels = teacher_rows(500, 12, seed=2)
    coding = TopK(12, k)
    arrays = coding.encode(rows, labels)

    given_rows = (coding.decode(arrays, temperature).double() / temperature).softmax(1)

    exact = (rows.double() / temperature).softmax(1)
    peak = float(rows.abs().max())
    tolerance = {"rtol": 2 * peak * 2**-11 / temperature, "atol": 0.0}
    kept = coding.kept(arrays)
    assert not coding.keeps_all
    for classes in (labels[:, None], kept[:, :1], kept):
        torch.testing.assert_close(
            given_rows.gather(1, classes), exact.gather(1, classes), **tolerance
        )
    rest = exact.scatter(1, kept, 0)
    torch.testing.assert_close(given_rows.scatter(1, kept, 0).sum(1), rest.sum(1), **tolerance)
    if k > 2:  # with two, the label may have taken the prediction's neighbour, never its place
        assert bool((kept[:, 0] == rows.argmax(1)).all())


def test_the_rest_is_spread_evenly() -> None:
    rows, labels = teacher_rows(50, 12)
    coding = TopK(12, 4)
    arrays = coding.encode(rows, labels)
    kept = coding.kept(arrays)

    for temperature in TAILS:
        decoded = coding.decode(arrays, temperature)
        for row, known in zip(decoded.tolist(), kept.tolist(), strict=True):
            assert len({row[c] for c in range(12) if c not in known}) == 1


@pytest.mark.parametrize("coarseness", [0.0, 0.5, 4.0], ids=["distinct", "ties", "mostly-ties"])
def test_topk_of_many_rows_is_that_of_each_sorted_row(
    monkeypatch: pytest.MonkeyPatch, coarseness: float
) -> None:
    """Rows are encoded some at a time, and equal logits lie across the k-th place."""
    monkeypatch.setattr(topk, "_ENCODED", 7 * 40)
    rows, labels = teacher_rows(100, 40, seed=3)
    rows = (rows / coarseness).round() * coarseness if coarseness else rows
    coding = TopK(40, 5)

    arrays = coding.encode(rows, labels)

    for i, (row, label) in enumerate(zip(rows.tolist(), labels.tolist(), strict=True)):
        expected = sorted(range(40), key=lambda c: (-row[c], c))[:5]
        if label not in expected:
            expected[-1] = label
        assert coding.kept(arrays)[i].tolist() == expected
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


@pytest.mark.parametrize("temperature", [0.5, 3.0, 4.0001])
def test_topk_refuses_a_temperature_it_does_not_know(temperature: float) -> None:
    rows, labels = teacher_rows(5, 12)
    coding = TopK(12, 4)
    assert not coding.holds(temperature)

    with pytest.raises(CacheError, match=r"at T = 1, 2, 4, not at") as caught:
        coding.decode(coding.encode(rows, labels), temperature)
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
    assert arrays["topk_index"].to(torch.int64).tolist() == expected
    kept = coding.kept(arrays)
    assert kept.tolist() == expected
    decoded = coding.decode(arrays)
    assert decoded.argmax(1).tolist() == [classes - 1] * 2
    assert decoded[1, classes - 2] == np.float16(float(rows[1, classes - 2] - 9.0))


@pytest.mark.parametrize(
    "parameters",
    [
        {"k": 1},
        {"k": 13},
        {"k": 0},
        {"k": -4},
        {"temperatures": ()},
        {"temperatures": (1.0, 0.0)},
        {"temperatures": (-1.0,)},
        {"temperatures": (math.inf,)},
        {"temperatures": (math.nan,)},
    ],
    ids=str,
)
def test_topk_that_cannot_be_is_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(CacheError, match=r"topk (keeps|cannot)") as caught:
        TopK(12, **parameters)
    assert "--encoding topk:" in caught.value.remedy


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
    rows, labels = teacher_rows(600, 12, seed=5)
    arrays = coding.encode(rows, labels)

    found = measure(coding, rows, labels)

    assert found.rows == 600
    assert found.temperatures == tuple(t for t in TEMPERATURES if coding.holds(t))
    for column, temperature in enumerate(found.temperatures):
        kls = numpy_kl(rows, coding.decode(arrays, temperature), temperature).clip(0)
        assert found.mean_kl[column] == pytest.approx(kls.mean(), rel=1e-6, abs=1e-14)
        high = np.quantile(kls, 0.999)
        assert found.high_kl[column] == pytest.approx(high, rel=1e-6, abs=1e-14)
    decoded = coding.decode(arrays, 1.0).argmax(1)
    assert found.top1_agreement == float((decoded == rows.argmax(1)).double().mean())
    lead_too = [
        min(row[c] for c in leading) >= sorted(row)[-5]
        for row, leading in zip(
            coding.decode(arrays, 1.0).tolist(),
            np.argsort(rows.numpy(), axis=1)[:, -5:].tolist(),
            strict=True,
        )
    ]
    assert found.top5_agreement == pytest.approx(np.mean(lead_too))
    assert found.saturated == coding.saturated(arrays)
    assert Fidelity.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert msgspec.json.decode(msgspec.json.encode(found), type=Fidelity) == found


def test_fidelity_is_measured_at_the_temperatures_that_are_held() -> None:
    rows, labels = teacher_rows(100, 12)

    assert measure(TopK(12, 4, (2.0, 8.0)), rows, labels).temperatures == (2.0,)
    nowhere = measure(TopK(12, 12, (8.0,)), rows, labels)
    assert nowhere.temperatures == TEMPERATURES


def test_fidelities_of_blocks_are_weighted_by_rows() -> None:
    parts = [
        Fidelity(100, (1.0, 4.0), (0.3, 0.1), (0.9, 0.2), 0.5, 2),
        Fidelity(300, (1.0, 4.0), (0.1, 0.5), (0.4, 0.6), 1.0, 3),
    ]

    whole = combined(parts)

    assert whole.top5_agreement is None
    assert (whole.rows, whole.temperatures, whole.saturated) == (400, (1.0, 4.0), 5)
    assert whole.mean_kl == pytest.approx((0.15, 0.4))
    assert whole.high_kl == (0.9, 0.6)
    assert whole.top1_agreement == pytest.approx(0.875)
    assert combined(parts[:1]) == parts[0]


def test_blocks_of_an_earlier_version_are_put_together_with_later_ones() -> None:
    earlier = Fidelity(100, (1.0, 4.0), (0.3, 0.1), (0.9, 0.2), 0.5, 2)
    later = Fidelity(300, (1.0, 2.0, 4.0), (0.1, 9.0, 0.5), (0.4, 9.0, 0.6), 1.0, 3, 0.5)

    whole = combined([earlier, later])

    assert whole.temperatures == (1.0, 4.0)
    assert whole.mean_kl == pytest.approx((0.15, 0.4))
    assert whole.high_kl == (0.9, 0.6)
    assert whole.top5_agreement is None
    assert combined([later, later]).top5_agreement == 0.5


@each_encoding
def test_fidelity_of_all_rows_is_that_of_their_parts(coding: Encoding) -> None:
    rows, labels = teacher_rows(500, 12)
    cuts = [slice(0, 100), slice(100, 120), slice(120, 500)]

    whole = combined([measure(coding, rows[cut], labels[cut]) for cut in cuts])

    at_once = measure(coding, rows, labels)
    assert whole.mean_kl == pytest.approx(at_once.mean_kl, rel=1e-4, abs=1e-12)
    assert whole.top1_agreement == pytest.approx(at_once.top1_agreement)


# ---- what it is, in a store -----------------------------------------------------------------


def changed(tensor: Tensor, where: int) -> Tensor:
    """One value, in its last bit."""
    flat = tensor.clone().flatten()
    flat[where] = flat[where].nextafter(torch.tensor(9e9))
    return flat.reshape(tensor.shape)


def test_a_digest_changes_with_every_parameter_and_every_value() -> None:
    rows, _ = teacher_rows(100, 5)
    klt = Klt.fit(rows)
    several: list[Encoding] = [Float32(), Float16(), Uint8(), klt]
    several += [TopK(5, 2), TopK(5, 3), TopK(5, 2, (1.0,)), TopK(5, 2, (4.0, 2.0, 1.0))]
    several += [dataclasses.replace(klt, dtype="int16")]
    for name in ("basis", "mean", "step"):
        values = getattr(klt, name)
        for where in range(values.numel()):
            several.append(dataclasses.replace(klt, **{name: changed(values, where)}))

    digests = [coding.digest() for coding in several]

    assert len(set(digests)) == len(several)
    assert all(len(digest) == 32 for digest in digests)
    assert digests == [coding.digest() for coding in several]


@each_encoding
def test_an_encoding_comes_back_from_its_attributes(coding: Encoding) -> None:
    text = json.dumps(encoding_attributes(coding))
    attributes = msgspec.json.decode(text, type=EncodingAttributes)

    again = restored(attributes, 12, lambda name: coding.calibration()[name].clone())

    assert type(again) is type(coding)
    assert (again.digest(), again.parameters) == (coding.digest(), coding.parameters)
    rows, labels = teacher_rows(50, 12, seed=6)
    assert torch.equal(round_trip(again, rows, labels), round_trip(coding, rows, labels))


DAMAGED: dict[str, tuple[str, dict[str, Any]]] = {
    "another-name": ("float32", {"name": "float16"}),
    "unknown-name": ("float32", {"name": "jpeg"}),
    "auto": ("float32", {"name": "auto"}),
    "another-digest": ("uint8", {"digest": "00" * 16}),
    "no-k": ("topk", {"parameters": {"temperatures": [1.0, 2.0, 4.0]}}),
    "k-a-word": ("topk", {"parameters": {"k": "many", "temperatures": [1.0, 2.0, 4.0]}}),
    "k-null": ("topk", {"parameters": {"k": None, "temperatures": [1.0, 2.0, 4.0]}}),
    "k-too-large": ("topk", {"parameters": {"k": 99, "temperatures": [1.0, 2.0, 4.0]}}),
    "another-k": ("topk", {"parameters": {"k": 5, "temperatures": [1.0, 2.0, 4.0]}}),
    "temperatures-null": ("topk", {"parameters": {"k": 4, "temperatures": None}}),
    "temperature-a-word": ("topk", {"parameters": {"k": 4, "temperatures": ["warm"]}}),
    "no-dtype": ("klt", {"parameters": {}}),
    "another-dtype": ("klt", {"parameters": {"dtype": "int16"}}),
    "unknown-dtype": ("klt", {"parameters": {"dtype": "int7"}}),
    "klt-without-calibration": ("float32", {"name": "klt", "parameters": {"dtype": "int8"}}),
    "topk-without-parameters": ("float32", {"name": "topk"}),
}


@pytest.mark.parametrize(("name", "change"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_attributes_of_an_encoding_are_told(name: str, change: dict[str, Any]) -> None:
    coding = CODINGS[name]
    attributes = msgspec.convert(encoding_attributes(coding) | change, EncodingAttributes)

    with pytest.raises(CacheError):
        restored(attributes, 12, lambda array: coding.calibration()[array])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: changed(t, 3), id="value"),
        pytest.param(lambda t: t[:-1], id="shape"),
        pytest.param(lambda t: t.double(), id="dtype"),
        pytest.param(torch.zeros_like, id="zeros"),
    ],
)
@pytest.mark.parametrize("array", ["klt_basis", "klt_mean", "klt_step"])
def test_a_damaged_calibration_is_told(array: str, change: Callable[[Tensor], Tensor]) -> None:
    coding = CODINGS["klt"]
    attributes = msgspec.convert(encoding_attributes(coding), EncodingAttributes)

    def read(name: str) -> Tensor:
        values = coding.calibration()[name]
        return change(values) if name == array else values

    with pytest.raises(CacheError, match="calibration"):
        restored(attributes, 12, read)


# ---- which one ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "classes", "chosen"),
    [
        pytest.param("auto", 2, "float32", id="two-classes"),
        pytest.param("auto", 10, "float32", id="ten-classes"),
        pytest.param("auto", 11, "klt-top", id="eleven-classes"),
        pytest.param("auto", 100, "klt-top", id="a-hundred-classes"),
        pytest.param("auto", 4097, "klt-top", id="thousands-of-classes"),
        pytest.param("float16", 10, "float16", id="asked-for"),
        pytest.param("float32", 100, "float32", id="exact-asked-for"),
        pytest.param("klt", 5, "klt", id="klt-of-few-classes"),
        pytest.param("klt:step=0.3", 5, "klt", id="klt-of-a-step"),
        pytest.param("klt:top=0", 5, "klt", id="klt-unrefined"),
        pytest.param("klt:top=2", 5, "klt-top", id="klt-refined"),
        pytest.param("klt-top", 2, "klt-top", id="klt-top-of-two-classes"),
        pytest.param("klt-top", 4097, "klt-top", id="klt-top-of-thousands"),
        pytest.param("topk", 5, "topk", id="fewer-classes-than-k"),
    ],
)
def test_an_encoding_is_chosen_by_name_and_by_classes(spec: str, classes: int, chosen: str) -> None:
    rows = torch.randn(40, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(40, dtype=torch.int64)

    coding = fit_encoding(spec, rows, labels)

    assert coding.name == chosen
    assert coding.decode(coding.encode(rows, labels)).shape == (40, classes)


def test_parameters_of_topk_come_with_its_name() -> None:
    rows, labels = teacher_rows(50, 12)

    def topk(spec: str) -> Encoding:
        return fit_encoding(spec, rows, labels)

    assert topk("topk") == TopK(12, 10)
    assert topk("topk:k=4") == TopK(12, 4)
    assert topk("topk:temperatures=1/3.5") == TopK(12, 10, (1.0, 3.5))
    assert topk("topk:k=3,temperatures=2") == TopK(12, 3, (2.0,))
    assert fit_encoding("topk", rows[:, :5], labels % 5) == TopK(5, 5)


BAD_SPECS: dict[str, tuple[str, type[PipelineError], str]] = {
    "unknown": ("float8", CacheError, "unknown encoding 'float8'"),
    "empty": ("", CacheError, "unknown encoding ''"),
    "number": ("topk:k=many", ConfigError, "'k=many' is not a parameter of the encoding topk"),
    "parameter": ("topk:depth=3", ConfigError, "'depth=3' is not a parameter"),
    "no-value": ("topk:k", ConfigError, "'k' is not a parameter"),
    "temperatures": ("topk:temperatures=1/warm", ConfigError, "'temperatures=1/warm'"),
    "too-few": ("topk:k=1", CacheError, "topk keeps 2 to 12 logits"),
    "too-many": ("topk:k=13", CacheError, "topk keeps 2 to 12 logits"),
    "cold": ("topk:temperatures=0", CacheError, "cannot keep tails"),
    "klt": ("klt:fine=1", ConfigError, "'fine=1' is not a parameter of the encoding klt"),
    "no-step": ("klt:step=0", CacheError, "a step above 0 and up to 64, not 0"),
    "negative-step": ("klt:step=-1,top=3", CacheError, "a step above 0"),
    "infinite-step": ("klt-top:step=inf", CacheError, "a step above 0"),
    "no-number-step": ("klt-top:step=nan", CacheError, "a step above 0"),
    "no-top": ("klt-top:top=0", CacheError, "klt-top refines 1 to 12 classes of 12, not 0"),
    "negative-top": ("klt:top=-1", CacheError, "klt-top refines 1 to 12 classes"),
    "too-large-top": ("klt:top=13", CacheError, "klt-top refines 1 to 12 classes"),
    "half-a-top": ("klt:top=1.5", ConfigError, "'top=1.5' is not a parameter"),
    "float32": ("float32:k=2", ConfigError, "takes none"),
    "auto": ("auto:k=2", ConfigError, "'k=2' is not a parameter of the encoding auto"),
}


@pytest.mark.parametrize(("spec", "error", "message"), BAD_SPECS.values(), ids=BAD_SPECS)
@pytest.mark.parametrize("max_kl", [None, 0.1])
def test_an_encoding_that_cannot_be_is_refused(
    spec: str, error: type[PipelineError], message: str, max_kl: float | None
) -> None:
    rows, labels = teacher_rows(50, 12)

    with pytest.raises(error, match=message):
        fit_encoding(spec, rows, labels, max_kl and {1.0: max_kl})


def test_an_unknown_encoding_lists_the_known_ones() -> None:
    with pytest.raises(CacheError) as caught:
        fit_encoding("float8", *teacher_rows(5, 12))
    assert all(name in caught.value.remedy for name in ("auto", *ENCODINGS))


def test_klt_is_not_for_thousands_of_classes() -> None:
    with pytest.raises(CacheError, match="klt is for up to 4,096 classes, not 4,097") as caught:
        fit_encoding("klt", torch.zeros(2, 4097), torch.zeros(2, dtype=torch.int64))
    assert "topk" in caught.value.remedy


@pytest.mark.parametrize("max_kl", [1.0, 5e-3, 1e-4, 1e-6, 1e-12])
def test_auto_with_a_budget_takes_the_smallest_that_holds_it(max_kl: float) -> None:
    rows, labels = teacher_rows(600, 30)

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


def test_encodings_that_cannot_hold_the_rows_are_left_out() -> None:
    rows, labels = teacher_rows(300, 12)

    names = [m.coding.name for m in measure_all(rows * 1e5, labels, {1.0: 1e-9})]

    assert "float32" in names
    assert not {"float16", "topk"} & set(names)


# ---- rows of a real teacher -----------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar100() -> tuple[Tensor, Tensor]:
    """A ResNet-9's logits of view 0 of CIFAR-100, in random order, and the labels."""
    path: Path = SHARED_DATA / "cifar100" / "logits-resnet9.npz"
    if not path.exists():
        pytest.skip(f"{path.name} of CIFAR-100 is not at hand")
    with np.load(path, allow_pickle=False) as found:
        logits, labels = torch.from_numpy(found["logits"][0]), torch.from_numpy(found["labels"])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return logits[order].float(), labels[order].long()


@pytest.mark.parametrize(
    ("spec", "name", "most_bytes", "kls", "top1"),
    [
        pytest.param("klt", "klt", 46, {1.0: 5e-3, 4.0: 1e-3}, 0.96, id="plain"),
        pytest.param(
            "auto", "klt-top", 17, DEFAULT_BUDGET, 1.0, id="default", marks=pytest.mark.slow
        ),
    ],
)
def test_klt_on_cifar100(
    cifar100: tuple[Tensor, Tensor],
    spec: str,
    name: str,
    most_bytes: float,
    kls: dict[float, float],
    top1: float,
) -> None:
    logits, labels = cifar100
    coding = fit_encoding(spec, logits[:8192], labels[:8192])
    rows, labels = logits[-20_000:], labels[-20_000:]

    fidelity = measure(coding, rows, labels)

    assert coding.name == name
    assert row_bytes_on_disk(coding, rows, labels) <= most_bytes
    assert all((fidelity.known_kl(t) or 0) <= kl for t, kl in kls.items())
    assert fidelity.top1_agreement >= top1
    assert fidelity.saturated <= 20


def test_a_byte_a_logit_and_ten_logits_on_cifar100(cifar100: tuple[Tensor, Tensor]) -> None:
    rows, labels = (part[:8192] for part in cifar100)

    uint8, topk = measure(Uint8(), rows, labels), measure(TopK(100), rows, labels)

    assert uint8.mean_kl[0] < 1e-3
    assert topk.mean_kl[0] < 0.1
    assert topk.top1_agreement > 0.999


@pytest.mark.parametrize(
    ("classes", "rows"), [(10, 4096), (1000, 4096), (2048, 2048), (21_841, 256), (10**6, 256)]
)
def test_fidelity_is_measured_on_fewer_rows_of_many_classes(classes: int, rows: int) -> None:
    assert checked_rows(classes) == rows
