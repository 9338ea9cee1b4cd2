"""`klt-top` against whole numbers in NumPy: the same bits whatever adds them, in any order."""

import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from whole_numbers import Whole, any_arrays, assert_exact, codes_of, digits, refined, whole

from stages.cache.encoding import (
    DEFAULT_BUDGET,
    EncodingAttributes,
    encoding_attributes,
    fit_encoding,
    is_encoding,
    measure,
    ranking,
    restored,
    row_bytes_on_disk,
)
from stages.cache.encoding.klt import Klt
from stages.cache.encoding.klt_basis import Rows
from stages.cache.encoding.klt_top import KltTop
from stages.cache.encoding.packing import FIVES, PAIRS, THREES, Packing
from stages.errors import CacheError
from stages.training.graphs import NoWaits


def head_rows(count: int, classes: int, features: int, seed: int = 0) -> Tensor:
    """float32 (n, C): logits of a linear head, of no higher rank than it has features (and 1)."""
    generator = torch.Generator().manual_seed(1000)
    weight = torch.randn(features, classes, generator=generator)
    bias = torch.randn(classes, generator=generator)
    generator.manual_seed(seed)
    scale = 3.0 / torch.arange(1, features + 1).sqrt()
    return torch.randn(count, features, generator=generator) * scale @ weight + bias


def in_whole_numbers(coding: KltTop, arrays: dict[str, Tensor]) -> tuple[Whole, list[list[int]]]:
    """The integers of rows, (n, C), and the refined classes of each."""
    basis, mean = whole(coding.basis), whole(coding.mean)
    rows, leading = [], []
    for i, prediction in enumerate(arrays["prediction"].long().tolist()):
        rows.append(mean + codes_of(arrays, "logits", i, coding.center[prediction]) @ basis)
        errors = digits(arrays["logits_top"][i], "top")
        leading.append(refined(coding, rows[-1], prediction, errors))
    return np.stack(rows), leading


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return head_rows(300, 24, 16)


@pytest.fixture(scope="module", params=[(None, None), (0.4, 3), (6.0, 5), (2.5, 24)], ids=str)
def coding(rows: Tensor, request: pytest.FixtureRequest) -> KltTop:
    step, top = request.param
    given = {} if step is None else {"step": step, "top": top}
    return KltTop.fit(rows, **given)


def test_a_row_is_whole_numbers(coding: KltTop, rows: Tensor) -> None:
    arrays = coding.encode(rows[:100])
    found = coding.decode(arrays)
    assert_exact(coding, in_whole_numbers(coding, arrays)[0], arrays, found)
    assert torch.equal(found.argmax(1), rows[:100].argmax(1))


def test_whatever_adds_the_bits_are_the_same(
    coding: KltTop, rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order, in one product or many, in other precision; as on a device, where the
    host is asked for nothing.
    """
    arrays = coding.encode(rows)
    plain, product = coding.decode(arrays), torch.addmm

    def one_by_one(mean: Tensor, codes: Tensor, basis: Tensor) -> Tensor:
        order = torch.randperm(len(basis), generator=torch.Generator().manual_seed(5))
        return sum((codes[:, j, None] * basis[j] for j in order.tolist()), torch.zeros(())) + mean

    def in_double(mean: Tensor, codes: Tensor, basis: Tensor) -> Tensor:
        return product(mean.double(), codes.double(), basis.double()).float()

    for add in (one_by_one, in_double):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "addmm", add)
            assert torch.equal(coding.decode(arrays), plain)
    alone = torch.cat([coding.decode({n: a[i : i + 1] for n, a in arrays.items()}) for i in (0, 7)])
    assert torch.equal(alone, plain[[0, 7]])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(coding.decode(arrays), plain)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(coding.decode(arrays), plain)
    finally:
        torch.set_float32_matmul_precision(before)
    monkeypatch.setattr(ranking, "largest_on_host", ranking.largest)
    with NoWaits() as called:
        found = coding.to(torch.device("cpu")).decode(arrays)
    assert torch.equal(found, plain)
    assert "topk.default" in {name for name, _ in called.operations}


def test_any_codes_are_exact(coding: KltTop) -> None:
    arrays = any_arrays(coding, 24, seed=2, extreme=True, rows=100)
    assert_exact(coding, in_whole_numbers(coding, arrays)[0], arrays, coding.decode(arrays))


@pytest.mark.parametrize("given", [None, 0, 23])
def test_the_stored_prediction_decodes_to_the_argmax(
    coding: KltTop, rows: Tensor, given: int | None
) -> None:
    """Also one that is not the argmax: of a sample that the teacher has not seen."""
    asked = None if given is None else torch.full((300,), given)
    decoded = coding.decode(coding.encode(rows, predictions=asked))
    assert torch.equal(decoded.argmax(1), rows.argmax(1) if asked is None else asked)
    first, second = decoded.topk(2, dim=1).values.T
    assert bool((first - second >= 0.9 * coding.margin * coding.unit).all())


def test_classes_that_are_equal_to_the_prediction_stay_below_it(coding: KltTop) -> None:
    for tied in (torch.zeros(3, 24), torch.full((3, 24), -7.5)):
        decoded = coding.decode(coding.encode(tied))
        assert decoded.argmax(1).tolist() == [0, 0, 0]  # as argmax has it
        assert bool(torch.isfinite(decoded).all())


# ---- calibration ----------------------------------------------------------------------------


def test_where_no_step_is_fine_enough_auto_takes_plain_klt(rows: Tensor) -> None:
    """One row far beyond all others asks for codes of two bytes."""
    odd = torch.cat([head_rows(300, 20, 5), 200 * head_rows(1, 20, 5)])
    broken = rows.clone()
    broken[3, 4] = torch.nan
    for cannot, budget in ((odd, DEFAULT_BUDGET), (broken, DEFAULT_BUDGET), (rows, {4.0: 1e-13})):
        with pytest.raises(CacheError) as caught:
            KltTop.fit(cannot, budget)
        assert caught.value.remedy

    coding = fit_encoding("auto", odd, odd.argmax(1))

    assert coding.name == "klt"
    assert measure(coding, odd, odd.argmax(1)).holds({1.0: 5e-3})


@pytest.mark.parametrize("budget", [{1.0: 1e-3}, {4.0: 1e-3}, {1.0: 0.1, 4.0: 2e-3, 10.0: 1e-3}])
def test_every_part_of_a_budget_is_held(rows: Tensor, budget: dict[float, float]) -> None:
    coding, labels = KltTop.fit(rows, budget), torch.zeros(300).long()
    assert measure(coding, rows, labels).holds(budget)
    assert not measure(KltTop.fit(rows, step=1.1 * coding.step), rows, labels).holds(budget)


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


# ---- a few codes in a byte ------------------------------------------------------------------


@pytest.mark.parametrize("packing", [PAIRS, THREES, FIVES], ids=str)
@pytest.mark.parametrize("count", [1, 4, 5, 30])
def test_codes_come_back_from_their_bytes(packing: Packing, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(-packing.limit, packing.limit + 1, (50, count), generator=generator)
    for given, expected in ((codes, codes), (codes * 99, codes.sign() * packing.limit)):
        packed = packing.pack(given)

        assert packed.dtype == torch.uint8
        assert packed.shape == (50, -(-count // packing.digits))
        found = packing.unpack(packed, packing.table())
        assert torch.equal(found[:, :count].long(), expected)
        assert not found[:, count:].any()


# ---- in a store -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        *({"step": None}, {"top": 0}, {"top": 25}, {"top": "8"}, {"fine": 0}, {"wide": -1}),
        *({"pair": 99}, {"unit": True}, {"five": 1.5}),
    ],
    ids=str,
)
def test_damaged_parameters_are_told(rows: Tensor, change: dict[str, Any]) -> None:
    coding = KltTop.fit(rows, step=2.0)
    known = encoding_attributes(coding)
    changed = {**known, "parameters": {**known["parameters"], **change}}
    with pytest.raises(CacheError):
        restored(msgspec.convert(changed, EncodingAttributes), 24, coding.calibration().__getitem__)


SPECS = {
    "auto": True, "klt-top": True, "klt:top=5": True, "klt-top:top=5": True,
    "klt:step=1.5,top=5": True, "klt-top:step=1.5": True,
    "klt": False, "klt:top=4": False, "klt:step=1.5": False, "klt:step=1.4,top=5": False,
    "topk": False,
}  # fmt: skip


@pytest.mark.parametrize(("spec", "same"), SPECS.items(), ids=SPECS)
def test_a_cache_is_what_a_spec_asks_for(rows: Tensor, spec: str, same: bool) -> None:
    assert is_encoding(spec, KltTop.fit(rows, step=1.5, top=5)) == same
    # a step is remembered though it is kept in single precision
    assert is_encoding("klt:step=0.3", Klt.fit(rows, step=0.3))


def test_it_takes_fewer_bytes_than_klt_at_the_same_kl() -> None:
    rows = head_rows(2000, 60, 40)
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
