"""A student trained by several processes: the batches of one process, divided among them."""

import json
import signal
import time
from pathlib import Path

import forks
import msgspec
import pytest
import torch
from helpers import changed, metrics, same_weights, student_of, weights
from torch import Tensor

import stages.training.learner
from stages.cache import LogitCache
from stages.data import Splits, cached_policy
from stages.distributed import Ranks
from stages.errors import ConfigError
from stages.settings import BiasSettings, LossSettings, StudentConfig
from stages.student_checks import check_students, complete
from stages.targets.chunks import groups_of_ranks
from stages.train_student import student_trainer
from stages.training.learner import Learner
from stages.training.run_directory import RunDirectory
from stages.training.task import Position

EPOCHS, BATCH = 3, 100


def student(cache: Path) -> StudentConfig:
    """Without batch norm: its gradient is a mean over the batch, however divided."""
    return student_of(
        cache,
        train__epochs=EPOCHS,
        train__lr=0.2,
        loss=LossSettings(name="ctkd", ce_weight=0.5, weight=0.5),
        bias=BiasSettings(mode="rectify", schedule="ramp", reduction="batch"),
    )


def arguments(config: StudentConfig, out: Path, *more: str) -> list[str]:
    file = out.with_suffix(".json")
    file.write_text(json.dumps(msgspec.to_builtins(config)))
    return ["train-student", config.cache, "--config", str(file), "--out", str(out), *more]


@pytest.mark.parametrize("per_decode", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_learn_what_one_process_learns(
    rectified_cache: Path, digits: Splits, tmp_path: Path, per_decode: int | None
) -> None:
    config = changed(student(rectified_cache), train__views_per_decode=per_decode)
    ranks = forks.start_ranks(["-m", "pipeline", *arguments(config, tmp_path / "two")], 2)
    for rank in ranks:
        assert rank.wait(200) == 0, rank.stderr
    assert [rank.stdout.count("epoch 3/3") for rank in ranks] == [1, 0]

    # One process that is shown the same batches: the parts of both ranks, one after the other.
    cache = LogitCache.open(rectified_cache)
    groups = groups_of_ranks(cache.row_of, cache.grid.chunk_rows, 2)
    trainer = student_trainer([config], [RunDirectory(tmp_path / "one")], digits)

    def both(samples: Tensor, seed: int, epoch: int) -> Tensor:
        parts = [groups.order_of_group(g, samples, seed, epoch) for g in (0, 1)]
        batches = zip(*(part.split(BATCH // 2) for part in parts), strict=True)
        return torch.cat([half for batch in batches for half in batch])

    trainer.stream.order = both
    trainer.fit()
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name
    for alone, together in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in ("loss", "loss_ce", "loss_wrong", "wrong_rate", "lr", "view", "weight_wrong"):
            assert together[key] == pytest.approx(alone[key], rel=1e-4), key
        assert together["test_top1"] == pytest.approx(alone["test_top1"], abs=3 / 797)


@pytest.mark.slow
def test_a_killed_launch_goes_on_bit_for_bit(rectified_cache: Path, tmp_path: Path) -> None:
    train = {"train__epochs": 12, "train__batch_size": 20, "train__lr": 0.05}
    config = changed(student(rectified_cache), **train)

    def launch(out: Path, *more: str) -> list[forks.Started]:
        return forks.start_ranks(["-m", "pipeline", *arguments(config, out, *more)], 2)

    def ended(ranks: list[forks.Started]) -> None:
        assert [rank.wait(200) for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]

    ended(launch(tmp_path / "whole"))
    for stop in (signal.SIGKILL, signal.SIGTERM):
        out = tmp_path / stop.name
        ranks = launch(out)
        while not (out / "last.pt").exists():
            time.sleep(0.02)
        for rank in ranks:  # as torchrun hands it on
            rank.send_signal(stop)
        assert 0 not in [rank.wait(200) for rank in ranks]
        ended(launch(out, "--resume"))
        assert same_weights(tmp_path / "whole", out)
        for whole, resumed in zip(metrics(tmp_path / "whole"), metrics(out), strict=True):
            assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_a_checkpoint_has_the_losses_of_all_ranks(
    rectified_cache: Path, digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are added up again at the end of the epoch: the first goes on from them."""

    def at_rank(rank: int) -> Learner:
        resume = (tmp_path / "run").exists()
        learner = student_trainer(
            [student(rectified_cache)], [RunDirectory(tmp_path / "run", resume=resume)], digits
        ).learner
        learner.ranks = Ranks(rank, 2, rank)
        return learner

    monkeypatch.setattr(stages.training.learner, "summed", lambda _, mine: mine + 0.25)
    first = at_rank(0)
    first.position = Position(epoch=0, step=3, totals={"loss": torch.tensor(0.5)})
    first.run.begin()
    first.save()
    first.run.release()
    for rank, kept in ((0, 0.75), (1, 0.0)):
        learner = at_rank(rank)
        learner.restore()
        assert learner.position.step == 3
        assert float(learner.position.totals["loss"]) == kept
        learner.run.release()


@pytest.mark.parametrize(
    ("rows", "chunk", "world"), [(1000, 350, 2), (50_000, 8192, 3), (10, 4, 4)]
)
def test_ranks_take_disjoint_parts_drawn_anew(rows: int, chunk: int, world: int) -> None:
    samples = torch.arange(rows)
    row_of = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    groups = groups_of_ranks(row_of, chunk, world)
    shown, firsts = groups.smallest(samples), set[tuple[int, ...]]()
    assert shown >= rows // world - world * 20
    for epoch in range(4):
        parts = [groups.order_of_group(rank, samples, 0, epoch) for rank in range(world)]
        assert {len(part) for part in parts} == {shown}
        assert len(torch.cat(parts).unique()) == shown * world
        firsts.add(tuple(parts[0].sort().values.tolist()))
    assert len(firsts) > 1


def test_what_ranks_cannot_do(rectified_cache: Path) -> None:
    with pytest.raises(ConfigError, match="10 samples cannot be divided among 8"):
        groups_of_ranks(torch.arange(10), 4, 8)
    config, cache = student(rectified_cache), LogitCache.open(rectified_cache)
    for wanted, message in (
        (changed(config, train__batch_size=33), "33 cannot be divided among 2"),
        (changed(config, slab_memory="1GB"), "several processes"),
    ):
        chosen = complete(wanted, cache)
        with pytest.raises(ConfigError, match=message):
            check_students([chosen], [cache], cached_policy(cache), Ranks(0, 2, 0))
