"""Distillation that is switched off: when, what the loss is then, what a resumed run does."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    AtBatch,
    Runs,
    Words,
    assert_same_runs,
    changed,
    metrics,
    student_of,
    terminate,
    weights,
)
from simulated_graphs import simulated_graphs

from pipeline.config import read_config
from stages.cache import LogitCache
from stages.errors import ConfigError, RunError, StoppedError
from stages.order import held_out
from stages.settings import LossSettings, StudentConfig
from stages.student_checks import complete
from stages.train_student import train_together
from stages.training.until import Until, top1_on, until_of

EPOCHS, HELD_OUT = 4, 0.3


def config(cache: Path, until: Any, **changes: Any) -> StudentConfig:
    given = {"loss__until": until, "loss__ce_weight": 0.5, "data__val_fraction": HELD_OUT}
    given |= {"train__epochs": EPOCHS, "train__batch_size": 32, "train__lr": 0.02}
    return student_of(cache, **given | changes)


def lines_of(*val_top1: float) -> list[dict[str, float]]:
    return [{"epoch": epoch, "val_top1": value} for epoch, value in enumerate(val_top1)]


@pytest.mark.parametrize(
    ("epochs", "share", "on"),
    [(4, 0.5, 2), (5, 0.5, 3), (30, 0.1, 3), (3, 0.01, 1), (3, 0.99, 3), (8, 5.0, 5), (3, 9.0, 9)],
)
def test_a_number_of_epochs_or_a_share(epochs: int, share: float, on: int) -> None:
    """The term is there as long as epoch / epochs is below the share; or in so many epochs."""
    until = until_of(config(Path("cache"), share, train__epochs=epochs))
    assert until is not None
    for done in range(epochs + 1):
        assert until.on_epochs(lines_of(*[0.0] * done)) == (on if done >= on else None)


@pytest.mark.parametrize(
    ("val_top1", "on"),
    [((), None), ((0.5, 0.6), None), ((0.7,), 1), ((0.6, 0.61, 0.2), 2), ((0.2, 0.9, 0.95), 2)],
)
def test_once_the_student_is_better_it_stays_off(
    val_top1: tuple[float, ...], on: int | None
) -> None:
    until = Until(None, 0.6, "CE")
    assert until.on_epochs(lines_of(*val_top1)) == on
    assert (until.message(lines_of(*val_top1)) is None) is (on is None)


def test_what_the_teacher_has_right(small_cache: Path) -> None:
    """By a loop over its stored answers, sample by sample."""
    cache = LogitCache.open(small_cache)
    _, samples = held_out(300, HELD_OUT, 0)
    right = 0
    for view in range(2):
        answers = cache.predictions(view).tolist()
        for sample in samples.tolist():
            row = cache.dataset_index.tolist().index(sample)
            right += answers[row] == int(cache.labels[sample])
    assert top1_on(cache, samples, [0, 1]) == pytest.approx(right / (2 * len(samples)))


def test_a_student_that_is_as_good_is_not_better(small_cache: Path) -> None:
    """Both shares are numbers of one precision: a third is no more than a third."""
    cache = LogitCache.open(small_cache)
    right = cache.predictions(0)[cache.row_of] == cache.labels
    samples = torch.cat([right.nonzero()[:1], (~right).nonzero()[:2]]).squeeze(1)
    same = float(torch.tensor(1) / torch.tensor(3))
    assert same != 1 / 3
    assert Until(None, top1_on(cache, samples, [0]), "").on_epochs(lines_of(same)) is None


@pytest.mark.parametrize("given", [0.5, "0.5", "5e-1"])
def test_a_number_is_one_setting_however_it_is_spelled(given: Any) -> None:
    assert LossSettings(until=given) == LossSettings(until=0.5)
    flags = {"cache": "c", "data.dataset": "digits", "model.architecture": "resnet8"}
    assert read_config(StudentConfig, None, {**flags, "loss.until": given}, ()).loss.until == 0.5


@pytest.mark.parametrize("given", [0, -1, 2.5, "late", "nan", "inf"])
def test_what_it_cannot_be(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"loss\.until must be"):
        LossSettings(until=given)


REFUSED: dict[str, dict[str, Any]] = {
    "held-out samples, and none are held out": {"data__val_fraction": 0.0},
    "several are averaged": {"also": ("other.zarr",)},
    "leaves nothing to learn from": {"loss__name": "la", "loss__ce_weight": None},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message: str, small_cache: Path) -> None:
    cache = LogitCache.open(small_cache)
    with pytest.raises(ConfigError, match=message) as refused:
        complete(config(small_cache, "beats-teacher", **REFUSED[message]), cache)
    assert refused.value.remedy
    hard_labels = complete(config(small_cache, 1, loss__name="ce"), cache)
    assert hard_labels.config.loss.until is None  # nothing to switch off


@pytest.fixture
def my_run(small_runs: Runs) -> Path:
    """A student that beats its teacher half-way. Read only."""
    return small_runs.plain(config(small_runs.cache, "beats-teacher"))


def test_it_is_switched_off_after_the_first_epoch_that_is_better(
    my_run: Path, small_runs: Runs
) -> None:
    lines, said = metrics(my_run), (my_run / "log.txt").read_text()
    _, samples = held_out(300, HELD_OUT, 0)
    teacher = top1_on(LogitCache.open(small_runs.cache), samples, [0, 1])
    on = 1 + next(line["epoch"] for line in lines if line["val_top1"] > teacher)
    assert 0 < on < EPOCHS
    assert [line["weight_loss"] for line in lines] == [0.9] * on + [0.0] * (EPOCHS - on)
    assert {line["teacher_val_top1"] for line in lines} == {teacher}
    assert said.count(f"no distillation after epoch {on}") == 1


CASES: dict[str, dict[str, Any]] = {
    "rectified, the dynamic loss": {"bias__mode": "rectify"},
    "corrected": {"bias__mode": "correct"},
    "of coupled rows": {"loss__name": "dist"},
    "in groups": {"slab_memory": "20kB"},
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_is_cross_entropy(name: str, small_runs: Runs) -> None:
    for line in metrics(small_runs.plain(config(small_runs.cache, 2, **CASES[name]))):
        rest = line["loss"] - 0.5 * line["loss_ce"]
        if line["epoch"] < 2:
            assert abs(rest) > 1e-4
        else:
            assert rest == pytest.approx(0, abs=1e-6)


def test_the_weights_are_those_of_a_loop(small_runs: Runs, tmp_path: Path) -> None:
    """An epoch as without it, then w - lr (g / 2 + decay w) with g the gradient of CE."""
    train = {"train__schedule": "constant", "train__momentum": 0.0, "data__val_fraction": 0.0}
    student = config(small_runs.cache, 1, train__epochs=2, **train)
    plain = config(small_runs.cache, None, train__epochs=1, **train)
    trainer = small_runs.trainer(student, tmp_path / "loop")
    learner, stream = trainer.learner, trainer.stream
    learner.module.load_state_dict(weights(small_runs.plain(plain)))
    views = learner.task.start_epoch(1)
    for batch in stream.batches(stream.epoch_order(1), views, 0):
        labels = small_runs.splits.train.labels[batch.samples]
        parameters = [*learner.module.parameters()]
        ce = F.cross_entropy(learner.module(learner.normalise(batch.pixels)), labels)
        with torch.no_grad():
            for w, g in zip(parameters, torch.autograd.grad(ce, parameters), strict=True):
                w -= 0.02 * (0.5 * g + student.train.weight_decay * w)
    trainer.close()
    for name, tensor in weights(small_runs.plain(student)).items():
        torch.testing.assert_close(tensor, learner.module.state_dict()[name])


def test_recorded_steps(my_run: Path, small_runs: Runs) -> None:
    """The weight lies on the device: a recorded step reads another one in every epoch."""
    with simulated_graphs() as launches:
        run = small_runs.trained(config(small_runs.cache, "beats-teacher", train__capture=True))
        assert launches() == 2 * 6 * EPOCHS
    for name, tensor in weights(my_run).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=1e-4, atol=1e-6)
    ours, theirs = ([line["weight_loss"] for line in metrics(p)] for p in (my_run, run))
    assert ours == theirs


def test_students_together_each_by_itself(my_run: Path, small_runs: Runs, tmp_path: Path) -> None:
    outs = [tmp_path / str(at) for at in range(3)]
    students = [config(small_runs.cache, until) for until in ("beats-teacher", 1, None)]
    train_together(students, outs, splits=small_runs.splits)
    assert_same_runs(outs[0], my_run)
    assert [line["weight_loss"] for line in metrics(outs[1])] == [0.9, 0.0, 0.0, 0.0]
    assert "weight_loss" not in metrics(outs[2])[0]


def test_a_resumed_run_knows_that_it_is_off(my_run: Path, small_runs: Runs, tmp_path: Path) -> None:
    """Stopped in the middle of the first epoch without it, of seven batches."""
    student, out = config(small_runs.cache, "beats-teacher"), tmp_path / "run"
    with pytest.raises(StoppedError):
        small_runs.trained(student, out, reporter=AtBatch(16, terminate))
    words = Words()
    small_runs.trained(student, out, resume=True, reporter=words)
    assert_same_runs(out, my_run)
    assert sum("no distillation after epoch" in text for text in words.lines) == 1
    (teacher,) = {line["teacher_val_top1"] for line in metrics(out)}
    assert any(f"{teacher:.2%} of 90 held-out samples" in text for text in words.lines)


def test_more_epochs_are_refused_only_of_a_share(small_runs: Runs) -> None:
    for until in (0.5, "beats-teacher"):
        two = config(small_runs.cache, until, train__epochs=2, train__schedule="constant")
        out, more = small_runs.trained(two), changed(two, train__epochs=3)
        if until == "beats-teacher":
            small_runs.trained(more, out, resume=True)
            assert len(metrics(out)) == 3
        else:
            with pytest.raises(RunError, match="share of all of them"):
                small_runs.trained(more, out, resume=True)
