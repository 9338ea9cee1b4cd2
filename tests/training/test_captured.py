"""Recorded steps: the same training as one operation at a time, and nothing asked of the host."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from helpers import AtBatch, Runs, changed, metrics, normed, student_of, terminate, weights
from simulated_graphs import simulated_graphs
from torch import Tensor, nn

from stages.cache import LogitCache
from stages.errors import ConfigError, StoppedError
from stages.objectives.losses import DEFINITIONS, Definition
from stages.settings import StudentConfig
from stages.student_checks import complete
from stages.train_student import student_trainer, train_together
from stages.training.cached_task import CachedTask
from stages.training.captured import CapturedStep
from stages.training.graphs import NoWaits, WaitError
from stages.training.objective import Student
from stages.training.run_directory import RunDirectory
from stages.training.trainer import Trainer

BATCH, EPOCHS = 32, 3  # 300 samples: nine whole batches and one of 12


def config(cache: Path, loss: str = "kd", bias: Any = "none", **changes: Any) -> StudentConfig:
    """changes: settings of training, or the model."""
    given = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 0.02} | changes
    model = given.pop("model", "helpers:normed")
    of = {"loss__name": loss, "bias__mode": bias, "model__architecture": model}
    return student_of(cache, **of, **{f"train__{key}": value for key, value in given.items()})


def log_of(run: Path) -> str:
    return (run / "log.txt").read_text()


def captured(config: StudentConfig) -> StudentConfig:
    return changed(config, train__capture=True)


def assert_same_runs(one: Path, other: Path) -> None:
    """To rounding: on the device the rate is float32."""
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(other)[name], tensor, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        for key in mine.keys() - {"seconds", "images_per_second", "wait_seconds"}:
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4, abs=1e-6), key


CASES: dict[str, dict[str, Any]] = {
    "hard labels": {"loss": "ce"},
    "kd, multistep": {"schedule": "multistep", "milestones": (1,)},
    "kd, eliminated, without momentum": {"bias": "eliminate", "momentum": 0.0},
    "dkd, rectified, the dynamic loss": {"loss": "dkd", "bias": "rectify"},
    "adam, onecycle": {"optimizer": "adam", "lr": 1e-3, "schedule": "onecycle"},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", CASES)
def test_launches_of_a_recorded_step_train_as_steps_do(name: str, small_runs: Runs) -> None:
    """30 steps of three epochs: other batches, views, targets, rates and weights in each."""
    plain = config(small_runs.cache, **CASES[name])
    with simulated_graphs() as launches:
        run = small_runs.trained(captured(plain))
        assert launches() == 2 * 9 * EPOCHS  # the batch, the step; the last batch is smaller
    assert_same_runs(small_runs.plain(plain), run)


def recordable(definition: Definition) -> bool:
    return not definition.on_host and definition.views == 1


@pytest.fixture(scope="module")
def my_trainer(small_runs: Runs) -> Iterator[Trainer]:
    """Of a student whose steps are recorded, with the targets of a rectification."""
    with simulated_graphs():
        student = captured(config(small_runs.cache, bias="rectify"))
        trainer = student_trainer(
            [student], [RunDirectory(small_runs.folder / "own")], small_runs.splits
        )
        trainer.learner.start_epoch()
    yield trainer
    trainer.close()


def put_to(trainer: Trainer, student: Student) -> tuple[CapturedStep, tuple[int, ...]]:
    """Another task for the trainer's learner; its step, and the views of an epoch."""
    learner = trainer.learner
    before: Any = learner.task
    task = CachedTask(student, before._schedule, before._reader, trainer.stream.labels)
    assert learner._capture is not None
    learner.task = task
    views = learner.start_epoch()
    assert task.keep_in_place() is None
    return learner._capture._step, views


@pytest.mark.parametrize(
    ("loss", "bias"),
    [
        *((name, "none") for name, d in DEFINITIONS.items() if recordable(d)),
        *(("dkd", bias) for bias in ("eliminate", "rectify", "correct")),
    ],
)
def test_no_step_asks_the_host(
    loss: str, bias: str, small_cache: Path, my_trainer: Trainer
) -> None:
    """No value, no shape that depends on values; and every step calls the same operations, with
    results of the same shapes.
    """
    student = complete(config(small_cache, loss, bias), LogitCache.open(small_cache))
    step, views = put_to(my_trainer, student)
    batches, steps = my_trainer.stream.batches(torch.arange(300), views, 0), []
    step.learn(next(batches))  # an optimiser begins with states
    for _ in range(3):
        batch = next(batches)
        with NoWaits() as called:
            step.learn(batch)
        steps.append(called.operations)
    my_trainer.learner.position.totals.clear()
    assert steps[0] == steps[1] == steps[2]
    assert any("_fused_sgd" in name for name, _ in steps[0])


PLANTED: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda rows: rows * (1.0 if rows.max().item() > 0 else 0.5),
    "masked": lambda rows: rows + 0 * rows[rows > 0].sum(),
    "nonzero": lambda rows: rows + 0 * rows.nonzero().sum(),
    "bool": lambda rows: rows if (rows > 1e9).any() else rows * 1.0,
}


def plant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `kd` ask the host for something that changes nothing."""
    kd = DEFINITIONS["kd"]

    def planted(*arguments: Any, reduction: str = "mean", **more: Any) -> Tensor:
        rows = PLANTED[name](kd.loss(*arguments, reduction="none", **more))
        return rows.mean() if reduction == "mean" else rows

    planted.__signature__ = inspect.signature(kd.loss)  # type: ignore[attr-defined]
    monkeypatch.setitem(DEFINITIONS, "kd", dataclasses.replace(kd, loss=planted))


@pytest.mark.parametrize("name", PLANTED)
def test_a_step_that_asks_the_host_is_found(
    name: str, small_cache: Path, my_trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the trial leaves all that a step changes as it was."""
    plant(name, monkeypatch)
    step, views = put_to(my_trainer, complete(config(small_cache), LogitCache.open(small_cache)))
    batch = next(my_trainer.stream.batches(torch.arange(300), views, 0))
    step.learn(batch)
    my_trainer.learner.position.totals.clear()
    before = {name: tensor.clone() for name, tensor in step._changes().items()}
    with pytest.raises(WaitError):
        step(batch)
    after = step._changes()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_loss_that_asks_the_host_is_trained_as_ever(
    small_runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = config(small_runs.cache, epochs=1)
    expected = small_runs.plain(plain)
    plant("item", monkeypatch)
    with simulated_graphs() as launches:
        run = small_runs.trained(captured(plain))
        assert launches() == 9  # the batches alone
    assert_same_runs(expected, run)
    assert "steps are not recorded" in log_of(run)


def test_without_a_gpu_it_is_refused(small_runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CUDA graphs, the device is cpu") as caught:
        small_runs.trained(captured(config(small_runs.cache)), tmp_path / "run")
    assert caught.value.remedy == "Leave --capture out."
    assert not (tmp_path / "run").exists()


NOT_RECORDED: dict[str, tuple[dict[str, Any], str]] = {
    "float16": ({"dtype": "float16"}, "float16 scales its gradients"),
    "dropout": ({"model": "test_captured:dropping"}, "a random number of the host waits"),
}


def dropping(num_classes: int) -> nn.Module:
    """On the CPU its random numbers are the host's."""
    return nn.Sequential(normed(num_classes), nn.Dropout(0.1))


@pytest.mark.parametrize("name", NOT_RECORDED)
def test_what_cannot_be_recorded_is_said_and_trained_as_ever(name: str, small_runs: Runs) -> None:
    given, reason = NOT_RECORDED[name]
    plain = config(small_runs.cache, **{"epochs": 1} | given)
    with simulated_graphs():
        run = small_runs.trained(captured(plain))
    assert_same_runs(small_runs.plain(plain), run)
    assert reason in log_of(run)


def eagerly(function: Any, **_: object) -> Any:
    """In place of torch.compile: traced as it does it, and run one operation at a time."""
    return dynamo.optimize("eager", dynamic=False)(function)


@pytest.mark.slow
def test_compiled_steps_are_recorded(small_runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and loss are traced in the trial steps; the launches are those of a plain step."""
    given = CASES["dkd, rectified, the dynamic loss"]
    monkeypatch.setattr(torch, "compile", eagerly)
    with simulated_graphs() as launches:
        both = config(small_runs.cache, **given, epochs=1, capture=True, compile=True)
        run = small_runs.trained(both)
        assert launches() == 2 * 9
    assert_same_runs(small_runs.plain(config(small_runs.cache, **given, epochs=1)), run)


def test_what_cuda_does_not_record_is_said_and_trained_as_ever(
    small_runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where compiled code, which is not looked into, copies to the host."""
    plain, calls = config(small_runs.cache, epochs=1), itertools.count(1)
    with simulated_graphs():
        record = torch.cuda.graph

        @contextmanager
        def refuses(graph: Any, **more: Any) -> Iterator[None]:
            with record(graph, **more):
                yield
            if next(calls) == 2:  # the first is that of the batches
                raise RuntimeError("operation not permitted when stream is capturing\nand more")

        monkeypatch.setattr(torch.cuda, "graph", refuses)
        run = small_runs.trained(captured(plain))
        monkeypatch.undo()
    assert_same_runs(small_runs.plain(plain), run)
    why = "steps are not recorded: CUDA does not record them: operation not permitted"
    assert why in log_of(run)
    assert "and more" not in log_of(run)


@pytest.mark.parametrize(("optimizer", "first_captured"), [("adam", True), ("sgd", False)])
def test_a_run_goes_on_with_and_without(
    optimizer: str, first_captured: bool, small_runs: Runs
) -> None:
    """Stopped in the middle of its second epoch."""
    plain = config(small_runs.cache, epochs=2, optimizer=optimizer, lr=1e-3)
    ways = [captured(plain), plain] if first_captured else [plain, captured(plain)]
    run = small_runs.folder / optimizer
    with simulated_graphs():
        with pytest.raises(StoppedError):
            small_runs.trained(ways[0], run, reporter=AtBatch(14, terminate))
        small_runs.trained(ways[1], run, resume=True)
    assert_same_runs(small_runs.plain(plain), run)


def test_students_together(small_runs: Runs) -> None:
    """Each is a graph of its own on the batch that they share; one of them cannot be recorded."""
    students = [
        config(small_runs.cache, epochs=1),
        config(small_runs.cache, "dkd", "rectify", epochs=1, lr=0.05),
        config(small_runs.cache, "ctkd", epochs=1),
    ]
    outs = [small_runs.folder / f"together{number}" for number in range(3)]
    with simulated_graphs() as launches:
        train_together([captured(s) for s in students], outs, splits=small_runs.splits)
        assert launches() == (1 + 2) * 9
    assert "the loss 'ctkd' takes steps on the host" in log_of(outs[2])
    for student, out in zip(students, outs, strict=True):
        assert_same_runs(small_runs.plain(student), out)
