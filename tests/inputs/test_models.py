import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.errors import ModelError
from stages.inputs.cifar_models import cifar_model
from stages.inputs.models import build_model, load_model

NAME, CLASSES, CHANNELS = "resnet8", 10, 3


def trained(name: str = NAME, num_classes: int = CLASSES, channels: int = CHANNELS) -> nn.Module:
    """A model whose weights no other call of it has."""
    model = cifar_model(name, num_classes, channels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def write_run(folder: Path, state: dict[str, Tensor], **model: Any) -> Path:
    folder.mkdir()
    described = {"architecture": NAME, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = {"model": {**described, "image_size": None, **model}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet8x5", "did you mean 'resnet8x4'"),
        ("mobilenet_v3_smal", "did you mean 'mobilenet_v3_small'"),
        ("zzzzzz", "unknown model 'zzzzzz'\nKnown: the CIFAR families"),
        ("", "unknown model ''\nKnown"),
        ("no_such_module:net", "cannot import model 'no_such_module:net'"),
        ("torch.nn:Lineal", "cannot import model 'torch.nn:Lineal'"),
        ("builtins:str", r"returned a str, not a torch\.nn\.Module"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(name, CLASSES, CHANNELS)


@pytest.mark.parametrize(
    ("name", "channels", "takes"),
    [
        ("resnet8", 1, 1),
        ("resnet8", 3, 3),
        ("shufflenet_v2_x0_5", 3, 3),
        ("shufflenet_v2_x0_5", 1, 3),  # is given grey repeated
        ("helpers:plain", 3, 3),
    ],
)
def test_names(name: str, channels: int, takes: int) -> None:
    model = build_model(name, 7, channels)
    assert model.architecture == name
    assert model.channels == takes
    assert model.statistics is None
    with torch.no_grad():
        assert model.module.eval()(torch.zeros(2, takes, 32, 32)).shape == (2, 7)


def test_timm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ModelError, match=r"timm:vit needs timm\n.*pip install"):
        build_model("timm:vit", CLASSES, CHANNELS)


def safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "w.safetensors")
    return folder / "w.safetensors"


@pytest.mark.parametrize("kind", ["w.safetensors", "w.pth", "old.pth"])
def test_weights_alone(kind: str, tmp_path: Path) -> None:
    source, path = trained(), tmp_path / kind
    if kind == "w.safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=kind == "w.pth")
    loaded = load_model(NAME, str(path), CLASSES, CHANNELS)
    assert same(loaded.module, source)
    assert loaded.architecture == NAME
    assert loaded.statistics is loaded.image_size is None


def test_a_run_directory_brings_what_belongs_to_it(tmp_path: Path) -> None:
    source = trained()
    run = write_run(tmp_path / "run", source.state_dict(), image_size=48)
    loaded = load_model(None, str(run), CLASSES, CHANNELS)
    assert same(loaded.module, source)
    assert loaded.architecture == NAME
    assert loaded.statistics == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert loaded.image_size == 48
    assert loaded.channels == CHANNELS
    with pytest.raises(ModelError, match="holds a resnet8, not a vgg8"):
        load_model("vgg8", str(run), CLASSES, CHANNELS)


class MakesFolder:
    """A pickle that runs code when it is loaded, as an attacker would write it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("key", ["model", "fc.weight"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, key: str, zipped: bool) -> None:
    pickle.loads(pickle.dumps(MakesFolder(tmp_path / "control")))
    assert (tmp_path / "control").is_dir()
    path = tmp_path / "w.pth"
    attack = {key: MakesFolder(tmp_path / "attack")}
    torch.save(attack, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="cannot be read as plain tensors") as caught:
        load_model(NAME, str(path), CLASSES, CHANNELS)
    assert not (tmp_path / "attack").exists()
    # torch would advise to load it all the same
    assert caught.value.cause == f"{path} cannot be read as plain tensors (UnpicklingError)"
    assert not re.search("weights_only|add_safe_globals|unsafe", str(caught.value))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "content", [[torch.zeros(3)], {"fc.weight": 3}, {"nets": {"fc.weight": torch.zeros(3)}}]
)
def test_a_file_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"does not hold a state dict\nSave model.state_dict"):
        load_model(NAME, str(tmp_path / "w.pth"), CLASSES, CHANNELS)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "whole.pth"])
def test_a_file_of_something_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"hello" * 10)
    if name == "whole.pth":
        torch.save(trained(), tmp_path / name)
    with pytest.raises(ModelError, match=f"{name} cannot be read as plain tensors"):
        load_model(NAME, str(tmp_path / name), CLASSES, CHANNELS)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (("resnet8", 10, 3), ("resnet8", 7, 3), "has 10 classes, the dataset has 7"),
        (("resnet8", 10, 3), ("vgg8", 10, 3), "another architecture: .* keys missing"),
        (("resnet8", 10, 3), ("resnet14", 10, 3), r"missing \(layer1.1.bn1.*\), 0 un"),
        (("resnet14", 10, 3), ("resnet8", 10, 3), r"0 keys missing, \d+ unexpected"),
        (("resnet9_w8", 10, 3), ("resnet9_w16", 10, 3), "architecture: .* is .*, not"),
        (("resnet9_w8", 7, 3), ("resnet9_w16", 10, 3), "another architecture"),
        (
            ("resnet8", 10, 1),
            ("resnet8", 10, 3),
            r"conv1.weight is \(16, 1, 3, 3\), not \(16, 3, 3, 3\)",
        ),
    ],
)
def test_weights_of_another_model(
    tmp_path: Path, theirs: tuple[str, int, int], ours: tuple[str, int, int], message: str
) -> None:
    path = safetensors(cifar_model(*theirs).state_dict(), tmp_path)
    name, num_classes, channels = ours
    with pytest.raises(ModelError, match=message):
        load_model(name, str(path), num_classes, channels)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", None, "is not a run directory"),
        ("config.yaml", "", "config.yaml is damaged"),
        ("config.yaml", "model: {architecture: resnet8}", "is not a run directory"),
        ("config.yaml", "model: [", "config.yaml is damaged"),
        ("model.safetensors", None, r"no weights at .*safetensors\nHas the run"),
    ],
)
def test_spoilt_runs(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    run = write_run(tmp_path / "run", trained().state_dict())
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        load_model(None, str(run), CLASSES, CHANNELS)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        (NAME, None, r"no weights given\nGive --weights"),
        (NAME, "nowhere.pth", "no weights at nowhere.pth"),
        (None, "some.pth", "no weights at some.pth"),
        ("resnet8", "pretrained", "no pretrained weights for 'resnet8'"),
        (None, "pretrained", "no pretrained weights for ''"),
        ("resnet18", "pretrained", "has 1000 classes, the dataset has 10"),
    ],
)
def test_weights_that_are_not_there(name: str | None, weights: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(name, weights, CLASSES, CHANNELS)
