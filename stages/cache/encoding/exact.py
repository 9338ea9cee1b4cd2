"""Rows that are sums of whole numbers below 2^24: the same bits on every device, run by run."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_AT_ONCE = 2**24
"""Logits that are encoded or decoded at once: a block of many classes is not held several times."""


def runs(logits: Tensor, classes: int | None = None) -> list[slice]:
    """Rows in runs of a size that is encoded or decoded at once."""
    size = max(1, _AT_ONCE // (classes or logits.shape[1]))
    return [slice(start, start + size) for start in range(0, max(1, len(logits)), size)]


def by_runs(
    arrays: Mapping[str, Tensor],
    classes: int,
    decode: Callable[[Mapping[str, Tensor]], Tensor],
) -> Tensor:
    """What `decode` makes of all rows, float32 (n, C), a run of them at a time."""
    predictions = arrays["prediction"]
    parts = runs(predictions, classes)
    if len(parts) == 1:
        return decode(arrays)
    logits = torch.empty((len(predictions), classes), device=predictions.device)
    for run in parts:
        logits[run] = decode({name: array[run] for name, array in arrays.items()})
    return logits


def exact_sum(base: Tensor, codes: Tensor, matrix: Tensor) -> Tensor:
    """base + codes @ matrix, float32 (n, C): of whole numbers below 2^24, exact in any order.

    bfloat16 holds codes but no entries of a basis: autocast is kept out, and a user's choice of
    bfloat16 for all products is met with double precision.
    """
    with torch.autocast(codes.device.type, enabled=False):
        if torch.get_float32_matmul_precision() == "medium":
            return (base.double() + codes.double() @ matrix.double()).float()
        return torch.addmm(base, codes, matrix)
