"""ResNet: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.inputs.cifar_models.layers import conv, initialise, named, stage


def _projection(cin: int, cout: int, stride: int) -> nn.Module:
    """The identity where shapes agree, else a strided 1x1 convolution with batch norm."""
    if stride == 1 and cin == cout:
        return nn.Identity()
    return nn.Sequential(conv(cin, cout, 1, stride), nn.BatchNorm2d(cout))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, cin, H, W) -> (B, cout, H/stride, W/stride)."""

    side = "downsample"
    """What the shortcut is called."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(cin, cout, 3, stride), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = conv(cout, cout), nn.BatchNorm2d(cout)
        self.add_module(self.side, _projection(cin, cout, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.get_submodule(self.side)(x))


class _ShortcutBlock(_BasicBlock):
    """The same, as the networks with four stages name it."""

    side = "shortcut"


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; shapes as in `_BasicBlock`, cout/4 inside."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        mid = cout // 4
        self.conv1, self.bn1 = conv(cin, mid, 1), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = conv(mid, mid, 3, stride), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = conv(mid, cout, 1), nn.BatchNorm2d(cout)
        self.shortcut = _projection(cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def build_resnet(
    depth: int, widths: Sequence[int], num_classes: int, channels: int
) -> nn.Sequential:
    """The three-stage CIFAR ResNet of depth 6n+2; `widths` are those of stem and stages."""
    stem, *stages = widths
    blocks = (depth - 2) // 6
    model = named(
        conv1=conv(channels, stem),
        bn1=nn.BatchNorm2d(stem),
        relu=nn.ReLU(),
        layer1=stage(_BasicBlock, stem, stages[0], blocks, 1),
        layer2=stage(_BasicBlock, stages[0], stages[1], blocks, 2),
        layer3=stage(_BasicBlock, stages[1], stages[2], blocks, 2),
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(stages[2], num_classes),
    )
    return initialise(model)


def build_wide_stem(depths: Sequence[int], num_classes: int, channels: int) -> nn.Sequential:
    """Four stages of basic blocks, 64 to 512 channels; H and W fall by 8."""
    first, second, third, fourth = depths
    model = named(
        conv1=conv(channels, 64),
        bn1=nn.BatchNorm2d(64),
        relu=nn.ReLU(),
        layer1=stage(_ShortcutBlock, 64, 64, first, 1),
        layer2=stage(_ShortcutBlock, 64, 128, second, 2),
        layer3=stage(_ShortcutBlock, 128, 256, third, 2),
        layer4=stage(_ShortcutBlock, 256, 512, fourth, 2),
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        linear=nn.Linear(512, num_classes),
    )
    return initialise(model)


def build_resnet50(num_classes: int, channels: int) -> nn.Sequential:
    """Bottleneck stages of 3, 4, 6, 3 blocks; H and W fall by 8."""
    model = named(
        conv1=conv(channels, 64),
        bn1=nn.BatchNorm2d(64),
        relu=nn.ReLU(),
        layer1=stage(_Bottleneck, 64, 256, 3, 1),
        layer2=stage(_Bottleneck, 256, 512, 4, 2),
        layer3=stage(_Bottleneck, 512, 1024, 6, 2),
        layer4=stage(_Bottleneck, 1024, 2048, 3, 2),
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        linear=nn.Linear(2048, num_classes),
    )
    return initialise(model)
