"""ShuffleNet v1 and v2: Zhang et al., arXiv 1707.01083; Ma et al., arXiv 1807.11164.

The layers keep their default initialisation, as in the published distillation results.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.inputs.cifar_models.layers import Block, conv, named, stage


def _shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave `groups` runs of channels: (B, C, H, W) -> (B, C, H, W)."""
    batch, _, height, width = x.shape
    y = x.reshape(batch, groups, -1, height, width).transpose(1, 2)
    return y.reshape(batch, -1, height, width)


class _ShuffleUnitV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; stride 2 appends the pooled input."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        new = cout - cin if stride == 2 else cout
        mid, self.groups, self.stride = new // 4, 1 if cin == 24 else 3, stride
        self.conv1, self.bn1 = conv(cin, mid, 1, groups=self.groups), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = conv(mid, mid, 3, stride, groups=mid), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = conv(mid, new, 1, groups=3), nn.BatchNorm2d(new)
        self.shortcut = nn.AvgPool2d(3, 2, 1) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = _shuffle(torch.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(y)))))
        x = self.shortcut(x)
        return torch.relu(torch.cat([y, x], 1) if self.stride == 2 else y + x)


class _ShuffleUnitV2(nn.Module):
    """Half the channels pass, half are convolved, then both are interleaved; H, W and C stay."""

    def __init__(self, cin: int) -> None:
        super().__init__()
        mid = cin // 2
        self.conv1, self.bn1 = conv(mid, mid, 1), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = conv(mid, mid, 3, groups=mid), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = conv(mid, mid, 1), nn.BatchNorm2d(mid)

    def forward(self, x: Tensor) -> Tensor:
        kept, y = x.chunk(2, 1)
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(y)))))
        return _shuffle(torch.cat([kept, torch.relu(self.bn3(self.conv3(y)))], 1), 2)


class _ShuffleDownV2(nn.Module):
    """Two strided branches, interleaved: (B, cin, H, W) -> (B, cout, H/2, W/2)."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        mid = cout // 2
        self.conv1, self.bn1 = conv(cin, cin, 3, 2, groups=cin), nn.BatchNorm2d(cin)
        self.conv2, self.bn2 = conv(cin, mid, 1), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = conv(cin, mid, 1), nn.BatchNorm2d(mid)
        self.conv4, self.bn4 = conv(mid, mid, 3, 2, groups=mid), nn.BatchNorm2d(mid)
        self.conv5, self.bn5 = conv(mid, mid, 1), nn.BatchNorm2d(mid)

    def forward(self, x: Tensor) -> Tensor:
        left = torch.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(torch.relu(self.bn3(self.conv3(x)))))
        return _shuffle(torch.cat([left, torch.relu(self.bn5(self.conv5(right)))], 1), 2)


def _shuffle_block_v2(cin: int, cout: int, stride: int) -> nn.Module:
    return _ShuffleDownV2(cin, cout) if stride == 2 else _ShuffleUnitV2(cin)


def _shufflenet(
    block: Block, stages: Sequence[int], tail: int | None, num_classes: int, channels: int
) -> nn.Sequential:
    """A 1x1 stem of 24 channels, stages of 4, 8, 4 blocks, and for v2 a 1x1 to `tail`."""
    last: dict[str, nn.Module] = {}
    if tail is not None:
        last = {"conv2": conv(stages[2], tail, 1), "bn2": nn.BatchNorm2d(tail), "relu2": nn.ReLU()}
    return named(
        conv1=conv(channels, 24, 1),
        bn1=nn.BatchNorm2d(24),
        relu=nn.ReLU(),
        layer1=stage(block, 24, stages[0], 4, 2),
        layer2=stage(block, stages[0], stages[1], 8, 2),
        layer3=stage(block, stages[1], stages[2], 4, 2),
        **last,
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        linear=nn.Linear(tail or stages[2], num_classes),
    )


def build_shuffle_v1(num_classes: int, channels: int) -> nn.Sequential:
    """ShuffleNet v1 with 3 groups."""
    return _shufflenet(_ShuffleUnitV1, (240, 480, 960), None, num_classes, channels)


def build_shuffle_v2(num_classes: int, channels: int) -> nn.Sequential:
    """ShuffleNet v2 at width 1."""
    return _shufflenet(_shuffle_block_v2, (116, 232, 464), 1024, num_classes, channels)
