import errno
import itertools
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import msgspec
import numpy as np
import pytest
import torch
import zarr
from helpers import Words
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.blocks import BlockGroup
from stages.cache.metadata import sealed
from stages.cache_teacher import cache_teacher, prepare
from stages.data import Splits
from stages.errors import CacheError, ConfigError
from stages.objectives.rectification import replaced_logits
from stages.rectify import rectify, rectify_rows, settings_of
from stages.settings import CacheConfig, Method, RectifyConfig, Space
from stages.tally import Tally

METHODS: tuple[Method, ...] = ("pairwise", "swap", "blend")
SPACES: tuple[Space, ...] = ("probability-T", "probability-1", "logit")
Row = list[float]
Numbers = dict[str, np.ndarray[Any, Any]]


# ---- the truth: one row at a time, in Python ------------------------------------------------


def softmax(row: Row, temperature: float = 1.0) -> Row:
    top = max(row)
    weights = [math.exp((z - top) / temperature) for z in row]
    return [w / sum(weights) for w in weights]


def rectified(row: Row, label: int, predicted: int, method: str) -> Row:
    """`calibrate3` as released: half a step to the one-hot target, then the sum of the two."""
    if label == predicted:
        return list(row)
    new = list(row)
    if method == "swap":
        new[label], new[predicted] = row[predicted], row[label]
    elif method == "blend":
        new = [(p + (c == label)) / 2 for c, p in enumerate(row)]
    else:
        pair = row[label] + row[predicted]
        a, b = (row[label] + 1) / 2, row[predicted] / 2
        new[label], new[predicted] = a * pair / (a + b), b * pair / (a + b)
    return new


def rectified_distribution(
    row: Row, label: int, predicted: int, config: RectifyConfig, temperature: float
) -> Row:
    """What a student should see at `temperature`."""
    if config.space == "logit":
        return softmax(rectified(row, label, predicted, config.method), temperature)
    if config.space == "probability-1":
        powers = [
            p ** (1 / temperature) for p in rectified(softmax(row), label, predicted, config.method)
        ]
        return [p / sum(powers) for p in powers]
    return rectified(softmax(row, temperature), label, predicted, config.method)


def argmax(row: Row) -> int:
    return row.index(max(row))


# ---- rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "label", "expected"),
    [
        pytest.param(
            [0, 0.2, 0.3, 0.02, 0.48], 0, [0.3243, 0.2, 0.3, 0.02, 0.1557], id="label-at-zero"
        ),
        pytest.param(
            [0.45, 0.10, 0.15, 0.25, 0.05], 1, [0.1597, 0.3903, 0.15, 0.25, 0.05], id="label-second"
        ),
    ],
)
def test_the_authors_worked_example(row: Row, label: int, expected: Row) -> None:
    new = rectify_rows(torch.tensor([row]), torch.tensor([label]), "pairwise")

    torch.testing.assert_close(new, torch.tensor([expected]), rtol=0, atol=1e-4)
    assert float(new.sum()) == pytest.approx(1, abs=1e-6)


@st.composite
def cases(draw: st.DrawFn, largest: float = 30.0) -> tuple[Tensor, Tensor]:
    """float64 logits (n, C) without ties, and labels (n,): some right, some wrong."""
    n, classes = draw(st.integers(1, 12)), draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.floats(0.01, largest / 4))
    logits = (torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale).clamp(
        -largest, largest
    )
    labels = torch.randint(classes, (n,), generator=generator)
    right = torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return logits, torch.where(right, logits.argmax(1), labels)


@given(cases(), st.sampled_from(METHODS), st.sampled_from([1.0, 4.0]))
def test_rows_equal_the_loop_over_rows(
    case: tuple[Tensor, Tensor], method: Method, temperature: float
) -> None:
    logits, labels = case
    probabilities = (logits / temperature).softmax(1)

    new = rectify_rows(probabilities, labels, method)

    expected = [
        rectified(row, label, argmax(row), method)
        for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True)
    ]
    torch.testing.assert_close(new, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@given(cases(), st.sampled_from(METHODS), st.sampled_from([torch.float32, torch.float64]))
def test_what_holds_for_every_rectified_row(
    case: tuple[Tensor, Tensor], method: Method, dtype: torch.dtype
) -> None:
    logits, labels = case
    probabilities = logits.to(dtype).softmax(1)
    predicted = probabilities.argmax(1)
    wrong = predicted != labels

    new = rectify_rows(probabilities, labels, method)

    assert new.dtype == dtype
    torch.testing.assert_close(new.sum(1), torch.ones(len(new), dtype=dtype), rtol=0, atol=1e-5)
    assert torch.equal(new[~wrong], probabilities[~wrong])
    assert bool((new >= 0).all())
    for row, old, label, top in zip(
        new[wrong], probabilities[wrong], labels[wrong], predicted[wrong], strict=True
    ):
        if method == "swap":
            assert (row[label], row[top]) == (old[top], old[label])
        if method == "pairwise":
            assert row[label] >= row[top]
            if old[top] < 1 - 1e-6:  # beyond that the difference is below float32's resolution
                assert row[label] > row[top]
        others = [c for c in range(len(row)) if c not in (int(label), int(top))]
        factor = 0.5 if method == "blend" else 1.0
        assert torch.equal(row[others], old[others] * factor)


def test_predictions_that_are_given_decide() -> None:
    rows = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])

    new = rectify_rows(rows, torch.tensor([2, 1]), "swap", predictions=torch.tensor([1, 1]))

    assert torch.equal(new, torch.tensor([[0.5, 0.2, 0.3], [0.5, 0.3, 0.2]]))


# ---- the two logits that are kept -----------------------------------------------------------


def wrong_rows(case: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """float32 logits, labels, predictions: every row is wrong."""
    logits, labels = case[0].float(), case[1]
    predictions = logits.argmax(1)
    return (
        logits,
        torch.where(labels == predictions, (labels + 1) % logits.shape[1], labels),
        (predictions),
    )


def put_in(logits: Tensor, labels: Tensor, predictions: Tensor, config: RectifyConfig) -> Tensor:
    """The rows with the two replaced logits in their places, float64."""
    new_label, new_predicted = replaced_logits(
        logits, labels, predictions, config.method, config.space, config.temperature
    )
    assert new_label.dtype == new_predicted.dtype == torch.float32
    rows = logits.double().clone()
    for i, (label, predicted) in enumerate(zip(labels, predictions, strict=True)):
        rows[i, label], rows[i, predicted] = new_label[i].double(), new_predicted[i].double()
    return rows


@given(cases(largest=12.0), st.sampled_from(METHODS), st.sampled_from([1.0, 2.0, 4.0, 8.0]))
def test_replaced_logits_make_the_rectified_distribution(
    case: tuple[Tensor, Tensor], method: Method, temperature: float
) -> None:
    config = RectifyConfig(method=method, temperature=temperature)
    logits, labels, predictions = wrong_rows(case)

    rows = put_in(logits, labels, predictions, config)

    for i, row in enumerate(logits.double().tolist()):
        expected = rectified_distribution(
            row, int(labels[i]), int(predictions[i]), config, temperature
        )
        assert softmax(rows[i].tolist(), temperature) == pytest.approx(expected, rel=2e-5, abs=1e-9)


@given(
    cases(largest=12.0),
    st.sampled_from(METHODS),
    st.sampled_from([1.0, 4.0]),
    st.sampled_from([0.5, 1.0, 2.0, 4.0, 8.0]),
)
def test_probability_1_may_be_softened_to_any_temperature(
    case: tuple[Tensor, Tensor], method: Method, made_at: float, temperature: float
) -> None:
    config = RectifyConfig(method=method, space="probability-1", temperature=made_at)
    logits, labels, predictions = wrong_rows(case)

    rows = put_in(logits, labels, predictions, config)

    assert settings_of(config).temperature_free
    for i, row in enumerate(logits.double().tolist()):
        expected = rectified_distribution(
            row, int(labels[i]), int(predictions[i]), config, temperature
        )
        assert softmax(rows[i].tolist(), temperature) == pytest.approx(expected, rel=5e-5, abs=1e-9)


@given(case=cases(), space=st.sampled_from(SPACES), temperature=st.sampled_from([1.0, 4.0]))
def test_swapping_logits_is_swapping_probabilities(
    case: tuple[Tensor, Tensor], space: Space, temperature: float
) -> None:
    config = RectifyConfig(method="swap", space=space, temperature=temperature)
    logits, labels, predictions = wrong_rows(case)

    new_label, new_predicted = replaced_logits(
        logits, labels, predictions, config.method, config.space, config.temperature
    )

    every = range(len(logits))
    assert new_label.tolist() == [float(logits[i, predictions[i]]) for i in every]
    assert new_predicted.tolist() == [float(logits[i, labels[i]]) for i in every]
    assert settings_of(config).temperature_free
    torch.testing.assert_close(
        (put_in(logits, labels, predictions, config) / temperature).softmax(1),
        rectify_rows((logits.double() / temperature).softmax(1), labels, "swap", predictions),
    )


@given(case=cases(largest=12.0))
def test_the_logit_space_is_the_released_formula(case: tuple[Tensor, Tensor]) -> None:
    config = RectifyConfig(space="logit")
    logits, labels, predictions = wrong_rows(case)

    new_label, new_predicted = replaced_logits(
        logits, labels, predictions, config.method, config.space, config.temperature
    )

    for i, row in enumerate(logits.double().tolist()):
        label, predicted = int(labels[i]), int(predictions[i])
        if abs(row[label] + row[predicted] + 1) < 1e-2:
            continue  # the released formula divides by nearly nothing here
        expected = rectified(row, label, predicted, "pairwise")
        assert float(new_label[i]) == pytest.approx(expected[label], rel=1e-5, abs=1e-6)
        assert float(new_predicted[i]) == pytest.approx(expected[predicted], rel=1e-5, abs=1e-6)


EXTREME = torch.tensor(
    [
        [200.0, -200.0, 0.0, 199.0],
        [-200.0, 200.0, -200.0, -200.0],
        [200.0, 200.0, 200.0, 199.0],
        [-200.0, -200.0, -200.0, -199.0],
        [0.0, -1.0, -3.0, -4.0],  # with label 1 the pair's sum is -1: the logit space's pole
    ]
)


@pytest.mark.parametrize(
    ("method", "space"),
    [(m, s) for m, s in itertools.product(METHODS, SPACES) if (m, s) != ("blend", "logit")],
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_extreme_logits_stay_finite(method: Method, space: Space, temperature: float) -> None:
    config = RectifyConfig(method=method, space=space, temperature=temperature)
    predictions = EXTREME.argmax(1)
    for label in range(4):
        at = predictions != label
        labels = torch.full((int(at.sum()),), label)

        rows = put_in(EXTREME[at], labels, predictions[at], config)

        assert bool(torch.isfinite(rows).all())
        assert bool(torch.isfinite((rows / temperature).log_softmax(1)).all())


@pytest.mark.parametrize(
    ("method", "space"), [("pairwise", "probability-T"), ("blend", "probability-1")]
)
def test_an_offset_of_a_row_is_an_offset_of_what_is_replaced(method: Method, space: Space) -> None:
    """To the last digit that float32 has beside 10,000: half a step of 2^-10."""
    config = RectifyConfig(method=method, space=space, temperature=3.0)
    logits = (torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) * 768).round() / 256
    labels, predictions = (logits.argsort(1, descending=True)[:, place] for place in (2, 0))
    plain, moved = (
        replaced_logits(z, labels, predictions, method, space, config.temperature)
        for z in (logits, logits + 1e4)
    )
    for near, far in zip(plain, moved, strict=True):
        torch.testing.assert_close(far.double() - 1e4, near.double(), atol=2**-11 + 1e-5, rtol=0)


def test_blend_is_refused_in_the_logit_space() -> None:
    with pytest.raises(ConfigError, match="not defined for the method 'blend'"):
        RectifyConfig(method="blend", space="logit")


@pytest.mark.parametrize("temperature", [0.0, -4.0, math.inf, math.nan])
def test_temperatures_are_positive(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature must be in"):
        RectifyConfig(temperature=temperature)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (RectifyConfig(), "pairwise-T4"),
        (RectifyConfig(method="swap", temperature=2.5), "swap-T2.5"),
        (RectifyConfig(space="probability-1"), "pairwise-T4-probability-1"),
        (RectifyConfig(space="logit", temperature=1), "pairwise-T1-logit"),
        (RectifyConfig(name="mine"), "mine"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_default_names(config: RectifyConfig, name: str) -> None:
    assert config.chosen_name == name


# ---- a whole cache --------------------------------------------------------------------------


def numbers(store: Path, group: str = "") -> Numbers:
    """Every array of a group, read by zarr alone."""
    found = zarr.open_group(store / group, mode="r")
    return {name: np.asarray(array[:]) for name, array in found.arrays()}


CONFIGS = {
    config.chosen_name: config
    for config in (
        RectifyConfig(),
        RectifyConfig(temperature=1.0),
        RectifyConfig(method="swap"),
        RectifyConfig(method="blend", temperature=2.0),
        RectifyConfig(space="probability-1"),
        RectifyConfig(space="logit"),
    )
}


@pytest.fixture(scope="module")
def side_by_side(finished_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache with all of CONFIGS."""
    path = tmp_path_factory.mktemp("rectified") / "digits.zarr"
    shutil.copytree(finished_cache, path)
    for config in CONFIGS.values():
        rectify(path, config)
    return path


def test_rectifications_lie_side_by_side(side_by_side: Path, finished_cache: Path) -> None:
    assert LogitCache.open(side_by_side).rectifications == sorted(CONFIGS)
    before, after = numbers(finished_cache), numbers(side_by_side)
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_and_zeros_follow_the_stored_predictions(side_by_side: Path, name: str) -> None:
    root, ours = numbers(side_by_side), numbers(side_by_side, f"rectified/{name}")

    wrong = root["prediction"].astype(int) != root["label"][None]

    assert ours.keys() == {"wrong", "label_logit", "predicted_logit"}
    assert np.array_equal(ours["wrong"], wrong)
    assert 0.1 < wrong.mean() < 0.95
    assert not np.array_equal(wrong[0], wrong[1])
    for key in ("label_logit", "predicted_logit"):
        assert ours[key].dtype == np.float32
        assert not ours[key][~wrong].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_distribution_is_the_rectified_softmax(side_by_side: Path, name: str) -> None:
    config, root = CONFIGS[name], numbers(side_by_side)
    cache = LogitCache.open(side_by_side)
    free = settings_of(config).temperature_free

    for view, temperature in [(0, config.temperature), (2, 2.0 if free else config.temperature)]:
        found = cache.distribution(view, rectified=name, temperature=temperature)
        assert (found.shape, found.dtype) == ((1000, 10), torch.float32)
        for row in range(0, 1000, 7):
            expected = rectified_distribution(
                root["logits"][view, row].astype(float).tolist(),
                int(root["label"][row]),
                int(root["prediction"][view, row]),
                config,
                temperature,
            )
            sample = int(root["dataset_index"][row])
            assert found[sample].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_distribution_of_another_temperature_is_refused(side_by_side: Path) -> None:
    with pytest.raises(CacheError, match="belongs to temperature 4, not 2") as caught:
        LogitCache.open(side_by_side).distribution(0, "pairwise-T4", temperature=2)
    assert "--temperature 2" in caught.value.remedy


def test_an_unknown_rectification_lists_the_known_ones(side_by_side: Path) -> None:
    with pytest.raises(CacheError, match=r"no rectification 'mine'; it has .*pairwise-T4"):
        LogitCache.open(side_by_side).read_view(0, rectified="mine")


@pytest.mark.parametrize("name", ["pairwise-T4", "blend-T2", "pairwise-T4-probability-1"])
def test_statistics_are_the_plain_counts(side_by_side: Path, name: str) -> None:
    root, config = numbers(side_by_side), CONFIGS[name]
    pairs: Counter[tuple[int, int]] = Counter()
    right, repaired = [0, 0, 0], 0
    for view, row in itertools.product(range(3), range(1000)):
        label, predicted = int(root["label"][row]), int(root["prediction"][view, row])
        if label == predicted:
            right[view] += 1
            continue
        pairs[label, predicted] += 1
        logits = root["logits"][view, row].astype(float).tolist()
        new = rectified_distribution(logits, label, predicted, config, config.temperature)
        repaired += argmax(new) == label
    wrong = sum(pairs.values())

    found = LogitCache.open(side_by_side).rectification(name).statistics

    assert found["wrong_rows"] == wrong
    assert found["wrong_rate"] == pytest.approx(wrong / 3000)
    assert found["top1_per_view"] == pytest.approx([r / 1000 for r in right])
    assert found["label_is_argmax"] == pytest.approx(repaired / wrong, abs=2 / wrong)
    listed = [(int(c["label"]), int(c["predicted"]), c["count"]) for c in found["most_confused"]]
    assert all(pairs[label, predicted] == count for label, predicted, count in listed)
    counts = [count for *_, count in listed]
    assert counts == sorted(pairs.values(), reverse=True)[:20]


blocks_of_pairs = st.lists(
    st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.integers(1, 4)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40)
@given(blocks_of_pairs, st.integers(0, 5))
def test_confused_pairs_are_counted_as_a_counter_does(
    blocks: list[dict[tuple[int, int], int]], at_once: int
) -> None:
    """Two blocks a view; pairs that are as frequent come in the order in which they were seen."""
    tally, counter = Tally(4), Counter[tuple[int, int]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.tally._PAIRS_AT_ONCE", at_once)
        for number, pairs in enumerate(blocks):
            confused = [[*pair, count] for pair, count in sorted(pairs.items())]
            wrong = sum(pairs.values())
            known = {"rows": 100, "wrong": wrong, "label_is_argmax": 0, "confused": confused}
            tally.add({number % 2: {"view": number // 2, "statistics": known}})
            for label, predicted, count in confused:
                counter[label, predicted] += count
        found = tally.summary("abcd")

    assert found["most_confused"] == [
        {"label": "abcd"[label], "predicted": "abcd"[predicted], "count": count}
        for (label, predicted), count in counter.most_common(20)
    ]
    assert found["wrong_rows"] == sum(counter.values())
    assert len(found["top1_per_view"]) == (len(blocks) + 1) // 2


def test_rectify_returns_the_statistics_it_keeps(side_by_side: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in side_by_side.rglob("c/**/*")}

    statistics = rectify(side_by_side, CONFIGS["swap-T4"])

    assert statistics == LogitCache.open(side_by_side).rectification("swap-T4").statistics
    assert {p: p.stat().st_mtime_ns for p in side_by_side.rglob("c/**/*")} == before


def test_materialised_rows_are_for_anybody(finished_cache: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished_cache, tmp_path / "c.zarr"))
    rectify(path, RectifyConfig(materialise=True))

    index = numbers(path)["dataset_index"]
    ours = numbers(path, "rectified/pairwise-T4")["log_distribution"]
    assert (ours.shape, ours.dtype) == ((3, 1000, 10), np.float16)
    for view in range(3):
        expected = LogitCache.open(path).distribution(view, "pairwise-T4", 4.0)[index].log()
        np.testing.assert_allclose(ours[view], expected, rtol=2**-10, atol=1e-5)


def test_the_stored_prediction_decides_and_not_the_decoded_row(cache_copy: Path) -> None:
    """As with an encoding whose decoded rows have another argmax here and there."""
    cache = LogitCache.open(cache_copy, writable=True)
    for block in range(cache.grid.num_blocks):
        rows = cache.read_block(1, block)
        second = rows.logits.topk(2).indices[:, 1]
        cache.write_block(1, block, rows.logits, second, {})
    root = numbers(cache_copy)

    rectify(cache_copy, RectifyConfig())

    wrong = numbers(cache_copy, "rectified/pairwise-T4")["wrong"]
    assert np.array_equal(wrong[1], root["prediction"][1] != root["label"])
    assert not np.array_equal(wrong[1], root["logits"][1].argmax(1) != root["label"])
    found = LogitCache.open(cache_copy).distribution(1, "pairwise-T4", 4.0)
    for row in range(0, 1000, 7):
        expected = rectified_distribution(
            root["logits"][1, row].astype(float).tolist(),
            int(root["label"][row]),
            int(root["prediction"][1, row]),
            RectifyConfig(),
            4.0,
        )
        sample = int(root["dataset_index"][row])
        assert found[sample].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


# ---- incomplete, again, refused -------------------------------------------------------------


def test_a_name_with_other_settings_is_refused(side_by_side: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in side_by_side.rglob("*")}

    changes: list[dict[str, Any]] = [{"method": "swap"}, {"temperature": 2.0}]
    for change in [*changes, {"space": "probability-1"}, {"materialise": True}]:
        config = msgspec.structs.replace(CONFIGS["pairwise-T4"], name="pairwise-T4", **change)
        with pytest.raises(CacheError, match="'pairwise-T4' exists with other settings") as caught:
            rectify(side_by_side, config)
        assert "--name" in caught.value.remedy
    assert {p: p.stat().st_mtime_ns for p in side_by_side.rglob("*")} == before


def test_an_incomplete_cache_is_refused_and_its_leading_views_are_offered(
    cache_copy: Path, cache_config: CacheConfig, digits: Splits, side_by_side: Path
) -> None:
    (cache_copy / "commits/logits/v00002.json").unlink()

    with pytest.raises(CacheError, match="2 of 3 views") as caught:
        rectify(cache_copy, RectifyConfig())
    assert "cache-teacher" in caught.value.remedy
    assert "--views 2" in caught.value.remedy
    assert LogitCache.open(cache_copy).rectifications == []

    rectify(cache_copy, RectifyConfig(views=2))
    assert LogitCache.open(cache_copy).read_view(1, "pairwise-T4").rectified is not None
    with pytest.raises(CacheError, match=r"view 2 of logits is not complete"):
        LogitCache.open(cache_copy).read_view(2, "pairwise-T4")

    cache_teacher(prepare(cache_config, digits), cache_copy)
    with pytest.raises(CacheError, match=r"view 2 of rectified/pairwise-T4 is not complete"):
        LogitCache.open(cache_copy).read_view(2, "pairwise-T4")
    statistics = rectify(cache_copy, RectifyConfig())

    group = "rectified/pairwise-T4"
    ours, whole = numbers(cache_copy, group), numbers(side_by_side, group)
    assert all(np.array_equal(ours[name], whole[name]) for name in whole)
    assert statistics == LogitCache.open(side_by_side).rectification("pairwise-T4").statistics


def test_without_a_complete_view_nothing_is_offered(cache_copy: Path) -> None:
    shutil.rmtree(cache_copy / "commits/logits")

    with pytest.raises(CacheError, match="0 of 3 views") as caught:
        rectify(cache_copy, RectifyConfig())
    assert "--views" not in caught.value.remedy


def test_views_that_are_appended_are_rectified_by_running_again(
    cache_copy: Path, cache_config: CacheConfig, digits: Splits
) -> None:
    rectify(cache_copy, RectifyConfig())
    before = numbers(cache_copy, "rectified/pairwise-T4")
    records = list((cache_copy / "commits/rectified/pairwise-T4").glob("*.json"))
    written = {path: path.stat().st_mtime_ns for path in records}
    config = msgspec.structs.replace(cache_config, views=4)

    cache_teacher(prepare(config, digits), cache_copy)
    with pytest.raises(CacheError, match="view 3 of rectified/pairwise-T4 is not complete"):
        LogitCache.open(cache_copy).read_view(3, "pairwise-T4")
    statistics = rectify(cache_copy, RectifyConfig())

    after, root = numbers(cache_copy, "rectified/pairwise-T4"), numbers(cache_copy)
    assert all(np.array_equal(after[name][:3], before[name]) for name in before)
    assert np.array_equal(after["wrong"][3], root["prediction"][3] != root["label"])
    assert len(statistics["top1_per_view"]) == 4
    assert len(written) == 3
    assert {path: path.stat().st_mtime_ns for path in records} == written  # none written again


def test_a_failing_block_keeps_what_was_done(
    cache_copy: Path, side_by_side: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def full(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    original = BlockGroup.write
    with monkeypatch.context() as patch:
        patch.setattr(BlockGroup, "write", full)
        with pytest.raises(CacheError, match="cannot be written: No space left on device"):
            rectify(cache_copy, RectifyConfig())
    assert 3 <= len(LogitCache.open(cache_copy).rectification("pairwise-T4").commits.records) < 9

    rectify(cache_copy, RectifyConfig())

    group = "rectified/pairwise-T4"
    ours, whole = numbers(cache_copy, group), numbers(side_by_side, group)
    assert all(np.array_equal(ours[name], whole[name]) for name in whole)


def test_a_rectification_of_another_cache_is_refused(side_by_side: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(side_by_side, tmp_path / "c.zarr"))
    group = zarr.open_group(path / "rectified/swap-T4", mode="r+")
    group.attrs.put(sealed({**group.attrs.asdict(), "identity_digest": "of another"}))

    with pytest.raises(CacheError, match="'swap-T4' belongs to another cache"):
        LogitCache.open(path).read_view(0, "swap-T4")
    assert LogitCache.open(path).read_view(0, "blend-T2").rectified is not None


def test_a_rectification_that_is_removed_is_made_again(side_by_side: Path, tmp_path: Path) -> None:
    """The remedy of "belongs to another cache": remove rectified/<name>, run again."""
    path = Path(shutil.copytree(side_by_side, tmp_path / "c.zarr"))
    shutil.rmtree(path / "rectified/pairwise-T4")

    rectify(path, CONFIGS["pairwise-T4"], words := Words())

    assert words.lines == []  # no block counts as there already
    group = "rectified/pairwise-T4"
    ours, whole = numbers(path, group), numbers(side_by_side, group)
    assert all(np.array_equal(ours[name], whole[name]) for name in whole)
    read = LogitCache.open(path).distribution(1, "pairwise-T4", 4.0)
    assert torch.equal(read, LogitCache.open(side_by_side).distribution(1, "pairwise-T4", 4.0))


def test_views_that_the_cache_has_not_are_refused(finished_cache: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished_cache.rglob("*")}
    for views in (0, -1):
        with pytest.raises(ConfigError, match=f"views must be positive, was {views}"):
            rectify(finished_cache, RectifyConfig(views=views))
    with pytest.raises(CacheError, match="has 3 views, 4 were asked for") as caught:
        rectify(finished_cache, RectifyConfig(views=4))
    assert "cache-teacher" in caught.value.remedy
    assert {p: p.stat().st_mtime_ns for p in finished_cache.rglob("*")} == before


@pytest.mark.parametrize(
    "name",
    [
        *("a/b", "..", ".", "../logits", "/x", "", ".hidden", "-x", "a b", "a\n", "wrong\\x"),
        *("zarr.json", "Zarr.JSON", "x.partial", "x.PARTIAL", "x" * 101, "x" * 300),
        *("caf\u00e9", "x\u202egnp", "x\x1b[2J", "x\0"),
    ],
)
def test_a_name_is_the_name_of_a_folder(finished_cache: Path, name: str) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished_cache.rglob("*")}
    with pytest.raises(ConfigError, match="cannot name a rectification"):
        rectify(finished_cache, RectifyConfig(name=name))
    assert {p: p.stat().st_mtime_ns for p in finished_cache.rglob("*")} == before


@pytest.mark.parametrize(
    "name",
    ["a", "T4_v1.2", "swap+blend-3", "2", RectifyConfig().chosen_name, "pairwise-T0.5-logit"],
)
def test_names_of_letters_digits_and_a_few_signs_will_do(name: str) -> None:
    assert RectifyConfig(name=name).chosen_name == name


# ---- on a cluster ---------------------------------------------------------------------------


def test_a_dask_cluster_gives_the_same(cache_copy: Path, side_by_side: Path) -> None:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        statistics = rectify(cache_copy, RectifyConfig(scheduler=cluster.scheduler_address))

    group = "rectified/pairwise-T4"
    ours, whole = numbers(cache_copy, group), numbers(side_by_side, group)
    assert all(np.array_equal(ours[name], whole[name]) for name in whole)
    assert statistics == LogitCache.open(side_by_side).rectification("pairwise-T4").statistics


def test_an_error_on_the_cluster_is_told_as_it_is(cache_copy: Path) -> None:
    from distributed import LocalCluster

    shard = cache_copy / "logits/c/1/1/0"
    shard.write_bytes(shard.read_bytes()[:-1])

    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster,
        pytest.raises(CacheError, match="object logits/c/1/1/0 is damaged") as caught,
    ):
        rectify(cache_copy, RectifyConfig(scheduler=cluster.scheduler_address))
    assert "pipeline verify CACHE --repair" in caught.value.remedy


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense", "carrier-pigeon://x:1"])
def test_a_scheduler_that_does_not_answer_is_told(
    cache_copy: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    import distributed

    def impatient(address: str, timeout: float, **options: Any) -> Any:
        return client(address, timeout=0.5, **options)

    client: Callable[..., Any] = distributed.Client
    monkeypatch.setattr(distributed, "Client", impatient)
    with dask.config.set({"distributed.comm.timeouts.connect": "0.5s", "scheduler": "threads"}):
        with pytest.raises(ConfigError, match="does not answer") as caught:
            rectify(cache_copy, RectifyConfig(scheduler=address))
        scheduler = dask.config.get("scheduler")
    assert address in caught.value.cause
    assert LogitCache.open(cache_copy).complete_views == [0, 1, 2]
    assert scheduler == "threads"  # whatever uses dask later does not wait for it
