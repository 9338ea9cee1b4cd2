"""Published weights: never with a head of chance unless that is asked for, and said."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from stages.errors import ModelError
from stages.inputs.models import load_model
from stages.inputs.recorded import recorded_statistics

TIMM, TORCHVISION = "test_resnet", "shufflenet_v2_x0_5"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """What timm and torchvision would download."""
    return {
        f"timm:{TIMM}": timm.create_model(TIMM).state_dict(),
        TORCHVISION: torchvision.models.get_model(TORCHVISION).state_dict(),
    }


@pytest.fixture(autouse=True)
def offline(published: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(published[f"timm:{TIMM}"], tmp_path / "timm.pth")
    create = timm.create_model

    def from_file(name: str, **options: Any) -> nn.Module:
        file = {"file": str(tmp_path / "timm.pth")}
        return create(name, **options, pretrained_cfg_overlay=file)

    monkeypatch.setattr(timm, "create_model", from_file)
    monkeypatch.setattr(
        torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: published[TORCHVISION]
    )


@pytest.mark.parametrize("name", [f"timm:{TIMM}", TORCHVISION])
def test_published_weights_are_whole_or_refused(name: str, published: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="1000 classes, the dataset has 10"):
        load_model(name, "pretrained", 10, 3)
    model = load_model(name, "pretrained", 1000, 3)
    state = model.module.state_dict()
    assert all(torch.equal(state[n], t) for n, t in published[name].items())
    assert model.notes == ()
    assert name in model.source
    assert model.statistics == (IMAGENET if name == TORCHVISION else model.statistics)


@pytest.mark.parametrize("name", [f"timm:{TIMM}", TORCHVISION])
def test_a_student_may_have_a_new_head_and_is_told(name: str, published: dict[str, Any]) -> None:
    model = load_model(name, "pretrained", 10, 3, new_head=True)
    state, before = model.module.state_dict(), published[name]
    assert [n for n in state if not torch.equal(state[n], before[n])] == ["fc.weight", "fc.bias"]
    (note,) = model.notes
    assert "fc.weight, fc.bias" in note
    assert state["fc.weight"].shape[0] == 10


MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ({"args": argparse.Namespace(mean=MEAN, std=STD)}, True),
        ({"args": {"mean": MEAN, "std": STD}}, True),
        ({"pretrained_cfg": {"mean": MEAN, "std": STD}}, True),
        ({"config": {"mean": tuple(MEAN), "std": tuple(STD)}}, True),
        ({"args": argparse.Namespace(mean=None, std=None)}, False),
        ({"args": {"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}}, False),
        ({"args": {"mean": MEAN, "std": [0, 0, 0]}}, False),
        ({"args": {"mean": MEAN}}, False),
        ({"args": 3, "config": "x"}, False),
        ([], False),
    ],
)
def test_recorded_statistics(document: Any, found: bool) -> None:
    assert recorded_statistics(document) == ((tuple(MEAN), tuple(STD)) if found else None)


def test_a_config_beside_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"pretrained_cfg": {"mean": MEAN, "std": STD}})
    )
    assert recorded_statistics({}, tmp_path / "w.safetensors") == (tuple(MEAN), tuple(STD))
    (tmp_path / "config.json").write_text("[")
    assert recorded_statistics({}, tmp_path / "w.safetensors") is None


def test_timms_script_leaves_it_to_the_model(tmp_path: Path, published: dict[str, Any]) -> None:
    state, path = published[f"timm:{TIMM}"], tmp_path / "last.pth.tar"
    script = argparse.Namespace(mean=None, std=None)
    torch.save({"arch": TIMM, "state_dict": state, "args": script}, path)
    model = load_model(f"timm:{TIMM}", str(path), 1000, 3)
    config = timm.get_pretrained_cfg(TIMM)
    assert model.statistics == (tuple(config.mean), tuple(config.std))
    torch.save(state, path)
    assert load_model(f"timm:{TIMM}", str(path), 1000, 3).statistics is None
