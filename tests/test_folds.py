"""Folds, their teachers, and caches of what each says of the samples that it has not seen."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from damage import flip, tree
from helpers import cache_config_of, first, same_weights, teacher_of, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.cache import LogitCache
from stages.cache_teacher import cache_teacher, prepare
from stages.data import Splits
from stages.errors import ConfigError, IdentityError, ModelError, PipelineError, RunError
from stages.folds import fold_map
from stages.inputs.cifar_models import cifar_model
from stages.inputs.counter_hash import permute
from stages.inputs.datasets import ImageDataset
from stages.inputs.feed import Normalise
from stages.inputs.views import view_policy
from stages.repair import recorded_job, repair
from stages.settings import (
    CacheConfig,
    ModelSettings,
    SeedSettings,
    TeacherConfig,
    TeacherSettings,
    TrainSettings,
)
from stages.teacher.job import CacheJob
from stages.train_teacher import train_folds, train_teacher
from stages.verify import verify, verify_live
from stages.verify.documents import whole_array_faults

SAMPLES, FOLDS, SEED = 120, 3, 5
POLICY = "pad-crop:pad=2"
MEAN, STD = (0.3,), (0.4,)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(2, 7), st.integers(-9, 9))
@settings(max_examples=40, deadline=None)
def test_folds_are_dealt_out_class_after_class(labels: list[int], folds: int, seed: int) -> None:
    """A naive loop; and any two folds differ by one sample at the most, in all and of a class."""
    if folds > len(labels):
        with pytest.raises(ConfigError, match=f"into {folds} folds"):
            fold_map(torch.tensor(labels), folds, seed)
        return
    found = fold_map(torch.tensor(labels), folds, seed).tolist()
    place = {i: int(permute(torch.tensor([i]), len(labels), seed, 6)) for i in range(len(labels))}
    dealt = sorted(range(len(labels)), key=lambda i: (labels[i], place[i]))
    assert found == [dealt.index(i) % folds for i in range(len(labels))]
    for chosen in (set(labels), *({c} for c in labels)):
        counts = [
            sum(f == k and y in chosen for f, y in zip(found, labels, strict=True))
            for k in range(folds)
        ]
        assert max(counts) - min(counts) <= 1


def test_the_map_is_pinned() -> None:
    """Another map would call samples unseen that a teacher has seen."""
    found = fold_map(torch.arange(20) % 3, 4, 7)
    assert found.tolist() == PINNED
    assert found.tolist() != fold_map(torch.arange(20) % 3, 4, 8).tolist()


PINNED = [2, 3, 0, 0, 3, 2, 2, 0, 1, 1, 2, 3, 0, 1, 3, 1, 1, 2, 3, 0]


class World(NamedTuple):
    """Three teachers of 120 digits, and the cache of two views of them in two blocks each."""

    splits: Splits
    teachers: Path
    config: CacheConfig
    job: CacheJob
    cache: Path
    fold_of: Tensor

    def config_of(self, teachers: Path) -> CacheConfig:
        return msgspec.structs.replace(self.config, teacher=TeacherSettings(weights=str(teachers)))


def teacher_config(**changes: Any) -> TeacherConfig:
    own: dict[str, Any] = {
        "model": ModelSettings(architecture="resnet8", mean=MEAN, std=STD),
        "augment": POLICY,
        "train": TrainSettings(epochs=1, batch_size=40),
        "seed": SeedSettings(data=SEED),
        "folds": FOLDS,
    }
    return teacher_of(**{**own, **changes})


@pytest.fixture(scope="module")
def my_world(digits: Splits, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("folds")
    splits = Splits(first(digits.train, SAMPLES), first(digits.test, 30))
    train_folds(teacher_config(), folder / "t", splits=splits)
    how = {"augment": POLICY, "block_rows": 60, "batch_size": 16}
    config = cache_config_of(folder / "t", **how)
    job = prepare(config, splits)
    cache_teacher(job, folder / "c.zarr")
    fold_of = fold_map(splits.train.labels, FOLDS, SEED)
    return World(splits, folder / "t", config, job, folder / "c.zarr", fold_of)


def zeroed(dataset: ImageDataset, which: Tensor) -> ImageDataset:
    """The same dataset with these images black."""
    assert dataset.images is not None
    images = dataset.images.clone()
    images[which] = 0
    return dataclasses.replace(dataset, images=images, load=images.__getitem__)


def test_a_teacher_does_not_depend_on_its_fold(my_world: World, tmp_path: Path) -> None:
    for fold in (0, 2):
        black = zeroed(my_world.splits.train, my_world.fold_of == fold)
        splits, out = Splits(black, my_world.splits.test), tmp_path / str(fold)
        train_folds(teacher_config(fold=2), out, splits=splits)
        same = same_weights(out / "fold-2", my_world.teachers / "fold-2")
        assert same == (fold == 2)


def test_folds_go_on_where_they_were_stopped(my_world: World, tmp_path: Path) -> None:
    """Finished ones stay; what is missing is trained."""
    out = tmp_path / "t"
    shutil.copytree(my_world.teachers / "fold-0", out / "fold-0")
    with pytest.raises(RunError, match="--resume"):
        train_folds(teacher_config(), out, splits=my_world.splits)
    before = tree(out / "fold-0")
    train_folds(teacher_config(), out, resume=True, splits=my_world.splits)
    assert tree(out / "fold-0") == before
    assert all(same_weights(out / f"fold-{k}", my_world.teachers / f"fold-{k}") for k in (1, 2))


def live(world: World, fold: int) -> Callable[[Tensor], Tensor]:
    """A fold's teacher, loaded by hand: uint8 pixels -> logits."""
    module = cifar_model("resnet8", 10, 1).eval()
    module.load_state_dict(weights(world.teachers / f"fold-{fold}"))
    normalise = Normalise(MEAN, STD, 1, torch.device("cpu"), False)
    asked: Callable[[Tensor], Tensor] = torch.inference_mode()(lambda x: module(normalise(x)))
    return asked


def test_every_row_is_of_the_teacher_that_has_not_seen_it(my_world: World) -> None:
    """A naive loop over samples and views; and the mean of all teachers on the test split."""
    cache, train = LogitCache.open(my_world.cache), my_world.splits.train
    assert train.images is not None
    folds = cache.identity.teacher.folds
    assert folds is not None
    assert torch.equal(fold_map(cache.labels, folds.count, folds.seed), my_world.fold_of)
    policy, teachers = view_policy(POLICY, 0), [live(my_world, k) for k in range(FOLDS)]
    for view in (0, 1):
        stored = cache.read_view(view).rows(torch.arange(SAMPLES))
        for sample in range(SAMPLES):
            asked = torch.tensor([sample])
            pixels = policy.apply(train.images[asked], asked, view)
            of_its_fold = teachers[int(my_world.fold_of[sample])](pixels)[0]
            torch.testing.assert_close(stored[sample], of_its_fold, rtol=1e-4, atol=1e-4)
    test = my_world.splits.test
    assert test.images is not None
    mean = torch.stack([teacher(test.images) for teacher in teachers]).mean(0)
    stored, labels = cache.eval_logits()
    both = stored.log_softmax(1), mean.log_softmax(1)  # a constant of a row is not kept
    torch.testing.assert_close(*both, rtol=2e-3, atol=2e-3)  # float16
    assert torch.equal(labels, test.labels)


def test_rows_of_a_teacher_that_has_seen_them_are_found(my_world: World, tmp_path: Path) -> None:
    """Of a cache whose bytes are intact, written with two teachers exchanged."""
    folds = my_world.job.folds
    assert folds is not None
    one, two, three = folds.modules
    wrong = dataclasses.replace(
        my_world.job, folds=dataclasses.replace(folds, modules=(two, one, three))
    )
    cache_teacher(wrong, tmp_path / "c.zarr")
    assert not verify_live(LogitCache.open(my_world.cache), my_world.job, 100)
    cache = LogitCache.open(tmp_path / "c.zarr")
    assert not verify(tmp_path / "c.zarr").faults
    assert [fault.where for fault in verify_live(cache, my_world.job, 100)] == ["live teacher"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"map": "0" * 32}, "other folds than those that were stated"),
        ({"seed": SEED + 1}, "other folds than those that were stated"),
        ({"count": 2}, "2 folds and the weights of 3 teachers"),
    ],
)
def test_folds_that_were_not_stated(my_world: World, changes: dict[str, Any], named: str) -> None:
    replace, cache = msgspec.structs.replace, LogitCache.open(my_world.cache)
    teacher = cache.identity.teacher
    stated = replace(teacher, folds=replace(teacher.folds, **changes))
    cache.identity = replace(cache.identity, teacher=stated)
    (fault,) = whole_array_faults(cache)
    assert fault.where == "folds"
    assert named in fault.what


def test_a_damaged_block_is_computed_again(my_world: World, tmp_path: Path) -> None:
    path = Path(shutil.copytree(my_world.cache, tmp_path / "c.zarr"))
    assert not verify(path).faults
    flip(path / "logits/c/1/0/0")
    faults = verify(path).faults
    assert faults
    assert not repair(path, my_world.job, faults).faults
    assert tree(path)["logits/c/1/0/0"] == tree(my_world.cache)["logits/c/1/0/0"]


Change = Callable[[Path], None]


def exchange(teachers: Path) -> None:
    for one, other in (("fold-0", "x"), ("fold-1", "fold-0"), ("x", "fold-1")):
        (teachers / one).rename(teachers / other)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (exchange, "trained without fold 1"),
        (lambda path: shutil.rmtree(path / "fold-1"), "--resume"),
        (lambda path: (path / "fold-2" / "summary.json").unlink(), "not trained to its end"),
    ],
)
def test_folders_of_several_trainings(
    my_world: World, tmp_path: Path, change: Change, named: str
) -> None:
    teachers = Path(shutil.copytree(my_world.teachers, tmp_path / "t"))
    change(teachers)
    config = my_world.config_of(teachers)
    with pytest.raises(ModelError, match=named):
        prepare(config, my_world.splits)


def test_other_teachers_are_not_gone_on_with(my_world: World, tmp_path: Path) -> None:
    teachers = Path(shutil.copytree(my_world.teachers, tmp_path / "t"))
    config = my_world.config_of(teachers)

    def replace_last(**changes: Any) -> None:
        shutil.rmtree(teachers / "fold-2")
        train_folds(teacher_config(fold=2, **changes), teachers, splits=my_world.splits)

    replace_last(seed=SeedSettings(data=SEED, init=1))
    with pytest.raises(ModelError, match="differ in their seed"):
        prepare(config, my_world.splits)
    replace_last(train=TrainSettings(epochs=2, batch_size=40))
    with pytest.raises(IdentityError, match=r"teacher\.folds\.weights"):
        cache_teacher(prepare(config, my_world.splits), my_world.cache)


def test_another_dataset_than_the_teachers_is_refused(my_world: World, digits: Splits) -> None:
    splits = Splits(first(digits.train, SAMPLES + 1), my_world.splits.test)
    with pytest.raises(IdentityError, match="other images"):
        prepare(my_world.config, splits)


def test_views_that_mix_samples_are_refused(my_world: World, tmp_path: Path) -> None:
    mixed = f"{POLICY}+mixup"
    with pytest.raises(ModelError, match="mix samples"):
        prepare(msgspec.structs.replace(my_world.config, augment=mixed), my_world.splits)
    with pytest.raises(ConfigError, match="--folds holds samples out"):
        train_folds(teacher_config(augment=mixed), tmp_path / "t", splits=my_world.splits)


@pytest.mark.parametrize(
    "make",
    [
        lambda where: train_folds(teacher_config(fold=3), where),
        lambda where: train_teacher(teacher_config(folds=None, fold=0), where),
        lambda where: train_teacher(teacher_config(), where),
        lambda where: train_folds(teacher_config(folds=None), where),
    ],
)
def test_settings_that_cannot_be(make: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        make(tmp_path / "t")


def test_a_run_is_no_folder_for_folds(my_world: World) -> None:
    with pytest.raises(RunError, match="is a run"):
        train_folds(teacher_config(), my_world.teachers / "fold-0", splits=my_world.splits)


def test_a_cache_of_moved_teachers_is_gone_on_with(my_world: World, tmp_path: Path) -> None:
    """By what it says of itself; here the dataset of the record is the whole of the digits."""
    moved = shutil.copytree(my_world.teachers, tmp_path / "moved")
    with pytest.raises(PipelineError, match="other images"):
        recorded_job(my_world.cache, weights=str(moved))
