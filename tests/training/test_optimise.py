"""Learning rates at given steps against values worked out by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, MultiStepLR, OneCycleLR

from stages.errors import ConfigError
from stages.settings import TrainSettings
from stages.training.optimise import Schedule, make_optimizer, restore_optimizer

STEPS = 5  # an epoch


def rates(settings: TrainSettings, steps_per_epoch: int = STEPS) -> list[float]:
    """The rate of every step of a run, and the one after the last."""
    optimizer = make_optimizer(nn.Linear(1, 1), settings)
    schedule, found = Schedule(optimizer, settings, steps_per_epoch), list[float]()
    for _ in range(settings.epochs * steps_per_epoch):
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    return [*found, optimizer.param_groups[0]["lr"]]


def torchs(settings: TrainSettings) -> tuple[torch.optim.Optimizer, Any]:
    """An optimiser and torch's own scheduler of it, as earlier versions made them."""
    optimizer, total = make_optimizer(nn.Linear(1, 1), settings), settings.epochs * STEPS
    if settings.schedule == "multistep":
        milestones = [epoch * STEPS for epoch in settings.milestones]
        return optimizer, MultiStepLR(optimizer, milestones, settings.gamma)
    if settings.schedule == "cosine":
        return optimizer, CosineAnnealingLR(optimizer, total)
    if settings.schedule == "onecycle":
        share = min(max(settings.warmup, 2 / total), 1 - 1 / total)
        once = OneCycleLR(optimizer, settings.lr, total, pct_start=share, cycle_momentum=False)
        return optimizer, once
    return optimizer, ConstantLR(optimizer, factor=1.0)


SCHEDULES = {
    "constant": {},
    "multistep": {"milestones": (1, 3, 3, 9), "gamma": 0.3},
    "multistep from the start": {"schedule": "multistep", "milestones": (0, 2)},
    "cosine": {},
    "onecycle": {"warmup": 0.21},
    "onecycle, no warmup": {"schedule": "onecycle", "warmup": 0.0},
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("lr", "epochs"), [(0.1, 7), (0.05, 60), (3e-4, 1)])
def test_every_rate_is_torchs(name: str, lr: float, epochs: int) -> None:
    """Bit for bit; and runs go on from what torch's scheduler has kept."""
    given: dict[str, Any] = {"schedule": name, **SCHEDULES[name]}
    settings = TrainSettings(lr=lr, epochs=epochs, **given)
    optimizer, scheduler = torchs(settings)
    resumed = Schedule(make_optimizer(nn.Linear(1, 1), settings), settings, STEPS)
    expected = []
    for step in range(settings.epochs * STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        if step == 3:
            resumed.load_state_dict(scheduler.state_dict())
        optimizer.step()
        scheduler.step()
    expected.append(optimizer.param_groups[0]["lr"])
    assert rates(settings) == expected
    assert resumed.upcoming(len(expected) - 3) == expected[3:]
    assert resumed.rate == expected[3]


def test_multistep_lowers_the_rate_after_its_milestones() -> None:
    """Milestones 3 and 5: epochs 1 to 3 at 1, 4 and 5 at 0.1, from 6 on at 0.01."""
    settings = TrainSettings(epochs=8, lr=1.0, schedule="multistep", milestones=(3, 5))
    by_epoch = [1.0] * 3 + [0.1] * 2 + [0.01] * 3
    expected = [rate for rate in by_epoch for _ in range(STEPS)]
    assert rates(settings)[:-1] == pytest.approx(expected)


@pytest.mark.parametrize("steps", range(1, 13))
def test_onecycle_of_any_length_never_divides_by_zero(steps: int) -> None:
    every_warmup = {share / 24 for share in range(25)} | {part / steps for part in range(steps + 1)}
    for warmup in sorted(every_warmup):
        settings = TrainSettings(epochs=1, lr=0.3, schedule="onecycle", warmup=warmup)
        every = rates(settings, steps_per_epoch=steps)[:-1]
        assert len(every) == steps
        assert all(0 < rate <= 0.3 + 1e-9 for rate in every), warmup


KINDS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@pytest.mark.parametrize("name", KINDS)
def test_optimizers_take_the_settings(name: Any) -> None:
    """And leave frozen parameters out; SGD alone minds that Nesterov needs momentum."""
    module = nn.Linear(1, 1)
    module.bias.requires_grad_(False)
    given = {"optimizer": name, "nesterov": True, "lr": 0.02, "weight_decay": 3e-4}
    optimizer = make_optimizer(module, TrainSettings(momentum=0.8, **given))
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, KINDS[name])
    assert (group["lr"], group["weight_decay"]) == (0.02, 3e-4)
    assert [id(p) for p in group["params"]] == [id(module.weight)]
    if name == "sgd":
        assert (group["momentum"], group["nesterov"]) == (0.8, True)
        with pytest.raises(ConfigError, match=r"train\.nesterov needs a train\.momentum above 0"):
            TrainSettings(momentum=0.0, **given)
    else:
        TrainSettings(momentum=0.0, **given)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_run_that_began_with_other_kernels_goes_on_with_them(name: Any, half: bool) -> None:
    """Checkpoints from before `fused`: the same bits as if nothing had changed."""
    settings = TrainSettings(optimizer=name, lr=0.1)
    modules = [nn.Linear(7, 5) for _ in range(2)]
    given = {"momentum": 0.9} if name == "sgd" else {}
    before: Any = KINDS[name](modules[0].parameters(), lr=0.1, weight_decay=5e-4, **given)
    now = make_optimizer(modules[1], settings)
    assert now.param_groups[0]["fused"]
    modules[1].load_state_dict(modules[0].state_dict())
    draw = torch.Generator().manual_seed(0)
    scalers = [torch.amp.GradScaler("cpu", enabled=half) for _ in range(2)]
    for step in range(6):
        if step == 3:
            modules[1].load_state_dict(modules[0].state_dict())
            restore_optimizer(now, copy.deepcopy(before.state_dict()))
        for scaler in scalers:
            scaler.scale(torch.ones(1))
        for one, other in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=draw)
            other.grad = one.grad.clone()
        for scaler, optimizer in zip(scalers, (before, now), strict=True):
            scaler.step(optimizer)
            scaler.update()
    for one, other in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(one, other)
