"""Losses in runs of train-student: from partial rows, and from several teachers."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from helpers import (
    first,
    metrics,
    seen_batches,
    student_of,
)
from row_losses import Row, averaged, by_formula
from safetensors.torch import load_file, save_file
from test_dist import formula as dist_formula
from test_dkd import nkd_formula
from test_kd import ce_formula, kd_formula
from test_rld import rld_formula
from test_ttm import wttm_formula
from torch import Tensor

from stages.cache import LogitCache
from stages.cache_teacher import cache_teacher, prepare
from stages.data import Splits
from stages.errors import CacheError, ConfigError, PipelineError
from stages.objectives.losses import DEFINITIONS, TemperedRows
from stages.rectify import rectify
from stages.settings import (
    BiasMode,
    BiasSettings,
    CacheConfig,
    LossSettings,
    ModelSettings,
    RectifyConfig,
    StudentConfig,
    TrainSettings,
)
from stages.student_checks import complete
from stages.train_student import train_student

SAMPLES = 80


class World(NamedTuple):
    """Caches of one view: `whole` and `part` of one teacher, `other` of another one."""

    splits: Splits
    caches: Mapping[str, Path]


@pytest.fixture(scope="module")
def my_world(
    digits: Splits,
    cache_config: CacheConfig,
    teacher_run: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("losses")
    splits = Splits(first(digits.train, SAMPLES), first(digits.test, 10))
    another = Path(shutil.copytree(teacher_run, folder / "another"))
    weights = load_file(another / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    last = weights[list(weights)[-1]]
    last += 2 * torch.randn(last.shape, generator=generator)
    save_file(weights, another / "model.safetensors")
    (another / "summary.json").unlink()  # which has a digest of the old ones

    other = msgspec.structs.replace(cache_config.teacher, weights=str(another))
    changes: Mapping[str, Mapping[str, Any]] = {
        "whole": {},
        "part": {"encoding": "topk:k=4,temperatures=1/2/4"},
        "other": {"teacher": other},
    }
    for name, changed in changes.items():
        config = msgspec.structs.replace(cache_config, views=1, **changed)
        cache_teacher(prepare(config, splits), folder / name)
    rectify(folder / "part", RectifyConfig())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "stages.inputs.probes.pixel_probes",
            lambda *_: LogitCache.open(folder / "whole").pixel_probes,
        )
        yield World(splits, {name: folder / name for name in changes})


class Shown(NamedTuple):
    """What one batch of all samples was: student logits, labels, and the line of metrics."""

    samples: Tensor
    logits: Tensor
    labels: Tensor
    line: dict[str, Any]


def student_config(world: World, *names: str, **changes: Any) -> StudentConfig:
    one, *also = (str(world.caches[name]) for name in names)
    own: dict[str, Any] = {
        "model": ModelSettings(architecture="resnet8"),
        "train": TrainSettings(epochs=1, batch_size=1000, lr=1e-12, weight_decay=0),
    }
    return student_of(one, also=tuple(also), **{**own, **changes})


def run(world: World, out: Path, *names: str, **changes: Any) -> Shown:
    """A run of one batch."""
    with pytest.MonkeyPatch.context() as patch:
        seen = seen_batches(patch)
        train_student(student_config(world, *names, **changes), out, splits=world.splits)
    ((_, samples, logits),) = seen
    (line,) = metrics(out)
    return Shown(samples, logits, world.splits.train.labels[samples], line)


FROM_PART = [
    LossSettings(name="kd"),
    LossSettings(name="dkd", warmup=0),
    LossSettings(name="nkd", temperature=2.0),
    LossSettings(name="ttm", temperature=2.0),
    LossSettings(name="wttm", temperature=4.0),
    LossSettings(name="rld", warmup=0, sure_temperature=2.0),
    LossSettings(name="la"),
    LossSettings(name="ka_lsr"),
    LossSettings(name="rc"),
    LossSettings(name="wsld"),
]


@pytest.mark.parametrize("settings", FROM_PART, ids=lambda settings: settings.name)
def test_what_a_run_from_partial_rows_minimises(
    my_world: World, tmp_path: Path, settings: LossSettings
) -> None:
    shown = run(my_world, tmp_path / "run", "part", loss=settings)
    targets = LogitCache.open(my_world.caches["part"]).read_view(0)
    kept = targets.kept(shown.samples)
    assert kept is not None
    assert kept.shape == (SAMPLES, 4)
    rows = TemperedRows(lambda t: targets.rows(shown.samples, t), kept)
    definition = DEFINITIONS[settings.name]
    given = {
        key: value for key in definition.defaults if (value := getattr(settings, key)) is not None
    }
    soft = definition.make(given)(shown.logits, rows, shown.labels).item()
    assert shown.line["loss_kd"] == pytest.approx(soft, rel=1e-4)
    total = definition.ce_weight * shown.line["loss_ce"] + definition.weight * soft
    assert shown.line["loss"] == pytest.approx(total, rel=1e-4)


REFUSED: Mapping[str, tuple[LossSettings, type[PipelineError], str]] = {
    "dist": (LossSettings(name="dist"), ConfigError, "'dist' needs whole teacher rows"),
    "mlkd": (LossSettings(name="mlkd"), ConfigError, "'mlkd' needs whole teacher rows"),
    "ctkd": (LossSettings(name="ctkd"), ConfigError, "'ctkd' needs whole teacher rows"),
    "lr": (LossSettings(name="lr"), ConfigError, "'lr' needs whole teacher rows"),
    "standardised": (LossSettings(standardise=True), ConfigError, "standardised where whole rows"),
    "temperature": (LossSettings(name="ttm"), CacheError, "T = 1, 2, 4, not at 10"),
    "second": (LossSettings(name="rld", sure_temperature=3.0), CacheError, "not at 3"),
    "unknown": (LossSettings(beta=2.0), ConfigError, "the loss 'kd' has no beta"),
}


@pytest.mark.parametrize(("settings", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_there_is_a_run(
    my_world: World, tmp_path: Path, settings: LossSettings, kind: type[PipelineError], message: str
) -> None:
    for number, names in enumerate((["part"], ["whole", "part"])):
        config = student_config(my_world, *names, loss=settings)
        with pytest.raises(kind) as refused:
            train_student(config, tmp_path / str(number), splits=my_world.splits)
        if names == ["part"]:
            assert message in str(refused.value)
        assert not (tmp_path / str(number)).exists()


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (LossSettings(temperature=2.0), True),
        (LossSettings(name="nkd"), True),
        (LossSettings(name="dkd"), False),
    ],
    ids=["kd-2", "nkd-1", "dkd-4"],
)
def test_a_rectification_belongs_to_the_temperature_of_the_loss(
    my_world: World, tmp_path: Path, settings: LossSettings, refused: bool
) -> None:
    config = student_config(my_world, "part", loss=settings, bias=BiasSettings(mode="rectify"))
    cache = LogitCache.open(config.cache)
    if refused:
        with pytest.raises(CacheError, match="belongs to temperature 4"):
            complete(config, cache)
    else:
        assert complete(config, cache).config.bias.rectified == "pairwise-T4"


@pytest.mark.parametrize(
    "settings",
    [LossSettings(name="ctkd"), LossSettings(standardise=True), LossSettings(name="mlkd")],
    ids=["ctkd", "standardised", "mlkd"],
)
def test_a_rectification_of_any_temperature_serves(
    my_world: World, tmp_path: Path, settings: LossSettings
) -> None:
    """A learned temperature, and standardised rows, have none that it could belong to."""
    copy = Path(shutil.copytree(my_world.caches["whole"], tmp_path / "whole"))
    temperature = 4.0 if settings.name == "mlkd" else 3.0
    rectify(copy, RectifyConfig(temperature=temperature))
    config = msgspec.structs.replace(
        student_config(my_world, "whole", loss=settings, bias=BiasSettings(mode="rectify")),
        cache=str(copy),
    )
    assert complete(config, LogitCache.open(copy)).config.bias.rectified


@pytest.mark.parametrize("mode", ["none", "eliminate"])
def test_rows_of_lr_are_averaged_once(my_world: World, mode: BiasMode) -> None:
    """By their kinds as released, or as bias-aware weights do it."""
    bias = BiasSettings(mode=mode)
    config = student_config(my_world, "whole", loss=LossSettings(name="lr"), bias=bias)
    cache = LogitCache.open(config.cache)
    checked = complete(config, cache).config
    assert checked.loss.average == ("kind" if mode == "none" else "batch")
    assert complete(checked, cache).config == checked
    asked = msgspec.structs.replace(config, loss=LossSettings(name="lr", average="kind"))
    if mode == "none":
        assert complete(asked, cache).config.loss.average == "kind"
    else:
        with pytest.raises(ConfigError, match=r"bias\.reduction"):
            complete(asked, cache)


FORMULAS = {
    "kd": kd_formula,
    "nkd": nkd_formula,
    "rld": rld_formula,
    "wttm": wttm_formula,
}


@pytest.mark.parametrize("name", [*FORMULAS, "dist"])
def test_several_teachers(my_world: World, tmp_path: Path, name: str) -> None:
    """The loss of the mean probabilities at every temperature that it reads, by its formula."""
    given: dict[str, Any] = {"temperature": 2.0} if name == "nkd" else {}
    settings = LossSettings(name=name, warmup=0, **given)
    shown = run(my_world, tmp_path / "run", "whole", "other", loss=settings)
    teachers = [
        LogitCache.open(my_world.caches[cache]).read_view(0).rows(shown.samples)
        for cache in ("whole", "other")
    ]
    assert (teachers[0].argmax(1) != teachers[1].argmax(1)).any()
    mean = averaged(teachers)
    if name == "dist":
        expected = dist_formula(shown.logits, mean.at(4.0))
    else:
        rows: Row = by_formula(FORMULAS[name], shown.logits, mean.at, shown.labels, given)
        expected = float(rows.mean())
    assert shown.line["loss_kd"] == pytest.approx(expected, rel=1e-3)
    hard = by_formula(ce_formula, shown.logits, mean.at, shown.labels, {}).mean()
    assert shown.line["loss_ce"] == pytest.approx(hard, rel=1e-4)
