"""`klt-anchored` against whole numbers added by loops, and its regression without each row."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from whole_numbers import Whole, any_arrays, assert_exact, codes_of, digits, refined, whole

from stages.cache.encoding import (
    DEFAULT_BUDGET,
    EncodingAttributes,
    encoding_attributes,
    fit_encoding,
    is_encoding,
    measure_all,
    ranking,
    restored,
    row_bytes_on_disk,
    views_to_fit,
)
from stages.cache.encoding.base import PLAIN_BUDGET
from stages.cache.encoding.fidelity import compare, mean_kl
from stages.cache.encoding.klt import Klt
from stages.cache.encoding.klt_anchored import KltAnchored, _regression
from stages.cache.encoding.klt_top import KltTop
from stages.errors import CacheError
from stages.training.graphs import NoWaits

CLASSES = 24
SURE = 100 * torch.eye(CLASSES)[3]


def view_rows(
    view: int, count: int = 300, classes: int = CLASSES, features: int = 16, apart: float = 0.25
) -> Tensor:
    """float32 (n, C): logits of a linear head on features that views have in common, but for some.

    apart: the share of a view's own, of the standard deviation.
    """
    head = torch.Generator().manual_seed(1000)
    weight = torch.randn(features, classes, generator=head)
    scale = 3.0 / torch.arange(1, features + 1).sqrt()
    common, own = (torch.Generator().manual_seed(seed) for seed in (7, 100 + view))
    shown = torch.randn(count, features, generator=common)
    shown = shown + apart * torch.randn(count, features, generator=own)
    return shown * scale @ weight + torch.randn(classes, generator=head)


def in_whole_numbers(coding: KltAnchored, arrays: dict[str, Tensor]) -> Whole:
    """The integers of rows of another view, (n, C)."""
    anchor, others, rows = coding.anchor, coding.others, []
    predictor, basis, mean = map(whole, (coding.predictor, others.basis, others.mean))
    for i, prediction in enumerate(arrays["prediction"].long().tolist()):
        there = int(arrays["anchor_prediction"][i])
        z = mean + codes_of(arrays, "anchor", i, anchor.center[there]) @ predictor
        z = z + codes_of(arrays, "logits", i, others.center[prediction]) @ basis
        refined(others, z, prediction, digits(arrays["logits_top"][i], "top"))
        rows.append(z)
    return np.stack(rows)


def beside(coding: KltAnchored, first: Tensor, other: Tensor) -> dict[str, Tensor]:
    return coding.encode_beside(coding.as_anchor(coding.encode(first)), other)


FITTED = KltAnchored.fit(view_rows(0, 300), second=view_rows(1, 300))


@pytest.fixture(scope="module")
def views() -> list[Tensor]:
    return [view_rows(view) for view in range(3)]


@pytest.fixture(scope="module", params=[{}, {"step": 0.5, "top": 3}, {"step": 6.0}], ids=str)
def coding(views: list[Tensor], request: pytest.FixtureRequest) -> KltAnchored:
    return KltAnchored.fit(views[0], second=views[1], **request.param)


def test_a_row_is_whole_numbers(coding: KltAnchored, views: list[Tensor]) -> None:
    arrays = beside(coding, views[0][:100], views[2][:100])
    found = coding.decode(arrays)
    assert_exact(coding.others, in_whole_numbers(coding, arrays), arrays, found)
    assert torch.equal(found.argmax(1), views[2][:100].argmax(1))
    first = coding.encode(views[0])
    assert torch.equal(coding.decode(first).argmax(1), views[0].argmax(1))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), extreme=st.booleans())
def test_any_codes_are_exact(seed: int, extreme: bool) -> None:
    arrays = any_arrays(FITTED, CLASSES, seed, extreme, rows=5)
    arrays["anchor_prediction"] = arrays["prediction"].flip(0)
    exact = in_whole_numbers(FITTED, arrays)
    assert_exact(FITTED.others, exact, arrays, FITTED.decode(arrays))


def test_as_on_a_device_it_decodes_the_same_and_asks_nothing_of_the_host(
    coding: KltAnchored, views: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = coding.encode(views[0]), beside(coding, views[0], views[1])
    plain = [coding.decode(arrays) for arrays in both]
    monkeypatch.setattr(ranking, "largest_on_host", ranking.largest)
    moved = coding.to(torch.device("cpu"))

    with NoWaits():
        found = [moved.decode(arrays) for arrays in both]

    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, plain, map(coding.decode, both)))
    assert all(map(torch.equal, plain, found))


# ---- calibration ----------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "features"), [(40, 6), (12, 30)])
def test_what_is_left_of_a_row_is_by_all_others(count: int, features: int) -> None:
    """The same ridge regression again without each row, also of fewer rows than features."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-9, 10, (count, features), generator=generator).float()
    rows = torch.randn(count, 5, generator=generator) + 4.0

    weights, predicted = _regression(codes, rows)

    x, y = codes.double().numpy(), rows.double().numpy()
    y = y - y.mean(1, keepdims=True)
    centred = x - x.mean(0)
    ridge = max(1.0, 1e-3 * float((centred**2).sum(0).mean())) * np.eye(features)
    whole = np.linalg.solve(centred.T @ centred + ridge, centred.T @ (y - y.mean(0)))
    np.testing.assert_allclose(weights.numpy(), whole, rtol=1e-4, atol=1e-5)
    constant = y.mean(0) - x.mean(0) @ whole
    for i in range(count):
        kept = np.arange(count) != i
        a, b = x[kept] - x[kept].mean(0), y[kept]
        again = np.linalg.solve(a.T @ a + ridge, a.T @ (b - b.mean(0)))
        expected = b.mean(0) + (x[i] - x[kept].mean(0)) @ again
        np.testing.assert_allclose(predicted[i].numpy() + constant, expected, rtol=0, atol=1e-4)


ODD = {
    "three-samples": (view_rows(0, 3), view_rows(1, 3)),
    "one-sample": (view_rows(0, 1), view_rows(1, 1)),
    "zeros": (torch.zeros(50, 9), torch.zeros(50, 9)),
    "constant-rows": (view_rows(0)[:, :1].expand(-1, 9), view_rows(1)[:, :1].expand(-1, 9)),
    "all-the-same": (view_rows(0, 1).expand(50, -1), view_rows(1, 1).expand(50, -1)),
    "only-the-first-constant": (torch.zeros(300, CLASSES), view_rows(1, 300)),
    "the-same-view": (view_rows(0, 300), view_rows(0, 300)),
    "nothing-in-common": (view_rows(0, 300), view_rows(1, 300).flip(0)),
    "two-classes": (view_rows(0, 200, 2, 3), view_rows(1, 200, 2, 3)),
    "one-class-is-always-right": (view_rows(0) + SURE, view_rows(1) + SURE),
    "low-rank": (view_rows(0, 400, features=2), view_rows(1, 400, features=2)),
    "fewer-rows-than-codes": (view_rows(0, 15, 40, 60), view_rows(1, 15, 40, 60)),
    "far-off": (view_rows(0, 300) + 1e4, view_rows(1, 300) - 1e4),
}


@pytest.mark.parametrize(("first", "second"), ODD.values(), ids=ODD)
def test_odd_teachers_are_held(first: Tensor, second: Tensor) -> None:
    """By klt and klt-top as well, which see one view."""
    coding = KltAnchored.fit(first, second=second)
    refined, plain = KltTop.fit(second), Klt.fit(second)
    for made, rows, arrays in (
        (coding, first, coding.encode(first)),
        (coding, second, beside(coding, first, second)),
        (refined, second, refined.encode(second)),
    ):
        assert compare(made, rows, arrays).holds(DEFAULT_BUDGET)
        assert torch.equal(made.decode(arrays).argmax(1), rows.argmax(1))
    assert compare(plain, second, plain.encode(second)).holds(PLAIN_BUDGET)
    basis = plain.basis.double()
    identity = torch.eye(len(basis)).double()
    torch.testing.assert_close(basis @ basis.T, identity, rtol=0, atol=1e-6)
    unseen = view_rows(2, len(first), first.shape[1], 30) * 10
    for made, arrays in (
        (coding, beside(coding, unseen, unseen.flip(0))),
        (refined, refined.encode(unseen)),
        (plain, plain.encode(unseen)),
    ):
        assert bool(torch.isfinite(made.decode(arrays)).all())


@pytest.mark.parametrize("budget", [None, {1.0: 1e-3}, {1.0: 0.1, 4.0: 2e-3, 10.0: 1e-3}])
def test_a_budget_is_held_on_views_that_were_not_seen(
    views: list[Tensor], budget: dict[float, float] | None
) -> None:
    coding = KltAnchored.fit(views[0], budget, second=views[1])
    budget = budget or dict(DEFAULT_BUDGET)
    for other in views[1:]:
        decoded = coding.decode(beside(coding, views[0], other))
        assert all(float(mean_kl(other, decoded, t)) <= 1.1 * kl for t, kl in budget.items())


def test_rows_that_were_not_seen_are_held_where_few_were() -> None:
    """Of 100 rows with 60 codes each, what is left after regression looks small by itself."""
    first, second = view_rows(0, 600, 40, 60), view_rows(1, 600, 40, 60)
    coding, alone = (KltAnchored.fit(first[:100], second=second[:100]), KltTop.fit(first[:100]))
    first, second = first[100:], second[100:]
    found = compare(coding, second, beside(coding, first, second))
    plain = compare(alone, second, alone.encode(second))
    assert found.saturated <= plain.saturated + 5
    assert (found.known_kl(4.0) or 0) <= 1.3 * (plain.known_kl(4.0) or 0)


def test_it_takes_fewer_bytes_than_klt_top_at_the_same_kl() -> None:
    first, second = view_rows(0, 1000, 60, 40), view_rows(1, 1000, 60, 40)
    labels = first.argmax(1)
    refined_alone, anchored = (
        fit_encoding(name, first, labels, {4.0: 8e-3}, second)
        for name in ("klt-top", "klt-anchored")
    )

    def size(views: int) -> float:
        return row_bytes_on_disk(anchored, first, labels, second, views)

    assert size(8) < 0.8 * row_bytes_on_disk(refined_alone, first, labels)
    assert size(162) < size(8) < size(2)
    assert size(1) == row_bytes_on_disk(anchored.anchor, first, labels)  # type: ignore[attr-defined]


def test_auto_never_takes_it_and_a_plan_measures_it(views: list[Tensor]) -> None:
    labels = views[0].argmax(1)
    found = {m.coding.name: m for m in measure_all(*views[:1], labels, None, None, views[1], 8)}
    assert found["klt-anchored"].row_bytes < found["klt-top"].row_bytes
    assert found["klt-anchored"].fidelity.holds(DEFAULT_BUDGET)
    for budget in (None, {4.0: 8e-3}):
        chosen = fit_encoding("auto", views[0], labels, budget, views[1])
        assert chosen.name not in ("klt-anchored", "auto")


@pytest.mark.parametrize(
    ("second", "given", "words"),
    [
        (None, {}, "one view"),
        (view_rows(1), {"step": 0.0}, "step"),
        (view_rows(1), {"step": float("nan")}, "step"),
        (view_rows(1), {"top": 25}, "24 classes"),
        (view_rows(1).log(), {}, "does not fit"),
        (-view_rows(1).exp(), {}, "no step"),
    ],
    ids=["no-second-view", "step", "step-nan", "top", "not-finite", "no-step"],
)
def test_what_cannot_be_is_told(
    views: list[Tensor], second: Tensor | None, given: dict[str, float], words: str
) -> None:
    with pytest.raises(CacheError, match=words) as told:
        KltAnchored.fit(views[0], second=second, **given)
    assert str(told.value).count("\n") <= 2
    assert told.value.remedy


@pytest.mark.parametrize(
    ("spec", "views", "fitted"),
    [("klt-anchored", 2, (0, 1)), ("klt-anchored:top=4", 9, (0, 1)), ("klt-anchored", 1, (0,)),
     ("klt-top", 9, (0,)), ("auto", 9, (0,))],
)  # fmt: skip
def test_the_views_that_are_fitted(spec: str, views: int, fitted: tuple[int, ...]) -> None:
    assert views_to_fit(spec, views) == fitted


# ---- in a store -----------------------------------------------------------------------------


def known(coding: KltAnchored, **change: Any) -> EncodingAttributes:
    attributes = encoding_attributes(coding)
    changed = {**attributes, "parameters": {**attributes["parameters"], **change}}
    return msgspec.convert(changed, EncodingAttributes)


def test_it_comes_back_from_what_is_stored(coding: KltAnchored, views: list[Tensor]) -> None:
    again = restored(known(coding), CLASSES, coding.calibration().__getitem__)
    arrays = beside(coding, views[0], views[1])
    assert torch.equal(again.decode(arrays), coding.decode(arrays))
    assert is_encoding(f"klt-anchored:step={coding.others.step!r}", again)
    assert not is_encoding("klt-anchored:step=0.123", again)
    assert not is_encoding("klt-top", again)


@pytest.mark.parametrize(
    "change",
    [{"step": None}, {"anchor_step": "1"}, {"anchor_top": 25}, {"anchor_wide": 99}, {"pair": 9}],
    ids=str,
)
def test_damaged_parameters_are_told(change: dict[str, Any]) -> None:
    with pytest.raises(CacheError):
        restored(known(FITTED, **change), CLASSES, FITTED.calibration().__getitem__)


def test_a_damaged_predictor_is_told() -> None:
    for damaged in (FITTED.predictor[1:], FITTED.predictor + 1):
        calibration = {**FITTED.calibration(), "klt_predictor": damaged}
        with pytest.raises(CacheError):
            restored(known(FITTED), CLASSES, calibration.__getitem__)
