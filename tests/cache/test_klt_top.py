"""`klt-top` against whole numbers in NumPy: the same bits whatever adds them, in any order."""

import dataclasses
import math
import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.cache.encoding import (
    DEFAULT_BUDGET,
    ENCODINGS,
    EncodingAttributes,
    encoding_attributes,
    fit_encoding,
    fit_rows,
    is_encoding,
    measure,
    ranking,
    restored,
    row_bytes_on_disk,
)
from stages.cache.encoding.klt_basis import Rows
from stages.cache.encoding.klt_top import KltTop
from stages.cache.encoding.packing import FIVES, PAIRS, THREES, Packing
from stages.errors import CacheError
from stages.training.graphs import NoWaits

DIGITS = {"pair": (2, 15), "three": (3, 5), "five": (5, 3)}
"""How many codes a byte has, and in which base."""


def head_rows(count: int, classes: int, features: int, seed: int = 0) -> Tensor:
    """float32 (n, C): logits of a linear head, of no higher rank than it has features (and 1)."""
    generator = torch.Generator().manual_seed(1000)
    weight = torch.randn(features, classes, generator=generator)
    bias = torch.randn(classes, generator=generator)
    generator.manual_seed(seed)
    scale = 3.0 / torch.arange(1, features + 1).sqrt()
    return torch.randn(count, features, generator=generator) * scale @ weight + bias


def in_whole_numbers(coding: KltTop, arrays: dict[str, Tensor]) -> tuple[NDArray[Any], list[Any]]:
    """A row's integers after refinement, int64 (n, C), and the refined classes of each row; by
    loops, from the documented rule.
    """
    code, pair, three, five, top = (
        arrays[f"logits_{n}"].numpy().astype(np.int64)
        for n in ("code", "pair", "three", "five", "top")
    )

    def digits(packed: NDArray[Any], name: str) -> list[int]:
        count, base = DIGITS[name]
        return [int(b) // base**i % base - base // 2 for b in packed for i in range(count)]

    basis, mean, center = (
        t.numpy().astype(np.int64) for t in (coding.basis, coding.mean, coding.center)
    )
    rows, refined = [], []
    for i, prediction in enumerate(arrays["prediction"].long().tolist()):
        codes = [*code[i, :-1].tolist(), *digits(pair[i], "pair")]
        codes += [*digits(three[i], "three"), *digits(five[i], "five")]
        z = mean + (np.array(codes) + center[prediction]) @ basis
        others = sorted((c for c in range(len(z)) if c != prediction), key=lambda c: (-z[c], c))
        leading = [prediction, *others][: coding.top]
        for c, errors in zip(leading, digits(top[i], "pair"), strict=False):
            z[c] += coding.fine * errors
        highest = max(int(v) for c, v in enumerate(z) if c != prediction)
        z[prediction] = max(int(z[prediction]), highest + max(1, coding.fine // 8))
        rows.append(z)
        refined.append(leading)
    return np.stack(rows), refined


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return head_rows(600, 24, 16)


@pytest.fixture(scope="module", params=[(None, None), (0.4, 3), (6.0, 5), (2.5, 24)], ids=str)
def coding(rows: Tensor, request: pytest.FixtureRequest) -> KltTop:
    step, top = request.param
    given = {} if step is None else {"step": step, "top": top}
    return KltTop.fit(rows, **given)


def test_a_row_is_whole_numbers_in_any_order(coding: KltTop, rows: Tensor) -> None:
    arrays = coding.encode(rows)

    found = coding.decode(arrays)

    exact, _ = in_whole_numbers(coding, arrays)
    assert int(np.abs(exact).max()) < 2**24
    steps = arrays["logits_code"][:, -1:].numpy().astype(np.float32)
    offset = steps * np.float32(coding.offset_step) + np.float32(coding.offset)
    expected = exact.astype(np.float32) * np.float32(coding.unit) + offset
    assert found.numpy().tobytes() == expected.tobytes()
    assert torch.equal(found.argmax(1), rows.argmax(1))


def test_rounding_of_another_library_changes_nothing(
    coding: KltTop, rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order, in one product or many, in double precision: the same bits."""
    arrays = coding.encode(rows)
    plain = coding.decode(arrays)
    product = torch.addmm

    def one_by_one(mean: Tensor, codes: Tensor, basis: Tensor) -> Tensor:
        order = torch.randperm(len(basis), generator=torch.Generator().manual_seed(5))
        total = torch.zeros(len(codes), basis.shape[1])
        for j in order.tolist():
            total += codes[:, j, None] * basis[j]
        return total + mean

    monkeypatch.setattr(torch, "addmm", one_by_one)
    assert torch.equal(coding.decode(arrays), plain)
    monkeypatch.setattr(
        torch, "addmm", lambda m, c, b: product(m.double(), c.double(), b.double()).float()
    )
    assert torch.equal(coding.decode(arrays), plain)
    monkeypatch.undo()
    alone = torch.cat([coding.decode({n: a[i : i + 1] for n, a in arrays.items()}) for i in (0, 7)])
    assert torch.equal(alone, plain[[0, 7]])


def test_low_precision_of_products_is_kept_out(coding: KltTop, rows: Tensor) -> None:
    arrays = coding.encode(rows)
    plain = coding.decode(arrays)

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(coding.decode(arrays), plain)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(coding.decode(arrays), plain)
    finally:
        torch.set_float32_matmul_precision(before)


def test_as_on_a_device_it_decodes_the_same_and_asks_nothing_of_the_host(
    coding: KltTop, rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = coding.encode(rows)
    plain = coding.decode(arrays)
    monkeypatch.setattr(ranking, "largest_on_host", ranking.largest)
    moved = coding.to(torch.device("cpu"))

    with NoWaits() as called:
        found = moved.decode(arrays)

    assert torch.equal(found, plain)
    assert "topk.default" in {name for name, _ in called.operations}


def test_any_codes_are_exact(coding: KltTop) -> None:
    """What no teacher gives, and a damaged store may."""
    generator = torch.Generator().manual_seed(2)
    shapes = {name: coding.sizes[spec.dimensions[2]] for name, spec in coding.arrays().items()
              if name != "prediction"}  # fmt: skip
    most = {"logits_code": 127, "logits_pair": 224, "logits_top": 224, "logits_three": 124}
    arrays = {"prediction": torch.randint(24, (200,), generator=generator)}
    for name, size in shapes.items():
        high = most.get(name, 242)
        extreme = torch.randint(2, (200, size), generator=generator)
        low = -high if name == "logits_code" else 0
        arrays[name] = torch.where(extreme > 0, high, low).to(
            getattr(torch, coding.arrays()[name].dtype)
        )

    found = coding.decode(arrays)

    exact, _ = in_whole_numbers(coding, arrays)
    assert int(np.abs(exact).max()) < 2**24
    offset = arrays["logits_code"][:, -1:].float() * coding.offset_step + coding.offset
    assert torch.equal(found, torch.from_numpy(exact).float() * coding.unit + offset)


def test_equal_entries_are_ranked_by_class(rows: Tensor) -> None:
    """A basis of zeros: all coarse rows are the mean, most of whose entries are equal."""
    fitted = KltTop.fit(rows, step=2.0, top=6)
    coding = dataclasses.replace(
        fitted, basis=torch.zeros_like(fitted.basis), mean=(torch.arange(24) // 12 % 2).int()
    )
    arrays = coding.encode(rows)

    _, refined = in_whole_numbers(coding, arrays)

    for prediction, classes in zip(arrays["prediction"].tolist(), refined, strict=True):
        assert classes == [prediction, *(c for c in range(12, 24) if c != prediction)][:6]
    errors = PAIRS.unpack(arrays["logits_top"], PAIRS.table())[:, :6]
    leading = torch.tensor(refined)
    relative = (rows - rows.mean(1, keepdim=True)) / coding.unit - coding.mean
    wanted = (relative.gather(1, leading) / coding.fine).round().clamp(-7, 7)
    assert torch.equal(errors, wanted)


def test_refinement_brings_the_leading_classes_nearer(rows: Tensor) -> None:
    kls = [
        measure(KltTop.fit(rows, step=4.0, top=top), rows, torch.zeros(600).long()).mean_kl
        for top in (1, 4, 12, 24)
    ]

    for column in range(4):
        at = [kl[column] for kl in kls]
        assert at == sorted(at, reverse=True)
    assert kls[2][0] < kls[0][0] / 4


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        pytest.param(None, None, id="the-argmax"),
        pytest.param(0, 0, id="one-that-is-not"),  # of a sample that the teacher has not seen
        pytest.param(23, 23, id="the-last-class"),
    ],
)
def test_the_stored_prediction_decodes_to_the_argmax(
    coding: KltTop, rows: Tensor, given: int | None, kept: int | None
) -> None:
    asked = None if given is None else torch.full((600,), given)

    decoded = coding.decode(coding.encode(rows, predictions=asked))

    expected = rows.argmax(1) if kept is None else torch.full((600,), kept)
    assert torch.equal(decoded.argmax(1), expected)
    first, second = decoded.topk(2, dim=1).values.T
    assert bool((first - second >= 0.9 * coding.margin * coding.unit).all())


def test_classes_that_are_equal_to_the_prediction_stay_below_it(coding: KltTop) -> None:
    for tied in (torch.zeros(3, 24), torch.full((3, 24), -7.5), torch.eye(24)[:3] * 0):
        decoded = coding.decode(coding.encode(tied))
        assert decoded.argmax(1).tolist() == [0, 0, 0]  # as argmax has it
        assert bool(torch.isfinite(decoded).all())


# ---- calibration ----------------------------------------------------------------------------


ODD_ROWS = {
    "three-samples": head_rows(3, 20, 30),
    "one-row": head_rows(1, 20, 30),
    "all-the-same": head_rows(1, 20, 30).expand(50, 20),
    "zeros": torch.zeros(50, 20),
    "constant-rows": head_rows(50, 20, 30)[:, :1].expand(50, 20),
    "low-rank": head_rows(400, 20, 2),
    "two-classes": head_rows(200, 2, 3),
    "one-class-is-always-right": head_rows(200, 20, 5) + 100 * torch.eye(20)[3],
    "far-off": head_rows(300, 20, 5) + 1e4,
}


@pytest.mark.parametrize("odd", ODD_ROWS.values(), ids=ODD_ROWS)
def test_odd_teachers_are_held(odd: Tensor) -> None:
    coding = KltTop.fit(odd)
    arrays = coding.encode(odd)

    fidelity = measure(coding, odd, torch.zeros(len(odd)).long())

    assert fidelity.holds(DEFAULT_BUDGET)
    assert torch.equal(coding.decode(arrays).argmax(1), odd.argmax(1))
    unseen = head_rows(100, odd.shape[1], 30, seed=9) * 10
    assert bool(torch.isfinite(coding.decode(coding.encode(unseen))).all())


def test_where_no_step_is_fine_enough_auto_takes_plain_klt() -> None:
    """One row far beyond all others asks for codes of two bytes."""
    odd = torch.cat([head_rows(300, 20, 5), 200 * head_rows(1, 20, 5)])
    with pytest.raises(CacheError, match="no step of the encoding klt-top holds"):
        KltTop.fit(odd)

    coding = fit_encoding("auto", odd, odd.argmax(1))

    assert coding.name == "klt"
    assert measure(coding, odd, odd.argmax(1)).holds({1.0: 5e-3})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_refused(rows: Tensor, value: float) -> None:
    broken = rows.clone()
    broken[3, 4] = value
    with pytest.raises(CacheError, match="does not fit in klt-top"):
        KltTop.fit(broken)


def test_a_budget_that_no_step_holds_is_told(rows: Tensor) -> None:
    with pytest.raises(CacheError, match=r"klt-top holds a KL of 1e-13 at T=4") as caught:
        KltTop.fit(rows, {4.0: 1e-13})
    assert "float32" in caught.value.remedy


@pytest.mark.parametrize("budget", [{1.0: 1e-3}, {4.0: 1e-3}, {1.0: 0.1, 4.0: 2e-3, 10.0: 1e-3}])
def test_every_part_of_a_budget_is_held(rows: Tensor, budget: dict[float, float]) -> None:
    coding = KltTop.fit(rows, budget)

    found = measure(coding, rows, torch.zeros(600).long())
    coarser = measure(KltTop.fit(rows, step=1.1 * coding.step), rows, torch.zeros(600).long())

    assert found.holds(budget)
    assert not coarser.holds(budget)


def test_the_mean_of_a_prediction_is_what_analysis_of_variance_says() -> None:
    """By loops over classes and components, in double precision."""
    rows = head_rows(400, 6, 4)

    found = Rows.of(rows)

    x = rows.double().numpy()
    x = x - x.mean(1, keepdims=True)
    y = (x - x.mean(0)) @ found.basis.double().numpy().T
    predictions = x.argmax(1)
    present = sorted(set(predictions.tolist()))
    for j in range(y.shape[1]):
        groups = {p: y[predictions == p, j] for p in present}
        within = sum(((g - g.mean()) ** 2).sum() for g in groups.values()) / (400 - len(present))
        spread = sum(len(g) * g.mean() ** 2 for g in groups.values()) / 400
        between = spread - within * len(present) / 400
        for p, group in groups.items():
            k = len(group)
            expected = group.mean() * k / (k + within / between) if between > 0 else 0.0
            assert float(found.center[p, j]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
        away = np.abs(y[:, j] - found.center[predictions, j].double().numpy())
        assert float(found.peak[j]) == pytest.approx(away.max(), rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(found.mean, x.mean(0), atol=1e-5)


def test_of_thousands_of_classes_the_leading_components_are_found() -> None:
    """A head of 12 features has 12 components, whatever it has of classes."""
    rows = head_rows(200, 2100, 12)

    found = Rows.of(rows)

    kept = found.basis[found.peak > 1e-3]
    assert len(kept) == 12
    np.testing.assert_allclose(kept @ kept.T, np.eye(12), atol=1e-4)
    centred = rows - rows.mean(1, keepdim=True) - found.mean
    left = centred - (centred @ kept.T) @ kept
    assert float(left.norm() / centred.norm()) < 1e-5
    variances = (centred @ kept.T).square().sum(0)
    exact = torch.linalg.svdvals(centred.double())[:12].square().float()
    torch.testing.assert_close(variances, exact, rtol=1e-3, atol=0)
    coding = fit_encoding("klt-top", rows, torch.zeros(200).long())
    assert len(coding.calibration()["klt_basis"]) <= 12 + 2 + 3 + 5
    assert measure(coding, rows, torch.zeros(200).long()).holds(DEFAULT_BUDGET)


@pytest.mark.parametrize(("classes", "most"), [(100, 8192), (1000, 8192), (21_841, 3072)])
def test_fewer_rows_are_calibrated_of_many_classes(classes: int, most: int) -> None:
    assert fit_rows(classes) == most


# ---- a few codes in a byte ------------------------------------------------------------------


@pytest.mark.parametrize("packing", [PAIRS, THREES, FIVES], ids=str)
@pytest.mark.parametrize("count", [1, 4, 5, 30])
def test_codes_come_back_from_their_bytes(packing: Packing, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(-packing.limit, packing.limit + 1, (50, count), generator=generator)

    packed = packing.pack(codes)

    assert packed.dtype == torch.uint8
    assert packed.shape == (50, -(-count // packing.digits))
    found = packing.unpack(packed, packing.table())
    assert torch.equal(found[:, :count].long(), codes)
    assert not found[:, count:].any()
    assert torch.equal(
        packing.unpack(packing.pack(codes * 99), packing.table())[:, :count].long(),
        codes.sign() * packing.limit,
    )


# ---- in a store -----------------------------------------------------------------------------


def test_a_program_that_does_not_know_it_says_so(
    rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    coding = KltTop.fit(rows)
    attributes = msgspec.convert(encoding_attributes(coding), EncodingAttributes)
    monkeypatch.delitem(ENCODINGS, "klt-top")

    with pytest.raises(CacheError, match="unknown encoding 'klt-top'") as caught:
        restored(attributes, 24, lambda name: coding.calibration()[name])
    assert "newer" in caught.value.remedy


@pytest.mark.parametrize(
    "change",
    [
        {"step": None},
        {"top": 0},
        {"top": 25},
        {"top": "8"},
        {"fine": 0},
        {"wide": -1},
        {"pair": 99},
        {"unit": True},
        {"five": 1.5},
    ],
    ids=str,
)
def test_damaged_parameters_are_told(rows: Tensor, change: dict[str, Any]) -> None:
    coding = KltTop.fit(rows)
    known = encoding_attributes(coding)
    attributes = msgspec.convert(
        {**known, "parameters": {**known["parameters"], **change}}, EncodingAttributes
    )

    with pytest.raises(CacheError, match="damaged"):
        restored(attributes, 24, lambda name: coding.calibration()[name])


SPECS = {
    "auto": True, "klt-top": True, "klt:top=5": True, "klt-top:top=5": True,
    "klt:step=1.5,top=5": True, "klt-top:step=1.5": True,
    "klt": False, "klt:top=4": False, "klt:step=1.5": False, "klt:step=1.4,top=5": False,
    "topk": False,
}  # fmt: skip


@pytest.mark.parametrize(("spec", "same"), SPECS.items(), ids=SPECS)
def test_a_cache_is_what_a_spec_asks_for(rows: Tensor, spec: str, same: bool) -> None:
    assert is_encoding(spec, KltTop.fit(rows, step=1.5, top=5)) == same


def test_a_step_is_remembered_though_it_is_kept_in_single_precision(rows: Tensor) -> None:
    coding = fit_encoding("klt:step=0.3", rows, torch.zeros(600).long())

    assert is_encoding("klt:step=0.3", coding)
    assert not is_encoding("klt:step=0.31", coding)


def test_it_takes_fewer_bytes_than_klt_at_the_same_kl() -> None:
    rows = head_rows(4000, 60, 40)
    labels = rows.argmax(1)
    refined = KltTop.fit(rows)
    at = measure(refined, rows, labels)

    plain = fit_encoding("klt", rows, labels, {1.0: at.mean_kl[0], 4.0: at.mean_kl[2]})

    assert row_bytes_on_disk(refined, rows, labels) < 0.8 * row_bytes_on_disk(plain, rows, labels)


OF_MANY_CLASSES = """
import resource
import torch
from stages.cache.encoding import fit_encoding, measure

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10

draw = torch.Generator().manual_seed(0)
head = torch.randn(64, 21_841, generator=draw)
rows = torch.randn(600, 64, generator=draw) @ head * 0.5
labels, before = rows.argmax(1), peak()
coding = fit_encoding("klt-top", rows, labels)
found = measure(coding, rows, labels)
arrays = {name: array[:64] for name, array in coding.encode(rows, labels).items()}
student = torch.zeros(64, 21_841, requires_grad=True)
target = torch.softmax(coding.decode(arrays) / 4, 1)
(-target * torch.log_softmax(student / 4, 1)).sum().backward()
assert student.grad.isfinite().all()
print(peak() - before, found.mean_kl[2], found.top1_agreement)
"""


@pytest.mark.slow
def test_rows_of_21_841_classes_take_bounded_memory() -> None:
    """Calibrated, encoded, decoded and learned from, in a process of its own."""
    command = [sys.executable, "-c", OF_MANY_CLASSES]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    grown, kl, top1 = map(float, said.split())

    assert grown < 20 * 600 * 21_841 * 4  # a square basis would take 1.9 GB
    assert kl <= DEFAULT_BUDGET[4.0]
    assert top1 == 1
