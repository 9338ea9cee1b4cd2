"""Targets in one place: those of another view come into the same memory, decoded once."""

import pytest
import torch
from torch import Tensor

from stages.cache.encoding import fit_encoding
from stages.cache.encoding.base import Encoding
from stages.cache.targets import RectifiedValues, ViewTargets
from stages.targets import in_place
from stages.targets.ensemble import EnsembleTargets

ROWS, CLASSES = 40, 12
LABELS = torch.arange(ROWS) % CLASSES


def logits(view: int) -> Tensor:
    return 4 * torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(view))


def targets(encoding: Encoding, view: int) -> ViewTargets:
    rows = logits(view)
    values = RectifiedValues(rows[:, 0] + 1, rows[:, 1] - 1)
    arrays = {  # as a reader holds them
        name: array.int() if array.dtype == torch.uint16 else array
        for name, array in encoding.encode(rows, LABELS).items()
    }
    order = torch.arange(ROWS).flip(0)
    return ViewTargets(encoding, arrays, rows.argmax(1), LABELS, order, values)


@pytest.mark.parametrize("most", [2**30, 0])
@pytest.mark.parametrize("name", ["float32", "float16", "uint8", "klt", "klt:top=3", "topk:k=3"])
def test_another_view_comes_into_the_same_memory(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place, "DECODED_BYTES", most)
    encoding = fit_encoding(name, logits(0), LABELS)
    first, second = targets(encoding, 0), targets(encoding, 1)
    kept = in_place.kept_in_place(first)
    assert isinstance(kept, ViewTargets)
    decoded = most > 0 and encoding.keeps_all
    assert kept.encoding.name == ("float32" if decoded else encoding.name)
    places = [tensor.data_ptr() for tensor in [*kept.arrays.values(), kept.mistakes]]
    samples = torch.tensor([3, 0, 39, 7])
    for view in (first, second, first):
        in_place.take(kept, view)
        torch.testing.assert_close(kept.rows(samples), view.rows(samples))
        torch.testing.assert_close(kept.rectified_rows(samples), view.rectified_rows(samples))
        assert torch.equal(kept.wrong(samples), view.wrong(samples))
    assert [t.data_ptr() for t in [*kept.arrays.values(), kept.mistakes]] == places
    assert all(  # what was read is as it was
        torch.equal(array, first.arrays[name])
        for name, array in targets(encoding, 0).arrays.items()
    )


def test_several_teachers() -> None:
    one, other = (fit_encoding(name, logits(0), LABELS) for name in ("klt", "float32"))
    views = [
        EnsembleTargets([targets(one, view), targets(other, view + 2)], LABELS) for view in (0, 1)
    ]
    kept = in_place.kept_in_place(views[0])
    assert kept is not None
    in_place.take(kept, views[1])
    samples = torch.arange(5)
    torch.testing.assert_close(kept.rows(samples), views[1].rows(samples))
