"""Caches that were written once and are read for ever: today's code, and the format's plain reader.

What they must say lies beside them, as the teacher computed it: no reader of caches made it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from stages.cache import LogitCache
from stages.verify import verify

GOLDEN = Path(__file__).with_name("golden")
DOCUMENT = (Path(__file__).parents[1] / "docs" / "cache-format.md").read_text()
VIEWS = 2
KL = {
    **{"float32": 1e-12, "float16": 1e-6, "uint8": 1e-3, "klt": 2e-2, "klt-top": 6e-2},
    **{"klt-anchored": 6e-2, "topk": 0.5, "mixed": 1e-6},
}
"""Mean KL to the exact rows at T=1 that each may have, in nats."""

Rows = NDArray[Any]


@pytest.fixture(scope="module")
def truth() -> dict[str, Rows]:
    with np.load(GOLDEN / "truth.npz") as found:
        return dict(found)


def program(name: str) -> dict[str, Any]:
    """What a program of docs/cache-format.md defines."""
    found = re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None
    defined: dict[str, Any] = {}
    exec(found[1], defined)
    return defined


def mean_kl(exact: Rows, found: Rows) -> float:
    p, q = softmax(exact.astype(float), axis=1), softmax(found.astype(float), axis=1)
    return float((p * (np.log(p) - np.log(q))).sum(1).mean())


@pytest.mark.parametrize("name", KL)
def test_every_byte_holds(name: str) -> None:
    assert verify(GOLDEN / f"{name}.zarr").faults == []


@pytest.mark.parametrize("view", range(VIEWS))
@pytest.mark.parametrize("name", KL)
def test_rows_are_the_teachers(name: str, view: int, truth: dict[str, Rows]) -> None:
    exact = truth[f"{name}-{view}"]
    cache = LogitCache.open(GOLDEN / f"{name}.zarr")
    samples = torch.arange(len(exact))
    targets = cache.read_view(view).of(samples)
    read = program("reader")["read_view"]
    ours, (plain, labels) = targets.at().numpy(), read(str(GOLDEN / f"{name}.zarr"), view)

    for found in (ours, plain):
        assert mean_kl(exact, found) <= KL[name]
        assert name == "klt" or (found.argmax(1) == exact.argmax(1)).all()
    if name == "float32":
        assert ours.tobytes() == plain.tobytes() == exact.tobytes()
    assert np.array_equal(labels, truth["train_labels"])
    assert np.array_equal(cache.labels.numpy(), truth["train_labels"])
    assert np.array_equal(targets.wrong().numpy(), exact.argmax(1) != truth["train_labels"])


@pytest.mark.parametrize("name", KL)
def test_the_test_split_is_the_teachers(name: str, truth: dict[str, Rows]) -> None:
    cache = LogitCache.open(GOLDEN / f"{name}.zarr")
    logits, labels = cache.eval_logits()
    exact = truth.get(f"{name}-test", truth["test"])
    assert mean_kl(exact, logits.numpy()) < 1e-6
    assert np.array_equal(labels.numpy(), truth["test_labels"])
    assert np.array_equal(cache.eval_predictions().numpy(), exact.argmax(1))


@pytest.mark.parametrize("method", ["pairwise", "swap"])
@pytest.mark.parametrize("name", [name for name in KL if name != "mixed"])
def test_wrong_rows_are_rectified_as_the_formula_says(
    name: str, method: str, truth: dict[str, Rows]
) -> None:
    replaced: Callable[..., tuple[float, float]] = program("rectify")["replaced"]
    read = program("reader")["read_view"]
    store, rectified = str(GOLDEN / f"{name}.zarr"), f"{method}-T4"
    targets = LogitCache.open(store).read_view(0, rectified)
    rows, labels = read(store, 0, temperature=4.0)
    plain, _ = read(store, 0, rectified=rectified, temperature=4.0)
    ours = targets.rectified_rows(torch.arange(len(rows)), 4.0).numpy()

    predictions = truth[f"{name}-0"].argmax(1)
    expected = rows.astype(float)
    for row in np.flatnonzero(predictions != labels):
        label, prediction = labels[row], predictions[row]
        expected[row, [label, prediction]] = replaced(
            rows[row].astype(float), label, prediction, method, "probability-T", 4.0
        )
    assert (predictions != labels).any()
    assert np.allclose(plain, expected, rtol=0, atol=1e-4)
    assert np.allclose(plain, ours, rtol=1e-5, atol=1e-5)
    shares = [softmax(z.astype(float) / 4, axis=1) for z in (ours, expected)]
    assert np.allclose(*shares, rtol=0, atol=1e-5)
