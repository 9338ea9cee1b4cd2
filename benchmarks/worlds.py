"""What is measured on: a data set, a teacher, and a cache of it, made in a temporary folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.cache import LogitCache
from stages.cache_teacher import cache_teacher
from stages.data import Splits, load_data
from stages.settings import (
    CacheConfig,
    DataSettings,
    Dtype,
    ModelSettings,
    SeedSettings,
    StudentConfig,
    TeacherConfig,
    TeacherSettings,
    TrainSettings,
)
from stages.teacher.job import CacheJob, prepare
from stages.train_teacher import train_teacher

VIEWS = 3
SYNTHETIC = "benchmarks.synthetic:images"


@dataclass(frozen=True)
class Plan:
    """What a world is made of. weights: of a teacher that is there; else one is trained for so many
    epochs, which is enough to measure speed by. small: fixed costs are most of what a view takes.
    """

    name: str
    dataset: str
    teacher: str
    students: Sequence[str]
    augment: str = "pad-crop-flip"
    weights: str | None = None
    epochs: int = 1
    batch_size: int = 128
    dtype: Dtype = "float32"
    small: bool = False


@dataclass(frozen=True)
class World:
    """A plan that was carried out. job: as stage one has it, with the teacher loaded."""

    plan: Plan
    splits: Splits
    job: CacheJob
    path: Path

    @property
    def cache(self) -> LogitCache:
        return LogitCache.open(self.path)

    def student(self, architecture: str, init: int = 0) -> StudentConfig:
        """A run of a student of this world's cache."""
        return StudentConfig(
            cache=str(self.path),
            data=DataSettings(dataset=self.plan.dataset),
            model=ModelSettings(architecture=architecture),
            train=TrainSettings(batch_size=self.plan.batch_size, dtype=self.plan.dtype),
            seed=SeedSettings(init=init),
            device=self.job.config.device,
        )


def digits(dtype: Dtype) -> Plan:
    """Embedded and real, 1,000 images of 8 x 8: starting a kernel takes longer than running it."""
    return Plan(
        name="digits, resnet8",
        dataset="digits",
        teacher="resnet8",
        students=("resnet8",),
        augment="pad-crop:pad=2",
        epochs=3,
        dtype=dtype,
        small=True,
    )


def synthetic(teacher: str, students: Sequence[str], dtype: Dtype, batch_size: int) -> Plan:
    """10,000 images of CIFAR's shape, see `benchmarks.synthetic`."""
    name = f"32 px, {teacher}"
    return Plan(name, SYNTHETIC, teacher, students, batch_size=batch_size, dtype=dtype)


def make_world(plan: Plan, splits: Splits, folder: Path, device: str) -> World:
    """Train the teacher where there is none, and cache its rows as stage one would."""
    data = DataSettings(dataset=plan.dataset)
    weights = plan.weights
    if weights is None:
        weights = str(folder / "teacher")
        config = TeacherConfig(
            data=data,
            model=ModelSettings(architecture=plan.teacher),
            augment=plan.augment,
            train=TrainSettings(
                epochs=plan.epochs, batch_size=plan.batch_size, lr=0.05, dtype=plan.dtype
            ),
            device=device,
        )
        train_teacher(config, weights, splits=splits)
    job = prepare(
        CacheConfig(
            data=data,
            teacher=TeacherSettings(weights=weights),
            views=VIEWS,
            augment=plan.augment,
            dtype=plan.dtype,
            device=device,
        ),
        splits,
    )
    path = folder / "cache.zarr"
    cache_teacher(job, path)
    return World(plan, splits, job, path)


def load(plans: Sequence[Plan]) -> dict[str, Splits]:
    """Every data set once, by its name."""
    return {
        name: load_data(DataSettings(dataset=name))
        for name in dict.fromkeys(plan.dataset for plan in plans)
    }
