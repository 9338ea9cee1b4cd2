"""VGG with batch norm: Simonyan and Zisserman, arXiv 1409.1556."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.inputs.cifar_models.layers import conv_bn_relu, initialise, named


class _PoolFrom8(nn.Module):
    """Max pool by 2 where maps are 8x8 (64x64 images); smaller maps (32x32 images) pass."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.max_pool2d(x, 1 + x.shape[-1] // 8)


def build_vgg(depths: Sequence[int], num_classes: int, channels: int) -> nn.Sequential:
    """Five blocks of `depths` 3x3 convolutions (with bias) and batch norms, one linear layer."""
    children: dict[str, nn.Module] = {}
    cin = channels
    for i, (cout, depth) in enumerate(zip((64, 128, 256, 512, 512), depths, strict=True)):
        ins = [cin] + [cout] * (depth - 1)
        layers = [module for wide in ins for module in conv_bn_relu(wide, cout, bias=True)]
        children[f"block{i}"] = nn.Sequential(*layers[:-1])
        children[f"relu{i}"] = layers[-1]
        children[f"pool{i}"] = nn.MaxPool2d(2) if i < 3 else _PoolFrom8()
        cin = cout
    children["pool4"] = nn.AdaptiveAvgPool2d(1)
    model = named(**children, flatten=nn.Flatten(), classifier=nn.Linear(cin, num_classes))
    return initialise(model, linear_std=0.01)
