"""What the families share: convolutions, stages of blocks, initialisation."""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

Block = Callable[[int, int, int], nn.Module]  # (cin, cout, stride) -> module


def conv(
    cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A convolution that keeps H and W up to its stride."""
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=bias)


def conv_bn_relu(
    cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False
) -> list[nn.Module]:
    """A convolution, its batch norm and a ReLU, to be spread into a `Sequential`."""
    return [conv(cin, cout, kernel, stride, groups, bias), nn.BatchNorm2d(cout), nn.ReLU()]


def named(**children: nn.Module) -> nn.Sequential:
    """The children one after another, under their names."""
    return nn.Sequential(OrderedDict(children))


def stage(block: Block, cin: int, cout: int, depth: int, stride: int) -> nn.Sequential:
    """`depth` blocks, the first of which changes width and stride."""
    rest = (block(cout, cout, 1) for _ in range(depth - 1))
    return nn.Sequential(block(cin, cout, stride), *rest)


def initialise(model: nn.Sequential, linear_std: float | None = None) -> nn.Sequential:
    """Kaiming normal (fan out) for convolutions; batch norms keep their weight 1 and bias 0.

    Linear layers keep the default unless `linear_std` asks for a normal weight and a zero bias.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, 0.0, linear_std)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


class Residual(nn.Module):
    """`conv`, plus its input where `skip`."""

    def __init__(self, conv: nn.Sequential, skip: bool = True) -> None:
        super().__init__()
        self.conv, self.skip = conv, skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.skip else y
