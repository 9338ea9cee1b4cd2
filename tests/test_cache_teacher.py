import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import numpy as np
import pytest
import torch
import xarray
import yaml
import zarr
from helpers import Words, plain, resized
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.cache import LogitCache
from stages.cache_teacher import CacheJob, CacheSummary, cache_teacher, prepare
from stages.data import Splits
from stages.errors import (
    CacheError,
    ConfigError,
    IdentityError,
    ModelError,
    ViewError,
)
from stages.inputs.cifar_models import cifar_model
from stages.inputs.views import view_policy
from stages.repair import repair
from stages.settings import CacheConfig, TeacherSettings
from stages.teacher.logits import TeacherPass
from stages.verify import verify

Objects = Callable[[Path], dict[str, bytes]]


def run(job: CacheJob, out: Path, **changes: Any) -> CacheSummary:
    """The job with other settings, over the same images."""
    config = msgspec.structs.replace(job.config, **changes)
    return cache_teacher(prepare(config, job.splits), out)


def mtimes(store: Path) -> dict[str, int]:
    return {str(p.relative_to(store)): p.stat().st_mtime_ns for p in store.rglob("*")}


@pytest.fixture(scope="module")
def teacher(teacher_run: Path) -> Callable[[Tensor], Tensor]:
    """The teacher, rebuilt from its files alone: uint8 pixels (B, 1, H, W) -> logits (B, 10)."""
    model = yaml.safe_load((teacher_run / "config.yaml").read_text())["model"]
    module = cifar_model(model["architecture"], 10, 1)
    module.load_state_dict(load_file(teacher_run / "model.safetensors"))
    module.eval()

    @torch.no_grad()
    def forward(pixels: Tensor) -> Tensor:
        values = (pixels.numpy().astype(np.float64) / 255 - model["mean"][0]) / model["std"][0]
        logits: Tensor = module(torch.from_numpy(values.astype(np.float32)))
        return logits

    return forward


def test_xarray_reads_the_live_logits(
    finished_cache: Path, teacher: Callable[[Tensor], Tensor]
) -> None:
    npz = np.load(Path(__file__).parents[1] / "data" / "digits.npz", allow_pickle=False)
    with xarray.open_zarr(finished_cache, consolidated=False) as found:
        assert found["logits"].dims == ("view", "sample", "class")
        assert found["prediction"].dims == ("view", "sample")
        assert found["label"].dims == found["dataset_index"].dims == ("sample",)
        assert found["eval_logits"].dims == ("eval_sample", "class")
        assert found["eval_label"].dims == found["eval_prediction"].dims == ("eval_sample",)
        sizes = {"view": 3, "sample": 1000, "class": 10, "eval_sample": 797}
        assert dict(found.sizes) == sizes
        dtypes = {str(name): str(array.dtype) for name, array in found.items()}
        values = {str(name): array.to_numpy() for name, array in found.items()}
        attributes = found.attrs

    assert dtypes == {
        "dataset_index": "int64",
        "label": "int32",
        "prediction": "uint16",
        "logits": "float32",
        "eval_label": "int32",
        "eval_logits": "float16",
        "eval_prediction": "uint16",
    }
    assert (attributes["format"], attributes["version"]) == ("teacher-logit-cache", 1)
    index = values["dataset_index"]
    assert sorted(index) == list(range(1000))
    assert not np.array_equal(index, np.arange(1000))
    assert np.array_equal(values["label"], npz["train_labels"][index])
    images = torch.from_numpy(npz["train_images"][index]).unsqueeze(1)
    policy = view_policy("pad-crop:pad=2", seed=0)
    config = msgspec.convert(attributes["provenance"]["config"], CacheConfig)
    summary = cache_teacher(prepare(config), finished_cache)  # writes nothing
    for view in range(3):
        live = teacher(policy.apply(images, torch.from_numpy(index), view)).numpy()
        right = (live.argmax(1) == values["label"]).mean()
        assert summary.train_top1[view] == pytest.approx(right, abs=0.002)
        np.testing.assert_allclose(values["logits"][view], live, rtol=0, atol=1e-5)
        assert np.array_equal(values["prediction"][view], values["logits"][view].argmax(1))
        sure = np.sort(live)[:, -1] - np.sort(live)[:, -2] > 1e-4
        assert sure.mean() > 0.9
        assert np.array_equal(values["prediction"][view][sure], live.argmax(1)[sure])
    live = teacher(torch.from_numpy(npz["test_images"]).unsqueeze(1)).numpy()
    right = (live.argmax(1) == npz["test_labels"]).mean()
    assert summary.test_top1 == pytest.approx(right, abs=0.002)
    relative = live - live.max(1, keepdims=True)
    np.testing.assert_allclose(values["eval_logits"], relative, rtol=2**-11, atol=2e-5)
    assert np.array_equal(values["eval_prediction"], live.argmax(1))
    assert np.array_equal(values["eval_label"], npz["test_labels"])


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"batch_size": 37, "channels_last": False, "block_rows": 128}, 1e-5),
        ({"encoding": "float16"}, 4e-3),
        ({"dtype": "bfloat16"}, 0.2),
    ],
)
def test_logits_do_not_depend_on_how_they_were_computed(
    small_job: CacheJob, finished_cache: Path, tmp_path: Path, changes: Any, tolerance: float
) -> None:
    run(small_job, tmp_path / "c.zarr", views=1, **{"encoding": "float32", **changes})

    ours, exact = (LogitCache.open(p).read_view(0) for p in (tmp_path / "c.zarr", finished_cache))
    some = torch.arange(300)
    torch.testing.assert_close(ours.rows(some), exact.rows(some), rtol=0, atol=tolerance)
    if changes.get("encoding") == "float16":  # predictions are taken before encoding
        assert torch.equal(ours.wrong(some), exact.wrong(some))


@pytest.mark.parametrize("views", [1, 2])
def test_running_again_writes_nothing(tiny_cache: Path, tiny_job: CacheJob, views: int) -> None:
    before, words = mtimes(tiny_cache), Words()

    summary = cache_teacher(resized(tiny_job, 60, 20, views=views), tiny_cache, words)

    assert (summary.computed_blocks, summary.views) == (0, 2)
    assert words.done == []
    assert any(re.search(r"\b0 are missing", line) for line in words.lines)
    assert mtimes(tiny_cache) == before


def test_appended_views_leave_blocks_alone(
    tiny_job: CacheJob, tmp_path: Path, array_bytes: Objects
) -> None:
    out, words = tmp_path / "c.zarr", Words()
    assert cache_teacher(tiny_job, out, words).computed_blocks == 4
    assert words.done == sorted(words.done)
    assert words.done[-1] == 1.0
    before, times = array_bytes(out), mtimes(out)

    summary = run(tiny_job, out, views=5)

    assert (summary.computed_blocks, summary.views) == (3 * 2, 5)
    after, now = array_bytes(out), mtimes(out)
    blocks = [name for name in before if "/c/" in name]
    assert len(blocks) == 2 * 2 * 2 + 5
    assert {name: after[name] for name in blocks} == {name: before[name] for name in blocks}
    assert {name: now[name] for name in blocks} == {name: times[name] for name in blocks}
    run(tiny_job, tmp_path / "at-once.zarr", views=5)
    assert after == array_bytes(tmp_path / "at-once.zarr")


def test_a_damaged_record_is_told_first(
    tiny_copy: Path, tiny_job: CacheJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny_copy / "commits/logits/v00001.json").write_bytes(b"{}")
    monkeypatch.setattr(TeacherPass, "of_views", lambda *_: pytest.fail("worked"))
    with pytest.raises(CacheError, match=r"v00001.json is not readable"):
        run(tiny_job, tiny_copy, views=5)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("prediction/c/1/0", 0),
        pytest.param("logits/c/1/1/0", -1, marks=pytest.mark.slow),
        pytest.param("eval_logits/c/0/0", -1, marks=pytest.mark.slow),
    ],
)
def test_an_object_that_is_not_whole_is_mended(
    tiny_copy: Path, tiny_job: CacheJob, array_bytes: Objects, name: str, kept: int
) -> None:
    """As the message says."""
    before, shard = array_bytes(tiny_copy), tiny_copy / name
    shard.write_bytes(shard.read_bytes()[:kept])
    if not kept:
        shard.unlink()
    found = r"has \d+ bytes" if kept else "is missing"
    with pytest.raises(CacheError, match=rf"object {name} {found}") as caught:
        cache_teacher(tiny_job, tiny_copy)
    assert "pipeline verify CACHE --repair" in caught.value.remedy
    faults = verify(tiny_copy).faults
    assert len(faults) == 1
    assert repair(tiny_copy, tiny_job, faults).faults == []
    assert array_bytes(tiny_copy) == before


def test_a_missing_fidelity_is_completed(tiny_job: CacheJob, tmp_path: Path) -> None:
    """Of a run that was killed when all blocks were committed."""

    def killed(_: LogitCache) -> None:
        raise KeyboardInterrupt

    for views in (1, 2):  # made, and appended to
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LogitCache, "write_fidelity", killed)
            with pytest.raises(KeyboardInterrupt):
                run(tiny_job, tmp_path / "c.zarr", views=views)

        assert run(tiny_job, tmp_path / "c.zarr", views=views).computed_blocks == 0

        fidelity = LogitCache.open(tmp_path / "c.zarr").fidelity
        assert fidelity is not None
        assert fidelity.rows == views * 60


def test_a_forgotten_view_is_made_again(
    tiny_copy: Path, tiny_job: CacheJob, array_bytes: Objects
) -> None:
    before = array_bytes(tiny_copy)
    (tiny_copy / "commits/logits/v00001.json").unlink()

    assert cache_teacher(tiny_job, tiny_copy).computed_blocks == 2
    assert array_bytes(tiny_copy) == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 1}, "views.seed"),
        ({"augment": "pad-crop:pad=1"}, "views.parameters.pad"),
        ({"augment": "pad-crop-flip:pad=2"}, "views.policy"),
        ({"dtype": "bfloat16"}, "compute_dtype"),
        ({"teacher": "other weights"}, "teacher.weights"),
        ({"teacher": "other statistics"}, "teacher.mean"),
        ({}, "dataset.labels"),
        ({"images_digest": "of others"}, "dataset.images"),
    ],
)
def test_another_identity_is_refused_and_named(
    tiny_cache: Path, tiny_job: CacheJob, other_teacher_run: Path, changes: Any, field: str
) -> None:
    before, teacher = mtimes(tiny_cache), str(tiny_job.config.teacher.weights)
    if field == "teacher.weights":
        changes = {"teacher": TeacherSettings(weights=str(other_teacher_run))}
    elif field == "teacher.mean":
        changes = {"teacher": TeacherSettings(weights=teacher, mean=(0.25,), std=(0.5,))}
    elif field.startswith("dataset"):
        labels = tiny_job.splits.train.labels.clone()
        labels[50] += -1 if labels[50] else 1
        train = dataclasses.replace(tiny_job.splits.train, **(changes or {"labels": labels}))
        changes = {}
        tiny_job = dataclasses.replace(tiny_job, splits=Splits(train, tiny_job.splits.test))

    with pytest.raises(IdentityError, match=re.escape(f"{field}: ")) as caught:
        run(tiny_job, tiny_cache, **changes)
    assert "--out" in caught.value.remedy
    assert mtimes(tiny_cache) == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"views": 26}, ViewError, "25 distinct"),
        ({"views": 0}, ConfigError, "views must be positive, was 0"),
        ({"block_rows": 0}, ConfigError, "block_rows must be positive"),
        ({"encoding": "jpeg"}, CacheError, "unknown encoding 'jpeg'"),
        ({"device": "abacus"}, ConfigError, "abacus"),
    ],
)
def test_settings_that_cannot_be_run(
    tiny_job: CacheJob, tmp_path: Path, changes: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        run(tiny_job, tmp_path / "c.zarr", **changes)
    assert not LogitCache.exists(tmp_path / "c.zarr")


def test_all_views_of_a_policy_can_be_cached(tiny_job: CacheJob, tmp_path: Path) -> None:
    assert run(tiny_job, tmp_path / "c.zarr", views=9, augment="pad-crop:pad=1").views == 9


def test_something_else_at_out_is_left_alone(tiny_job: CacheJob, tmp_path: Path) -> None:
    """Of what it can be, tests/cache/test_store.py has more."""
    group = zarr.create_group(tmp_path / "theirs.zarr", zarr_format=3)
    group.create_array("temperature", shape=(3,), dtype="float32")[:] = 1
    half = tmp_path / f"theirs.zarr/temperature/c/1.{uuid4().hex}.partial"
    half.write_bytes(b"being written")
    (tmp_path / "note.txt").write_text("keep me")
    before = mtimes(tmp_path)

    for out in ("theirs.zarr", "note.txt", "."):
        with pytest.raises(CacheError):
            cache_teacher(tiny_job, tmp_path / out)
    assert mtimes(tmp_path) == before


def test_what_a_killed_writer_left_is_removed_alone(tiny_copy: Path, tiny_job: CacheJob) -> None:
    (tiny_copy / "logits/c/film.mkv.partial").write_text("half a film")
    files = {path for path in tiny_copy.rglob("*") if path.is_file()}
    for name in ("zarr.json", "logits/c/0/0/0", "commits/logits/v00000.json"):
        (tiny_copy / f"{name}.{uuid4().hex}.partial").write_bytes(b"half")

    assert cache_teacher(tiny_job, tiny_copy).computed_blocks == 0

    assert {path for path in tiny_copy.rglob("*") if path.is_file()} == files


def test_whole_numbers_will_do_as_a_normalisation(tiny_job: CacheJob, tmp_path: Path) -> None:
    teacher = TeacherSettings(weights=tiny_job.config.teacher.weights, mean=(0,), std=(1,))

    for computed in (4, 0):
        assert run(tiny_job, tmp_path / "c.zarr", teacher=teacher).computed_blocks == computed
    identity = LogitCache.open(tmp_path / "c.zarr").identity
    assert (identity.teacher.mean, identity.teacher.std) == ((0.0,), (1.0,))
    assert {type(x) for x in (*identity.teacher.mean, *identity.teacher.std)} == {float}


class Poisoned(nn.Module):
    """Says `poison` wherever an image is black."""

    def __init__(self, poison: float) -> None:
        super().__init__()
        self.poison, self.network = poison, plain(10)

    def forward(self, x: Tensor) -> Tensor:
        black = (x == 0).all((1, 2, 3)).unsqueeze(1)
        return torch.where(black, self.poison, self.network(x))


def poisoned_by_nan() -> nn.Module:
    return Poisoned(math.nan)


def poisoned_by_inf() -> nn.Module:
    return Poisoned(math.inf)


def poisoned(job: CacheJob, split: str, sample: int, by: str = "nan") -> CacheJob:
    """The job with such a teacher, for which black pixels are zero, and with a black image."""
    dataset = getattr(job.splits, split)
    images = dataset.images.clone()
    images[sample] = 0
    black = dataclasses.replace(dataset, images=images, load=images.__getitem__)
    architecture = f"test_cache_teacher:poisoned_by_{by}"
    teacher = TeacherSettings(architecture=architecture, mean=(0.0,), std=(1.0,))
    config = msgspec.structs.replace(job.config, teacher=teacher)
    return prepare(config, dataclasses.replace(job.splits, **{split: black}))


@pytest.mark.parametrize("by", ["nan", "inf"])
def test_nonfinite_logits_are_named(tiny_job: CacheJob, tmp_path: Path, by: str) -> None:
    job, out = poisoned(tiny_job, "train", 45, by), tmp_path / "c.zarr"

    with pytest.raises(ModelError, match=r"not finite: sample 45, view 0\n") as caught:
        cache_teacher(job, out)
    assert caught.value.remedy

    assert not LogitCache.exists(out)  # view 0 comes before the store: encodings are fitted to it
    sound = dataclasses.replace(job, splits=tiny_job.splits)
    assert run(sound, out, views=1).views == 1


def test_nonfinite_logits_leave_what_was_committed_before(
    tiny_job: CacheJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.cache.encoding.choose.FIT_ROWS", 30)
    sample = int(tiny_job.row_order[-1])  # in a block after the first, or nothing is committed

    with pytest.raises(ModelError, match=rf"not finite: sample {sample}, view 0\n"):
        cache_teacher(poisoned(tiny_job, "train", sample), tmp_path / "c.zarr")
    cache = LogitCache.open(tmp_path / "c.zarr")
    assert int(cache.dataset_index[-1]) == sample
    assert set(cache.commits.records) == {(0, 0)}


def test_nonfinite_logits_of_the_test_split_are_named(tiny_job: CacheJob, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not finite: sample 15, the test split"):
        cache_teacher(poisoned(tiny_job, "test", 15), tmp_path / "c.zarr")
    with pytest.raises(CacheError, match="no logits of the test split"):
        LogitCache.open(tmp_path / "c.zarr").eval_logits()
