import dataclasses
import json
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
from helpers import Words, resized
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.cache import LogitCache
from stages.cache_teacher import CacheJob, CacheSummary, cache_teacher, prepare
from stages.data import Splits
from stages.errors import (
    CacheError,
    ConfigError,
    IdentityError,
    ModelError,
    PipelineError,
    ViewError,
)
from stages.inputs.cifar_models import cifar_model
from stages.inputs.views import view_policy
from stages.repair import repair
from stages.settings import CacheConfig, TeacherSettings
from stages.teacher.logits import TeacherPass
from stages.verify import verify

Objects = Callable[[Path], dict[str, bytes]]
BLOCKS_PER_VIEW = 3


def run(config: CacheConfig, out: Path, splits: Splits, **changes: Any) -> CacheSummary:
    return cache_teacher(prepare(msgspec.structs.replace(config, **changes), splits), out)


def mtimes(store: Path) -> dict[str, int]:
    return {str(p.relative_to(store)): p.stat().st_mtime_ns for p in store.rglob("*")}


# ---- the numbers ----------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def npz() -> dict[str, Any]:
    path = Path(__file__).parents[1] / "data" / "digits.npz"
    with np.load(path, allow_pickle=False) as found:
        return dict(found)


def test_xarray_alone_reads_the_live_teachers_logits(
    finished_cache: Path, teacher: Callable[[Tensor], Tensor], npz: dict[str, Any]
) -> None:
    with xarray.open_zarr(finished_cache, consolidated=False) as found:
        assert found["logits"].dims == ("view", "sample", "class")
        assert found["prediction"].dims == ("view", "sample")
        assert found["label"].dims == found["dataset_index"].dims == ("sample",)
        assert found["eval_logits"].dims == ("eval_sample", "class")
        assert found["eval_label"].dims == found["eval_prediction"].dims == ("eval_sample",)
        assert dict(found.sizes) == {
            "view": 3, "sample": 1000, "class": 10, "eval_sample": 797
        }  # fmt: skip
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
    for view in range(3):
        live = teacher(policy.apply(images, torch.from_numpy(index), view)).numpy()
        np.testing.assert_allclose(values["logits"][view], live, rtol=0, atol=1e-5)
        assert np.array_equal(values["prediction"][view], values["logits"][view].argmax(1))
        sure = np.sort(live)[:, -1] - np.sort(live)[:, -2] > 1e-4
        assert sure.mean() > 0.9
        assert np.array_equal(values["prediction"][view][sure], live.argmax(1)[sure])
    live = teacher(torch.from_numpy(npz["test_images"]).unsqueeze(1)).numpy()
    relative = live - live.max(1, keepdims=True)
    np.testing.assert_allclose(values["eval_logits"], relative, rtol=2**-11, atol=2e-5)
    assert np.array_equal(values["eval_prediction"], live.argmax(1))
    assert np.array_equal(values["eval_label"], npz["test_labels"])


def test_the_summary_is_the_teachers_accuracy(
    finished_cache: Path,
    cache_config: CacheConfig,
    digits: Splits,
    teacher: Callable[[Tensor], Tensor],
) -> None:
    summary = run(cache_config, finished_cache, digits)  # nothing is missing: nothing is written

    images, labels = digits.train.images, digits.train.labels
    assert images is not None
    policy = view_policy("pad-crop:pad=2", seed=0)
    for view in range(3):
        live = teacher(policy.apply(images, torch.arange(1000), view))
        right = float((live.argmax(1) == labels).double().mean())
        assert summary.train_top1[view] == pytest.approx(right, abs=0.002)
    assert digits.test.images is not None
    live = teacher(digits.test.images)
    assert summary.test_top1 == pytest.approx(
        float((live.argmax(1) == digits.test.labels).double().mean()), abs=0.002
    )


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        pytest.param({"batch_size": 37}, 1e-5, id="batch-size"),
        pytest.param({"channels_last": False}, 1e-5, id="memory-format"),
        pytest.param({"block_rows": 128}, 1e-5, id="block-rows"),
        pytest.param({"encoding": "float16"}, 4e-3, id="float16"),
        pytest.param({"dtype": "bfloat16"}, 0.2, id="bfloat16"),
    ],
)
def test_logits_do_not_depend_on_how_they_were_computed(
    cache_config: CacheConfig,
    digits: Splits,
    finished_cache: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    tolerance: float,
) -> None:
    run(cache_config, tmp_path / "c.zarr", digits, views=1, **changes)

    ours = LogitCache.open(tmp_path / "c.zarr").read_view(0).rows(torch.arange(1000))
    exact = LogitCache.open(finished_cache).read_view(0).rows(torch.arange(1000))
    torch.testing.assert_close(ours, exact, rtol=0, atol=tolerance)
    if changes.get("encoding") == "float16":
        # predictions are taken before encoding
        predictions = LogitCache.open(tmp_path / "c.zarr").read_view(0).predictions
        assert torch.equal(predictions, LogitCache.open(finished_cache).read_view(0).predictions)


# ---- running again --------------------------------------------------------------------------


def test_running_again_computes_and_writes_nothing(
    cache_copy: Path, cache_config: CacheConfig, digits: Splits
) -> None:
    before, words = mtimes(cache_copy), Words()

    summary = cache_teacher(prepare(cache_config, digits), cache_copy, words)

    assert summary.computed_blocks == 0
    assert summary.views == 3
    assert words.done == []
    assert any(re.search(r"\b0 are missing", line) for line in words.lines)
    assert mtimes(cache_copy) == before


def test_progress_reaches_the_end(tmp_path: Path, tiny_job: CacheJob) -> None:
    words = Words()

    summary = cache_teacher(tiny_job, tmp_path / "c.zarr", words)

    assert summary.computed_blocks == 4
    assert words.done == sorted(words.done)
    assert words.done[-1] == 1.0


def test_more_views_are_appended_and_old_blocks_stay_untouched(
    cache_copy: Path,
    cache_config: CacheConfig,
    digits: Splits,
    tmp_path: Path,
    array_bytes: Objects,
) -> None:
    before, times = array_bytes(cache_copy), mtimes(cache_copy)

    summary = run(cache_config, cache_copy, digits, views=5)

    assert (summary.computed_blocks, summary.views) == (2 * BLOCKS_PER_VIEW, 5)
    after = array_bytes(cache_copy)
    blocks = [name for name in before if "/c/" in name]
    assert len(blocks) == 3 * BLOCKS_PER_VIEW * 2 + 5
    assert {name: after[name] for name in blocks} == {name: before[name] for name in blocks}
    now = mtimes(cache_copy)
    assert {name: now[name] for name in blocks} == {name: times[name] for name in blocks}
    run(cache_config, tmp_path / "at-once.zarr", digits, views=5)
    assert after == array_bytes(tmp_path / "at-once.zarr")


def test_fewer_views_than_there_are_are_no_reason_to_write(
    cache_copy: Path, cache_config: CacheConfig, digits: Splits
) -> None:
    before = mtimes(cache_copy)

    summary = run(cache_config, cache_copy, digits, views=1)

    assert (summary.computed_blocks, summary.views) == (0, 3)
    assert mtimes(cache_copy) == before


def mend(config: CacheConfig, out: Path, splits: Splits, repaired: int) -> None:
    """What `pipeline verify CACHE --repair` does; so many objects were damaged."""
    faults = verify(out).faults
    assert len(faults) == repaired
    assert repair(out, prepare(config, splits), faults).faults == []


def test_a_damaged_record_is_told_before_the_teacher_works(
    cache_copy: Path, cache_config: CacheConfig, digits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache_copy / "commits/logits/v00001.json").write_bytes(b"{}")
    monkeypatch.setattr(TeacherPass, "of_views", lambda *_: pytest.fail("worked"))
    with pytest.raises(CacheError, match=r"v00001.json is not readable"):
        run(cache_config, cache_copy, digits, views=5)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        pytest.param("prediction/c/1/0", 0, id="gone-prediction"),
        pytest.param("logits/c/1/2/0", -1, id="cut-off-logits", marks=pytest.mark.slow),
        pytest.param("eval_logits/c/0/0", -1, id="cut-off-eval", marks=pytest.mark.slow),
    ],
)
def test_an_object_that_is_not_whole_is_mended_as_the_message_says(
    cache_copy: Path,
    cache_config: CacheConfig,
    digits: Splits,
    array_bytes: Objects,
    name: str,
    kept: int,
) -> None:
    before = array_bytes(cache_copy)
    shard = cache_copy / name
    shard.write_bytes(shard.read_bytes()[:kept])
    if not kept:
        shard.unlink()
    found = r"has \d+ bytes" if kept else "is missing"
    with pytest.raises(CacheError, match=rf"object {name} {found}") as caught:
        run(cache_config, cache_copy, digits)
    assert "pipeline verify CACHE --repair" in caught.value.remedy

    mend(cache_config, cache_copy, digits, repaired=1)

    assert array_bytes(cache_copy) == before


def test_a_run_that_ended_before_it_declared_the_fidelity_is_completed_by_the_next(
    tiny_job: CacheJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks are committed by then: nothing is missing but the attribute."""

    def killed(_: LogitCache) -> None:
        raise KeyboardInterrupt

    for views in (1, 2):  # made, and appended to
        job = resized(tiny_job, 60, 20, views=views)
        with monkeypatch.context() as patch:
            patch.setattr(LogitCache, "write_fidelity", killed)
            with pytest.raises(KeyboardInterrupt):
                cache_teacher(job, tmp_path / "c.zarr")

        assert cache_teacher(job, tmp_path / "c.zarr").computed_blocks == 0

        fidelity = LogitCache.open(tmp_path / "c.zarr").fidelity
        assert fidelity is not None
        assert fidelity.rows == views * 60


def test_a_view_that_was_forgotten_is_computed_again(
    cache_copy: Path, cache_config: CacheConfig, digits: Splits, array_bytes: Objects
) -> None:
    before = array_bytes(cache_copy)
    (cache_copy / "commits/logits/v00001.json").unlink()

    assert run(cache_config, cache_copy, digits).computed_blocks == BLOCKS_PER_VIEW
    assert array_bytes(cache_copy) == before


# ---- what is refused ------------------------------------------------------------------------


def other_weights(config: CacheConfig, folder: Path) -> TeacherSettings:
    weights = load_file(Path(config.teacher.weights) / "model.safetensors")
    last = list(weights)[-1]
    weights[last] = weights[last].nextafter(torch.tensor(9.0))
    run_config = yaml.safe_load((Path(config.teacher.weights) / "config.yaml").read_text())
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(run_config))
    return TeacherSettings(weights=str(folder))


def same_but_normalised(config: CacheConfig, _: Path) -> TeacherSettings:
    return TeacherSettings(weights=config.teacher.weights, mean=(0.25,), std=(0.5,))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        pytest.param({"seed": 1}, "views.seed", id="view-seed"),
        pytest.param({"augment": "pad-crop:pad=1"}, "views.parameters.pad", id="view-parameter"),
        pytest.param({"augment": "pad-crop-flip:pad=2"}, "views.policy", id="view-policy"),
        pytest.param({"dtype": "bfloat16"}, "compute_dtype", id="dtype"),
        pytest.param({"teacher": other_weights}, "teacher.weights", id="weights"),
        pytest.param({"teacher": same_but_normalised}, "teacher.mean", id="normalisation"),
    ],
)
def test_another_identity_is_refused_and_named(
    finished_cache: Path,
    cache_config: CacheConfig,
    digits: Splits,
    tmp_path: Path,
    changes: dict[str, Any],
    field: str,
) -> None:
    before = mtimes(finished_cache)
    if "teacher" in changes:
        changes = {"teacher": changes["teacher"](cache_config, tmp_path / "other")}

    with pytest.raises(IdentityError, match=re.escape(f"{field}: ")) as caught:
        run(cache_config, finished_cache, digits, **changes)
    assert "--out" in caught.value.remedy
    assert mtimes(finished_cache) == before


@pytest.mark.parametrize("what", ["labels", "images"])
def test_another_dataset_is_refused_and_named(
    finished_cache: Path, cache_config: CacheConfig, digits: Splits, what: str
) -> None:
    relabelled, images = digits.train.labels.clone(), digits.train.images
    relabelled[500] = (relabelled[500] + 1) % 10
    other = dataclasses.replace(digits.train, labels=relabelled)
    if what == "images":  # tests/inputs/test_datasets.py says when their digest is another
        other = dataclasses.replace(digits.train, images=images, images_digest="of others")

    with pytest.raises(IdentityError, match=rf"dataset\.{what}: "):
        run(cache_config, finished_cache, Splits(other, digits.test))


def test_another_encoding_is_refused(
    finished_cache: Path, cache_config: CacheConfig, digits: Splits
) -> None:
    with pytest.raises(IdentityError, match="encoded as float32, not float16"):
        run(cache_config, finished_cache, digits, encoding="float16")
    assert run(cache_config, finished_cache, digits, encoding="float32").computed_blocks == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param({"views": 26}, ViewError, "25 distinct", id="beyond-the-policy"),
        pytest.param({"augment": "none", "views": 2}, ViewError, "1 distinct", id="plain-view"),
        pytest.param({"views": 0}, ConfigError, "views must be positive, was 0", id="no-views"),
        pytest.param({"views": -3}, ConfigError, "views must be positive, was -3", id="negative"),
        pytest.param({"block_rows": 0}, ConfigError, "block_rows must be positive", id="block"),
        pytest.param({"encoding": "jpeg"}, CacheError, "unknown encoding 'jpeg'", id="encoding"),
        pytest.param({"augment": "pad-crap"}, ViewError, "pad-crap", id="policy"),
        pytest.param({"device": "abacus"}, ConfigError, "abacus", id="device"),
    ],
)
def test_settings_that_cannot_be_run(
    cache_config: CacheConfig,
    digits: Splits,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[PipelineError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        run(cache_config, tmp_path / "c.zarr", digits, **changes)
    assert not LogitCache.exists(tmp_path / "c.zarr")


def test_all_views_of_a_policy_can_be_cached(tiny_job: CacheJob, tmp_path: Path) -> None:
    job = resized(tiny_job, 60, 20, views=9, augment="pad-crop:pad=1", block_rows=60)

    assert cache_teacher(job, tmp_path / "c").views == 9


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


def test_what_a_killed_writer_left_half_written_is_removed_and_nothing_else(
    cache_copy: Path, cache_config: CacheConfig, digits: Splits
) -> None:
    (cache_copy / "logits/c/film.mkv.partial").write_text("half a film")
    files = {path for path in cache_copy.rglob("*") if path.is_file()}
    for name in ("zarr.json", "logits/c/0/0/0", "commits/logits/v00000.json"):
        (cache_copy / f"{name}.{uuid4().hex}.partial").write_bytes(b"half")

    assert run(cache_config, cache_copy, digits).computed_blocks == 0

    assert {path for path in cache_copy.rglob("*") if path.is_file()} == files


def test_whole_numbers_will_do_as_a_normalisation(tiny_job: CacheJob, tmp_path: Path) -> None:
    teacher = TeacherSettings(weights=tiny_job.config.teacher.weights, mean=(0,), std=(1,))
    job = resized(tiny_job, 60, 20, teacher=teacher)

    for computed in (4, 0):
        assert cache_teacher(job, tmp_path / "c.zarr").computed_blocks == computed
    identity = LogitCache.open(tmp_path / "c.zarr").identity
    assert identity == job.identity
    assert (identity.teacher.mean, identity.teacher.std) == ((0.0,), (1.0,))
    assert {type(x) for x in (*identity.teacher.mean, *identity.teacher.std)} == {float}


# ---- teachers that do not belong ------------------------------------------------------------

TEACHERS = """
import torch
from torch import nn

class Poisoned(nn.Module):
    "Says `poison` wherever an image is black; weights are finite: -1 stands for nan, -2 for inf."
    def __init__(self, num_classes):
        super().__init__()
        self.linear = nn.Linear(3 * 64, num_classes)
        self.poison = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        black = (x == 0).all((1, 2, 3)).unsqueeze(1)
        said = {-1.0: torch.nan, -2.0: torch.inf}.get(float(self.poison), float(self.poison))
        return torch.where(black, said, self.linear(x.flatten(1)))

def seven_classes(num_classes):
    return Poisoned(7)
"""


@pytest.fixture
def teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "odd_teachers.py").write_text(TEACHERS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def save(name: str, classes: int, folder: Path, poison: float) -> TeacherSettings:
    """Settings of a teacher in TEACHERS with such weights; black pixels are zero for it."""
    torch.manual_seed(0)
    linear = nn.Linear(3 * 64, classes)
    stored = -1.0 if math.isnan(poison) else -2.0 if math.isinf(poison) else poison
    state = {"poison": torch.tensor(stored)}
    state |= {f"linear.{n}": t for n, t in linear.state_dict().items()}
    torch.save(state, folder / "weights.pth")
    return TeacherSettings(
        architecture=f"odd_teachers:{name}",
        weights=str(folder / "weights.pth"),
        mean=(0.0,),
        std=(1.0,),
    )


def blackened(splits: Splits, split: str, sample: int) -> Splits:
    dataset = getattr(splits, split)
    images = dataset.images.clone()
    images[sample] = 0
    black = dataclasses.replace(dataset, images=images, load=images.__getitem__)
    return dataclasses.replace(splits, **{split: black})


def prepare_order(config: CacheConfig, splits: Splits, teacher: TeacherSettings) -> list[int]:
    """The sample of each row."""
    job = prepare(msgspec.structs.replace(config, teacher=teacher), splits)
    samples: list[int] = job.row_order.tolist()
    return samples


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_logits_that_are_not_finite_are_named(
    teachers: Path, cache_config: CacheConfig, digits: Splits, poison: float
) -> None:
    teacher, out = save("Poisoned", 10, teachers, poison), teachers / "c.zarr"
    splits = blackened(digits, "train", 123)

    with pytest.raises(ModelError, match=r"not finite: sample 123, view 0\n") as caught:
        run(cache_config, out, splits, teacher=teacher)
    assert caught.value.remedy

    assert not LogitCache.exists(out)  # view 0 comes before the store: encodings are fitted to it
    splits = Splits(digits.train, splits.test)
    assert run(cache_config, out, splits, teacher=teacher, views=1).views == 1


def test_logits_that_are_not_finite_leave_what_was_committed_before(
    teachers: Path, cache_config: CacheConfig, digits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, out = save("Poisoned", 10, teachers, float("nan")), teachers / "c.zarr"
    splits = blackened(digits, "train", 123)
    monkeypatch.setattr("stages.cache.encoding.choose.FIT_ROWS", 334)
    row = prepare_order(cache_config, splits, teacher).index(123)
    assert row >= 334  # in a block after the first, or nothing is committed

    with pytest.raises(ModelError, match=r"not finite: sample 123, view 0\n"):
        run(cache_config, out, splits, teacher=teacher)
    cache = LogitCache.open(out)
    assert cache.dataset_index.tolist().index(123) == row
    assert set(cache.commits.records) == {(0, block) for block in range(row // 334)}


def test_logits_of_the_test_split_that_are_not_finite_are_named(
    teachers: Path, cache_config: CacheConfig, digits: Splits
) -> None:
    teacher, out = save("Poisoned", 10, teachers, float("nan")), teachers / "c.zarr"

    with pytest.raises(ModelError, match="not finite: sample 45, the test split"):
        run(cache_config, out, blackened(digits, "test", 45), teacher=teacher)
    with pytest.raises(CacheError, match="no logits of the test split"):
        LogitCache.open(out).eval_logits()


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        pytest.param("seven_classes", 7, "10 classes", id="model-has-seven"),
        pytest.param("Poisoned", 7, "has 7 classes, the dataset has 10", id="weights-have-seven"),
    ],
)
def test_a_teacher_of_other_classes_is_refused(
    teachers: Path, cache_config: CacheConfig, digits: Splits, name: str, classes: int, message: str
) -> None:
    teacher = save(name, classes, teachers, 0.0)

    with pytest.raises(ModelError, match=message):
        run(cache_config, teachers / "c", digits, teacher=teacher)
    assert not (teachers / "c").exists()


def test_provenance_says_what_was_used(finished_cache: Path, teacher_run: Path) -> None:
    attributes = json.loads((finished_cache / "zarr.json").read_text())["attributes"]

    config = attributes["provenance"]["config"]
    assert config["data"]["dataset"] == "digits"
    assert config["teacher"]["weights"] == str(teacher_run)
    assert msgspec.convert(config, CacheConfig).views == 3
    assert attributes["provenance"]["versions"]["torch"] == torch.__version__
    assert attributes["identity"]["dataset"]["num_samples"] == 1000
