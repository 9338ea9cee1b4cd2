"""What is told of a teacher before hours are spent, and that a good one is left alone."""

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import yaml
from helpers import Words, first
from torch import Tensor

from stages.cache import LogitCache
from stages.cache_teacher import cache_teacher, prepare
from stages.data import Splits
from stages.errors import ModelError, PipelineError
from stages.evaluate import evaluate_run
from stages.inputs.datasets import ImageDataset
from stages.inputs.model_input import small_image_notes
from stages.repair import recorded_job
from stages.settings import CacheConfig, TeacherSettings
from stages.teacher.checks import teacher_warnings
from stages.teacher.plan import plan_cache
from stages.user_code import trusting

ORDER = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]


def rows(top1: float, classes: int = 10, size: int = 4000) -> tuple[Tensor, Tensor]:
    """Logits and labels of a teacher that is right this often."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (size,), generator=generator)
    wrong = torch.randint(classes, (size,), generator=generator)
    answers = torch.where(torch.rand(size, generator=generator) < top1, labels, wrong)
    return torch.nn.functional.one_hot(answers, classes).float(), labels


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (*rows(0.8), None),
        (*rows(0.2), None),
        (*rows(0.6, classes=2), None),
        (*rows(0.1, classes=1000), None),
        (*rows(0.0), "chance"),
        (*rows(0.0, classes=2), "chance"),
        (*rows(0.0, classes=1000), "chance"),
        (rows(0.8)[0][:, ORDER], rows(0.8)[1], "order"),
        (rows(0.8, 1000)[0].roll(1, 1), rows(0.8, 1000)[1], "order"),
        (rows(0.9)[0][:, [1, 0, *range(2, 10)]], rows(0.9)[1], "order"),  # two are exchanged
        (torch.eye(10)[[7] * 400], rows(0.5)[1][:400], "'seven'"),  # always the same
        (*(x[:20] for x in rows(0.0)), None),  # too few rows to tell
    ],
)
def test_warnings(logits: Tensor, labels: Tensor, message: str | None) -> None:
    names = [{7: "seven"}.get(c, str(c)) for c in range(logits.shape[1])]
    warnings = teacher_warnings(logits, labels, names)
    assert len(warnings) == (0 if message is None else 1)
    assert message is None or message in warnings[0]


@pytest.fixture(autouse=True)
def measured_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.teacher.measure.MEASURED_SECONDS", 0.01)


def reordered(digits: Splits, order: list[int]) -> Splits:
    """The same images under the same names, with the classes in another order."""
    place = {old: new for new, old in enumerate(order)}
    names = tuple(digits.train.class_names[old] for old in order)

    def of(split: ImageDataset) -> ImageDataset:
        labels = torch.tensor([place[int(c)] for c in split.labels])
        return dataclasses.replace(split, labels=labels, class_names=names)

    return Splits(of(digits.train), of(digits.test))


def with_teacher(config: CacheConfig, **changes: object) -> CacheConfig:
    teacher = msgspec.structs.replace(config.teacher, **changes)
    return msgspec.structs.replace(config, teacher=teacher, views=1)


def test_another_order_is_refused_or_followed(
    tmp_path: Path, cache_config: CacheConfig, digits: Splits, finished_cache: Path
) -> None:
    other = reordered(digits, ORDER)
    with pytest.raises(ModelError, match="--class-order teacher"):
        prepare(cache_config, other)

    job = prepare(with_teacher(cache_config, class_order="teacher"), other)
    cache_teacher(job, tmp_path / "c.zarr")
    ours = LogitCache.open(tmp_path / "c.zarr")
    theirs = LogitCache.open(finished_cache)
    assert ours.identity.teacher.class_order == tuple(ORDER)
    samples = torch.arange(100)
    torch.testing.assert_close(
        ours.read_view(0).rows(samples), theirs.read_view(0).rows(samples)[:, ORDER]
    )
    assert ours.top1_per_view[0] == theirs.top1_per_view[0]


def test_an_identity_has_new_fields_only_where_they_are_used(
    cache_config: CacheConfig, digits: Splits
) -> None:
    plain = prepare(cache_config, digits).identity.to_json()["teacher"]
    assert plain.keys() == {"architecture", "weights", "mean", "std", "image_size"}


def test_an_unknown_order_is_doubted(
    tmp_path: Path, cache_config: CacheConfig, digits: Splits
) -> None:
    other, weights = reordered(digits, ORDER), f"{cache_config.teacher.weights}/model.safetensors"
    config = with_teacher(cache_config, weights=weights, architecture="resnet8")
    job, words = prepare(config, other), Words()
    (warning,) = plan_cache(job, tmp_path / "plan.zarr").warnings
    assert "--class-order" in warning
    cache_teacher(job, tmp_path / "c.zarr", words)
    assert any(warning in line for line in words.lines)
    good = prepare(with_teacher(cache_config), Splits(first(digits.train, 400), digits.test))
    assert plan_cache(good, tmp_path / "plan.zarr").warnings == ()


def test_another_order_is_not_evaluated(
    monkeypatch: pytest.MonkeyPatch, teacher_run: Path, digits: Splits
) -> None:
    other = reordered(digits, ORDER).test
    monkeypatch.setattr("stages.evaluate.load_dataset", lambda *_, **__: other)
    with pytest.raises(PipelineError, match="another order"):
        evaluate_run(teacher_run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "of run "),
        ({"weights": "FILE", "architecture": "resnet8"}, "dataset's images"),
        ({"mean": (0.5,), "std": (0.25,)}, "mean 0.5, std 0.25 for every channel, as given"),
    ],
)
def test_where_the_normalisation_comes_from_is_told(
    tmp_path: Path, cache_config: CacheConfig, digits: Splits, changes: dict[str, Any], message: str
) -> None:
    if "weights" in changes:
        changes = {**changes, "weights": f"{cache_config.teacher.weights}/model.safetensors"}
    few = Splits(first(digits.train, 60), first(digits.test, 20))
    job = prepare(with_teacher(cache_config, **changes), few)
    assert message in job.normalisation
    summary = cache_teacher(job, tmp_path / "c.zarr")
    assert summary.normalisation == job.normalisation
    assert LogitCache.open(tmp_path / "c.zarr").provenance["normalisation"] in job.normalisation


def test_a_network_for_large_images_is_told_of(digits: Splits) -> None:
    (note,) = small_image_notes("resnet18", digits.train, None)
    assert "'ResNet18'" in note
    assert small_image_notes("resnet18", digits.train, 224) == ()
    assert small_image_notes("resnet8", digits.train, None) == ()


MODELS = """
from torch import nn
from stages.inputs.models import load_model

def net():
    return load_model(None, {run!r}, 10, 1).module

class Grey(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.net, self.change = net(), change
    def forward(self, x):
        return self.change(self.net(x[:, :1]))

mapping = lambda: Grey(lambda x: dict(logits=x, loss=None))
probabilities = lambda num_classes: Grey(lambda x: x.softmax(1))
nothing = lambda: Grey(lambda x: None)
too_wide = lambda: Grey(lambda x: x.repeat(1, 2))
two = lambda a, b: net()

def broken(num_classes):
    raise OSError("no such hub")

def later():
    def fail_on_many(x):
        if len(x) > 2:
            raise ValueError("too many")
        return x
    return Grey(fail_on_many)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, teacher_run: Path) -> str:
    folder = tmp_path_factory.mktemp("own")
    (folder / "teachers_of_ones_own.py").write_text(MODELS.format(run=str(teacher_run)))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield "teachers_of_ones_own"


def own_config(config: CacheConfig, name: str, **changes: Any) -> CacheConfig:
    run = yaml.safe_load((Path(str(config.teacher.weights)) / "config.yaml").read_text())
    statistics = {key: tuple(run["model"][key]) for key in ("mean", "std")}
    teacher = TeacherSettings(architecture=name, **statistics, **changes)
    return msgspec.structs.replace(config, teacher=teacher, views=1)


@pytest.mark.parametrize(("name", "outputs"), [("mapping", None), ("probabilities",) * 2])
def test_a_callable_brings_its_own_weights(
    tmp_path: Path,
    own: str,
    name: str,
    outputs: str | None,
    cache_config: CacheConfig,
    digits: Splits,
    finished_cache: Path,
) -> None:
    """The rows of the run that it loads; and the same identity when it is loaded again."""
    asked = {} if outputs is None else {"outputs": outputs}
    job = prepare(own_config(cache_config, f"{own}:{name}", **asked), digits)
    cache_teacher(job, tmp_path / "c.zarr")
    cache = LogitCache.open(tmp_path / "c.zarr")
    found, known = (
        LogitCache.open(path).read_view(0).rows(torch.arange(200))
        for path in (tmp_path / "c.zarr", finished_cache)
    )
    for temperature in (1, 4):
        torch.testing.assert_close(
            (found / temperature).softmax(1), (known / temperature).softmax(1), rtol=1e-3, atol=1e-5
        )
    assert cache.identity.teacher.outputs == asked.get("outputs", "logits")
    with trusting(own):
        assert recorded_job(tmp_path / "c.zarr").identity == job.identity


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("probabilities", {}, "--outputs probabilities"),
        ("mapping", {"outputs": "probabilities"}, "no probabilities"),
        ("nothing", {}, "None"),
        ("too_wide", {}, r"\(2, 20\)"),
        ("two", {}, r"\(a, b\)"),
        ("broken", {}, r"OSError: no such hub \(.*teachers_of_ones_own.py:\d+\)"),
    ],
)
def test_models_that_are_refused(
    own: str,
    name: str,
    changes: dict[str, object],
    message: str,
    cache_config: CacheConfig,
    digits: Splits,
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        prepare(own_config(cache_config, f"{own}:{name}", **changes), digits)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_model_that_fails_later(
    tmp_path: Path, own: str, cache_config: CacheConfig, digits: Splits
) -> None:
    job = prepare(own_config(cache_config, f"{own}:later"), digits)
    with pytest.raises(ModelError, match=r"ValueError: too many \(.*teachers_of_ones_own.py"):
        cache_teacher(job, tmp_path / "c.zarr")
