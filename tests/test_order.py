"""Which samples and which view an epoch shows; what is held out."""

import re

import pytest
import torch

from stages.errors import ConfigError
from stages.order import held_out, sample_order, view_order

SEEDS = range(20)


@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_sample_order_is_a_permutation(seed: int) -> None:
    for size in (2, 3, 10, 257, 1000):
        samples = torch.arange(size) * 3 + 1  # any set of samples, not just 0..N-1
        for epoch in (0, 1, 500):
            order = sample_order(samples, seed, epoch)
            assert order.dtype == torch.int64
            assert torch.equal(order.sort().values, samples)


def test_sample_order_differs_by_seed_and_epoch() -> None:
    samples = torch.arange(1000)
    orders = {
        (seed, epoch): sample_order(samples, seed, epoch) for seed in range(8) for epoch in range(8)
    }
    assert len({tuple(order.tolist()) for order in orders.values()}) == 64
    assert torch.equal(orders[3, 4], sample_order(samples, 3, 4))


def test_sample_order_is_fair() -> None:
    """The first sample of an epoch falls into each tenth about equally often: chi^2, 9 degrees."""
    firsts = torch.stack([sample_order(torch.arange(100), 0, epoch)[0] for epoch in range(120)])
    counts = torch.bincount(firsts // 10, minlength=10).double()
    assert ((counts - 12) ** 2 / 12).sum() < 33.7  # p = 1e-4


@pytest.mark.parametrize("num_views", [1, 2, 7, 25, 81])
def test_every_round_shows_every_view_once(num_views: int) -> None:
    for turn in (0, 5):
        views = [view_order(0, turn * num_views + i, num_views) for i in range(num_views)]
        assert sorted(views) == list(range(num_views))


def test_view_order_differs_by_round_and_seed() -> None:
    rounds = {
        tuple(view_order(seed, turn * 25 + i, 25) for i in range(25))
        for seed in range(4)
        for turn in range(2)
    }
    assert len(rounds) == 8


@pytest.mark.parametrize(
    ("num_samples", "fraction", "size"),
    [(1000, 0.1, 100), (1000, 0.0, 0), (997, 0.25, 249), (10, 0.8, 8), (3, 0.4, 1), (2, 0.0, 0)],
)
def test_held_out_is_disjoint_and_of_the_right_size(
    num_samples: int, fraction: float, size: int
) -> None:
    training, validation = held_out(num_samples, fraction, seed=0)
    assert len(validation) == size
    both = torch.cat([training, validation])
    assert torch.equal(both.sort().values, torch.arange(num_samples))
    for part in (training, validation):
        assert torch.equal(part, part.sort().values)


@pytest.mark.parametrize(
    ("num_samples", "fraction", "left", "out"),
    [
        *((10, 0.9, 1, 9), (10, 0.99, 0, 10), (10, 0.04, 10, 0)),
        *((1000, 0.0004, 1000, 0), (1, 0.0, 1, 0), (0, 0.0, 0, 0)),
    ],
)
def test_nothing_to_hold_out_or_nothing_left_to_train_on(
    num_samples: int, fraction: float, left: int, out: int
) -> None:
    message = f"{fraction:g} of {num_samples} samples leaves {left} for training and {out} held out"
    with pytest.raises(ConfigError, match=re.escape(f"data.val_fraction {message}")):
        held_out(num_samples, fraction, seed=0)


def test_held_out_is_a_draw_of_the_seed() -> None:
    draws = {tuple(held_out(1000, 0.1, seed)[1].tolist()) for seed in SEEDS}
    assert len(draws) == len(SEEDS)
    assert torch.equal(held_out(1000, 0.1, 7)[1], held_out(1000, 0.1, 7)[1])
    assert held_out(1000, 0.1, 0)[1].tolist() != list(range(100))  # datasets are often sorted
