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
        (under("module.", EMA), "'module.' stripped"),
        (under("_orig_mod.", EMA), "'_orig_mod.' stripped"),
        (under("module.student.", EMA), "'module.student.' stripped"),
        (under("module._orig_mod.model.", EMA), "module.model."),
        *(
            ({key: EMA, "epoch": 3}, f"'{key}'")
            for key in ("model", "state_dict", "model_state_dict", "net", "student", "state")
        ),
        ({"state_dict": under("model.", EMA)}, "'model.' stripped"),  # Lightning
        ({"model": {"state_dict": EMA}}, "'model.state_dict'"),
        (TIMM, "'state_dict_ema'"),
        (TIMM, "not from #state_dict"),
        (
            {"model": RAW, "model_ema": averaged(WANTED), "args": argparse.Namespace()},
            "'model_ema'",
        ),
        ({"model": RAW, "ema": {"shadow": EMA, "decay": 0.9}}, "'ema.shadow'"),
        ({"model": EMA, "ema": None}, "'model'"),
        ({"model": EMA, "ema": {"decay": 0.9}}, "'model'"),
        (averaged(WANTED), "n_averaged"),
        (mdistiller(EMA, under("other.", RAW)), "module.student."),
        (mdistiller(EMA, RAW), "module.student."),
        (REPDISTILLER, "'model'"),
        ({"epoch": 1, "model": EMA, "best_acc": torch.tensor(71.0)}, "'model'"),
        ({**EMA, "epoch": 3}, "left out (epoch)"),
        (EMA, ""),
    ],
)
def test_weights_that_are_found(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    state, words = loaded(tmp_path / "w.pth")
    assert equal(state, EMA)
    assert said in words
    assert bool(said) == bool(words)


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
    with pytest.raises(ModelError, match=r"under 'nothing'(.|\n)*w.pth#state_dict"):
        loaded(f"{tmp_path / 'w.pth'}#nothing")
    file = (tmp_path / "w.pth").rename(tmp_path / "run#3.pth")  # a hash in the name of the file
    assert equal(loaded(f"{file}#{key}")[0], wanted)


def spoilt(name: str, change: Callable[[Tensor], Tensor]) -> State:
    return {**EMA, name: change(EMA[name])}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (spoilt("fc.weight", Tensor.to_sparse), "sparse"),
        (spoilt("fc.weight", lambda t: t.to(torch.complex64)), "complex"),
        (spoilt("fc.weight", lambda t: t.to(torch.int8)), "quantised"),
        (spoilt("bn1.running_var", lambda t: t / 0), "not finite"),
        (spoilt("fc.bias", lambda t: t * float("nan")), "fc.bias"),
        ({**under("a.", EMA), **under("b.", RAW)}, r"several models: 'a\.', 'b\.'"),
        ({"generator": EMA}, "w.pth#generator"),  # an unknown key is offered
    ],
)
def test_weights_that_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(NAME, str(tmp_path / "w.pth"), CLASSES, 3)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("prefix", ["", "module.student."])
def test_half_precision_and_missing_counters_of_batches(tmp_path: Path, prefix: str) -> None:
    kept = {n: t.half() for n, t in EMA.items() if not n.endswith("num_batches_tracked")}
    torch.save(under(prefix, kept), tmp_path / "w.pth")
    state, _ = loaded(tmp_path / "w.pth")
    assert all(torch.equal(state[name], kept[name].float()) for name in kept)
    assert state["fc.weight"].dtype == torch.float32


def test_auxiliary_heads_may_be_missing(tmp_path: Path) -> None:
    from torchvision.models import googlenet

    source = googlenet(weights=None, num_classes=3, aux_logits=False, init_weights=False)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = load_model("googlenet", str(tmp_path / "w.pth"), 3, 3)
    assert equal(dict(model.module.state_dict()), dict(source.state_dict()))
    assert "auxiliary" in model.notes[0]
