"""The settings of every command: frozen structs that check themselves. Imports no torch.

`pipeline/config.py` fills them from YAML and `key=value`; here they are plain values.
"""

import math
import re
from typing import ClassVar, Literal

import msgspec

from stages.errors import ConfigError
from stages.sizes import parse_bytes

MOST_IN_A_BATCH, LARGEST_SIDE, MOST_WORKERS = 2**20, 2**14, 1024
"""Samples, pixels and processes: more are a slip of the finger, and would fail much later."""
TEMPERATURES = 1e-2, 1e4
"""Of a loss or a rectification: beyond, softmax in float32 is one class, or all alike."""
MAX_BLOCK_ROWS = 65_536
"""Of a cache: the most rows of a view that are written and committed at once."""
Dtype = Literal["float32", "bfloat16", "float16"]
Feeding = Literal["auto", "memory", "stream"]
Outputs = Literal["logits", "probabilities"]
Method = Literal["pairwise", "swap", "blend"]
Space = Literal["probability-T", "probability-1", "logit"]
BiasMode = Literal["none", "eliminate", "rectify"]
Schedule = Literal["cosine", "linear", "ramp", "constant"]
Reduction = Literal["subset", "batch"]

_NAME = re.compile(r"(?!zarr\.json)[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}(?<!\.partial)", re.IGNORECASE)
"""What can name a group of the store: on any disk, and apart from what the store itself uses."""


def counted(name: str, value: int, most: int) -> None:
    """Raise ConfigError unless 0 < value <= most."""
    positive(name, value)
    if value > most:
        raise ConfigError(f"{name} must be at most {most:,}, was {value:.3g}")


def positive(name: str, value: float) -> None:
    """Raise ConfigError unless value > 0 and finite."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} must be positive, was {value}")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless low <= value <= high and finite; a bound may be infinite."""
    if not (low <= value <= high and math.isfinite(value)):
        end = ")" if math.isinf(high) else "]"
        raise ConfigError(f"{name} must be in [{low:g}, {high:g}{end}, was {value}")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all settings: immutable, and an unknown key is an error."""


class TrainSettings(Settings, frozen=True):
    """How a model is optimised. Defaults: a short recipe for small images.

    lr: the peak. momentum: of SGD (Adam keeps its own betas). milestones: epochs after which
    the rate is multiplied by gamma. warmup: share of the steps that `onecycle` climbs.
    dtype: of the forward pass (autocast); weights stay float32. compile: the forward pass, see
    `stages.training.compiled`; weights differ in their last bits.
    """

    epochs: int = 30
    batch_size: int = 128
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: Literal["constant", "multistep", "cosine", "onecycle"] = "cosine"
    milestones: tuple[int, ...] = (150, 180, 210)
    gamma: float = 0.1
    warmup: float = 0.3
    dtype: Dtype = "float32"
    channels_last: bool = True
    deterministic: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        counted("train.epochs", self.epochs, 10**6)
        counted("train.batch_size", self.batch_size, MOST_IN_A_BATCH)
        positive("train.lr", self.lr)
        within("train.momentum", self.momentum, 0, 1)
        within("train.warmup", self.warmup, 0, 1)
        within("train.weight_decay", self.weight_decay, 0, math.inf)
        within("train.gamma", self.gamma, 0, math.inf)
        if self.nesterov and self.optimizer == "sgd" and self.momentum == 0:
            raise ConfigError("train.nesterov needs a train.momentum above 0")


class SeedSettings(Settings, frozen=True):
    """data: order of views and samples. init: the model's first weights."""

    data: int = 0
    init: int = 0

    def __post_init__(self) -> None:
        within("seed.data", self.data, -(2**63), 2**63 - 1)
        within("seed.init", self.init, -(2**63), 2**63 - 1)


class LossSettings(Settings, frozen=True):
    """What a student minimises: ce_weight * CE + weight * min(epoch / warmup, 1) * loss.

    None is the loss's own default, see `stages.objectives.losses` (epochs count from 1; a warmup of
    0 is none). standardise: bring the logits of both sides to one scale first. The others are
    parameters of the losses that have them. `ce` uses no targets, and ignores all but its name.
    """

    name: str = "kd"
    temperature: float | None = None
    ce_weight: float | None = None
    weight: float | None = None
    warmup: int | None = None
    standardise: bool = False
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    epsilon: float | None = None
    sure_temperature: float | None = None
    average: Literal["kind", "batch"] | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "sure_temperature"):
            if (value := getattr(self, name)) is not None:
                positive(f"loss.{name}", value)
                within(f"loss.{name}", value, *TEMPERATURES)
        for name in ("ce_weight", "weight", "warmup", "alpha", "beta", "gamma"):
            if (value := getattr(self, name)) is not None:
                within(f"loss.{name}", value, 0, math.inf)
        if self.epsilon is not None:
            within("loss.epsilon", self.epsilon, 0, 1)


class BiasSettings(Settings, frozen=True):
    """How the teacher's mistakes are treated: see `stages.objectives.bias`.

    schedule: None is `cosine` for `rectify` and `constant` for `eliminate`.
    rectified: name of the rectification, None for the only one.
    """

    mode: BiasMode = "none"
    schedule: Schedule | None = None
    reduction: Reduction = "subset"
    rectified: str | None = None

    @property
    def chosen_schedule(self) -> Schedule:
        return self.schedule or ("cosine" if self.mode == "rectify" else "constant")


class DataSettings(Settings, frozen=True):
    """Where images come from and how they are fed. See `stages.inputs.datasets`.

    val_fraction: share of the training samples held out for choosing the model. rescan: list a
    folder of images again, as after overwriting files in place; see its `manifest`. skip: a file
    that names samples to leave out, beside those that a cache leaves out.
    """

    dataset: str
    root: str | None = None
    download: bool = False
    rescan: bool = False
    skip: str | None = None
    feeding: Feeding = "auto"
    image_size: int | None = None
    resize: int | None = None
    workers: int = 2
    val_fraction: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size", "resize"):
            if (side := getattr(self, name)) is not None:
                counted(f"data.{name}", side, LARGEST_SIDE)
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"data.val_fraction must be in [0, 1), was {self.val_fraction}")
        if self.workers < 0:
            raise ConfigError(f"data.workers must not be negative, was {self.workers}")
        within("data.workers", self.workers, 0, MOST_WORKERS)


class ModelSettings(Settings, frozen=True):
    """architecture: a name as in `stages.inputs.models`. mean, std: of its normalisation, None for
    the dataset's own. init: weights to start from.
    """

    architecture: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None
    init: str | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None:
            counted("model.image_size", self.image_size, LARGEST_SIDE)


class RunConfig(Settings, frozen=True, kw_only=True):
    """What every training run has. tensorboard: write event files as well. kind: of run."""

    kind: ClassVar[str]

    data: DataSettings
    model: ModelSettings
    train: TrainSettings = TrainSettings()
    seed: SeedSettings = SeedSettings()
    device: str = "auto"
    tensorboard: bool = False


class TeacherConfig(RunConfig, frozen=True, kw_only=True):
    """A run of train-teacher. augment: a view policy; every epoch shows another of its views."""

    kind: ClassVar[str] = "teacher"

    augment: str = "pad-crop-flip"


class StudentConfig(RunConfig, frozen=True, kw_only=True):
    """A run of train-student.

    also: further caches of the same views, whose probabilities are averaged with the first's; see
    `stages.targets.ensemble`. views: train from the first so many views of the cache, None for
    all. slab_memory: how much memory targets may take, for example 2GB; where two views are more,
    epochs are read and shuffled in groups of chunks (`stages.targets.chunks`), in the same order
    for every loss. accept_pixel_drift: go on with a warning where the pixels are no longer quite
    those the teacher saw.
    """

    kind: ClassVar[str] = "student"

    cache: str
    also: tuple[str, ...] = ()
    views: int | None = None
    slab_memory: str | None = None
    loss: LossSettings = LossSettings()
    bias: BiasSettings = BiasSettings()
    accept_pixel_drift: bool = False

    def __post_init__(self) -> None:
        if self.slab_memory is not None:
            parse_bytes(self.slab_memory, "slab_memory")


class TeacherSettings(Settings, frozen=True):
    """architecture may be None where the weights are a run directory, and weights where the
    architecture is a module:callable that brings them. mean, std, image_size: None for the weights'
    own, or the dataset's. outputs: what it returns. class_order: see `output_order`.
    """

    weights: str | None = None
    architecture: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None
    outputs: Outputs = "logits"
    class_order: str | None = None


class CacheConfig(Settings, frozen=True):
    """A run of cache-teacher. seed: of the views. dtype: of the teacher's forward pass.

    encoding: a name, with parameters after a colon (`topk:k=20`). max_kl: mean KL to the exact rows
    at T=1, in nats, that the encoding must hold; with `auto` the smallest that does is taken.
    """

    data: DataSettings
    teacher: TeacherSettings
    views: int
    augment: str = "pad-crop-flip"
    seed: int = 0
    encoding: str = "auto"
    max_kl: float | None = None
    dtype: Dtype = "float32"
    batch_size: int = 512
    block_rows: int = MAX_BLOCK_ROWS
    channels_last: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        counted("views", self.views, 10**6)
        within("seed", self.seed, -(2**63), 2**63 - 1)
        counted("batch_size", self.batch_size, MOST_IN_A_BATCH)
        positive("block_rows", self.block_rows)
        if self.max_kl is not None:
            positive("max_kl", self.max_kl)


class RectifyConfig(Settings, frozen=True):
    """name: None for `<method>-T<temperature>`, with the space appended where it is not the
    default. scheduler: address of a Dask cluster, None for threads here. views: rectify the first
    so many views, None for all. materialise: also store whole rectified rows, for readers outside
    this project.
    """

    method: Method = "pairwise"
    space: Space = "probability-T"
    temperature: float = 4.0
    name: str | None = None
    views: int | None = None
    scheduler: str | None = None
    materialise: bool = False

    def __post_init__(self) -> None:
        within("temperature", self.temperature, 1e-2, 1e4)
        if self.views is not None:
            positive("views", self.views)
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"{self.name[:100]!r} cannot name a rectification",
                "Use up to 100 letters, digits, '.', '_', '+' and '-', a letter or a digit first, "
                "but not 'zarr.json', and not '.partial' at the end.",
            )
        if self.space == "logit" and self.method == "blend":
            raise ConfigError(
                "the space 'logit' is not defined for the method 'blend'",
                "Use --method pairwise (as released), or --space probability-T.",
            )

    @property
    def chosen_name(self) -> str:
        space = "" if self.space == "probability-T" else f"-{self.space}"
        return self.name or f"{self.method}-T{self.temperature:g}{space}"
