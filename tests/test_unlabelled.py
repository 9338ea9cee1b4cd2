"""Images without labels, and runs without a test split: cached, learned from, and what is refused.

The truth is the same cache with labels: rows, and what students learn from them, are the same.
"""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from click.testing import CliRunner
from helpers import DIGITS, Words, metrics, refused, student_of
from torch.utils.data import DataLoader

from pipeline.cli import cli
from stages.cache import LogitCache
from stages.cache_teacher import cache_teacher, prepare
from stages.cached_dataset import CachedDataset
from stages.data import dataset_identity
from stages.errors import PipelineError
from stages.evaluate import OtherImages, evaluate_run
from stages.inputs.datasets import load_dataset, load_splits
from stages.objectives.losses import DEFINITIONS, LearningLoss
from stages.rectify import rectify
from stages.repair import repair
from stages.settings import (
    BiasSettings,
    CacheConfig,
    DataSettings,
    LossSettings,
    ModelSettings,
    RectifyConfig,
    StudentConfig,
    TeacherConfig,
    TrainSettings,
)
from stages.teacher.recorded import recorded_job
from stages.train_student import train_student
from stages.train_teacher import train_teacher
from stages.verify import verify

UNLABELLED = DataSettings(dataset="digits", workers=0, no_labels=True, test="none")


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory, cache_config: CacheConfig) -> Path:
    """The digits without labels and without a test split; two views. Read only."""
    path = tmp_path_factory.mktemp("unlabelled") / "u.zarr"
    config = msgspec.structs.replace(cache_config, data=UNLABELLED, views=2)
    cache_teacher(prepare(config), path)
    return path


def student(cache: Path, data: DataSettings = UNLABELLED, **changes: Any) -> StudentConfig:
    train, loss = TrainSettings(epochs=1, batch_size=250), LossSettings(temperature=2.0)
    model = ModelSettings(architecture="resnet8")
    known = {"data": data, "model": model, "train": train, "loss": loss}
    return student_of(cache, **{**known, **changes})


def test_rows_are_the_same(
    unlabelled: Path, finished_cache: Path, cache_config: CacheConfig
) -> None:
    ours, theirs = LogitCache.open(unlabelled), LogitCache.open(finished_cache)
    assert not ours.labelled
    assert not ours.tested
    assert ours.identity.dataset.class_names == theirs.identity.dataset.class_names
    for view in range(2):
        assert torch.equal(ours.distribution(view), theirs.distribution(view))
    assert ours.top1_per_view == {}
    names = {name for name, _ in zarr.open_group(unlabelled, mode="r").arrays()}
    assert not names & {"label", "eval_label", "eval_logits", "eval_prediction"}  # absent, not zero
    record = next(iter(ours.commits.of_view(0).values()))
    assert "right" not in record
    config = msgspec.structs.replace(cache_config, data=UNLABELLED, views=2)
    summary = cache_teacher(prepare(config), unlabelled)  # nothing is missing
    assert (summary.computed_blocks, summary.views) == (0, 2)
    assert (summary.train_top1, summary.test_top1) == ([], None)
    labelled = msgspec.structs.replace(cache_config, views=2)
    with pytest.raises(PipelineError, match=r"dataset\.labels"):
        cache_teacher(prepare(labelled), unlabelled)


def test_it_is_verified_and_repaired(unlabelled: Path, tmp_path: Path) -> None:
    assert verify(unlabelled).faults == []
    copy = Path(shutil.copytree(unlabelled, tmp_path / "copy.zarr"))
    shard = copy / "logits" / "c" / "1" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])
    faults = verify(copy).faults
    assert faults
    assert repair(copy, recorded_job(copy), faults).faults == []
    assert shard.read_bytes() == (unlabelled / "logits" / "c" / "1" / "0" / "0").read_bytes()


def test_a_student_learns_the_same(unlabelled: Path, finished_cache: Path, tmp_path: Path) -> None:
    loss = LossSettings(temperature=2.0, ce_weight=0.0)
    said = Words()
    train_student(student(unlabelled), tmp_path / "u", reporter=said)
    train_student(
        student(finished_cache, DIGITS, views=2, loss=loss), tmp_path / "l", reporter=Words()
    )
    (ours,), (theirs,) = metrics(tmp_path / "u"), metrics(tmp_path / "l")
    assert ours["loss_kd"] == theirs["loss_kd"]
    assert ours["loss"] == pytest.approx(theirs["loss"])
    absent = {"loss_ce", "wrong_rate", "loss_right", "loss_wrong", "test_top1", "test_top5"}
    assert not absent & ours.keys()
    assert any("without labels" in line for line in said.lines)
    with pytest.raises(PipelineError, match="no test split"):
        evaluate_run(tmp_path / "u")
    named = OtherImages(dataset="digits")
    found = evaluate_run(tmp_path / "u", named, caches=[str(finished_cache)])
    assert found.scores.top1 == pytest.approx(theirs["test_top1"], abs=0.01)


def test_tested_on_another(unlabelled: Path, cache_config: CacheConfig, tmp_path: Path) -> None:
    data = msgspec.structs.replace(UNLABELLED, test=None, eval_dataset="digits")
    train_student(student(unlabelled, data), tmp_path / "run")
    (line,) = metrics(tmp_path / "run")
    found = evaluate_run(tmp_path / "run")
    assert found.scores.top1 == pytest.approx(line["test_top1"])
    config = msgspec.structs.replace(cache_config, data=data, views=1)
    cache_teacher(prepare(config), tmp_path / "tested.zarr")
    tested = LogitCache.open(tmp_path / "tested.zarr")
    assert tested.tested
    assert not tested.labelled
    assert len(tested.eval_labels) == 797


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": LossSettings(name="ce")}, "the loss 'ce' needs labels"),
        ({"loss": LossSettings(name="dkd")}, "the loss 'dkd' needs labels"),
        ({"loss": LossSettings(ce_weight=0.5)}, "ce_weight 0.5 needs labels"),
        ({"loss": LossSettings(until=1)}, "until needs labels"),
        ({"bias": BiasSettings(mode="eliminate")}, "bias 'eliminate' needs labels"),
        ({"bias": BiasSettings(mode="rectify")}, "bias 'rectify' needs labels"),
        ({"data": msgspec.structs.replace(UNLABELLED, val_fraction=0.1)}, "val_fraction 0.1 needs"),
        ({"data": msgspec.structs.replace(UNLABELLED, no_labels=False)}, "labels: "),
    ],
)
def test_what_needs_labels_is_refused(
    unlabelled: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with refused(PipelineError, message):
        train_student(student(unlabelled, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_stages_that_need_labels(unlabelled: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="rectification needs labels"):
        rectify(unlabelled, RectifyConfig())
    with pytest.raises(PipelineError, match="accuracy needs labels"):
        LogitCache.open(unlabelled).top1(0)
    with pytest.raises(PipelineError, match="no labels"):
        LogitCache.open(unlabelled).read_view(0).wrong(torch.arange(3))
    config = TeacherConfig(data=UNLABELLED, model=ModelSettings(architecture="resnet8"))
    with pytest.raises(PipelineError, match="needs labels"):
        train_teacher(config, tmp_path / "run")


def test_losses_say_whether_they_read_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    student_, teacher = (torch.randn(64, 10, generator=generator) for _ in range(2))
    labels = torch.randint(10, (64,), generator=generator)
    for name, definition in DEFINITIONS.items():
        loss = definition.make({})
        if isinstance(loss, LearningLoss):
            loss.start_epoch(0)
        shape = (64, 10) if definition.views == 1 else (2, 32, 10)
        rows, some = (student_.view(shape), teacher.view(shape)), labels[: shape[-2]]
        same = torch.equal(loss(*rows, some), loss(*rows, (some + 1) % 10))
        assert same is not definition.reads_labels, name


def test_a_cached_dataset_has_no_mask(unlabelled: Path) -> None:
    dataset = CachedDataset(unlabelled)
    batch = next(iter(DataLoader(dataset, batch_size=8)))
    assert batch.wrong.shape == (8, 0)
    assert batch.labels.tolist() == [-1] * 8
    assert batch.teacher_logits.shape == (8, 10)
    images = load_dataset("digits", "train").images
    assert images is not None
    own = CachedDataset(unlabelled, [np.asarray(image[0]) for image in images])
    torch.testing.assert_close(own[3].images, dataset[3].images)


def test_commands_say_so(unlabelled: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    message = run(cli, ["inspect", str(unlabelled)]).output
    assert "no test split" in message
    assert "none" in next(line for line in message.splitlines() if "labels" in line)
    page = tmp_path / "page.html"
    result = run(cli, ["report", str(unlabelled), "--out", str(page)])
    assert result.exit_code == 0, result.output
    assert "have no labels" in page.read_text()


def test_kd_on_topk_rows_without_labels(cache_config: CacheConfig, tmp_path: Path) -> None:
    config = msgspec.structs.replace(cache_config, data=UNLABELLED, views=1, encoding="topk:k=3")
    cache_teacher(prepare(config), tmp_path / "c.zarr")
    cache = LogitCache.open(tmp_path / "c.zarr")
    rows = cache.read_view(0).of(torch.arange(50))
    kept = rows.kept()
    assert kept is not None
    whole = F.softmax(rows.at(1.0), 1)
    assert torch.equal(whole.topk(3).indices.sort().values, kept.sort().values)  # no label in it


def test_an_identity_has_new_fields_only_where_they_are_used(
    unlabelled: Path, finished_cache: Path
) -> None:
    plain = LogitCache.open(finished_cache).identity.to_json()["dataset"]
    assert plain.keys() == {*("name", "split", "num_samples", "class_names", "labels", "images")}
    assert LogitCache.open(unlabelled).identity.to_json()["dataset"].keys() == plain.keys()
    shared = load_splits("digits", test="0.25")[0]
    assert dataset_identity(shared).tested_share == 0.25
