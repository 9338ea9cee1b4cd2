"""Wide ResNet: Zagoruyko and Komodakis, "Wide Residual Networks", arXiv 1605.07146."""

import torch
from torch import Tensor, nn

from stages.inputs.cifar_models.layers import conv, initialise, named, stage


class _WideBlock(nn.Module):
    """Pre-activation block; where the width changes, the shortcut starts after the activation."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), conv(cin, cout, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(cout), conv(cout, cout)
        self.convShortcut = None if cin == cout else conv(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.bn1(x))
        y: Tensor = self.conv2(torch.relu(self.bn2(self.conv1(active))))
        return y + (x if self.convShortcut is None else self.convShortcut(active))


def build_wrn(depth: int, width: int, num_classes: int, channels: int) -> nn.Sequential:
    """Depth 6n+4, three stages of n blocks and 16, 32, 64 times `width` channels."""
    blocks, stages = (depth - 4) // 6, [16 * width, 32 * width, 64 * width]
    head = nn.Linear(stages[2], num_classes)
    nn.init.zeros_(head.bias)
    model = named(
        conv1=conv(channels, 16),
        block1=named(layer=stage(_WideBlock, 16, stages[0], blocks, 1)),
        block2=named(layer=stage(_WideBlock, stages[0], stages[1], blocks, 2)),
        block3=named(layer=stage(_WideBlock, stages[1], stages[2], blocks, 2)),
        bn1=nn.BatchNorm2d(stages[2]),
        relu=nn.ReLU(),
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=head,
    )
    return initialise(model)
