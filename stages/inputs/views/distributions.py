"""Continuous distributions as tables of rounded numbers, so that no machine's libm decides.

`exp`, `log` and `lgamma` differ in their last bits between machines; rounding to a coarse grid
makes the tables the same everywhere, and what is drawn from them integer arithmetic.
"""

import functools
import itertools
import math

import torch
from torch import Tensor

GRID = 2**24
"""Probabilities and areas are drawn on this grid, which float64 holds exactly."""
MIXED = 256
"""Shares of a mixture are whole 256ths."""


@functools.cache
def log_uniform(low: float, high: float) -> Tensor:
    """1,024 values, log-uniform in [low, high], rounded to 2^-20: float64 (1024,)."""
    start, stop = math.log(low), math.log(high)
    steps = [math.exp(start + (stop - start) * (i + 0.5) / 1024) for i in range(1024)]
    return torch.tensor([round(r * 2**20) / 2**20 for r in steps], dtype=torch.float64)


@functools.cache
def folded_beta(alpha: float) -> Tensor:
    """The distribution of round(256 max(l, 1 - l)), l ~ Beta(alpha, alpha): int64 (129,).

    Entry j is P(at most 128 + j) on a grid of 2^-24. With I the regularised incomplete beta
    function, P(max(l, 1 - l) <= x) = 1 - 2 I_{1-x}(alpha, alpha) for x >= 1/2.
    """
    edges = ((MIXED - k - 0.5) / MIXED for k in range(MIXED // 2, MIXED))
    below = [round((1 - 2 * _incomplete_beta(edge, alpha)) * GRID) for edge in edges]
    return torch.tensor([*below, GRID])


def _incomplete_beta(x: float, a: float) -> float:
    """I_x(a, a) for 0 < x <= 1/2, by the series of DLMF 8.17.8; its terms are all positive."""
    total = term = 1.0
    for n in itertools.count():
        term *= x * (2 * a + n) / (a + 1 + n)
        total += term
        if term < 1e-17 * total:
            break
    front = a * math.log(x * (1 - x)) - math.log(a) + math.lgamma(2 * a) - 2 * math.lgamma(a)
    return math.exp(front) * total
