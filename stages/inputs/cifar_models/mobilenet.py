"""MobileNetV2 for small images: Sandler et al., arXiv 1801.04381."""

from functools import partial

from torch import nn

from stages.inputs.cifar_models.layers import Residual, conv, conv_bn_relu, initialise, named, stage


def _inverted(expand: int, cin: int, cout: int, stride: int) -> Residual:
    """Expand by 1x1, filter each channel by 3x3, project by 1x1 without activation."""
    wide = cin * expand
    body = nn.Sequential(
        *conv_bn_relu(cin, wide, 1),
        *conv_bn_relu(wide, wide, 3, stride, groups=wide),
        conv(wide, cout, 1),
        nn.BatchNorm2d(cout),
    )
    return Residual(body, skip=stride == 1 and cin == cout)


def build_mobile_half(num_classes: int, channels: int) -> nn.Sequential:
    """Expansion 6, half of the paper's widths, total stride 16 instead of 32."""
    plan = [(1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2)]
    plan += [(6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)]  # expansion, width, depth, stride
    widths = [16] + [width for _, width, _, _ in plan]
    blocks = (
        stage(partial(_inverted, expand), cin, cout, depth, stride)
        for cin, (expand, cout, depth, stride) in zip(widths, plan, strict=False)
    )
    model = named(
        conv1=nn.Sequential(*conv_bn_relu(channels, 16, 3, 2)),
        blocks=nn.Sequential(*blocks),
        conv2=nn.Sequential(*conv_bn_relu(160, 1280, 1)),
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Sequential(nn.Linear(1280, num_classes)),
    )
    return initialise(model, linear_std=0.01)
