"""A compiled forward pass: the same training but for rounding, and the same runs on disk."""

import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner
from helpers import DIGITS, first, weights
from torch import nn

from pipeline.cli import cli
from stages.data import Splits
from stages.errors import ConfigError
from stages.settings import ModelSettings, TeacherConfig, TrainSettings
from stages.train_teacher import train_teacher
from stages.training import compiled
from stages.training.compiled import CompiledForward, check_compiler

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
    for size in range(1, 13):
        compiled.prepare_compiler(CPU, models=1)
        forward = CompiledForward(nn.Linear(3, size), 2, CPU, graphs=False)
        forward(torch.zeros(2, 3))
    assert len(compiled_models) == 12


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_is_the_run_and_goes_on_uncompiled(digits: Splits, tmp_path: Path) -> None:
    splits = Splits(first(digits.train, 70), first(digits.test, 50))  # batches of 32, 32 and 6
    config = TeacherConfig(
        data=DIGITS,
        model=ModelSettings(architecture="test_compiled:tiny"),
        train=TrainSettings(epochs=3, batch_size=32),
        augment="pad-crop:pad=2",
        device="cpu",
    )
    train_teacher(config, tmp_path / "plain", splits=splits)

    class KilledError(Exception): ...

    class KillInSecondEpoch:
        def say(self, text: str) -> None: ...
        def table(self, *_: object) -> None: ...
        def progress(self, task: str, *_: object) -> None:
            if task.startswith("epoch 2"):
                raise KilledError

    quick = msgspec.structs.replace(
        config, train=msgspec.structs.replace(config.train, compile=True)
    )
    with pytest.raises(KilledError):
        train_teacher(quick, tmp_path / "run", splits=splits, reporter=KillInSecondEpoch())
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
    forward = CompiledForward(nn.Identity(), 8, CPU, graphs=True)
    for size in (8, 8, 3, 9):
        forward.start_step()
        assert torch.equal(forward(torch.ones(size, 2)), torch.ones(size, 2))
    assert seen == [8, 8]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs a compiler: g\+\+") as caught:
        check_compiler(CPU)
    assert caught.value.remedy == "Leave --compile out."


def test_without_a_compiler_no_run_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    command = ["train-teacher", "--dataset", "digits", "--model", "resnet8", "--compile"]
    with pytest.raises(ConfigError, match="--compile needs a compiler"):
        CliRunner().invoke(
            cli,
            [*command, "--device", "cpu", "--out", str(tmp_path / "run")],
            catch_exceptions=False,
        )
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_compiled_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def compile_(*_: object, **__: object) -> object:
        def call(_: torch.Tensor) -> None:
            raise TorchDynamoException("no Triton\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(ConfigError, match=r"cannot be compiled: no Triton\nLeave --compile out"):
        CompiledForward(nn.Identity(), 1, CPU, graphs=False)(torch.ones(1))
