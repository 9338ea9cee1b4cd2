"""Which outputs of a teacher are the classes of a dataset."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torchvision
from msgspec.structs import replace
from torch import nn

from stages.cache import LogitCache
from stages.cache_teacher import cache_teacher, prepare
from stages.data import Splits
from stages.errors import ConfigError, ModelError
from stages.inputs.class_maps import class_groups, imagenet_names, in_identity
from stages.inputs.model_outputs import Adapted
from stages.inputs.models import load_model
from stages.settings import CacheConfig, TeacherSettings

PETS = (("tabby, tabby cat",), ("Egyptian cat",), ("pug-dog",), ("crane",), ("crane",))
TORCHVISION = tuple(
    (name,) for name in torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
)
R = ["n01443537", "n01484850", "n07749582"]  # of ImageNet-R: goldfish, great white, lemon
V2 = sorted(map(str, range(1000)))  # ImageNet-V2's folders, as folders are sorted


@pytest.mark.parametrize(
    ("classes", "aliases", "outputs", "found"),
    [
        (["Egyptian cat", "pug-dog"], PETS, 5, [1, 2]),
        (["egyptian_cat", "Pug dog"], PETS, 5, [1, 2]),
        (["tabby_cat", "tabby"][:1], PETS, 5, [0]),
        (R, TORCHVISION, 1000, [1, 2, 951]),
        (R, None, 1000, [1, 2, 951]),
        (["lemon", "goldfish"], None, 1000, [951, 1]),
        (V2, TORCHVISION, 1000, list(map(int, V2))),
        (["3", "1"], (("3",), ("0",), ("1",)), 3, [0, 2]),
    ],
)
def test_by_name(classes, aliases, outputs, found) -> None:  # type: ignore[no-untyped-def]
    groups = class_groups("auto", classes, aliases, outputs, "the teacher")
    assert groups == tuple((output,) for output in found)


def test_a_file(tmp_path: Path) -> None:
    map_ = tmp_path / "map.yaml"
    map_.write_text("cat: [tabby, 1]\nno: pug_dog\n'017': 4\nunused: 3\n")
    groups = class_groups(str(map_), ["no", "cat", "017"], PETS, 5, "the teacher")
    assert groups == ((2,), (0, 1), (4,))
    assert in_identity(groups, 5) == ((), groups)


def test_the_table_and_what_is_kept_in_an_identity() -> None:
    table = imagenet_names()
    assert table is not None
    ids = [wordnet for wordnet, _ in table]
    assert ids == sorted(ids)  # ImageNet-1k's order
    assert table[951][1] == TORCHVISION[951][0] == "lemon"
    with pytest.raises(ConfigError, match="--classes alone"):
        TeacherSettings(weights="w", classes="auto", class_order="teacher")
    assert in_identity(((0,), (1,)), 2) == ((), ())
    assert in_identity(((0,), (1,)), 3) == ((0, 1), ())
    assert in_identity(((1,), (0,)), 2) == ((1, 0), ())
    assert in_identity(((1,), (0, 2)), 3) == ((), ((1,), (0, 2)))


def test_pooling_adds_probabilities_and_restricting_divides_them() -> None:
    logits = torch.randn(7, 5, dtype=torch.float64)
    probabilities = logits.softmax(1)
    sums = torch.stack(
        [probabilities[:, [4]].sum(1), probabilities[:, [0, 2, 3]].sum(1)], 1
    )  # output 1 is no class
    adapted = Adapted(nn.Identity(), "logits", (), ((4,), (0, 2, 3)))
    torch.testing.assert_close(adapted(logits).softmax(1), sums / sums.sum(1, keepdim=True))
    assert torch.equal(adapted(logits)[:, 0], logits[:, 4])
    rows = probabilities.float()
    of_probabilities = Adapted(nn.Identity(), "probabilities", (), ((4,), (0, 2, 3)))
    torch.testing.assert_close(of_probabilities(rows).exp(), sums.float())


@pytest.mark.parametrize(
    ("text", "classes", "aliases", "error", "message"),
    [
        ("auto", ["cat", "pug_dog", "emu"], PETS, ModelError, "2 of 3 classes: 'cat', 'emu'"),
        ("auto", ["tabby_ca"], PETS, ModelError, "did you mean 'tabby cat'"),
        ("auto", ["crane"], PETS, ModelError, "'crane' may be 3 or 4"),
        ("auto", ["a", "b"], None, ModelError, "names of the 5 outputs"),
        ("auto", ["tabby", "tabby cat"], PETS, ModelError, "output 0"),
        ("none", ["cat"], PETS, ConfigError, "cannot read the class map"),
        ("a: [", ["a"], PETS, ConfigError, "cannot read the class map"),
        ("- a\n- b", ["a"], PETS, ConfigError, "no map of classes"),
        ("", ["a"], PETS, ConfigError, "no map of classes"),
        ("a: 0", ["a", "b", "c"], PETS, ModelError, "2 of 3 classes: 'b', 'c'"),
        ("a: 5", ["a"], PETS, ModelError, "'5', which the teacher has not"),
        ("a: pug-dig", ["a"], PETS, ModelError, "did you mean 'pug dog'"),
        ("a: crane", ["a"], PETS, ModelError, "is 3 and 4: give a number"),
        ("a: []", ["a"], PETS, ConfigError, "no output or list"),
        ("a: [0, 1]\nb: 1", ["a", "b"], PETS, ModelError, "output 1 of the teacher to 'a'"),
    ],
)
def test_wrong_maps(tmp_path, text, classes, aliases, error, message) -> None:  # type: ignore[no-untyped-def]
    wanted = text
    if text not in ("auto", "none"):
        (tmp_path / "map.yaml").write_text(text)
        wanted = str(tmp_path / "map.yaml")
    with pytest.raises(error) as raised:
        class_groups(wanted, classes, aliases, 5, "the teacher")
    assert message in raised.value.cause + raised.value.remedy
    assert len(str(raised.value).splitlines()) <= 3


def grouped(digits: Splits) -> Splits:
    """Digits of three classes: below four, below eight, the rest."""

    def of(split):  # type: ignore[no-untyped-def]
        names = ("low", "middle", "high")
        return dataclasses.replace(split, labels=split.labels // 4, class_names=names)

    return Splits(of(digits.train), of(digits.test))


def test_a_cache_of_pooled_outputs(
    tmp_path: Path, cache_config: CacheConfig, digits: Splits, finished_cache: Path
) -> None:
    (tmp_path / "map.yaml").write_text("low: [0, 1, 2, 3]\nmiddle: [4, 5, 6, 7]\nhigh: [8, 9]\n")
    run, classes = str(cache_config.teacher.weights), str(tmp_path / "map.yaml")
    teacher = TeacherSettings(weights=run, classes=classes)
    job = prepare(replace(cache_config, teacher=teacher, views=1), grouped(digits))
    assert job.identity.teacher.class_order == ()
    assert job.identity.teacher.pooled_outputs == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9))
    cache_teacher(job, tmp_path / "c.zarr")
    whole = LogitCache.open(finished_cache).distribution(0)
    sums = torch.stack([whole[:, :4].sum(1), whole[:, 4:8].sum(1), whole[:, 8:].sum(1)], 1)
    torch.testing.assert_close(LogitCache.open(tmp_path / "c.zarr").distribution(0), sums)
    file = TeacherSettings(
        weights=f"{run}/model.safetensors", architecture="resnet8", classes=classes
    )
    bare = prepare(replace(cache_config, teacher=file, views=1), grouped(digits))
    assert bare.identity.teacher.pooled_outputs == job.identity.teacher.pooled_outputs


def one_thousand(num_classes: int = 1000) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def needs_a_number(num_classes: int) -> nn.Module:
    return one_thousand(num_classes)


def test_a_callable_has_the_outputs_that_it_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    model = load_model("test_class_maps:one_thousand", None, 3, 3, own_head=True)
    assert model.module(torch.zeros(2, 3, 4, 4)).shape == (2, 1000)
    with pytest.raises(ModelError, match="needs no argument"):
        load_model("test_class_maps:needs_a_number", None, 3, 3, own_head=True)
