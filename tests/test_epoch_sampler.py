"""Which samples an epoch shows, against what the trainer shows, alone and on several ranks."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import DIGITS, student_of, weights
from torch.utils.data import DataLoader, TensorDataset

from stages import CachedDataset, CachedEpochs, EpochSampler
from stages.data import Splits
from stages.device import place
from stages.distributed import Ranks
from stages.errors import ConfigError
from stages.inputs.feed import ViewFeed
from stages.inputs.models import build_model
from stages.objectives.losses import kd
from stages.settings import StudentConfig
from stages.train_student import rank_trainer, train_student
from stages.training.run_directory import RunDirectory

EPOCHS, BATCH = 4, 100


@pytest.fixture(scope="module")
def my_dataset(finished_cache: Path) -> CachedDataset:
    """1,000 samples, 3 views, chunks that four ranks can share."""
    return CachedDataset(finished_cache)


def student(cache: Path, seed: int = 0) -> StudentConfig:
    given = {"train__epochs": EPOCHS, "train__schedule": "constant"}
    return student_of(cache, seed__data=seed, **given)


def epoch_of(sampler: EpochSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_a_plain_loop_ends_where_train_student_ends(
    finished_cache: Path, digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, views_of = list[list[int]](), ViewFeed.views_of

    def spied(feed: ViewFeed, parts: Any, views: Any) -> Any:
        if len(order := torch.cat([*parts])) == 1000:  # not the test split
            shown.extend((1000 * view + order).tolist() for view in views)
        return views_of(feed, parts, views)

    with monkeypatch.context() as patch:
        patch.setattr(ViewFeed, "views_of", spied)
        train_student(student(finished_cache, seed=5), tmp_path / "run", splits=digits)
    assert digits.train.images is not None
    own = TensorDataset(digits.train.images, digits.train.labels)  # the user's own dataset object
    dataset = CachedDataset(finished_cache, own)
    dataset.transform = dataset.normalise(channels=3)  # as models of the user's own are given them
    sampler = EpochSampler(dataset, seed=5)
    loader = DataLoader(dataset, BATCH, sampler=sampler)
    assert [epoch_of(sampler, epoch) for epoch in range(EPOCHS)] == shown
    torch.manual_seed(0)
    net = place(build_model("helpers:plain", 10, 1).module, torch.device("cpu"))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True
    )
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        net.train()
        for batch in loader:
            logits = net(batch.images)
            soft = kd(logits, batch.teacher_logits, batch.labels, temperature=4, reduction="none")
            loss = 0.1 * F.cross_entropy(logits, batch.labels) + 0.9 * soft.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    ours, theirs = net.state_dict(), weights(tmp_path / "run")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ranks_have_disjoint_samples(my_dataset: CachedDataset) -> None:
    samplers = [EpochSampler(my_dataset, 1, rank, 3) for rank in range(3)]
    for epoch in range(3):
        parts = [epoch_of(sampler, epoch) for sampler in samplers]
        assert {len(part) for part in parts} == {len(sampler) for sampler in samplers}
        together = [index for part in parts for index in part]
        assert len(set(together)) == len(together) > 900
        assert {index // 1000 for index in together} == {samplers[0].view(epoch)}


def test_samples_held_out_are_not_shown(my_dataset: CachedDataset) -> None:
    sampler = EpochSampler(my_dataset, val_fraction=0.25)
    shown = {index % 1000 for index in sampler}
    assert shown == {*sampler.samples.tolist()}
    assert {*range(1000)} - shown == {*sampler.held_out.tolist()}
    assert len(sampler) == len(shown) == 750


def in_two_processes(folder: Path, work: Callable[[Ranks], Any]) -> list[Any]:
    """What two forks of this process return that are connected with gloo."""
    children = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            try:
                store = dist.FileStore(str(folder / "store"), 2)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
                (folder / str(rank)).write_text(json.dumps(work(Ranks(rank, 2, rank))))
            finally:
                os._exit(0)  # whoever failed has left no file
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]


def test_two_gloo_ranks_see_what_train_student_shows_them(
    my_dataset: CachedDataset, finished_cache: Path, digits: Splits, tmp_path: Path
) -> None:
    sampler = EpochSampler(my_dataset, seed=2)  # made before there is a process group
    assert len(sampler) == 1000
    loader = DataLoader(my_dataset, BATCH // 2, sampler=sampler)
    epochs = CachedEpochs(CachedDataset(finished_cache, DIGITS), BATCH // 2, seed=2, device="cpu")

    def seen(ranks: Ranks) -> list[list[list[int]]]:
        config, out = student(finished_cache, seed=2), tmp_path / "run"
        cpu = torch.device("cpu")
        trainer = rank_trainer([config], [RunDirectory(out)], cpu, ranks, digits)
        shown = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            batches = [*loader]
            for batch, fast in zip(batches, epochs.epoch(epoch), strict=True):
                assert torch.equal(batch.samples, fast.samples)
                assert torch.equal(batch.teacher_logits, fast.teacher_logits)
            ours = torch.cat([batch.samples for batch in batches])
            theirs = trainer.stream.order(trainer.stream.samples, 2, epoch)
            shown.append([ours.tolist(), theirs.tolist()])
        return shown

    first, second = in_two_processes(tmp_path, seen)
    for (ours, theirs), (others, others_theirs) in zip(first, second, strict=True):
        assert ours == theirs
        assert others == others_theirs
        assert not {*ours} & {*others}
        assert len(ours) == len(others) > 450


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_goes_on_where_it_was_left(my_dataset: CachedDataset, world: int) -> None:
    def made() -> EpochSampler:
        return EpochSampler(my_dataset, 4, world - 1, world)

    whole = [epoch_of(made(), epoch) for epoch in (2, 3)]
    left = made()
    left.set_epoch(2)
    loader = DataLoader(my_dataset, 64, sampler=left, num_workers=0)
    batches = iter(loader)
    before = [int(i) for _ in range(3) for i in next(batches).samples]
    again = made()
    again.load_state_dict(json.loads(json.dumps(left.state_dict())))
    assert again.epoch == 2
    again.set_epoch(2)
    after = [index % 1000 for index in again]
    assert before + after == [index % 1000 for index in whole[0]]
    assert list(again) == whole[0]  # only the pass that was interrupted is short
    assert epoch_of(again, 3) == whole[1]


def test_a_state_may_be_what_the_loop_has_done(my_dataset: CachedDataset) -> None:
    sampler, other = EpochSampler(my_dataset), EpochSampler(my_dataset)
    whole = epoch_of(sampler, 1)  # workers would read ahead like this
    other.load_state_dict(sampler.state_dict(position=640))
    assert list(other) == whole[640:]
    state = sampler.state_dict()
    assert (state["epoch"], state["position"]) == (2, 0)


def test_what_is_refused(my_dataset: CachedDataset) -> None:
    """The state of another order, and ranks that cannot be."""
    state = EpochSampler(my_dataset).state_dict()
    others: dict[str, dict[str, Any]] = {
        "seed": {"seed": 1},
        "world": {"rank": 0, "world": 2},
        "samples": {"val_fraction": 0.1},
    }
    for message, given in others.items():
        with pytest.raises(ConfigError, match=message):
            EpochSampler(my_dataset, **given).load_state_dict(state)
    ranks: list[dict[str, int]] = [{"rank": 2, "world": 2}, {"rank": -1, "world": 2}, {"rank": 0}]
    for of_rank in ranks:
        with pytest.raises(ConfigError):
            EpochSampler(my_dataset, **of_rank)
