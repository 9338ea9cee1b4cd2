import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
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
    **{"teacher.architecture": "resnet20", "teacher.weights": "ba" * 16},
    **{"teacher.mean": [0.5, 0.26], "teacher.std": [1.0, 0.2], "teacher.image_size": 32},
    **{"dataset.name": "cifar10", "dataset.split": "test", "dataset.num_samples": 999},
    **{"dataset.class_names": ["eins", "zero", "två"], "dataset.labels": "dc" * 16},
    **{"dataset.images": "fe" * 16, "views.policy": "pad-crop-flip", "views.parameters.pad": 4},
    **{"views.version": 2, "views.seed": 8, "compute_dtype": "bfloat16"},
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
    """In whatever order the keys come, and back from JSON."""
    known = IDENTITY.to_json()
    canonical = json.dumps(known, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    turned = dict(reversed(json.loads(json.dumps(known)).items()))
    turned["views"]["parameters"] = {"scale": 0.5, "pad": 2}

    back = identity_from_json(turned, "here")

    assert hashlib.sha256(canonical.encode()).hexdigest() == GOLDEN
    assert back == IDENTITY
    assert back.digest() == IDENTITY.digest() == GOLDEN
    assert differences(IDENTITY, back) == []


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


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda v: None,
    "a-list": lambda v: [],
    "part-missing": lambda v: v.pop("views") and v,
    "field-missing": lambda v: v["dataset"].pop("labels") and v,
    "unknown-field": lambda v: {**v, "teacher": {**v["teacher"], "colour": "red"}},
    "wrong-type": lambda v: {**v, "views": {**v["views"], "seed": "seven"}},
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_is_not_an_identity_is_refused(broken: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(CacheError, match=r"shelf\.zarr"):
        identity_from_json(broken(copy.deepcopy(IDENTITY.to_json())), "shelf.zarr")


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


def test_weights_digest_does_not_see() -> None:
    for same in SAME.values():
        assert weights_digest(same) == weights_digest(state())
