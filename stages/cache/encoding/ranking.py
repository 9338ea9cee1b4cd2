"""The leading classes of whole-number rows, in one order on every device and with every library."""

import numpy as np
import torch
from torch import Tensor

_EXACT_BITS = 24
"""Entries are below 2^24 - 1 in magnitude."""


def leading(rows: Tensor, first: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The class that is given, then those of the largest other entries: int64 (n, count); and their
    entries, float32 (n, count). Of equal entries the lower class comes first.

    rows: float32 (n, C), whole numbers below 2^24 - 1 in magnitude. first: int64 (n,). count: 1 to
    C.

    A key is an entry and, in its last bits, the class: no two are equal, so that no library has a
    choice, and all that is asked for can be read off the largest keys.
    """
    bits = (rows.shape[1] - 1).bit_length()
    dtype = torch.int32 if _EXACT_BITS + bits < 32 else torch.int64
    mask, given = 2**bits - 1, first[:, None]
    lowest_first = torch.arange(mask, mask - rows.shape[1], -1, dtype=dtype, device=rows.device)
    keys = torch.add(lowest_first, rows.to(dtype), alpha=2**bits)
    # The largest key, as `klt_integers` keeps entries below.
    keys.scatter_(1, given, (2 ** (_EXACT_BITS + bits) - 1 - given).to(dtype))
    find = largest_on_host if keys.device.type == "cpu" else largest
    classes = (mask - (find(keys, count) & mask)).long()
    return classes, rows.gather(1, classes)


def largest(keys: Tensor, count: int) -> Tensor:
    """The largest of each row in falling order, (n, count). keys: whole numbers (n, C), no two of a
    row equal.
    """
    return keys.topk(count, dim=1).values


def largest_on_host(keys: Tensor, count: int) -> Tensor:
    """As `largest`: NumPy parts a row several times as fast as torch does."""
    parted = np.partition(keys.numpy(), -count, axis=1)[:, -count:]
    parted.sort(axis=1)
    return torch.from_numpy(parted[:, ::-1].copy())
