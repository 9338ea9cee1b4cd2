import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.inputs.cifar_models import cifar_model, cifar_model_names, cifar_name, counterpart
from stages.inputs.cifar_models.shufflenet import _shuffle

PUBLISHED = {
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "ResNet18": 11_220_132,
    "ResNet34": 21_328_292,
    "ResNet50": 23_705_252,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobile_half": 812_836,
    "ShuffleV1": 949_258,
    "ShuffleV2": 1_355_528,
}
FAMILIES = ["resnet8x4", "ResNet50", "wrn_16_2", "vgg8", "mobile_half", "ShuffleV1", "ShuffleV2"]
ALIASES = {
    "MobileNetV2": "mobile_half",
    "ShuffleNetV1": "ShuffleV1",
    "ShuffleNetV2": "ShuffleV2",
    "resnet50_cifar": "ResNet50",
    "resnet9_w64": "resnet9",
    "wrn-40-2": "wrn_40_2",
    "WRN-16-2": "wrn_16_2",
    "wrn16x4": "wrn_16_4",
    "vgg8_bn": "vgg8",
    "mobilenetv2": "mobile_half",
    "shufflev2": "ShuffleV2",
    "cifar_resnet20": "resnet20",
    "cifar100_resnet56": "resnet56",
    "cifar10_vgg13_bn": "vgg13",
    "cifar_resnet18": "ResNet18",
    "resnet34_cifar": "ResNet34",
}
UNKNOWN = ["", "resnet50", "resnet18", "resnet21", "VGG8", "vgg13_bn", "resnet9_w", "resnet9_w0"]
UNKNOWN += ["cifar_", "cifar_resnet21", "cifar", "wrn-41-2", "resnet9_w08", "wrn", "wrn_17_2"]
UNKNOWN += ["wrn_4_2", "wrn_16_0", "wrn_16_02", "wrn_16_2 "]
# Entries of a state; some of their names and shapes.
KEYS = {
    "resnet8x4": "62 conv1.weight:32,3,3,3 layer1.0.downsample.0.weight:64,32,1,1"
    " layer2.0.bn2.num_batches_tracked: fc.weight:100,256",
    "ResNet50": "320 layer1.0.shortcut.0.weight:256,64,1,1 layer3.5.bn3.bias:1024"
    " layer4.2.conv3.weight:2048,512,1,1 linear.weight:100,2048",
    "ResNet18": "122 conv1.weight:64,3,3,3 layer1.1.conv2.weight:64,64,3,3"
    " layer2.0.shortcut.1.running_mean:128 linear.bias:100",
    "wrn_16_2": "83 conv1.weight:16,3,3,3 block1.layer.0.convShortcut.weight:32,16,1,1"
    " bn1.running_var:128 fc.weight:100,128",
    "vgg13": "72 block0.0.bias:64 block2.3.weight:256,256,3,3 block4.4.running_mean:512"
    " classifier.weight:100,512",
    "mobile_half": "320 conv1.0.weight:16,3,3,3 blocks.1.1.conv.3.weight:72,1,3,3"
    " blocks.6.0.conv.7.weight:160 classifier.0.weight:100,1280",
    "ShuffleV1": "296 layer1.0.conv3.weight:216,18,1,1 layer2.7.conv1.weight:120,160,1,1"
    " layer3.0.bn3.weight:480 linear.weight:100,960",
    "ShuffleV2": "338 layer1.0.conv5.weight:58,58,1,1 layer2.7.conv3.weight:116,116,1,1"
    " conv2.weight:1024,464,1,1 linear.weight:100,1024",
}
# Channels and sides of maps, of an image of 32 x 32.
MAPS = {
    "resnet8x4": "layer1:64,32 layer2:128,16 layer3:256,8",
    "ResNet50": "layer1:256,32 layer2:512,16 layer3:1024,8 layer4:2048,4",
    "wrn_16_2": "block1:32,32 block2:64,16 block3:128,8",
    "vgg8": "block0:64,32 block2:256,8 block3:512,4 block4:512,4",
    "mobile_half": "conv1:16,16 blocks.1:12,16 blocks.2:16,8 blocks:160,2",
    "ShuffleV1": "bn1:24,32 layer1:240,16 layer2:480,8 layer3:960,4",
    "ShuffleV2": "bn1:24,32 layer1:116,16 layer2:232,8 layer3:464,4",
    "resnet9_w8": "prep:8,32 layer1:16,16 layer2:32,8 layer3:64,4",
}


def read(text: str) -> dict[str, tuple[int, ...]]:
    named = (word.split(":") for word in text.split() if ":" in word)
    return {name: tuple(map(int, filter(None, sides.split(",")))) for name, sides in named}


def shapes(name: str, classes: int) -> dict[str, torch.Size]:
    """What a model's state has, without drawing its weights."""
    with torch.device("meta"):
        return {key: x.shape for key, x in cifar_model(name, classes).state_dict().items()}


def build(name: str, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return cifar_model(name, 100, channels).eval()


def unsettle(model: nn.Module) -> nn.Module:
    """Random batch-norm statistics and affine parameters, so that no layer is near neutral."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            mean, variance = module.running_mean, module.running_var
            assert mean is not None
            assert variance is not None
            nn.init.normal_(mean)
            nn.init.uniform_(variance, 0.5, 1.5)
    return model


def maps(model: nn.Module, image: Tensor, names: list[str]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        model(image)
    return seen


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        models = {name: cifar_model(name, 100) for name in PUBLISHED}
    found = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert found == PUBLISHED


@pytest.mark.parametrize("name", KEYS)
def test_state_dict_names_and_shapes(name: str) -> None:
    state = shapes(name, 100)
    some = read(KEYS[name])
    assert {key: tuple(state[key]) for key in some} == some
    assert len(state) == int(KEYS[name].split()[0])


def test_complete_state_dict_of_one_residual_block() -> None:
    state = shapes("resnet20", 100)
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = ["conv1.weight", *(f"bn1.{n}" for n in norm)]
    expected += ["conv2.weight", *(f"bn2.{n}" for n in norm)]
    block = [key for key in state if key.startswith("layer1.0.")]
    assert block == [f"layer1.0.{key}" for key in expected]


@pytest.mark.parametrize("name", MAPS)
def test_strides_and_widths(name: str) -> None:
    expected = read(MAPS[name])
    seen = maps(build(name), torch.randn(1, 3, 32, 32), list(expected))
    assert {key: (out.shape[1], out.shape[3]) for key, out in seen.items()} == expected


def test_vgg_pools_once_more_at_64() -> None:
    seen = maps(build("vgg8"), torch.randn(1, 3, 64, 64), ["relu3", "pool3", "block4"])
    assert seen["block4"].shape == (1, 512, 4, 4)
    assert torch.equal(seen["pool3"], F.max_pool2d(seen["relu3"], 2))


@pytest.mark.parametrize("name", [*FAMILIES, "resnet9_w8"])
def test_gradients_reach_every_parameter(name: str) -> None:
    side = 8 if name in ("ResNet50", "resnet8x4", "wrn_16_2") else 32
    model = build(name).train()
    model(torch.randn(2, 3, side, side)).square().sum().backward()
    missing = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


@pytest.mark.parametrize("name", [*FAMILIES, "resnet9_w8"])
def test_hooked_outputs_stay_untouched(name: str) -> None:
    kept: list[tuple[Tensor, Tensor]] = []
    model = unsettle(build(name))
    for module in model.modules():
        module.register_forward_hook(lambda _m, _i, out: kept.append((out, out.clone())))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert all(torch.equal(out, copy) for out, copy in kept)


def test_channel_shuffle_interleaves() -> None:
    assert _shuffle(torch.arange(6).view(1, 6, 1, 1), 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert _shuffle(torch.arange(6).view(1, 6, 1, 1), 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    x = torch.randn(2, 12, 3, 5)
    assert torch.equal(_shuffle(x, 3), F.channel_shuffle(x, 3))


def test_shuffle_v2_unit_keeps_the_first_half_at_even_channels() -> None:
    model = unsettle(build("ShuffleV2"))
    seen = maps(model, torch.randn(1, 3, 32, 32), ["layer1.0", "layer1.1"])
    assert torch.equal(seen["layer1.1"][:, ::2], seen["layer1.0"][:, :58])


def test_shuffle_v1_appends_the_pooled_input() -> None:
    seen = maps(unsettle(build("ShuffleV1")), torch.randn(1, 3, 32, 32), ["relu", "layer1.0"])
    pooled = F.avg_pool2d(seen["relu"], 3, 2, 1)
    torch.testing.assert_close(seen["layer1.0"][:, 216:], pooled)


def test_wide_block_shortcuts() -> None:
    model = unsettle(build("wrn_16_2"))
    names = ["block1.layer.0", "block1.layer.1", "block1.layer.1.conv2", "block2.layer.0"]
    names += ["block2.layer.0.bn1", "block2.layer.0.conv2"]
    seen = maps(model, torch.randn(1, 3, 32, 32), names)
    same = seen["block1.layer.0"] + seen["block1.layer.1.conv2"]
    torch.testing.assert_close(seen["block1.layer.1"], same)
    weight = model.state_dict()["block2.layer.0.convShortcut.weight"]
    wider = F.conv2d(seen["block2.layer.0.bn1"].relu(), weight, stride=2)
    torch.testing.assert_close(seen["block2.layer.0"], wider + seen["block2.layer.0.conv2"])


def test_inverted_residual_adds_its_input_without_activation() -> None:
    seen = maps(
        unsettle(build("mobile_half")),
        torch.randn(1, 3, 32, 32),
        ["blocks.2.0", "blocks.2.1", "blocks.2.0.conv", "blocks.2.1.conv"],
    )
    assert torch.equal(seen["blocks.2.0"], seen["blocks.2.0.conv"])
    assert torch.equal(seen["blocks.2.1"], seen["blocks.2.0"] + seen["blocks.2.1.conv"])
    assert (seen["blocks.2.1"] < 0).any()


@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_2", "vgg8", "mobile_half", "ResNet50"])
def test_initialisation(name: str) -> None:
    for key, module in build(name).named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            ratio = module.weight.std().item() / (2 / fan_out) ** 0.5
            assert ratio == pytest.approx(1, abs=0.1), key
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.Linear) and name in ("vgg8", "mobile_half"):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.05)
            assert not module.bias.any()
        elif isinstance(module, nn.Linear) and name.startswith("wrn"):
            assert not module.bias.any()


def test_spellings() -> None:
    names = cifar_model_names()
    assert len({*names}) == len(names)
    assert {*PUBLISHED} <= {*names}
    assert not {*ALIASES} & {*names}
    for alias, name in ALIASES.items():
        assert cifar_name(alias) in (name, alias)
        if not name.startswith("ResNet"):  # these take their time
            assert shapes(alias, 10) == shapes(name, 10), alias
    for name in UNKNOWN:
        with pytest.raises(KeyError):
            cifar_model(name, 10)
    assert [cifar_name(x) for x in ("wrn-40-2", "cifar_resnet20")] == ["wrn_40_2", "resnet20"]
    assert cifar_name("MobileNetV2") == "MobileNetV2"  # as caches that exist have it
    assert cifar_name("resnet18") is cifar_name("vgg13_bn") is None


def test_counterparts_of_networks_for_large_images() -> None:
    assert counterpart("resnet18") == "ResNet18"
    assert counterpart("timm:resnet34.a1_in1k") == "ResNet34"
    assert counterpart("vgg13_bn") == "vgg13"
    assert counterpart("mobilenet_v2") == "mobile_half"
    assert counterpart("vit_b_16") is counterpart("resnet20") is None
