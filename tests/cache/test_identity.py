import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.cache.identity import (
    DatasetIdentity,
    Identity,
    TeacherIdentity,
    ViewsIdentity,
    differences,
    identity_from_json,
    weights_digest,
)
from stages.errors import CacheError
from stages.inputs.models import load_model

IDENTITY = Identity(
    teacher=TeacherIdentity(
        architecture="resnet8", weights="ab" * 16, mean=(0.5, 0.25), std=(1.0, 0.1), image_size=None
    ),
    dataset=DatasetIdentity(
        name="digits",
        split="train",
        num_samples=1000,
        class_names=("zero", "eins", "två"),
        labels="cd" * 16,
        images="ef" * 16,
    ),
    views=ViewsIdentity(policy="pad-crop", parameters={"pad": 2, "scale": 0.5}, version=1, seed=7),
    compute_dtype="float32",
)
GOLDEN = "c44db4e8c1eedb4d046362b66bd080679fd2f596411ede203c643467ded3dc8c"
OTHER: dict[str, Any] = {
    "teacher.architecture": "resnet20",
    "teacher.weights": "ba" * 16,
    "teacher.mean": [0.5, 0.26],
    "teacher.std": [1.0, 0.2],
    "teacher.image_size": 32,
    "dataset.name": "cifar10",
    "dataset.split": "test",
    "dataset.num_samples": 999,
    "dataset.class_names": ["eins", "zero", "två"],
    "dataset.labels": "dc" * 16,
    "dataset.images": "fe" * 16,
    "views.policy": "pad-crop-flip",
    "views.parameters.pad": 4,
    "views.version": 2,
    "views.seed": 8,
    "compute_dtype": "bfloat16",
}


def with_other(*paths: str) -> Identity:
    """IDENTITY with other values at some paths."""
    values = copy.deepcopy(IDENTITY.to_json())
    for path in paths:
        *parents, field = path.split(".")
        place = values
        for parent in parents:
            place = place[parent]
        place[field] = OTHER[path]
    return identity_from_json(values, "here")


def test_digest_is_the_golden_one_and_the_sha256_of_sorted_json() -> None:
    canonical = json.dumps(
        IDENTITY.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )

    assert hashlib.sha256(canonical.encode()).hexdigest() == GOLDEN
    assert IDENTITY.digest() == GOLDEN


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    turned = dict(reversed(IDENTITY.to_json().items()))
    turned["views"]["parameters"] = {"scale": 0.5, "pad": 2}

    assert identity_from_json(turned, "here").digest() == GOLDEN


def test_json_round_trip_keeps_identity_and_digest() -> None:
    back = identity_from_json(json.loads(json.dumps(IDENTITY.to_json())), "here")

    assert back == IDENTITY
    assert back.digest() == GOLDEN


@pytest.mark.parametrize("path", OTHER)
def test_a_changed_field_is_named_and_changes_the_digest(path: str) -> None:
    other = with_other(path)

    (line,) = differences(other, IDENTITY)
    assert line.startswith(f"{path}: ")
    assert other.digest() != GOLDEN


def test_all_differences_are_named() -> None:
    lines = differences(with_other(*OTHER), IDENTITY)

    assert sorted(line.partition(":")[0] for line in lines) == sorted(OTHER)
    assert max(map(len, lines)) < 160


def test_equal_identities_do_not_differ() -> None:
    assert differences(IDENTITY, identity_from_json(IDENTITY.to_json(), "here")) == []


def broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    values = copy.deepcopy(IDENTITY.to_json())
    change(values)
    return values


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(None, id="nothing"),
        pytest.param([], id="a-list"),
        pytest.param(broken(lambda v: v.pop("views")), id="part-missing"),
        pytest.param(broken(lambda v: v["dataset"].pop("labels")), id="field-missing"),
        pytest.param(broken(lambda v: v["teacher"].update(colour="red")), id="unknown-field"),
        pytest.param(broken(lambda v: v["views"].update(seed="seven")), id="wrong-type"),
    ],
)
def test_what_is_not_an_identity_is_refused(values: Any) -> None:
    with pytest.raises(CacheError, match=r"identity of shelf\.zarr"):
        identity_from_json(values, "shelf.zarr")


# ---- weights --------------------------------------------------------------------------------


def state() -> dict[str, Tensor]:
    return {
        "conv.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
        "bn.num_batches_tracked": torch.tensor(5),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
    }


def test_weights_digest_is_the_golden_one() -> None:
    assert weights_digest(state()) == "be5c6a84845c00792b6afb75553df65c"


def flipped_bit(tensor: Tensor) -> Tensor:
    turned = tensor.clone()
    turned.view(torch.uint8).view(-1)[7] ^= 1
    return turned


CHANGES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "name": lambda s: s.update({"conv.weights": s.pop("conv.weight")}),
    "dtype": lambda s: s.update(half=s["half"].view(torch.float16)),
    "shape": lambda s: s.update({"conv.weight": s["conv.weight"].reshape(4, 3)}),
    "bit": lambda s: s.update({"conv.weight": flipped_bit(s["conv.weight"])}),
    "sign-of-zero": lambda s: s["conv.weight"][0, 0].neg_(),
    "scalar": lambda s: s["bn.num_batches_tracked"].add_(1),
    "scalar-shape": lambda s: s.update({"bn.num_batches_tracked": torch.tensor([5])}),
    "empty-shape": lambda s: s.update(empty=torch.empty(3, 0)),
    "missing": lambda s: s.pop("empty"),
    "swapped-names": lambda s: s.update({"half": s["empty"], "empty": s["half"]}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_digest_sees(change: Callable[[dict[str, Tensor]], Any]) -> None:
    changed = state()
    change(changed)

    assert weights_digest(changed) != weights_digest(state())


SAME: dict[str, dict[str, Tensor]] = {
    "order": dict(reversed(state().items())),
    "gradients": state() | {"conv.weight": state()["conv.weight"].requires_grad_()},
    "strides": state() | {"conv.weight": state()["conv.weight"].t().contiguous().t()},
}


@pytest.mark.parametrize("same", SAME.values(), ids=SAME)
def test_weights_digest_does_not_see(same: dict[str, Tensor]) -> None:
    assert weights_digest(same) == weights_digest(state())


def test_weights_digest_does_not_depend_on_the_file(teacher_run: Path, tmp_path: Path) -> None:
    weights = load_file(teacher_run / "model.safetensors")
    torch.save(weights, tmp_path / "plain.pth")
    torch.save({"model": weights, "epoch": 3}, tmp_path / "checkpoint.pth")
    torch.save({f"module.{n}": t for n, t in weights.items()}, tmp_path / "parallel.pth")
    save_file(dict(reversed(weights.items())), tmp_path / "again.safetensors")

    files = [teacher_run, *tmp_path.iterdir()]
    digests = {
        weights_digest(load_model("resnet8", str(file), 10, 1).module.state_dict())
        for file in files
    }
    assert len(files) == 5
    assert digests == {weights_digest(weights)}
