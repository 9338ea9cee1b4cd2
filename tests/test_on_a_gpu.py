"""Is everything where it must be for a step on a GPU? On one that is pretended: see there."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import first, student_of
from pretended_gpu import pretended_gpu
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

from stages.data import Splits
from stages.settings import (
    BiasMode,
    BiasSettings,
    LossSettings,
    TrainSettings,
)
from stages.train_student import student_trainer
from stages.training.run_directory import RunDirectory

CASES = [("kd", "eliminate"), ("kd", "rectify"), ("ctkd", "none"), ("lr", "none")]


def test_two_devices_cannot_be_mixed() -> None:
    with pretended_gpu():
        there = torch.ones(3).to("cuda")
        with pytest.raises(FakeTensorDeviceMismatchError):
            there * torch.arange(3.0)
        assert (there * 2).device.type == "cuda"


@pytest.mark.parametrize(("loss", "bias"), CASES)
def test_steps(
    loss: str, bias: BiasMode, small_cache: Path, digits: Splits, tmp_path: Path
) -> None:
    config = student_of(
        small_cache,
        loss=LossSettings(name=loss),
        bias=BiasSettings(mode=bias),
        train=TrainSettings(epochs=1, channels_last=False),  # fake weights change no layout
        device="cuda",
    )
    splits = Splits(first(digits.train, 300), first(digits.test, 100))
    with pretended_gpu():
        trainer = student_trainer([config], [RunDirectory(tmp_path / "run")], splits)
        learner = trainer.learner
        views = learner.start_epoch()
        for batch in trainer.stream.batches(torch.arange(200), views, 0):
            assert batch.pixels.is_cuda
            learner.step(batch)

        assert learner.position.step == 2
        assert all(total.is_cuda for total in learner.position.totals.values())


def test_the_loop_of_the_docs(
    finished_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch, on a machine where `auto` is a GPU: images, student and targets are there."""
    page = (Path(__file__).parents[1] / "docs" / "library.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (loop,) = (block for block in blocks if "CachedEpochs(" in block)
    shutil.copytree(finished_cache, tmp_path / "digits.zarr")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stages.cached_epochs.choose_device", lambda _: torch.device("cuda"))
    found: dict[str, Any] = {}
    with pretended_gpu():
        exec(compile(loop, "library.md", "exec"), found)
    assert found["loss"].is_cuda
    assert all(parameter.is_cuda for parameter in found["student"].parameters())
