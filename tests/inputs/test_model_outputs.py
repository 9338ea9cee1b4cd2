"""What models return, and whether it is the logits of the dataset's classes in their order."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.device import forward
from stages.errors import ConfigError, ModelError
from stages.inputs.model_outputs import Adapted, are_probabilities, logits_of, output_order

Auxiliary = namedtuple("Auxiliary", ["logits", "aux_logits"])
LOSS = torch.tensor(1.5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, {"feats": []}),
        lambda x: [x, x + 1],
        lambda x: (SimpleNamespace(logits=x, loss=None),),
        lambda x: (LOSS, x),
        lambda x: (None, x, x + 1),
        lambda x: {"logits": x, "hidden": x + 1},
        lambda x: OrderedDict(loss=LOSS, logits=x),
        lambda x: {"out": x},
        lambda x: Auxiliary(x, x + 1),
    ],
)
def test_logits_of(wrap: Callable[[Tensor], Any]) -> None:
    logits = torch.randn(2, 3)
    assert logits_of(wrap(logits)) is logits


@pytest.mark.parametrize(
    ("output", "named"),
    [
        (None, "None"),
        ([], "list"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}, "a, b"),
        ((LOSS,), "tuple"),
        (SimpleNamespace(x=1), "SimpleNamespace"),
    ],
)
def test_outputs_without_logits(output: Any, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        logits_of(output)


def _broken(images: Tensor) -> Tensor:
    raise KeyError("gamma")  # the line that is named


def test_a_model_that_fails_is_named_with_its_line() -> None:
    line = _broken.__code__.co_firstlineno + 1
    with pytest.raises(ModelError, match=rf"KeyError: 'gamma' \(.*test_model_outputs.py:{line}\)"):
        forward(_broken, torch.zeros(2, 3, 4, 4), "float32")


@pytest.mark.parametrize(
    ("rows", "are"),
    [
        (torch.randn(4, 5).softmax(1), True),
        (torch.randn(4, 1000).softmax(1).half(), True),
        (torch.eye(3), True),
        (torch.randn(4, 5).log_softmax(1), False),
        (torch.randn(4, 5), False),
        (torch.rand(4, 5), False),
        (torch.zeros(4, 5), False),
        (torch.tensor([[0.3, 0.7], [2.0, -1.0]]), False),
        (torch.full((2, 3), float("nan")), False),
    ],
)
def test_probabilities_are_known(rows: Tensor, are: bool) -> None:
    assert are_probabilities(rows.float()) == are


def test_the_log_of_probabilities_softens_as_their_logits_do() -> None:
    logits = 3 * torch.randn(6, 10)
    model = Adapted(nn.Softmax(1), "probabilities", ())
    found = model(logits)
    for temperature in (1, 4):
        torch.testing.assert_close(
            (found / temperature).softmax(1), (logits / temperature).softmax(1)
        )
    assert Adapted(nn.Identity(), "probabilities", ())(torch.eye(2)).isfinite().all()


def test_outputs_are_put_into_the_datasets_order() -> None:
    theirs, ours = ["a", "b", "c"], ["c", "a", "b"]
    order = output_order(theirs, ours, "teacher", "run")
    logits = torch.tensor([[1.0, 2.0, 3.0]])  # of a, b, c
    assert Adapted(nn.Identity(), "logits", order)(logits).tolist() == [[3.0, 1.0, 2.0]]


@pytest.mark.parametrize(
    ("theirs", "wanted", "expected"),
    [
        (None, None, ()),
        (["1", "10", "2"], None, ()),
        (["1", "2", "10"], "teacher", (0, 2, 1)),
        (["1", "2", "10"], "dataset", ()),
        (["x", "y", "z"], "FILE", (0, 2, 1)),
    ],
)
def test_orders_of_classes(
    tmp_path: Path, theirs: list[str] | None, wanted: str | None, expected: tuple[int, ...]
) -> None:
    (tmp_path / "names.txt").write_text("1\n2\n10\n")
    wanted = str(tmp_path / "names.txt") if wanted == "FILE" else wanted
    assert output_order(theirs, ["1", "10", "2"], wanted, "run") == expected


@pytest.mark.parametrize(
    ("theirs", "wanted", "error", "message"),
    [
        (["1", "2", "10"], None, ModelError, "another order(.|\n)*--class-order teacher"),
        (["x", "10", "2"], None, ModelError, "'x'"),
        (["1", "10"], "teacher", ModelError, "'2' only in the dataset"),
        (None, "teacher", ConfigError, "--class-order FILE"),
        (None, "nowhere.txt", ConfigError, "nowhere.txt"),
    ],
)
def test_classes_that_do_not_fit(
    theirs: list[str] | None, wanted: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        output_order(theirs, ["1", "10", "2"], wanted, "run")
