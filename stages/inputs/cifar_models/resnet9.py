"""The nine-layer ResNet of Page, "How to train your ResNet" (2018), at any width."""

from torch import Tensor, nn

from stages.inputs.cifar_models.layers import Residual, conv_bn_relu, initialise, named


class _GlobalMax(nn.Module):
    """(B, C, H, W) -> (B, C). Unlike adaptive max pooling, its gradient on CUDA is reproducible."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax((2, 3))


def build_resnet9(width: int, num_classes: int, channels: int) -> nn.Sequential:
    """Widths 1, 2, 4, 8 times `width`; each layer halves H and W.

    The first and last layers end in a residual of two further convolutions.
    """

    def layer(cin: int, cout: int, residual: bool) -> nn.Sequential:
        modules = [*conv_bn_relu(cin, cout), nn.MaxPool2d(2)]
        if residual:
            body = nn.Sequential(*conv_bn_relu(cout, cout), *conv_bn_relu(cout, cout))
            modules.append(Residual(body))
        return nn.Sequential(*modules)

    model = named(
        prep=nn.Sequential(*conv_bn_relu(channels, width)),
        layer1=layer(width, 2 * width, True),
        layer2=layer(2 * width, 4 * width, False),
        layer3=layer(4 * width, 8 * width, True),
        maxpool=_GlobalMax(),
        linear=nn.Linear(8 * width, num_classes),
    )
    return initialise(model)
