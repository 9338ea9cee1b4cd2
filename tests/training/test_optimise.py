"""Learning rates at given steps against values worked out by hand."""

import copy
import math
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
    schedule = Schedule(optimizer, settings, steps_per_epoch)
    found = []
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


def test_constant() -> None:
    assert set(rates(TrainSettings(epochs=8, lr=0.3, schedule="constant"))) == {0.3}


def test_multistep_lowers_the_rate_after_its_milestones() -> None:
    """Milestones 3 and 5: epochs 1 to 3 at 1, 4 and 5 at 0.1, from 6 on at 0.01."""
    settings = TrainSettings(epochs=8, lr=1.0, schedule="multistep", milestones=(3, 5))
    by_epoch = [1.0] * 3 + [0.1] * 2 + [0.01] * 3
    expected = [rate for rate in by_epoch for _ in range(STEPS)]
    assert rates(settings)[:-1] == pytest.approx(expected)


def test_multistep_with_the_literatures_milestones() -> None:
    """240 epochs, 0.05, tenths at 150, 180, 210: the first reduced epoch is the 151st."""
    every = rates(TrainSettings(epochs=240, lr=0.05, schedule="multistep"), steps_per_epoch=2)
    first_reduced = next(i for i, rate in enumerate(every) if rate < 0.049) // 2 + 1
    assert first_reduced == 151
    assert every[-2] == pytest.approx(5e-5)


def test_cosine_ends_at_zero() -> None:
    total = 8 * STEPS
    expected = [0.3 * (1 + math.cos(math.pi * step / total)) / 2 for step in range(total + 1)]
    assert rates(TrainSettings(epochs=8, lr=0.3)) == pytest.approx(expected, abs=1e-12)
    assert expected[-1] == 0


def test_onecycle_peaks_after_its_warmup() -> None:
    every = rates(TrainSettings(epochs=8, lr=0.3, schedule="onecycle", warmup=0.25))[:-1]
    assert max(every) == pytest.approx(0.3)
    assert every.index(max(every)) == 0.25 * len(every) - 1
    assert every[0] == pytest.approx(0.3 / 25)  # torch's default start
    assert every[-1] < every[0] / 1000


@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.5, 0.99])
def test_onecycle_survives_any_warmup(warmup: float) -> None:
    every = rates(TrainSettings(epochs=8, lr=0.3, schedule="onecycle", warmup=warmup))[:-1]
    assert all(0 < rate <= 0.3 + 1e-9 for rate in every)


@pytest.mark.parametrize(
    ("epochs", "warmup"),
    [(8, 1 / 40), (1, 0.2), (8, 1.0)],
    ids=["one-step", "one-step-of-five", "whole-run"],
)
def test_onecycle_with_a_warmup_at_the_edge(epochs: int, warmup: float) -> None:
    every = rates(TrainSettings(epochs=epochs, lr=0.3, schedule="onecycle", warmup=warmup))[:-1]
    assert all(0 < rate <= 0.3 + 1e-9 for rate in every)


@pytest.mark.parametrize("steps", range(1, 13))
def test_onecycle_of_any_length_never_divides_by_zero(steps: int) -> None:
    every_warmup = {share / 24 for share in range(25)} | {part / steps for part in range(steps + 1)}
    for warmup in sorted(every_warmup):
        settings = TrainSettings(epochs=1, lr=0.3, schedule="onecycle", warmup=warmup)
        every = rates(settings, steps_per_epoch=steps)[:-1]
        assert len(every) == steps
        assert all(0 < rate <= 0.3 + 1e-9 for rate in every), warmup


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_nesterov_needs_momentum_where_sgd_uses_it(optimizer: Any, momentum: float) -> None:
    def make() -> TrainSettings:
        return TrainSettings(optimizer=optimizer, momentum=momentum, nesterov=True)

    if optimizer == "sgd" and momentum == 0:
        with pytest.raises(ConfigError, match=r"train\.nesterov needs a train\.momentum above 0"):
            make()
    else:
        group = make_optimizer(nn.Linear(1, 1), make()).param_groups[0]
        assert group.get("nesterov", True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
def test_optimizers_take_the_settings(name: str, kind: type[torch.optim.Optimizer]) -> None:
    settings = TrainSettings(optimizer=name, lr=0.02, momentum=0.8, weight_decay=3e-4)  # type: ignore[arg-type]
    group = make_optimizer(nn.Linear(1, 1), settings).param_groups[0]
    assert isinstance(make_optimizer(nn.Linear(1, 1), settings), kind)
    assert (group["lr"], group["weight_decay"]) == (0.02, 3e-4)
    if name == "sgd":
        assert (group["momentum"], group["nesterov"]) == (0.8, False)


def test_frozen_parameters_stay() -> None:
    module = nn.Linear(1, 1)
    module.bias.requires_grad_(False)
    (group,) = make_optimizer(module, TrainSettings()).param_groups
    assert [id(p) for p in group["params"]] == [id(module.weight)]


def test_sgd_step_is_the_formula() -> None:
    """v = m v + g + wd w, w = w - lr v: two steps on w^2 / 2, whose gradient is w."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    settings = TrainSettings(lr=0.1, momentum=0.5, weight_decay=0.2, schedule="constant")
    optimizer = make_optimizer(module, settings)
    weight, velocity = 1.0, 0.0
    for _ in range(2):
        optimizer.zero_grad()
        (module.weight**2 / 2).sum().backward()
        optimizer.step()
        velocity = 0.5 * velocity + weight + 0.2 * weight
        weight -= 0.1 * velocity
    assert module.weight.item() == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_run_that_began_with_other_kernels_goes_on_with_them(name: Any, half: bool) -> None:
    """Checkpoints from before `fused`: the same bits as if nothing had changed."""
    settings = TrainSettings(optimizer=name, lr=0.1)
    modules = [nn.Linear(7, 5) for _ in range(2)]
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    given = {"momentum": 0.9} if name == "sgd" else {}
    before: Any = kinds[name](modules[0].parameters(), lr=0.1, weight_decay=5e-4, **given)
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
