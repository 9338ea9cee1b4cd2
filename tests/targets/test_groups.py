"""Epochs in groups of chunks: every sample once, group by group, a function of the seed."""

import pytest
import torch
from torch import Tensor

from stages.order import sample_order
from stages.targets.chunks import ChunkGroups

ROWS, CHUNK = 97, 10  # nine chunks of 10 and one of 7


def groups(most: int, rows: int = ROWS, chunk: int = CHUNK) -> ChunkGroups:
    row_of = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    return ChunkGroups(row_of, chunk, most)


def runs_of(cut: ChunkGroups, seed: int, epoch: int) -> list[int]:
    """How many samples each group has, in order."""
    return [len(group_rows(cut, chunks)) for chunks in cut.chunks(seed, epoch)]


def group_rows(cut: ChunkGroups, chunks: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(run.start, run.stop) for run in cut.runs(chunks)])


@pytest.mark.parametrize("most", [1, 3, 4, 10])
def test_every_chunk_is_in_one_group(most: int) -> None:
    cut = groups(most)
    assert cut.num_chunks == 10
    for epoch in range(5):
        drawn = cut.chunks(0, epoch)
        assert len(drawn) == cut.num_groups == -(-10 // most)
        assert sorted(chunk for group in drawn for chunk in group) == list(range(10))
        sizes = {len(group) for group in drawn}
        assert max(sizes) <= most
        assert max(sizes) - min(sizes) <= 1
        assert all(list(group) == sorted(group) for group in drawn)


def test_runs_are_whole_chunks() -> None:
    assert groups(3).runs((0, 4, 9)) == [slice(0, 10), slice(40, 50), slice(90, 97)]


@pytest.mark.parametrize("most", [1, 3, 9])
def test_the_order_goes_group_by_group(most: int) -> None:
    cut, epoch = groups(most), 7
    order = cut.order(torch.arange(ROWS), 3, epoch)
    assert torch.equal(order.sort().values, torch.arange(ROWS))
    assert torch.equal(cut.group_of(3, epoch)[order], cut.group_of(3, epoch).sort().values)
    for chunks, samples in zip(
        cut.chunks(3, epoch), order.split(runs_of(cut, 3, epoch)), strict=True
    ):
        assert torch.equal(cut.row_of[samples].sort().values, group_rows(cut, chunks))


def test_samples_are_shuffled_within_a_group() -> None:
    cut, samples = groups(5), torch.arange(ROWS)
    order = cut.order(samples, 0, 0)
    chunks = cut.chunk_of[order[: runs_of(cut, 0, 0)[0]]]
    assert (chunks[1:] != chunks[:-1]).float().mean() > 0.5  # not chunk by chunk
    assert torch.equal(groups(10).order(samples, 5, 6), sample_order(samples, 5, 6))  # one group


def test_held_out_samples_are_absent() -> None:
    cut, samples = groups(3), torch.arange(0, ROWS, 3)
    order = cut.order(samples, 0, 2)
    assert torch.equal(order.sort().values, samples)
    assert torch.equal(cut.group_of(0, 2)[order], cut.group_of(0, 2)[samples].sort().values)


def test_the_order_is_a_function_of_seed_epoch_and_size() -> None:
    samples = torch.arange(ROWS)
    orders = {
        (most, seed, epoch): tuple(groups(most).order(samples, seed, epoch).tolist())
        for most in (2, 3)
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == 32
    assert orders[3, 2, 1] == tuple(groups(3).order(samples, 2, 1).tolist())


def test_chunks_meet_other_chunks() -> None:
    """In 100 epochs each pair of chunks shares a group about equally often: chi^2, 44 degrees."""
    cut, together = groups(5), torch.zeros(10, 10)
    for epoch in range(100):
        for group in cut.chunks(0, epoch):
            for chunk in group:
                together[chunk, list(group)] += 1
    pairs = together[*torch.triu_indices(10, 10, offset=1)]
    expected = 100 * 4 / 9
    assert pairs.mean().item() == pytest.approx(expected)
    assert ((pairs - expected) ** 2 / expected).sum() < 96  # p = 1e-5


@pytest.mark.parametrize(("most", "least"), [(1, 7), (3, 17), (5, 47)])
def test_the_smallest_group(most: int, least: int) -> None:
    cut = groups(most)
    assert cut.smallest(torch.arange(ROWS)) == least
    assert min(min(runs_of(cut, 0, epoch)) for epoch in range(40)) == least
