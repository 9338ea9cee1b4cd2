"""Checkpoints as other people's programs write them: which weights are taken, and what is said."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from stages.errors import ModelError
from stages.inputs.cifar_models import cifar_model
from stages.inputs.models import load_model

NAME, CLASSES = "resnet8", 10
State = dict[str, Tensor]


def random_model(name: str = NAME) -> nn.Module:
    """A model whose weights no other call of it has."""
    model = cifar_model(name, CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


WANTED, OTHER = random_model(), random_model()


def loaded(path: str | Path, name: str = NAME) -> tuple[State, str]:
    """The weights that a model has from a file, and what was said of them."""
    model = load_model(name, str(path), CLASSES, 3)
    assert len(model.notes) <= 1
    return model.module.state_dict(), "".join(model.notes)


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def mdistiller(student: State, teacher: State) -> dict[str, Any]:
    """`latest` and `best` of its trainer: the whole distiller under DataParallel, an optimiser, a
    score that is a tensor or, from numpy, a scalar.
    """
    optimiser = torch.optim.SGD(WANTED.parameters(), 0.1, momentum=0.9)
    both = {**under("module.student.", student), **under("module.teacher.", teacher)}
    return {
        "epoch": 240,
        "model": both,
        "optimizer": optimiser.state_dict(),
        "best_acc": np.float64(76.5),
    }


def averaged(model: nn.Module, device: str | None = None) -> State:
    return dict(AveragedModel(model).state_dict())


RAW, EMA = OTHER.state_dict(), WANTED.state_dict()
TIMM = {"arch": NAME, "state_dict": RAW, "state_dict_ema": EMA, "args": argparse.Namespace(lr=0.1)}
REPDISTILLER = {"opt": argparse.Namespace(model=NAME, lr=0.05, path=Path("a/b")), "model": EMA}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *(
            pytest.param(under(prefix, EMA), f"'{prefix}' stripped", id=prefix)
            for prefix in ("module.", "_orig_mod.", "model.", "net.", "module.student.")
            if prefix != "_orig_mod."
        ),
        pytest.param(under("_orig_mod.", EMA), "'_orig_mod.' stripped", id="compiled"),
        pytest.param(under("module._orig_mod.model.", EMA), "module.model.", id="nested"),
        *(
            pytest.param({key: EMA, "epoch": 3}, f"'{key}'", id=key)
            for key in ("model", "state_dict", "model_state_dict", "net", "student", "state")
        ),
        pytest.param({"state_dict": under("model.", EMA)}, "'model.' stripped", id="Lightning"),
        pytest.param({"model": {"state_dict": EMA}}, "'model.state_dict'", id="under two keys"),
        pytest.param(TIMM, "'state_dict_ema'", id="timm's moving average"),
        pytest.param(
            {"model": RAW, "model_ema": averaged(WANTED), "args": argparse.Namespace()},
            "'model_ema'",
            id="torchvision's moving average",
        ),
        pytest.param(
            {"model": RAW, "ema": {"shadow": EMA, "decay": 0.9}}, "'ema.shadow'", id="ema"
        ),
        pytest.param({"model": EMA, "ema": None}, "'model'", id="no average yet"),
        pytest.param({"model": EMA, "ema": {"decay": 0.9}}, "'model'", id="settings of an average"),
        pytest.param(averaged(WANTED), "n_averaged", id="SWA"),
        pytest.param(mdistiller(EMA, under("other.", RAW)), "module.student.", id="mdistiller"),
        pytest.param(mdistiller(EMA, RAW), "module.student.", id="mdistiller, one architecture"),
        pytest.param({"model": EMA}, "'model'", id="mdistiller's student_best"),
        pytest.param(REPDISTILLER, "'model'", id="RepDistiller's last"),
        pytest.param(
            {"epoch": 1, "model": EMA, "best_acc": torch.tensor(71.0)}, "'model'", id="and its best"
        ),
        pytest.param({**EMA, "epoch": 3}, "left out (epoch)", id="a number among tensors"),
        pytest.param(EMA, "", id="plain"),
    ],
)
def test_weights_that_are_found(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    state, words = loaded(tmp_path / "w.pth")
    assert equal(state, EMA)
    assert said in words
    assert bool(said) == bool(words)


@pytest.mark.parametrize("prefix", ["", "module.student."])
def test_counters_of_batches_may_be_missing(tmp_path: Path, prefix: str) -> None:
    kept = {n: t for n, t in EMA.items() if not n.endswith("num_batches_tracked")}
    torch.save(under(prefix, kept), tmp_path / "w.pth")
    state, _ = loaded(tmp_path / "w.pth")
    assert all(torch.equal(state[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("state_dict", RAW),
        ("state_dict_ema", EMA),
        ("deeper.student", RAW),
        ("both.module.teacher", EMA),
        ("both.module.student", RAW),
    ],
)
def test_a_key_names_the_weights(tmp_path: Path, key: str, wanted: State) -> None:
    both = {**under("module.student.", RAW), **under("module.teacher.", EMA)}
    torch.save(
        {**TIMM, "deeper": {"student": RAW, "teacher": EMA}, "both": both}, tmp_path / "w.pth"
    )
    state, words = loaded(f"{tmp_path / 'w.pth'}#{key}")
    assert equal(state, wanted)
    assert key in words


def test_a_file_may_have_a_hash_in_its_name(tmp_path: Path) -> None:
    torch.save(TIMM, tmp_path / "run#3.pth")
    assert equal(loaded(tmp_path / "run#3.pth")[0], EMA)
    assert equal(loaded(f"{tmp_path / 'run#3.pth'}#state_dict")[0], RAW)


def test_a_moving_average_says_what_was_not_taken(tmp_path: Path) -> None:
    torch.save(TIMM, tmp_path / "w.pth")
    assert "not from #state_dict" in loaded(tmp_path / "w.pth")[1]


def spoilt(change: Callable[[State], Any]) -> State:
    state = {name: tensor.clone() for name, tensor in EMA.items()}
    return {**state, **change(state)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(spoilt(lambda s: {"fc.weight": s["fc.weight"].to_sparse()}), "sparse", id="s"),
        pytest.param(
            spoilt(lambda s: {"fc.weight": s["fc.weight"].to(torch.complex64)}), "complex", id="c"
        ),
        pytest.param(
            spoilt(lambda s: {"fc.weight": s["fc.weight"].to(torch.int8)}), "quantised", id="int8"
        ),
        pytest.param(
            spoilt(lambda s: {"bn1.running_var": s["bn1.running_var"] / 0}), "not finite", id="inf"
        ),
        pytest.param(
            spoilt(lambda s: {"fc.bias": s["fc.bias"] * float("nan")}), "fc.bias", id="nan"
        ),
        pytest.param(
            {**under("a.", EMA), **under("b.", RAW)}, r"several models: 'a\.', 'b\.'", id="several"
        ),
        pytest.param({"generator": EMA}, "w.pth#generator", id="an unknown key is offered"),
    ],
)
def test_weights_that_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(NAME, str(tmp_path / "w.pth"), CLASSES, 3)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_key_that_is_not_there(tmp_path: Path) -> None:
    torch.save(TIMM, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"under 'nothing'(.|\n)*w.pth#state_dict"):
        load_model(NAME, f"{tmp_path / 'w.pth'}#nothing", CLASSES, 3)


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    torch.save(
        {n: t.half() if t.is_floating_point() else t for n, t in EMA.items()}, tmp_path / "w"
    )
    state, _ = loaded(tmp_path / "w")
    assert state["fc.weight"].dtype == torch.float32
    assert torch.equal(state["fc.weight"], EMA["fc.weight"].half().float())


def test_auxiliary_heads_may_be_missing(tmp_path: Path) -> None:
    from torchvision.models import googlenet

    source = googlenet(weights=None, num_classes=3, aux_logits=False, init_weights=False)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = load_model("googlenet", str(tmp_path / "w.pth"), 3, 3)
    assert equal(dict(model.module.state_dict()), dict(source.state_dict()))
    assert "auxiliary" in model.notes[0]
