"""Samples that are left out: a cache goes on without a broken image, and nobody counts it."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import Words, student_of
from PIL import Image
from safetensors.torch import save_file

from pipeline.cli import cli
from stages import CachedDataset, CachedEpochs
from stages.cache import LogitCache
from stages.cache_teacher import CacheJob, cache_teacher, prepare
from stages.check_data import check_data, check_sample, write_skip_list
from stages.data import load_data
from stages.errors import DatasetError, IdentityError
from stages.evaluate import evaluate_run
from stages.inputs.cifar_models import cifar_model
from stages.inputs.datasets import Skip, load_dataset, read_skip_list
from stages.inputs.probes import NO_PROBE, pixel_probes
from stages.inputs.views import view_policy
from stages.rectify import rectify
from stages.repair import recorded_job, repair
from stages.settings import (
    CacheConfig,
    DataSettings,
    ModelSettings,
    RectifyConfig,
    TeacherSettings,
    TrainSettings,
)
from stages.teacher.job import begun_at
from stages.train_student import student_trainer, train_student
from stages.training.run_directory import RunDirectory
from stages.verify import verify, verify_live, verify_pixels

CLASSES, EACH = 3, 8
BROKEN = "b/3.png"
SAMPLE = EACH + 3
TESTED = 4  # of every class


@dataclass(frozen=True)
class World:
    """A folder of 24 training and 12 test images, and a teacher's weights."""

    images: Path
    weights: Path

    def settings(self, skip: Path | None = None) -> DataSettings:
        given = None if skip is None else str(skip)
        return DataSettings(
            dataset=f"folder:{self.images}", feeding="stream", workers=0, skip=given
        )

    def config(self, views: int, skip: Path | None = None, **changes: Any) -> CacheConfig:
        how = {"augment": "pad-crop:pad=2", "encoding": "float32", "block_rows": 8, "batch_size": 5}
        teacher = TeacherSettings(weights=str(self.weights), architecture="resnet8")
        own = {"teacher": teacher, "views": views, **how, **changes}
        return CacheConfig(data=self.settings(skip), device="cpu", **own)

    def job(self, views: int, out: Path, skip: Path | None = None, **changes: Any) -> CacheJob:
        return prepare(self.config(views, skip, **changes), begun=begun_at(out))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("whole")
    for split, each in (("train", EACH), ("test", TESTED)):
        for label, name in enumerate("abc"):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(each):
                pixels = np.random.default_rng([label, i, each]).integers(0, 256, (8, 8))
                path = folder / "images" / split / name / f"{i}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    torch.manual_seed(0)
    weights = folder / "teacher.safetensors"
    save_file(cifar_model("resnet8", CLASSES, 1).state_dict(), weights)
    return World(folder / "images", weights)


@pytest.fixture
def world(whole: World, tmp_path: Path) -> World:
    """A copy whose files may be spoilt."""
    return World(Path(shutil.copytree(whole.images, tmp_path / "images")), whole.weights)


@pytest.fixture(scope="module")
def reference(whole: World, tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """A cache of all samples, two views."""
    path = tmp_path_factory.mktemp("reference") / "cache.zarr"
    cache_teacher(whole.job(2, path), path)
    return LogitCache.open(path)


def spoil(path: Path) -> None:
    """Other bytes, as many."""
    path.write_bytes(b"x" * path.stat().st_size)


def skip_list(folder: Path, *lines: str) -> Path:
    path = folder / "skip.txt"
    path.write_text("# left out\n\n" + "".join(f"{line}\n" for line in lines))
    return path


@dataclass(frozen=True)
class Gone:
    """A cache that has begun, and went on without a sample."""

    world: World
    out: Path
    error: DatasetError
    blocks_before: dict[tuple[int, int], Any]


@pytest.fixture(scope="module")
def gone_on(whole: World, tmp_path_factory: pytest.TempPathFactory) -> Gone:
    """View 0 is there when an image breaks; view 1 stops at it, and goes on with a skip list."""
    folder = tmp_path_factory.mktemp("gone")
    world = World(Path(shutil.copytree(whole.images, folder / "images")), whole.weights)
    out = folder / "cache.zarr"
    cache_teacher(world.job(1, out), out)
    spoil(world.images / "train" / BROKEN)
    spoil(world.images / "test" / "c/0.png")
    with pytest.raises(DatasetError) as caught:
        cache_teacher(world.job(2, out), out)
    before = LogitCache.open(out).commits.records
    skip = folder / "skip.txt"
    write_skip_list(skip, check_data(f"folder:{world.images}").broken)
    cache_teacher(world.job(2, out, skip), out)
    skip.unlink()  # from here on the cache knows
    return Gone(world, out, caught.value, before)


def test_the_cache_goes_on_without_the_image(gone_on: Gone, reference: LogitCache) -> None:
    assert f"train/{BROKEN}" in gone_on.error.cause
    assert f"check-data folder:{gone_on.world.images} --skip-out" in gone_on.error.remedy
    assert "--skip skip.txt" in gone_on.error.remedy
    cache = LogitCache.open(gone_on.out)
    after = cache.commits.records
    row = int(cache.row_of[SAMPLE])
    stopped_at = (1, row // cache.grid.block_rows)
    assert stopped_at not in gone_on.blocks_before
    assert {(0, block) for block in range(3)} <= set(gone_on.blocks_before)
    assert all(after[key] == record for key, record in gone_on.blocks_before.items())
    others = [i for i in range(CLASSES * EACH) if i != SAMPLE]
    every = torch.arange(CLASSES * EACH)
    for view in range(2):
        ours, theirs = cache.read_view(view), reference.read_view(view)
        seen = every if view == 0 else torch.tensor(others)  # view 0 was there before
        assert torch.equal(ours.rows(seen), theirs.rows(seen))
        assert torch.equal(ours.wrong(seen), theirs.wrong(seen))
    assert not bool(cache.read_view(1).wrong(torch.tensor([SAMPLE])))
    assert cache.identity == reference.identity
    assert after[stopped_at]["skipped"] == [SAMPLE]


def test_what_the_cache_says_of_itself(gone_on: Gone, reference: LogitCache) -> None:
    cache = LogitCache.open(gone_on.out)
    size = (gone_on.world.images / "train" / BROKEN).stat().st_size
    skips = [(s.split, s.sample, s.path, s.bytes) for s in cache.skips]
    assert skips[1] == ("train", SAMPLE, BROKEN, size)
    assert skips[0][:3] == ("test", 2 * TESTED, "c/0.png")
    assert cache.skipped().tolist() == [SAMPLE]
    assert "skipped" not in reference.group.attrs.asdict()
    right = (reference.predictions(1) == reference.row_labels)[reference.dataset_index != SAMPLE]
    assert cache.top1(1) == cache.top1_per_view[1] == pytest.approx(float(right.double().mean()))
    assert cache.top1_per_view[0] == reference.top1_per_view[0]
    assert cache.fidelity is not None
    assert cache.fidelity.rows == 2 * CLASSES * EACH - 1
    assert 2 * TESTED not in cache.eval_shown
    assert len(cache.eval_shown) == CLASSES * TESTED - 1
    message = CliRunner().invoke(cli, ["inspect", str(gone_on.out)]).output
    assert "1 train and 1 test samples" in message


@pytest.mark.slow
def test_everything_after_it_needs_no_option(gone_on: Gone, tmp_path: Path) -> None:
    out, data = shutil.copytree(gone_on.out, tmp_path / "cache.zarr"), gone_on.world.settings()
    statistics = rectify(out, RectifyConfig())
    cache = LogitCache.open(out)
    assert statistics["top1_per_view"] == pytest.approx([cache.top1(0), cache.top1(1)])
    job = recorded_job(str(out))
    assert verify(str(out)).faults == []
    assert verify_live(cache, job, 40) == []
    assert verify_pixels(cache, job.splits) == []

    model, train = ModelSettings(architecture="resnet8"), TrainSettings(epochs=1, batch_size=8)
    config = student_of(out, data=data, model=model, train=train)
    words = Words()
    trainer = student_trainer([config], [RunDirectory(tmp_path / "looked-at")], reporter=words)
    assert trainer.stream.samples.tolist() == [i for i in range(CLASSES * EACH) if i != SAMPLE]
    assert 2 * TESTED not in trainer.stream.evaluations["test"].samples
    assert any("1 of 24 train samples skipped" in line for line in words.lines)
    train_student(config, tmp_path / "run")
    evaluated = evaluate_run(tmp_path / "run")
    assert sum(c.samples for c in evaluated.classes) == CLASSES * TESTED - 1
    assert evaluated.comparison is not None
    assert evaluated.scores.top1 == pytest.approx(evaluated.recorded_top1)
    epochs = CachedEpochs(CachedDataset(out, data), batch_size=8)
    shown = torch.cat([batch.samples for batch in epochs.epoch(0)])
    assert sorted(shown.tolist()) == trainer.stream.samples.tolist()


def test_repair_makes_the_same_bytes(gone_on: Gone, tmp_path: Path) -> None:
    out = Path(shutil.copytree(gone_on.out, tmp_path / "cache.zarr"))
    cache = LogitCache.open(out)
    block = int(cache.row_of[SAMPLE]) // cache.grid.block_rows
    path = out / "logits" / "c" / "1" / str(block) / "0"
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    faults = verify(str(out)).faults
    assert [fault.at for fault in faults] == [(1, block)]
    assert repair(str(out), recorded_job(str(out)), faults).faults == []
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_a_skipped_file_may_be_another(
    whole: World, world: World, tmp_path: Path, change: str
) -> None:
    path = world.images / "train" / BROKEN
    size = path.stat().st_size
    if change == "deleted":
        path.unlink()
    else:
        Image.new("RGB", (20, 20)).save(path)
    skip = read_skip_list(skip_list(tmp_path, f"train/{BROKEN}\t{size}\twhy"))
    ours = load_dataset(f"folder:{world.images}", "train", feeding="stream", skips=skip)
    theirs = load_dataset(f"folder:{whole.images}", "train", feeding="stream")
    assert ours.images_digest == theirs.images_digest
    assert ours.labels_digest == theirs.labels_digest
    assert ours.skipped.tolist() == [SAMPLE]
    assert not bool(ours.load(SAMPLE).any())
    held = load_dataset(f"folder:{world.images}", "train", feeding="memory", skips=skip).images
    assert held is not None
    assert torch.equal(held, torch.stack([ours.load(i) for i in range(len(ours))]))
    for i in (0, SAMPLE - 1, SAMPLE + 1, 23):
        assert torch.equal(ours.load(i), theirs.load(i))


def test_a_finished_cache(
    whole: World, gone_on: Gone, reference: LogitCache, tmp_path: Path
) -> None:
    skip = skip_list(tmp_path, "0", "test:1")
    with pytest.raises(IdentityError, match="finished"):
        cache_teacher(whole.job(2, Path(reference.path), skip), reference.path)
    known, weights = reference.identity.teacher, str(whole.weights)
    own = {"architecture": "resnet8", "mean": known.mean, "std": known.std}
    teacher = TeacherSettings(weights=weights, **own)
    with pytest.raises(IdentityError, match="leaves out 2 samples"):
        cache_teacher(prepare(gone_on.world.config(2, teacher=teacher)), gone_on.out)
    config = student_of(gone_on.out, data=gone_on.world.settings())
    splits = load_data(gone_on.world.settings())
    with pytest.raises(IdentityError, match="skips_of"):
        student_trainer([config], [RunDirectory(tmp_path / "run")], splits)


def test_a_student_may_leave_out_more(whole: World, reference: LogitCache, tmp_path: Path) -> None:
    """An image that broke once the cache was finished."""
    data = whole.settings(skip_list(tmp_path, "5", "train/a/0.png"))
    config = student_of(reference.path, data=data)
    trainer = student_trainer([config], [RunDirectory(tmp_path / "run")])
    assert trainer.stream.samples.tolist() == [i for i in range(24) if i not in (0, 5)]


def test_black_pixels_are_not_fitted(whole: World, reference: LogitCache, tmp_path: Path) -> None:
    skip, out = skip_list(tmp_path, "3"), tmp_path / "less.zarr"
    cache_teacher(whole.job(1, out, skip, encoding="klt"), out)
    cache = LogitCache.open(out)
    rows = reference.read_view(0).rows(cache.dataset_index[cache.dataset_index != 3])
    mean = torch.from_numpy(cache.group["klt_mean"][:])  # type: ignore[index,call-overload]
    assert torch.allclose(mean.float(), rows.mean(0), atol=0.2)
    assert cache.fidelity is not None
    assert cache.fidelity.rows == 23


@pytest.mark.parametrize("policy", ["pad-crop:pad=2", "pad-crop:pad=2+mixup:alpha=0.8"])
def test_probes_leave_out_what_is_black(whole: World, tmp_path: Path, policy: str) -> None:
    every, less = (load_data(whole.settings(s)).train for s in (None, skip_list(tmp_path, "3")))
    probes, left = (pixel_probes(d, view_policy(policy), None) for d in (every, less))
    assert 0 < left.count(NO_PROBE) < 256 // (2 if "mixup" in policy else 8)
    assert all(ours in (NO_PROBE, theirs) for ours, theirs in zip(left, probes, strict=True))


def test_what_a_line_may_be(tmp_path: Path) -> None:
    path = tmp_path / "skip.txt"
    path.write_bytes(
        b"# why\r\n\n17\ntest:3\t\twhy\r\n./train/a b/#1.png\t99\ttruncated\nVal/x/y/z.jpg\ntrain:4"
    )
    assert read_skip_list(path) == [
        Skip("train", 17),
        Skip("test", 3),
        Skip("train", None, "a b/#1.png", 99),
        Skip("test", None, "x/y/z.jpg"),
        Skip("train", 4),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b/3.png", "names no image of a split"),
        ("train", "names no image of a split"),
        ("-1", "names no image of a split"),
        ("train/b/99.png", "train/b/99.png"),
        ("24", "sample 24"),
        ("test:12", "sample 12"),
        ("\n".join(map(str, range(24))), "leaves no sample"),
        (None, "cannot read the skip list"),
    ],
)
def test_unusable_lists(whole: World, tmp_path: Path, line: str | None, message: str) -> None:
    path = tmp_path / "nowhere.txt" if line is None else skip_list(tmp_path, line)
    with pytest.raises(DatasetError, match=message):
        load_data(whole.settings(path))


def test_datasets_without_files_are_skipped_by_number(tmp_path: Path) -> None:
    settings = DataSettings(dataset="digits", skip=str(skip_list(tmp_path, "7", "test:0")))
    ours, theirs = load_data(settings), load_data(DataSettings(dataset="digits"))
    assert ours.train.images_digest == theirs.train.images_digest
    assert ours.train.skipped.tolist() == [7]
    assert ours.test.skipped.tolist() == [0]
    assert not bool(ours.train.load(7).any())
    assert torch.equal(ours.train.load(8), theirs.train.load(8))
    with pytest.raises(DatasetError, match="no folder of files"):
        load_data(DataSettings(dataset="digits", skip=str(skip_list(tmp_path, "train/0/1.png"))))


@pytest.fixture
def messy(world: World) -> Path:
    """Every kind of thing that is told of."""
    train = world.images / "train"
    spoil(train / BROKEN)
    (train / "a" / "4.png").write_bytes(b"")
    Image.new("I;16", (8, 8)).save(train / "a" / "1.png")
    with Image.open(train / "a" / "2.png") as image:
        image.convert("1").save(train / "b" / "0.png")
    shutil.copy(train / "a" / "5.png", train / "a" / "6.png")
    shutil.copy(train / "a" / "5.png", world.images / "test" / "b" / "0.png")
    (train / "a" / "notes.txt").write_text("x")
    (train / "b" / "gone.png").symlink_to("nowhere")
    return world.images


def test_all_is_found_at_once(messy: Path) -> None:
    checked = check_data(f"folder:{messy}")
    assert checked.images == {"train": 24, "test": 12}
    found = {(f.kind, f.name): f.what for f in checked.findings}
    assert {name for kind, name in found if kind == "broken"} == {
        f"train/{BROKEN}",
        "train/a/4.png",
        "train/a/1.png",
    }
    assert found["broken", "train/a/4.png"] == "it is empty"
    assert "8 bits" in found["broken", "train/a/1.png"]
    assert found["duplicate", "train/a/6.png"] == "the same as train/a/5.png"
    assert found["duplicate", "test/b/0.png"] == "the same as train/a/5.png, of another class"
    assert found["not taken", "train/a/notes.txt"] == ".txt"
    assert found["not taken", "train/b/gone.png"] == "dangling link"


def test_the_command(messy: Path, tmp_path: Path, whole: World) -> None:
    skip = tmp_path / "skip.txt"
    skip.write_text("train/c/7.png\t1\tmine")
    run = CliRunner().invoke(cli, ["check-data", f"folder:{messy}", "--skip-out", str(skip)])
    assert run.exit_code == 1
    assert "broken: train/a/4.png: it is empty" in run.output
    lines = skip.read_text().splitlines()
    assert lines[0] == "train/c/7.png\t1\tmine"
    assert f"train/{BROKEN}\t{(messy / 'train' / BROKEN).stat().st_size}\t" in skip.read_text()
    splits = load_data(DataSettings(dataset=f"folder:{messy}", skip=str(skip), feeding="stream"))
    for index in splits.train.shown.tolist():
        splits.train.load(index)
    run = CliRunner().invoke(cli, ["check-data", f"folder:{whole.images}", "--check", "5"])
    assert run.exit_code == 0
    assert "images looked at  5      5" in run.output


@pytest.mark.parametrize("amount", [None, 24, 1])
def test_a_pass_looks_first(messy: Path, amount: int | None) -> None:
    splits = load_data(DataSettings(dataset=f"folder:{messy}", feeding="stream"))
    if amount == 1:
        check_sample(splits, amount)
        return
    with pytest.raises(DatasetError, match="cannot be used") as caught:
        check_sample(splits, amount)
    assert "--skip-out" in caught.value.remedy
