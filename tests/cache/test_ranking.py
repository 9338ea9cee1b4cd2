"""Leading classes, against sorting in Python."""

import pytest
import torch
from torch import Tensor

from stages.cache.encoding.ranking import largest, largest_on_host, leading

FAR = 2**24 - 1


def some_rows(classes: int, spread: int) -> Tensor:
    """Whole numbers, float32 (20, C), both ends of the range among them."""
    generator = torch.Generator().manual_seed(classes)
    rows = torch.randint(-spread, spread + 1, (20, classes), generator=generator).float()
    rows[0], rows[1] = FAR, -FAR
    return rows


@pytest.mark.parametrize("spread", [1, FAR])
@pytest.mark.parametrize(
    ("classes", "count"), [(2, 1), (2, 2), (24, 6), (128, 9), (129, 9), (300, 300), (21_841, 17)]
)
def test_leading_classes_are_those_of_a_sort(classes: int, count: int, spread: int) -> None:
    rows = some_rows(classes, spread)
    first = torch.arange(20) % classes
    found, entries = leading(rows, first, count)
    for i, row in enumerate(rows.tolist()):
        given = int(first[i])
        others = sorted((c for c in range(classes) if c != given), key=lambda c: (-row[c], c))
        assert found[i].tolist() == [given, *others][:count]
        assert entries[i].tolist() == [row[c] for c in found[i].tolist()]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_the_host_finds_what_a_device_finds(count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.stack([torch.randperm(40, generator=generator) for _ in range(9)]).to(dtype) - 20
    assert torch.equal(largest_on_host(keys, count), largest(keys, count))
