import errno
import itertools
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
from helpers import Words, naive_softmax, refused, resized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.blocks import BlockGroup
from stages.cache.metadata import sealed
from stages.cache_teacher import CacheJob, cache_teacher
from stages.errors import CacheError, ConfigError
from stages.objectives.rectification import replaced_logits
from stages.rectify import rectify, rectify_rows, settings_of
from stages.settings import Method, RectifyConfig, Space
from stages.tally import Tally

METHODS: tuple[Method, ...] = ("pairwise", "swap", "blend")
SPACES: tuple[Space, ...] = ("probability-T", "probability-1", "logit")
Row = list[float]
Numbers = dict[str, np.ndarray[Any, Any]]


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
        return naive_softmax(rectified(row, label, predicted, config.method), temperature)
    if config.space == "probability-1":
        new = rectified(naive_softmax(row), label, predicted, config.method)
        powers = [p ** (1 / temperature) for p in new]
        return [p / sum(powers) for p in powers]
    return rectified(naive_softmax(row, temperature), label, predicted, config.method)


def argmax(row: Row) -> int:
    return row.index(max(row))


@pytest.mark.parametrize(
    ("row", "label", "expected"),
    [
        ([0, 0.2, 0.3, 0.02, 0.48], 0, [0.3243, 0.2, 0.3, 0.02, 0.1557]),
        ([0.45, 0.10, 0.15, 0.25, 0.05], 1, [0.1597, 0.3903, 0.15, 0.25, 0.05]),
    ],
)
def test_the_authors_worked_examples(row: Row, label: int, expected: Row) -> None:
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


@given(
    cases(),
    st.sampled_from(METHODS),
    st.sampled_from([1.0, 4.0]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_rows_equal_the_loop_over_rows(
    case: tuple[Tensor, Tensor], method: Method, temperature: float, dtype: torch.dtype
) -> None:
    """And nothing of a right row, or beside the two classes of a wrong one, moves by a bit."""
    logits, labels = case
    probabilities = (logits.to(dtype) / temperature).softmax(1)
    wrong = probabilities.argmax(1) != labels

    new = rectify_rows(probabilities, labels, method)

    expected = [
        rectified(row, label, argmax(row), method)
        for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True)
    ]
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(new, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=1e-37)
    assert torch.equal(new[~wrong], probabilities[~wrong])
    if method == "pairwise":
        own = new.gather(1, labels[:, None])
        assert bool((own >= new.gather(1, probabilities.argmax(1)[:, None])).all())
    others = torch.ones_like(new).scatter_(1, labels[:, None], 0)
    others.scatter_(1, probabilities.argmax(1)[:, None], 0)[~wrong] = 0
    factor = 0.5 if method == "blend" else 1.0
    assert torch.equal(new * others, probabilities * others * factor)


def test_predictions_that_are_given_decide() -> None:
    rows = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])

    new = rectify_rows(rows, torch.tensor([2, 1]), "swap", predictions=torch.tensor([1, 1]))

    assert torch.equal(new, torch.tensor([[0.5, 0.2, 0.3], [0.5, 0.3, 0.2]]))


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


@given(
    cases(largest=12.0),
    st.sampled_from(METHODS),
    st.sampled_from(["probability-T", "probability-1"]),
    st.sampled_from([1.0, 4.0]),
    st.sampled_from([0.5, 1.0, 2.0, 4.0, 8.0]),
)
def test_replaced_logits_make_the_rectified_distribution(
    case: tuple[Tensor, Tensor], method: Method, space: Space, made_at: float, temperature: float
) -> None:
    """At its temperature, or at any where it is free of it."""
    config = RectifyConfig(method=method, space=space, temperature=made_at)
    wrong = wrong_rows(case)
    at = temperature if settings_of(config).temperature_free else made_at
    assert settings_of(config).temperature_free or space == "probability-T"
    rows = put_in(*wrong, config)
    for row, before, label, predicted in zip(rows, *(t.tolist() for t in wrong), strict=True):
        expected = rectified_distribution(before, label, predicted, config, at)
        assert naive_softmax(row.tolist(), at) == pytest.approx(expected, rel=5e-5, abs=1e-9)


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


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", METHODS)
def test_extreme_logits_stay_finite(method: Method, space: Space, temperature: float) -> None:
    if (method, space) == ("blend", "logit"):
        with pytest.raises(ConfigError, match="not defined for the method 'blend'"):
            RectifyConfig(method=method, space=space)
        return
    config = RectifyConfig(method=method, space=space, temperature=temperature)
    predictions = EXTREME.argmax(1)
    for label in range(4):
        at = predictions != label
        labels = torch.full((int(at.sum()),), label)
        rows = put_in(EXTREME[at], labels, predictions[at], config)
        assert bool((rows / temperature).log_softmax(1).isfinite().all())


def test_an_offset_of_a_row_is_an_offset_of_what_is_replaced() -> None:
    """To the last digit that float32 has beside 10,000: half a step of 2^-10."""
    logits = (torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) * 768).round() / 256
    labels, predictions = (logits.argsort(1, descending=True)[:, place] for place in (2, 0))
    ways: list[tuple[Method, Space]] = [("pairwise", "probability-T"), ("blend", "probability-1")]
    for way in ways:
        plain, moved = (
            replaced_logits(z, labels, predictions, *way, 3.0) for z in (logits, logits + 1e4)
        )
        for near, far in zip(plain, moved, strict=True):
            error = far.double() - 1e4 - near.double()
            assert float(error.abs().max()) <= 2**-11 + 1e-5


def test_default_names() -> None:
    assert RectifyConfig(method="swap", temperature=2.5).chosen_name == "swap-T2.5"
    assert RectifyConfig(space="logit", temperature=1).chosen_name == "pairwise-T1-logit"
    assert RectifyConfig(space="probability-1").chosen_name == "pairwise-T4-probability-1"


def numbers(store: Path, group: str = "") -> Numbers:
    """Every array of a group, read by zarr alone."""
    found = zarr.open_group(store / group, mode="r")
    return {name: np.asarray(array[:]) for name, array in found.arrays()}


def assert_same_numbers(one: Path, other: Path, group: str = "rectified/pairwise-T4") -> None:
    """Every array of the other's group is in this one's, with the same numbers."""
    ours, theirs = numbers(one, group), numbers(other, group)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def changed_times(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in store.rglob("*")}


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
def my_job(tiny_job: CacheJob) -> CacheJob:
    """Three views of 60 samples in two blocks each."""
    return resized(tiny_job, 60, 20, views=3)


@pytest.fixture(scope="module")
def my_cache(my_job: CacheJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache. Read only."""
    path = tmp_path_factory.mktemp("plain") / "digits.zarr"
    cache_teacher(my_job, path)
    return path


@pytest.fixture
def my_copy(my_cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(my_cache, tmp_path / "copy.zarr"))


@pytest.fixture(scope="module")
def side_by_side(my_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache with all of CONFIGS. Read only."""
    path = Path(shutil.copytree(my_cache, tmp_path_factory.mktemp("rectified") / "digits.zarr"))
    for config in CONFIGS.values():
        rectify(path, config)
    return path


def test_rectifications_lie_side_by_side(side_by_side: Path, my_cache: Path) -> None:
    assert LogitCache.open(side_by_side).rectifications == sorted(CONFIGS)
    assert_same_numbers(side_by_side, my_cache, "")


def assert_rectified(path: Path, view: int, config: RectifyConfig, temperature: float) -> None:
    """A view's distributions are those of its rows, by the loop."""
    root, name = numbers(path), config.chosen_name
    found = LogitCache.open(path).distribution(view, rectified=name, temperature=temperature)
    assert (found.shape, found.dtype) == ((60, 10), torch.float32)
    for row, sample in enumerate(root["dataset_index"]):
        expected = rectified_distribution(
            root["logits"][view, row].astype(float).tolist(),
            int(root["label"][row]),
            int(root["prediction"][view, row]),
            config,
            temperature,
        )
        assert found[int(sample)].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_kept_of_a_rectification(side_by_side: Path, name: str) -> None:
    config, root = CONFIGS[name], numbers(side_by_side)
    ours = numbers(side_by_side, f"rectified/{name}")
    wrong = root["prediction"].astype(int) != root["label"][None]
    assert ours.keys() == {"wrong", "label_logit", "predicted_logit"}
    assert np.array_equal(ours["wrong"], wrong)
    assert 0.1 < wrong.mean() < 0.95
    assert not np.array_equal(wrong[0], wrong[1])
    for key in ("label_logit", "predicted_logit"):
        assert ours[key].dtype == np.float32
        assert not ours[key][~wrong].any()
    free = settings_of(config).temperature_free
    assert_rectified(side_by_side, 0, config, config.temperature)
    assert_rectified(side_by_side, 2, config, 2.0 if free else config.temperature)


def test_what_a_cache_has_not_is_refused(side_by_side: Path) -> None:
    cache = LogitCache.open(side_by_side)
    with refused(CacheError, "belongs to temperature 4, not 2", "--temperature 2"):
        cache.distribution(0, "pairwise-T4", temperature=2)
    with pytest.raises(CacheError, match=r"no rectification 'mine'; it has .*pairwise-T4"):
        cache.read_view(0, rectified="mine")


@pytest.mark.parametrize("name", ["pairwise-T4", "blend-T2", "pairwise-T4-probability-1"])
def test_statistics_are_the_plain_counts(side_by_side: Path, name: str) -> None:
    root, config = numbers(side_by_side), CONFIGS[name]
    pairs: Counter[tuple[int, int]] = Counter()
    right, repaired = [0, 0, 0], 0
    for view, row in itertools.product(range(3), range(60)):
        label, predicted = int(root["label"][row]), int(root["prediction"][view, row])
        if label == predicted:
            right[view] += 1
            continue
        pairs[label, predicted] += 1
        logits = root["logits"][view, row].astype(float).tolist()
        new = rectified_distribution(logits, label, predicted, config, config.temperature)
        repaired += argmax(new) == label
    wrong = sum(pairs.values())
    before = changed_times(side_by_side / "rectified" / name)

    found = rectify(side_by_side, config)  # once more: no block is written again

    assert found == LogitCache.open(side_by_side).rectification(name).statistics
    after = changed_times(side_by_side / "rectified" / name)
    assert all(after[p] == before[p] for p in before if "c" in p.parts)
    assert found["wrong_rows"] == wrong
    assert found["wrong_rate"] == pytest.approx(wrong / 180)
    assert found["top1_per_view"] == pytest.approx([r / 60 for r in right])
    assert found["label_is_argmax"] == pytest.approx(repaired / wrong, abs=2 / wrong)
    listed = [(int(c["label"]), int(c["predicted"]), c["count"]) for c in found["most_confused"]]
    assert all(pairs[label, predicted] == count for label, predicted, count in listed)
    assert [count for *_, count in listed] == sorted(pairs.values(), reverse=True)[:20]


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


def test_materialised_rows_are_for_anybody(my_copy: Path) -> None:
    rectify(my_copy, RectifyConfig(materialise=True))
    index = numbers(my_copy)["dataset_index"]
    ours = numbers(my_copy, "rectified/pairwise-T4")["log_distribution"]
    assert (ours.shape, ours.dtype) == ((3, 60, 10), np.float16)
    for view in range(3):
        expected = LogitCache.open(my_copy).distribution(view, "pairwise-T4", 4.0)[index].log()
        np.testing.assert_allclose(ours[view], expected, rtol=2**-10, atol=1e-5)


def test_the_stored_prediction_decides_and_not_the_decoded_row(my_copy: Path) -> None:
    """As with an encoding whose decoded rows have another argmax here and there."""
    cache = LogitCache.open(my_copy, writable=True)
    for block in range(cache.grid.num_blocks):
        rows = cache.read_block(1, block)
        cache.write_block(1, block, rows.logits, rows.logits.topk(2).indices[:, 1], {})
    root = numbers(my_copy)

    rectify(my_copy, RectifyConfig())

    wrong = numbers(my_copy, "rectified/pairwise-T4")["wrong"]
    assert np.array_equal(wrong[1], root["prediction"][1] != root["label"])
    assert not np.array_equal(wrong[1], root["logits"][1].argmax(1) != root["label"])
    assert_rectified(my_copy, 1, RectifyConfig(), 4.0)


def test_a_name_with_other_settings_is_refused(side_by_side: Path) -> None:
    before = changed_times(side_by_side)
    changes: list[dict[str, Any]] = [{"method": "swap"}, {"temperature": 2.0}]
    for change in [*changes, {"space": "probability-1"}, {"materialise": True}]:
        config = msgspec.structs.replace(CONFIGS["pairwise-T4"], name="pairwise-T4", **change)
        with refused(CacheError, "'pairwise-T4' exists with other settings", "--name"):
            rectify(side_by_side, config)
    assert changed_times(side_by_side) == before


def test_an_incomplete_cache_is_refused_and_its_leading_views_are_offered(
    my_copy: Path, my_job: CacheJob, side_by_side: Path
) -> None:
    (my_copy / "commits/logits/v00002.json").unlink()
    with refused(CacheError, "2 of 3 views", "cache-teacher", "--views 2"):
        rectify(my_copy, RectifyConfig())
    assert LogitCache.open(my_copy).rectifications == []

    rectify(my_copy, RectifyConfig(views=2))
    records = changed_times(my_copy / "commits/rectified/pairwise-T4")
    assert len(records) == 2
    assert LogitCache.open(my_copy).read_view(1, "pairwise-T4").rectified is not None
    with pytest.raises(CacheError, match=r"view 2 of logits is not complete"):
        LogitCache.open(my_copy).read_view(2, "pairwise-T4")

    cache_teacher(my_job, my_copy)
    with pytest.raises(CacheError, match=r"view 2 of rectified/pairwise-T4 is not complete"):
        LogitCache.open(my_copy).read_view(2, "pairwise-T4")
    statistics = rectify(my_copy, RectifyConfig())
    assert_same_numbers(my_copy, side_by_side)
    assert statistics == LogitCache.open(side_by_side).rectification("pairwise-T4").statistics
    assert len(statistics["top1_per_view"]) == 3
    after = changed_times(my_copy / "commits/rectified/pairwise-T4")
    assert {path: after[path] for path in records} == records  # none written again


def test_without_a_complete_view_nothing_is_offered(my_copy: Path) -> None:
    shutil.rmtree(my_copy / "commits/logits")
    with pytest.raises(CacheError, match="0 of 3 views") as caught:
        rectify(my_copy, RectifyConfig())
    assert "--views" not in caught.value.remedy


def test_a_failing_block_keeps_what_was_done(
    my_copy: Path, side_by_side: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, original = itertools.count(1), BlockGroup.write

    def full(*arguments: Any) -> Any:
        if next(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(BlockGroup, "write", full)
        with pytest.raises(CacheError, match="cannot be written: No space left on device"):
            rectify(my_copy, RectifyConfig())
    assert 3 <= len(LogitCache.open(my_copy).rectification("pairwise-T4").commits.records) < 6
    rectify(my_copy, RectifyConfig())
    assert_same_numbers(my_copy, side_by_side)


def test_a_rectification_of_another_cache_is_refused_and_made_again(
    side_by_side: Path, tmp_path: Path
) -> None:
    """Its remedy: remove rectified/<name>, run again."""
    path = Path(shutil.copytree(side_by_side, tmp_path / "c.zarr"))
    group = zarr.open_group(path / "rectified/pairwise-T4", mode="r+")
    group.attrs.put(sealed({**group.attrs.asdict(), "identity_digest": "of another"}))
    with pytest.raises(CacheError, match="'pairwise-T4' belongs to another cache"):
        LogitCache.open(path).read_view(0, "pairwise-T4")
    assert LogitCache.open(path).read_view(0, "blend-T2").rectified is not None

    shutil.rmtree(path / "rectified/pairwise-T4")
    rectify(path, CONFIGS["pairwise-T4"], words := Words())
    assert words.lines == []  # no block counts as there already
    assert_same_numbers(path, side_by_side)
    read = LogitCache.open(path).distribution(1, "pairwise-T4", 4.0)
    assert torch.equal(read, LogitCache.open(side_by_side).distribution(1, "pairwise-T4", 4.0))


def test_views_that_the_cache_has_not_are_refused(my_cache: Path) -> None:
    before = changed_times(my_cache)
    for views in (0, -1):
        with pytest.raises(ConfigError, match=f"views must be positive, was {views}"):
            rectify(my_cache, RectifyConfig(views=views))
    with refused(CacheError, "has 3 views, 4 were asked for", "cache-teacher"):
        rectify(my_cache, RectifyConfig(views=4))
    assert changed_times(my_cache) == before


@pytest.mark.parametrize(
    "name",
    [
        *("a/b", "..", ".", "../logits", "/x", "", ".hidden", "-x", "a b", "a\n", "wrong\\x"),
        *("zarr.json", "Zarr.JSON", "x.partial", "x.PARTIAL", "x" * 101, "x" * 300),
        *("caf\u00e9", "x\u202egnp", "x\x1b[2J", "x\0"),
    ],
)
def test_a_name_is_the_name_of_a_folder(my_cache: Path, name: str) -> None:
    before = changed_times(my_cache)
    with pytest.raises(ConfigError, match="cannot name a rectification"):
        rectify(my_cache, RectifyConfig(name=name))
    assert changed_times(my_cache) == before


@pytest.mark.parametrize("name", ["a", "T4_v1.2", "swap+blend-3", "2", "pairwise-T0.5-logit"])
def test_names_of_letters_digits_and_a_few_signs_will_do(name: str) -> None:
    assert RectifyConfig(name=name).chosen_name == name


def test_a_dask_cluster_gives_the_same_and_errors_as_they_are(
    my_copy: Path, side_by_side: Path
) -> None:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        statistics = rectify(my_copy, RectifyConfig(scheduler=cluster.scheduler_address))
        assert_same_numbers(my_copy, side_by_side)
        expected = LogitCache.open(side_by_side).rectification("pairwise-T4").statistics
        assert statistics == expected

        shard = my_copy / "logits/c/1/1/0"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(CacheError, match="object logits/c/1/1/0 is damaged") as caught:
            rectify(my_copy, RectifyConfig(scheduler=cluster.scheduler_address, temperature=1))
    assert "pipeline verify CACHE --repair" in caught.value.remedy


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense", "carrier-pigeon://x:1"])
def test_a_scheduler_that_does_not_answer_is_told(
    my_copy: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    import distributed

    client: Callable[..., Any] = distributed.Client
    monkeypatch.setattr(
        distributed, "Client", lambda to, **more: client(to, **(more | {"timeout": 0.5}))
    )
    with dask.config.set({"distributed.comm.timeouts.connect": "0.5s", "scheduler": "threads"}):
        with pytest.raises(ConfigError, match="does not answer") as caught:
            rectify(my_copy, RectifyConfig(scheduler=address))
        scheduler = dask.config.get("scheduler")
    assert address in caught.value.cause
    assert LogitCache.open(my_copy).complete_views == [0, 1, 2]
    assert scheduler == "threads"  # whatever uses dask later does not wait for it
