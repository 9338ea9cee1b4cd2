import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.inputs.counter_hash import bounded, counter_hash, permute

MASK = 2**64 - 1
signed = st.integers(-(2**63), 2**63 - 1)


def splitmix(x: int) -> int:
    """Steele, Lea, Flood 2014, on unsigned 64-bit integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def chain(*counters: int) -> int:
    state = 0
    for counter in counters:
        state = splitmix(state ^ (counter & MASK))
    return state


def walk(position: int, n: int, *key: int) -> int:
    """A six-round Feistel network over an even number of bits, until it lands in [0, n)."""
    half = next(h for h in range(1, 32) if 4**h >= n)
    while True:
        left, right = position >> half, position % 2**half
        for r in range(6):
            mixed = splitmix(splitmix(chain(*key) ^ r) ^ right) % 2**half
            left, right = right, left ^ mixed
        position = (left << half) + right
        if position < n:
            return position


def unsigned(hashed: Tensor) -> list[int]:
    return [value & MASK for value in hashed.flatten().tolist()]


def chi_square(values: Tensor, cells: int) -> float:
    """Pearson's statistic against the uniform distribution, in standard deviations from its mean.

    The statistic's mean is the number of degrees of freedom, its variance twice that.
    """
    expected = values.numel() / cells
    counts = torch.bincount(values.flatten(), minlength=cells).double()
    freedom = cells - 1
    statistic = float(((counts - expected) ** 2).sum()) / expected
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_published_outputs() -> None:
    """The first ones of SplitMix64, seeded with 0 and with 1234567."""
    assert unsigned(counter_hash(0)) == [0xE220A8397B1DCDAF]
    assert unsigned(counter_hash(1234567)) == [6457827717110365317]


@settings(max_examples=40, deadline=None)
@given(signed, st.lists(signed, min_size=1, max_size=5), signed)
def test_equals_plain_integers(first: int, middle: list[int], last: int) -> None:
    assert unsigned(counter_hash(first, *middle)) == [chain(first, *middle)]
    hashed = counter_hash(first, torch.tensor(middle), last)
    assert unsigned(hashed) == [chain(first, m, last) for m in middle]


def test_counters_are_not_added() -> None:
    assert counter_hash(0, 1) != counter_hash(1, 0)
    assert counter_hash(0, 1) != counter_hash(1)
    grid = torch.cartesian_prod(*[torch.arange(-5, 15)] * 3)
    hashed = counter_hash(*grid.T)
    assert len(hashed.unique()) == 20**3
    for bit in (0, 1, 31, 32, 63):  # and every bit is balanced
        assert abs(float(((hashed >> bit) & 1).double().mean()) - 0.5) < 5 * 0.5 / 20**1.5


@settings(max_examples=50, deadline=None)
@given(signed, st.integers(1, 2**31 - 1))
def test_bounded_takes_the_high_bits(hashed: int, n: int) -> None:
    value = int(bounded(torch.tensor(hashed), n))
    assert 0 <= value < n
    assert value == ((hashed & MASK) >> 32) * n // 2**32


@pytest.mark.parametrize("n", [2, 7, 162, 1024])
def test_bounded_is_uniform(n: int) -> None:
    hashed = counter_hash(3, torch.arange(50_000))
    assert abs(chi_square(bounded(hashed, n), n)) < 5
    limits = torch.arange(50_000) % n + 1
    expected = [
        (value >> 32) * limit // 2**32
        for value, limit in zip(unsigned(hashed[:200]), limits.tolist(), strict=False)
    ]
    assert bounded(hashed, limits)[:200].tolist() == expected


def test_permutes_every_small_domain() -> None:
    for n in [*range(1, 70), 255, 256, 257]:
        assert permute(torch.arange(n), n, 0, 11).sort().values.tolist() == list(range(n)), n


@pytest.mark.parametrize("n", [1023, 4097, 50_000])
def test_permutes_large_domains(n: int) -> None:
    moved = permute(torch.arange(n), n, 1)
    assert torch.equal(moved.sort().values, torch.arange(n))
    assert int((moved == torch.arange(n)).sum()) < 20  # one fixed point is expected


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5000), signed, st.data())
def test_permute_equals_plain_integers(n: int, key: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4))
    moved = permute(torch.tensor(positions), n, key, 3)
    assert moved.tolist() == [walk(p, n, key, 3) for p in positions]


def test_golden_permutations() -> None:
    assert permute(torch.arange(10), 10, 0).tolist() == [7, 1, 6, 8, 3, 4, 5, 9, 0, 2]
    assert permute(torch.arange(10), 10, 1).tolist() == [7, 0, 5, 8, 9, 2, 4, 6, 1, 3]
    assert permute(torch.arange(7), 7, 5, 9).tolist() == [6, 3, 2, 5, 4, 1, 0]


def test_each_position_may_have_a_key_of_its_own() -> None:
    keys = torch.tensor([0, 1, 5, 2**40])
    together = permute(torch.arange(81).expand(4, 81), 81, 9, keys[:, None])
    for row, key in zip(together, keys.tolist(), strict=True):
        assert torch.equal(row, permute(torch.arange(81), 81, 9, key))


def test_pairs_of_images_are_uniform_over_keys() -> None:
    keys = torch.arange(60_000)
    first, second = permute(torch.arange(2)[:, None].expand(2, len(keys)), 25, 0, keys)
    cell = first * 24 + second - (second > first).long()  # 600 ordered pairs of distinct images
    assert abs(chi_square(cell, 600)) < 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu() -> None:
    samples = torch.arange(10_000)
    hashed = counter_hash(-3, 17, samples)
    assert torch.equal(counter_hash(-3, 17, samples.cuda()).cpu(), hashed)
    assert torch.equal(bounded(hashed.cuda(), 162).cpu(), bounded(hashed, 162))
    moved = permute(samples % 162, 162, 0, samples)
    assert torch.equal(permute((samples % 162).cuda(), 162, 0, samples.cuda()).cpu(), moved)
