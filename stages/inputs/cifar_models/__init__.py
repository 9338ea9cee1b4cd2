"""The CIFAR families of the distillation literature, by name.

Parameter and buffer names and shapes equal those of RepDistiller (Tian et al., "Contrastive
Representation Distillation", arXiv 1910.10699) and mdistiller (Zhao et al., "Decoupled Knowledge
Distillation", arXiv 2203.08679), so their published checkpoints load directly:

    cifar_model("resnet32x4", 100).load_state_dict(checkpoint["model"])

Families (`cifar_model_names` lists the usual members):

* `resnet8` ... `resnet110`, `resnet8x4`, `resnet32x4`: He et al., arXiv 1512.03385
* `ResNet18`, `ResNet34`, `ResNet50`: the ImageNet networks of that paper with a 3x3 stride-1 stem
  and no max pool
* `wrn_D_W`: wide ResNet of depth D and width W, Zagoruyko and Komodakis, arXiv 1605.07146
* `vgg8` ... `vgg19`: Simonyan and Zisserman, arXiv 1409.1556, with batch norm and one linear
* `mobile_half`: MobileNetV2 with expansion 6 at half width, Sandler et al., arXiv 1801.04381
* `ShuffleV1`, `ShuffleV2`: Zhang et al., arXiv 1707.01083; Ma et al., arXiv 1807.11164
* `resnet9`, `resnet9_wK`: after Page, "How to train your ResNet" (2018); own parameter names

Every model is an `nn.Sequential` of named stages that maps images (B, channels, H, W) to logits
(B, num_classes). Pooling before the head is adaptive, which equals the fixed windows of the
originals at 32x32 and admits 8x8 to 64x64. No operation works in place, so what a hook sees at any
module stays as it was. Lower-case `resnet50` is a name of torchvision's and is unknown here.
Other spellings of these names are understood: `wrn-40-2`, `cifar_resnet20`, `vgg8_bn`.
"""

import re
from collections.abc import Callable
from functools import partial

from torch import nn

from stages.inputs.cifar_models.mobilenet import build_mobile_half
from stages.inputs.cifar_models.resnet import build_resnet, build_resnet50, build_wide_stem
from stages.inputs.cifar_models.resnet9 import build_resnet9
from stages.inputs.cifar_models.shufflenet import build_shuffle_v1, build_shuffle_v2
from stages.inputs.cifar_models.vgg import build_vgg
from stages.inputs.cifar_models.wrn import build_wrn

__all__ = [
    "SMALL",
    "cifar_model",
    "cifar_model_names",
    "cifar_name",
    "counterpart",
    "resolved_name",
]

SMALL = 64
"""Side in pixels up to which images are small: those of CIFAR and of Tiny-ImageNet."""

Builder = Callable[[int, int], nn.Sequential]  # (num_classes, channels) -> model

_RESNET_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
_VGG_DEPTHS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
_BUILDERS: dict[str, Builder] = {
    **{
        f"resnet{depth}": partial(build_resnet, depth, (16, 16, 32, 64)) for depth in _RESNET_DEPTHS
    },
    **{f"resnet{depth}x4": partial(build_resnet, depth, (32, 64, 128, 256)) for depth in (8, 32)},
    "ResNet18": partial(build_wide_stem, (2, 2, 2, 2)),
    "ResNet34": partial(build_wide_stem, (3, 4, 6, 3)),
    "ResNet50": build_resnet50,
    **{name: partial(build_vgg, depths) for name, depths in _VGG_DEPTHS.items()},
    "mobile_half": build_mobile_half,
    "ShuffleV1": build_shuffle_v1,
    "ShuffleV2": build_shuffle_v2,
    "resnet9": partial(build_resnet9, 64),
}
_ALIASES = {
    "MobileNetV2": "mobile_half",
    "ShuffleNetV1": "ShuffleV1",
    "ShuffleNetV2": "ShuffleV2",
    "resnet50_cifar": "ResNet50",
}
_SPELLINGS = {
    "resnet18_cifar": "ResNet18",
    "resnet34_cifar": "ResNet34",
    "mobilenetv2": "mobile_half",
    "shufflenetv1": "ShuffleV1",
    "shufflev1": "ShuffleV1",
    "shufflenetv2": "ShuffleV2",
    "shufflev2": "ShuffleV2",
    "vgg8_bn": "vgg8",
}
"""Recorded as what they stand for, unlike `_ALIASES`, under which caches have been made."""
_LARGE = {
    "resnet18": "ResNet18",
    "resnet34": "ResNet34",
    "resnet50": "ResNet50",
    "mobilenet_v2": "mobile_half",
    "mobilenetv2_050": "mobile_half",
    "mobilenetv2_100": "mobile_half",
    "shufflenet_v2_x1_0": "ShuffleV2",
    **{f"{vgg}_bn": vgg for vgg in _VGG_DEPTHS if vgg != "vgg8"},
}
"""Networks for large images, and those of the CIFAR families that are called nearly so."""
_USUAL_WRN = ("wrn_16_1", "wrn_16_2", "wrn_16_4", "wrn_28_10", "wrn_40_1", "wrn_40_2")
_USUAL_RESNET9 = ("resnet9_w8", "resnet9_w16", "resnet9_w32")


def cifar_model_names() -> list[str]:
    """The canonical names; of `wrn_D_W` and `resnet9_wK` the usual members."""
    return [*_BUILDERS, *_USUAL_RESNET9, *_USUAL_WRN]


def cifar_model(name: str, num_classes: int, channels: int = 3) -> nn.Module:
    """A freshly initialised model from (B, channels, H, W) to logits (B, num_classes).

    `name` is one of `cifar_model_names()`, another spelling of one (`MobileNetV2`, `wrn-40-2`,
    `cifar_resnet20`), any `wrn_D_W` with D = 6n+4 >= 10 and W >= 1, or any `resnet9_wK` with
    K >= 1. Any other name raises `KeyError`.
    """
    name = resolved_name(name)
    if (builder := _BUILDERS.get(name)) is not None:
        return builder(num_classes, channels)
    if match := re.fullmatch(r"resnet9_w([1-9]\d*)", name):
        return build_resnet9(int(match[1]), num_classes, channels)
    if match := re.fullmatch(r"wrn_([1-9]\d+)_([1-9]\d*)", name):
        depth, width = int(match[1]), int(match[2])
        if depth % 6 == 4:
            return build_wrn(depth, width, num_classes, channels)
    raise KeyError(f"no CIFAR model is named {name!r}")


def resolved_name(name: str) -> str:
    """The canonical name of a model of these families; any other name as it is."""
    inner = re.sub(r"cifar(100?)?_(?=.)", "", name, count=1) if name.startswith("cifar") else name
    if inner != name:
        inner = _LARGE.get(inner, inner)
    inner = _SPELLINGS.get(_ALIASES.get(inner, inner), _ALIASES.get(inner, inner))
    if match := re.fullmatch(r"(?:wrn|WRN)[-_]?([1-9]\d+)[-_x]([1-9]\d*)", inner):
        inner = f"wrn_{match[1]}_{match[2]}"
    return inner if _is_known(inner) else name


def cifar_name(name: str) -> str | None:
    """The name that is recorded for a model of these families; None for any other."""
    resolved = resolved_name(name)
    return (name if name in _ALIASES else resolved) if _is_known(resolved) else None


def counterpart(name: str) -> str | None:
    """The CIFAR network that is called nearly as one of torchvision's or timm's for large images,
    None where there is none.
    """
    return _LARGE.get(name.removeprefix("timm:").partition(".")[0])


def _is_known(name: str) -> bool:
    wrn = re.fullmatch(r"wrn_([1-9]\d+)_[1-9]\d*", name)
    wide = wrn is not None and int(wrn[1]) % 6 == 4
    return name in _BUILDERS or wide or re.fullmatch(r"resnet9_w[1-9]\d*", name) is not None
