"""One class for all the rest, on both sides: against loops in float64, and where it is exact."""

import math

import numpy as np
import pytest
import torch
from row_losses import draw
from torch import Tensor

from stages.cache.encoding.topk import TopK
from stages.objectives.losses import kd, lump

TEMPERATURES = [1.0, 2.0, 4.0]


def kept_of(teacher: Tensor, labels: Tensor, k: int) -> Tensor:
    coding = TopK(teacher.shape[1], k)
    return coding.kept(coding.encode(teacher, labels))


def naive_lumped(row: list[float], kept: list[int], temperature: float) -> list[float]:
    """Probabilities of the kept classes, and of all others together."""
    weights = [math.exp((z - max(row)) / temperature) for z in row]
    chosen = [weights[c] for c in kept]
    rest = math.fsum(w for c, w in enumerate(weights) if c not in kept)
    return [w / math.fsum(weights) for w in (*chosen, rest)]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [2, 5, 11])
def test_lumped_logits_have_the_probability_of_the_rest(k: int, temperature: float) -> None:
    _, teacher, labels = draw(classes=12)
    kept = kept_of(teacher, labels, k)

    lumped = lump(teacher, kept, temperature)

    assert lumped.shape == (12, k + 1)
    assert torch.equal(lumped[:, :k], teacher.gather(1, kept))
    probabilities = (lumped.double() / temperature).softmax(1).numpy()
    expected = [
        naive_lumped(row, classes, temperature)
        for row, classes in zip(teacher.double().tolist(), kept.tolist(), strict=True)
    ]
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [2, 4])
def test_the_lumped_loss_from_a_topk_row_is_that_of_the_exact_row(
    k: int, temperature: float
) -> None:
    """What is stored of a row is all that the loss asks for, up to half precision."""
    student, teacher, labels = draw(classes=12, rows=100)
    coding = TopK(12, k)
    arrays = coding.encode(teacher, labels)
    kept, decoded = coding.kept(arrays), coding.decode(arrays, temperature)

    rows = kd(
        lump(student, kept, temperature),
        lump(decoded, kept, temperature),
        labels,
        temperature,
        reduction="none",
    )

    for found, z_s, z_t, classes in zip(
        rows.tolist(), student.double().tolist(), teacher.double().tolist(), kept.tolist(),
        strict=True,
    ):  # fmt: skip
        p_s = naive_lumped(z_s, classes, temperature)
        p_t = naive_lumped(z_t, classes, temperature)
        pairs = zip(p_t, p_s, strict=True)
        expected = temperature**2 * sum(t * math.log(t / s) for t, s in pairs)
        assert found == pytest.approx(expected, rel=5e-3, abs=5e-3)
