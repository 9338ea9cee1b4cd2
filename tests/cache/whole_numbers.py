"""Rows of `klt-top` and `klt-anchored` as whole numbers: by loops, from the documented rule."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Whole = NDArray[np.int64]
DIGITS = {"pair": (2, 15), "three": (3, 5), "five": (5, 3), "top": (2, 15)}
"""How many codes a byte has, and in which base."""


def digits(packed: Tensor, name: str) -> list[int]:
    count, base = DIGITS[name]
    return [int(b) // base**i % base - base // 2 for b in packed for i in range(count)]


def codes_of(arrays: dict[str, Tensor], prefix: str, row: int, center: Tensor) -> Whole:
    """The codes of one row and the mean codes of its prediction. center: int8 (component,)."""
    each = arrays[f"{prefix}_code"][row, :-1].tolist()
    for name in ("pair", "three", "five"):
        each += digits(arrays[f"{prefix}_{name}"][row], name)
    return np.array(each, dtype=np.int64) + whole(center)


def whole(values: Tensor) -> Whole:
    found: Whole = values.numpy().astype(np.int64)
    return found


def refined(coding: Any, z: Whole, prediction: int, errors: Sequence[int]) -> list[int]:
    """Refine a row in place; its refined classes. coding: of klt-top."""
    others = sorted((c for c in range(len(z)) if c != prediction), key=lambda c: (-z[c], c))
    leading = [prediction, *others][: coding.top]
    for c, error in zip(leading, errors, strict=False):
        z[c] += coding.fine * error
    highest = max(int(v) for c, v in enumerate(z) if c != prediction)
    z[prediction] = max(int(z[prediction]), highest + max(1, coding.fine // 8))
    return leading


def any_arrays(coding: Any, classes: int, seed: int, extreme: bool, rows: int) -> dict[str, Tensor]:
    """Codes that no teacher gives, and a damaged store may. extreme: the ends of their range."""
    generator, arrays = torch.Generator().manual_seed(seed), {}
    for name, spec in coding.arrays().items():
        kind = name.rpartition("_")[2]
        if kind == "prediction":
            arrays[name] = torch.randint(classes, (rows,), generator=generator)
            continue
        high = 127 if kind == "code" else {2: 224, 3: 124, 5: 242}[DIGITS[kind][0]]
        low = -high if kind == "code" else 0
        shape = (rows, coding.sizes[spec.dimensions[2]])
        drawn = torch.randint(low, high + 1, shape, generator=generator)
        ends = torch.randint(2, shape, generator=generator) * (high - low) + low
        arrays[name] = (ends if extreme else drawn).to(getattr(torch, spec.dtype))
    return arrays


def assert_exact(coding: Any, rows: Whole, arrays: dict[str, Tensor], found: Tensor) -> None:
    """Whether decoded rows are these whole numbers and their offsets, to the bit."""
    assert int(np.abs(rows).max()) < 2**24
    steps = arrays["logits_code"][:, -1:].numpy().astype(np.float32)
    offset = steps * np.float32(coding.offset_step) + np.float32(coding.offset)
    expected = rows.astype(np.float32) * np.float32(coding.unit) + offset
    assert found.numpy().tobytes() == expected.tobytes()
