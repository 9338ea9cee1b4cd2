"""A compiled forward pass: the same training but for rounding, and the same runs on disk."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import AtBatch, changed, cut, student_of, teacher_of, terminate, weights
from torch import Tensor, nn

from stages.cache.targets import Targets
from stages.data import Splits
from stages.errors import ConfigError, StoppedError
from stages.inputs.feed import Batch
from stages.objectives.losses import DEFINITIONS
from stages.settings import BiasMode, LossSettings
from stages.train_teacher import train_teacher
from stages.training import passes
from stages.training.cached_task import CachedTask
from stages.training.objective import Student, student_loss
from stages.training.passes import Compiled

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
)


def tiny(num_classes: int) -> nn.Module:
    """Little to compile: three times four times four values, one layer."""
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, num_classes))


@pytest.mark.slow
def test_every_model_of_a_process_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a limit torch would leave the tenth as it is, and say nothing."""
    compiled_models = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        compiled_models.append(graph)
        return graph

    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **_: real(model, backend=backend, dynamic=False)
    )
    for size in range(1, 11):
        passes.prepare_compiler(CPU, models=1)
        forward = Compiled(nn.Linear(3, size), 2, CPU, graphs=False)
        forward(torch.zeros(2, 3))
    assert len(compiled_models) == 10


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_is_the_run_and_goes_on_uncompiled(digits: Splits, tmp_path: Path) -> None:
    splits = cut(digits, 70, 50)  # batches of 32, 32 and 6
    train = {"train__epochs": 3, "train__batch_size": 32}
    config = teacher_of(model__architecture="test_compiled:tiny", **train)
    train_teacher(config, tmp_path / "plain", splits=splits)

    quick, stop = changed(config, train__compile=True), AtBatch(4, terminate)
    with pytest.raises(StoppedError):
        train_teacher(quick, tmp_path / "run", splits=splits, reporter=stop)
    train_teacher(config, tmp_path / "run", splits=splits, resume=True)
    left, right = weights(tmp_path / "plain"), weights(tmp_path / "run")
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6)


def test_only_whole_batches_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def compile_(module: nn.Module, **_: object) -> object:
        def call(images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return module(images)

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    forward = Compiled(nn.Identity(), 8, CPU, graphs=True)
    for size in (8, 8, 3, 9):
        forward.start_step()
        assert torch.equal(forward(torch.ones(size, 2)), torch.ones(size, 2))
    assert seen == [8, 8]


def test_without_a_compiler_no_run_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(passes.shutil, "which", lambda _: None)
    config = teacher_of(train__compile=True)
    with pytest.raises(ConfigError, match=r"--compile needs a compiler: g\+\+") as caught:
        train_teacher(config, tmp_path / "run")
    assert caught.value.remedy == "Leave --compile out."
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_compiled_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def compile_(*_: object, **__: object) -> object:
        def call(_: torch.Tensor) -> None:
            raise TorchDynamoException("no Triton\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(ConfigError, match=r"cannot be compiled: no Triton\nLeave --compile out"):
        Compiled(nn.Identity(), 1, CPU, graphs=False)(torch.ones(1))


LABELS = torch.arange(12) % 5


class Lines(Targets):
    """Teacher rows, and which are wrong, made from the samples' numbers."""

    def of(self, samples: Tensor, rectified: bool = False, calibrated: bool = False) -> "Lines":
        self.samples = samples
        return self

    tempered = False

    def at(self, temperature: float = 1.0) -> Tensor:
        return 3 * torch.sin(self.samples[:, None] * torch.arange(1.0, 6.0))

    def wrong(self) -> Tensor:
        return self.at().argmax(1) != LABELS[self.samples]

    def kept(self) -> None: ...


def task_of(loss: str, bias: BiasMode) -> CachedTask:
    chosen = student_loss(LossSettings(name=loss))
    config = student_of("", loss=chosen.settings, bias__mode=bias)
    reader: Any = SimpleNamespace(of_epoch=lambda _: Lines())
    schedule: Any = SimpleNamespace(of_epoch=lambda _: (0,))
    task = CachedTask(Student(config, chosen), schedule, reader, LABELS)
    task.start_epoch(0)
    return task


@pytest.mark.parametrize(
    ("loss", "bias", "times"),
    [("kd", "none", 3), ("dkd", "rectify", 3), ("kd", "correct", 0), ("ctkd", "none", 0)],
)
def test_whole_batches_of_losses_are_compiled(
    loss: str, bias: BiasMode, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def compile_(function: Any, **_: object) -> Any:
        return lambda *given: calls.append(len(given[0])) or function(*given)

    monkeypatch.setattr(torch, "compile", compile_)
    task = task_of(loss, bias)
    task.compile(8)
    for size in (8, 8, 4, 8):
        logits = torch.cos(torch.arange(5.0 * size)).view(size, 5).requires_grad_()
        task.loss_parts(logits, Batch(torch.arange(size), torch.zeros(size, 1)))["loss"].backward()
    assert calls == [8] * times


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "bias"),
    [
        *(("kd", bias) for bias in ("eliminate", "rectify")),
        *(
            (name, "none")
            for name, definition in DEFINITIONS.items()
            if name != "ce" and not definition.on_host and definition.views == 1
        ),
    ],
)
def test_a_compiled_loss_is_the_loss(
    loss: str, bias: BiasMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is traced as one graph, and once: for both epochs."""
    graphs, real = [], torch.compile

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def compile_(function: Any, **_: object) -> Any:
        return real(function, backend=backend, dynamic=False, fullgraph=True)

    monkeypatch.setattr(torch, "compile", compile_)
    torch._dynamo.reset()
    plain, fast = task_of(loss, bias), task_of(loss, bias)
    fast.compile(8)
    for epoch, size in ((0, 8), (0, 8), (1, 8), (1, 4)):
        samples, found = torch.arange(size), []
        batch = Batch(samples, torch.zeros(size, 1))
        for task in (plain, fast):
            task.start_epoch(epoch)
            given = torch.cos(torch.arange(5.0 * size)).view(size, 5).requires_grad_()
            logits = 2 * given  # as a model's, no leaf
            parts = task.loss_parts(logits, batch)
            (gradient,) = torch.autograd.grad(parts["loss"], logits)
            found.append((parts, gradient))
        torch.testing.assert_close(found[1], found[0])
    assert len(graphs) == 1
