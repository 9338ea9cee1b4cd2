"""Weights in bfloat16 for recorded steps: the numbers of autocast, with fewer operations."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.settings import TrainSettings
from stages.training.graphs import NoWaits
from stages.training.passes import WorkingWeights


class Standardised(nn.Conv2d):
    """Its weights are standardised before they are rounded."""

    def forward(self, images: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(images, weight, self.bias, padding=1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = Standardised(4, 4, 3)
        self.third, self.fourth = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.fourth.weight = self.third.weight  # shared
        self.head, self.unused = nn.Linear(4 * 36, 5), nn.Linear(2, 2)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        z = self.norm(self.first(images)).relu()
        z = self.fourth(self.third(self.second(z)).relu())
        return self.frozen(self.head(z.flatten(1)))  # type: ignore[no-any-return]


def trained(module: nn.Module, working: WorkingWeights | None, steps: int) -> list[str]:
    """Steps of SGD under autocast; the operations of the last of them."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(0)
    names: list[str] = []
    for _ in range(steps):
        images = torch.rand(8, 3, 6, 6, generator=generator)
        with NoWaits() as called:
            if working is not None:
                working.renew()
            with torch.autocast("cpu", torch.bfloat16):
                logits = (working or module)(images)
            F.cross_entropy(logits.float(), torch.arange(8) % 5).backward()
            if working is not None:
                working.hand_back()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        names = [name for name, _ in called.operations]
    return names


def test_the_numbers_are_those_of_autocast() -> None:
    torch.manual_seed(0)
    plain = Model()
    other = copy.deepcopy(plain)
    casting = trained(plain, None, 4)
    copying = trained(other, WorkingWeights(other), 4)
    for name, value in plain.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    first, head = 4, 2  # of each: weight and bias, cast and cast back; the frozen one is left
    assert casting.count("_to_copy.default") - copying.count("_to_copy.default") == first + 2 * head
    assert copying.count("_foreach_copy_.default") == 2
    assert other.unused.weight.grad is None


def test_when_there_are_any() -> None:
    recorded: dict[str, Any] = {"capture": True, "dtype": "bfloat16"}
    assert WorkingWeights.of(Model(), TrainSettings(**recorded)) is not None
    for changes in ({"capture": False}, {"dtype": "float32"}, {"compile": True}):
        assert WorkingWeights.of(Model(), TrainSettings(**recorded | changes)) is None


def test_a_model_without_such_layers() -> None:
    module = nn.BatchNorm2d(3)
    working = WorkingWeights(module)
    working.renew()
    working(torch.rand(2, 3, 4, 4)).sum().backward()
    working.hand_back()
    assert module.weight.grad is not None
