"""Distillation that is switched off: when, what the loss is then, what a resumed run does."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DIGITS,
    AtBatch,
    Words,
    first,
    metrics,
    same_weights,
    student_of,
    terminate,
    weights,
    without_times,
)
from simulated_graphs import simulated_graphs

from pipeline.config import read_config
from stages.cache import LogitCache
from stages.data import Splits
from stages.errors import ConfigError, RunError, StoppedError
from stages.order import held_out
from stages.settings import BiasSettings, LossSettings, StudentConfig, TrainSettings
from stages.student_checks import complete
from stages.train_student import student_trainer, train_student, train_together
from stages.training.run_directory import RunDirectory
from stages.training.until import Until, top1_on, until_of

EPOCHS, HELD_OUT = 4, 0.3
DATA = msgspec.structs.replace(DIGITS, val_fraction=HELD_OUT)


@pytest.fixture(scope="module")
def my_splits(digits: Splits) -> Splits:
    return Splits(first(digits.train, 300), first(digits.test, 100))


def config(cache: Path, until: Any, mode: Any = "none", **changes: Any) -> StudentConfig:
    loss = {"name": "kd", "ce_weight": 0.5, "until": until} | changes.pop("loss", {})
    train = {"epochs": EPOCHS, "batch_size": 32, "lr": 0.02} | changes.pop("train", {})
    return student_of(
        cache,
        data=changes.pop("data", DATA),
        loss=LossSettings(**loss),
        bias=BiasSettings(mode=mode),
        train=TrainSettings(**train),
        **changes,
    )


def lines_of(*val_top1: float) -> list[dict[str, float]]:
    return [{"epoch": epoch, "val_top1": value} for epoch, value in enumerate(val_top1)]


# ---- when -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "share", "on"),
    [(4, 0.5, 2), (5, 0.5, 3), (30, 0.1, 3), (3, 0.01, 1), (3, 0.99, 3), (8, 5.0, 5), (3, 9.0, 9)],
)
def test_a_number_of_epochs_or_a_share(epochs: int, share: float, on: int) -> None:
    """The term is there as long as epoch / epochs is below the share; or in so many epochs."""
    until = until_of(config(Path("cache"), share, train={"epochs": epochs}))
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


# ---- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [0.5, "0.5", "5e-1"])
def test_a_number_is_one_setting_however_it_is_spelled(given: Any) -> None:
    assert LossSettings(until=given) == LossSettings(until=0.5)
    flags = {"cache": "c", "data.dataset": "digits", "model.architecture": "resnet8"}
    assert read_config(StudentConfig, None, {**flags, "loss.until": given}, ()).loss.until == 0.5


@pytest.mark.parametrize("given", [0, -1, 2.5, "late", "nan", "inf"])
def test_what_it_cannot_be(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"loss\.until must be"):
        LossSettings(until=given)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing held out": ({"data": DIGITS}, "held-out samples, and none are held out"),
    "several teachers": ({"also": ("other.zarr",)}, "several are averaged"),
    "nothing is left": (
        {"loss": {"name": "la", "ce_weight": None}},
        "leaves nothing to learn from",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, small_cache: Path) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as refused:
        complete(config(small_cache, "beats-teacher", **changes), LogitCache.open(small_cache))
    assert refused.value.remedy


def test_hard_labels_have_nothing_to_switch_off(small_cache: Path) -> None:
    found = complete(config(small_cache, 1, loss={"name": "ce"}), LogitCache.open(small_cache))
    assert found.config.loss.until is None


# ---- runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def my_run(
    small_cache: Path, my_splits: Splits, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A student that beats its teacher half-way, and what was said."""
    path, words = tmp_path_factory.mktemp("until") / "run", Words()
    train_student(config(small_cache, "beats-teacher"), path, splits=my_splits, reporter=words)
    return path, words.lines


def test_it_is_switched_off_after_the_first_epoch_that_is_better(
    my_run: tuple[Path, list[str]], small_cache: Path
) -> None:
    path, said = my_run
    lines = metrics(path)
    _, samples = held_out(300, HELD_OUT, 0)
    teacher = top1_on(LogitCache.open(small_cache), samples, [0, 1])
    on = 1 + next(line["epoch"] for line in lines if line["val_top1"] > teacher)
    assert 0 < on < EPOCHS
    assert [line["weight_loss"] for line in lines] == [0.9] * on + [0.0] * (EPOCHS - on)
    assert {line["teacher_val_top1"] for line in lines} == {teacher}
    message = [text for text in said if f"no distillation after epoch {on}" in text]
    assert len(message) == 1
    assert message[0] in (path / "log.txt").read_text()
    assert any(f"{teacher:.2%} of 90 held-out samples" in text for text in said)


CASES: dict[str, dict[str, Any]] = {
    "rectified, the dynamic loss": {"mode": "rectify"},
    "corrected": {"mode": "correct"},
    "of coupled rows": {"loss": {"name": "dist"}},
    "in groups": {"slab_memory": "20kB"},
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_is_cross_entropy(
    name: str, small_cache: Path, my_splits: Splits, tmp_path: Path
) -> None:
    train_student(config(small_cache, 2, **CASES[name]), tmp_path / "run", splits=my_splits)
    for line in metrics(tmp_path / "run"):
        rest = line["loss"] - 0.5 * line["loss_ce"]
        if line["epoch"] < 2:
            assert abs(rest) > 1e-4
        else:
            assert rest == pytest.approx(0, abs=1e-6)


def test_the_weights_are_those_of_a_loop(
    small_cache: Path, my_splits: Splits, tmp_path: Path
) -> None:
    """An epoch as without it, then w - lr (g / 2 + decay w) with g the gradient of CE."""
    train = {"epochs": 2, "schedule": "constant", "momentum": 0.0}
    student = config(small_cache, 1, data=DIGITS, train=train)
    found, one = tmp_path / "run", tmp_path / "one"
    train_student(student, found, splits=my_splits)
    plain = config(small_cache, None, data=DIGITS, train=train | {"epochs": 1})
    train_student(plain, one, splits=my_splits)
    trainer = student_trainer([student], [RunDirectory(tmp_path / "loop")], my_splits)
    learner, stream = trainer.learner, trainer.stream
    learner.module.load_state_dict(weights(one))
    views = learner.task.start_epoch(1)
    for batch in stream.batches(stream.epoch_order(1), views, 0):
        labels = my_splits.train.labels[batch.samples]
        parameters = [*learner.module.parameters()]
        ce = F.cross_entropy(learner.module(learner.normalise(batch.pixels)), labels)
        with torch.no_grad():
            for w, g in zip(parameters, torch.autograd.grad(ce, parameters), strict=True):
                w -= 0.02 * (0.5 * g + student.train.weight_decay * w)
    trainer.close()
    for name, tensor in weights(found).items():
        torch.testing.assert_close(tensor, learner.module.state_dict()[name])


def test_recorded_steps(
    my_run: tuple[Path, list[str]], small_cache: Path, my_splits: Splits, tmp_path: Path
) -> None:
    """The weight lies on the device: a recorded step reads another one in every epoch."""
    with simulated_graphs() as launches:
        captured = config(small_cache, "beats-teacher", train={"capture": True})
        train_student(captured, tmp_path / "run", splits=my_splits)
        assert launches() == 2 * 6 * EPOCHS
    for name, tensor in weights(my_run[0]).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, rtol=1e-4, atol=1e-6)
    ours, theirs = ([x["weight_loss"] for x in metrics(p)] for p in (my_run[0], tmp_path / "run"))
    assert ours == theirs


def test_students_together_each_by_itself(
    my_run: tuple[Path, list[str]], small_cache: Path, my_splits: Splits, tmp_path: Path
) -> None:
    outs = [tmp_path / str(at) for at in range(3)]
    students = [config(small_cache, until) for until in ("beats-teacher", 1, None)]
    train_together(students, outs, splits=my_splits)
    assert same_weights(outs[0], my_run[0])
    assert without_times(outs[0]) == without_times(my_run[0])
    assert [line["weight_loss"] for line in metrics(outs[1])] == [0.9, 0.0, 0.0, 0.0]
    assert "weight_loss" not in metrics(outs[2])[0]


def test_a_resumed_run_knows_that_it_is_off(
    my_run: tuple[Path, list[str]], small_cache: Path, my_splits: Splits, tmp_path: Path
) -> None:
    """Stopped in the middle of the first epoch without it, of seven batches."""
    student, out = config(small_cache, "beats-teacher"), tmp_path / "run"
    with pytest.raises(StoppedError):
        train_student(student, out, splits=my_splits, reporter=AtBatch(16, terminate))
    words = Words()
    train_student(student, out, resume=True, splits=my_splits, reporter=words)
    assert same_weights(out, my_run[0])
    assert without_times(out) == without_times(my_run[0])
    assert sum("no distillation after epoch" in text for text in words.lines) == 1


@pytest.mark.parametrize(("until", "goes_on"), [(0.5, False), ("beats-teacher", True)])
def test_more_epochs_are_refused_only_of_a_share(
    until: Any, goes_on: bool, small_cache: Path, my_splits: Splits, tmp_path: Path
) -> None:
    train = {"epochs": 2, "schedule": "constant"}
    out, student = tmp_path / "run", config(small_cache, until, train=train)
    train_student(student, out, splits=my_splits)
    more = config(small_cache, until, train=train | {"epochs": 3})
    if goes_on:
        train_student(more, out, resume=True, splits=my_splits)
        assert len(metrics(out)) == 3
        return
    with pytest.raises(RunError, match="share of all of them"):
        train_student(more, out, resume=True, splits=my_splits)
