"""Losses in runs of train-student: from partial rows, and from several teachers."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from helpers import (
    first,
    metrics,
    seen_batches,
    student_of,
)
from row_losses import Row, averaged, by_formula
from test_dist import formula as dist_formula
from test_dkd import nkd_formula
from test_kd import ce_formula
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
    other_teacher_run: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("losses")
    splits = Splits(first(digits.train, SAMPLES), first(digits.test, 10))
    other = msgspec.structs.replace(cache_config.teacher, weights=str(other_teacher_run))
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
        probes = LogitCache.open(folder / "whole").pixel_probes
        patch.setattr("stages.inputs.probes.pixel_probes", lambda *_: probes)
        yield World(splits, {name: folder / name for name in changes})


class Shown(NamedTuple):
    """What one batch of all samples was: student logits, labels, and the line of metrics."""

    samples: Tensor
    logits: Tensor
    labels: Tensor
    line: dict[str, Any]


def student_config(world: World, *names: str, **changes: Any) -> StudentConfig:
    one, *also = (str(world.caches[name]) for name in names)
    train = TrainSettings(epochs=1, batch_size=1000, lr=1e-12, weight_decay=0)
    return student_of(one, also=tuple(also), **{"train": train, **changes})


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
    LossSettings(name="wttm", temperature=4.0),
    LossSettings(name="rld", warmup=0, sure_temperature=2.0),
    LossSettings(name="rc"),
]
"""At which temperatures any loss reads partial rows: tests/objectives/test_losses.py."""


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


REFUSED: Mapping[str, tuple[LossSettings, type[PipelineError]]] = {
    "dist": (LossSettings(name="dist"), ConfigError),
    "ctkd": (LossSettings(name="ctkd"), ConfigError),
    "standardised": (LossSettings(standardise=True), ConfigError),
    "temperature": (LossSettings(name="ttm"), CacheError),
    "second": (LossSettings(name="rld", sure_temperature=3.0), CacheError),
    "unknown": (LossSettings(beta=2.0), ConfigError),
    "rectified-2": (LossSettings(temperature=2.0), PipelineError),
    "rectified-nkd": (LossSettings(name="nkd"), PipelineError),
}
"""The last two do not go with a rectification at another temperature, or of two caches."""


@pytest.mark.parametrize(("settings", "kind"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("names", [["part"], ["whole", "part"]], ids=["one", "two"])
def test_refused_before_there_is_a_run(
    my_world: World,
    tmp_path: Path,
    settings: LossSettings,
    kind: type[PipelineError],
    names: list[str],
    request: pytest.FixtureRequest,
) -> None:
    bias = BiasSettings(mode="rectify" if "rectified" in request.node.callspec.id else "none")
    config = student_config(my_world, *names, loss=settings, bias=bias)
    with pytest.raises(kind):
        train_student(config, tmp_path / "run", splits=my_world.splits)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        (LossSettings(name="dkd"), 4.0),
        (LossSettings(name="mlkd"), 4.0),
        (LossSettings(name="ctkd"), 3.0),
        (LossSettings(standardise=True), 3.0),
    ],
    ids=["dkd", "mlkd", "ctkd", "standardised"],
)
def test_a_rectification_that_serves(
    my_world: World, tmp_path: Path, settings: LossSettings, temperature: float
) -> None:
    """A learned temperature, and standardised rows, have none that it could belong to."""
    copy = Path(shutil.copytree(my_world.caches["whole"], tmp_path / "whole"))
    rectify(copy, RectifyConfig(temperature=temperature))
    config = student_config(my_world, "whole", loss=settings, bias=BiasSettings(mode="rectify"))
    config = msgspec.structs.replace(config, cache=str(copy))
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


FORMULAS = {"nkd": nkd_formula, "rld": rld_formula, "wttm": wttm_formula}


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
