"""Random numbers as a pure function of counters, and permutations keyed by them.

`counter_hash(seed, view, sample, draw)` is a 64-bit hash: the SplitMix64 finaliser (Steele, Lea,
Flood 2014) applied once per counter. There is no generator and no state, so that a draw does not
depend on batch size, order, worker, rank, device or library version. Counters are chained and not
added: (seed 0, sample 1) and (seed 1, sample 0) have nothing in common.

torch has no unsigned 64-bit arithmetic; int64 multiplication wraps in the same way, and the right
shift is made logical with a mask.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_FEISTEL_ROUNDS = 6
"""Four rounds make a pseudo-random permutation (Luby, Rackoff 1988) of large domains; two more
because ours are as small as 162."""


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def counter_hash(*counters: int | Tensor) -> Tensor:
    """Hash counters to int64 (all 64 bits random). Tensors broadcast; the result has their shape.

    Scalars must fit in a signed 64-bit integer.
    """
    device = next((c.device for c in counters if isinstance(c, Tensor)), torch.device("cpu"))
    state = torch.zeros((), dtype=torch.int64, device=device)
    for counter in counters:
        state = _splitmix(state ^ counter)
    return state


def bounded(hashed: Tensor, n: int | Tensor) -> Tensor:
    """Map hashes to integers in [0, n), n < 2**31; bias at most n / 2**32 per value."""
    return (_shift_right(hashed, 32) * n) >> 32


def permute(positions: Tensor, n: int, *key: int | Tensor) -> Tensor:
    """The images of `positions` (int64, each in [0, n)) under a permutation of 0..n-1.

    A Feistel network over the smallest even number of bits that holds n, walked along its cycles
    until it lands inside the domain (Black, Rogaway 2002). `key` may hold tensors that broadcast
    with `positions`: then every position goes through a permutation of its own.
    """
    key_hash = counter_hash(*key)
    if n == 1:
        return torch.zeros_like(positions ^ key_hash)
    half = ((n - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    round_keys = [_splitmix(key_hash ^ r) for r in range(_FEISTEL_ROUNDS)]

    def feistel(x: Tensor) -> Tensor:
        left, right = x >> half, x & mask
        for key in round_keys:
            left, right = right, left ^ (_splitmix(key ^ right) & mask)
        return (left << half) | right

    x = feistel(positions)
    while bool((outside := x >= n).any()):
        x = torch.where(outside, feistel(x), x)
    return x


def class_by_class(labels: Tensor, *key: int) -> Tensor:
    """All samples, those of one class after another, each in a keyed random order: int64 (N,).

    labels: int64 (N,).
    """
    size = len(labels)
    return (labels * size + permute(torch.arange(size), size, *key)).argsort()
