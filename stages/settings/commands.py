"""The commands that read `--config`, and every setting that each of them has."""

# fmt: off

import contextlib
import re
from typing import Annotated, ClassVar

from stages.errors import ConfigError
from stages.schema import Decides, Settings, about, settings_of
from stages.settings.learning import BiasSettings, LossSettings
from stages.settings.sections import (
    MAX_BLOCK_ROWS,
    SEEDS,
    TEMPERATURES,
    Augment,
    BatchSize,
    Cache,
    ChannelsLast,
    DataSettings,
    Device,
    FirstViews,
    Method,
    ModelSettings,
    Precision,
    Scheduler,
    SeedSettings,
    Space,
    TeacherSettings,
    TrainSettings,
)
from stages.sizes import parse_budget, parse_bytes

CALIBRATED = "-calibrated"
"""How the name of a rectification of calibrated rows ends, unless one is given."""
_NAME = re.compile(r"(?!zarr\.json)[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}(?<!\.partial)", re.IGNORECASE)
"""What can name a group of the store: on any disk, and apart from what the store itself uses."""


class CacheConfig(Settings, frozen=True):
    """A run of cache-teacher."""

    data: Annotated[DataSettings, about("", flags={"val_fraction": None})]
    teacher: Annotated[TeacherSettings, about("", group="model")]
    views: Annotated[int, about(
        "How many augmented views of every sample to cache.",
        "--views", group="data", above=0, most=10**6)]
    augment: Augment = "pad-crop-flip"
    seed: Annotated[int, about("Of the views.", "--seed", group="data", **SEEDS)] = 0
    encoding: Annotated[str, about(
        "How logits are stored; auto chooses by the number of classes, or the smallest that holds "
        "--max-kl. topk:k=10 sets a parameter.", "--encoding", takes="encoding")] = "auto"
    max_kl: Annotated[str | float | None, about(
        "Mean KL that the encoding must hold, in nats: 0.005 at T=1, or at temperatures of its own,"
        " 0.03@1,0.008@4.", "--max-kl", metavar="KL@T,...")] = None
    dtype: Precision = "float32"
    batch_size: BatchSize = 512
    block_rows: Annotated[int, about(
        "The most rows of a view that are committed at once.", above=0)] = MAX_BLOCK_ROWS
    channels_last: ChannelsLast = True
    views_at_once: Annotated[int | None, about(
        "Views that are made of an image while it is decoded, in memory together; chosen from "
        "memory if left out, 1 where images are in memory anyway. Decides speed alone.",
        "--views-at-once", above=0, most=10**6, decides="nothing")] = None
    device: Device = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.budget

    @property
    def budget(self) -> dict[float, float] | None:
        """What `max_kl` says: the KL at each temperature."""
        return None if self.max_kl is None else parse_budget(self.max_kl, "max_kl")


class RectifyConfig(Settings, frozen=True):
    """A run of rectify."""

    method: Annotated[Method, about("How a wrong row is rectified.", "--method")] = "pairwise"
    space: Annotated[Space, about(
        "Where: in the softmax at the temperature, that at 1, or the logits.",
        "--space")] = "probability-T"
    temperature: Annotated[float, about(
        "Of the loss that will use it.", "--temperature", **TEMPERATURES)] = 4.0
    wrong: Annotated[str | None, about(
        "Which rows that answer another class are wrong. label: all, as if left out; confidence:X: "
        "those that give it less than X at T=1. The others stay as they are: their label may be "
        "what is wrong.", "--wrong", metavar="RULE")] = None
    calibrate: Annotated[bool, about(
        "For students with --calibrate: the temperature times the one that `pipeline calibrate` "
        "fitted.", "--calibrate")] = False
    name: Annotated[str | None, about(
        "<method>-T<temperature>, the space and the rule if left out.", "--name")] = None
    views: Annotated[FirstViews, about("", above=0)] = None
    scheduler: Scheduler = None
    materialise: Annotated[bool, about(
        "Also store whole rectified rows, for other programs.", "--materialise")] = False
    suspects: Annotated[str | None, about(
        "With --wrong confidence:X: write the samples whose labels may be wrong there, as CSV.",
        "--suspects", metavar="FILE", takes="file")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
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

        if self.trusted_above is None and self.suspects is not None:
            raise ConfigError(
                "no label is suspected where no teacher is trusted against it",
                "Add --wrong confidence:X, or leave --suspects out.",
            )

    @property
    def trusted_above(self) -> float | None:
        """From which probability on a teacher is trusted against the label; None for never."""
        if self.wrong in (None, "label"):
            return None
        rule, _, number = self.wrong.partition(":")
        with contextlib.suppress(ValueError):
            if rule == "confidence" and 0 < float(number) <= 1:
                return float(number)
        raise ConfigError(
            f"there is no rule '{self.wrong[:100]}' for what is wrong",
            "Use --wrong label, or --wrong confidence:X with X above 0, up to 1.",
        )

    @property
    def chosen_name(self) -> str:
        """The name, or the default one: method, temperature, space, rule, and `-calibrated`."""
        space = "" if self.space == "probability-T" else f"-{self.space}"
        rule = "" if self.trusted_above is None else f"-confidence{self.trusted_above:g}"
        calibrated = CALIBRATED if self.calibrate else ""
        return self.name or f"{self.method}-T{self.temperature:g}{space}{rule}{calibrated}"


class RunConfig(Settings, frozen=True, kw_only=True):
    """What every training run has. kind: of run."""

    kind: ClassVar[str]

    data: Annotated[DataSettings, about("", shared=True)]
    model: ModelSettings
    train: Annotated[TrainSettings, about("", group="training")] = TrainSettings()
    seed: Annotated[SeedSettings, about("", group="training")] = SeedSettings()
    device: Annotated[Device, about("", shared=True)] = "auto"
    tensorboard: Annotated[bool, about(
        "Write event files for TensorBoard as well, under tensorboard/ in the run.",
        "--tensorboard", decides="nothing")] = False


class TeacherConfig(RunConfig, frozen=True, kw_only=True):
    """A run of train-teacher; every epoch shows another view."""

    kind: ClassVar[str] = "teacher"

    augment: Augment = "pad-crop-flip"
    folds: Annotated[int | None, about(
        "Train so many teachers, each without one fold of the samples, in --out/fold-0 and so on: "
        "cache-teacher --weights takes them all.", "--folds", group="training", least=2,
        most=1000)] = None
    fold: Annotated[int | None, about(
        "Only the teacher without this fold, of 0 to folds - 1.", "--fold", group="training",
        least=0)] = None


class StudentConfig(RunConfig, frozen=True, kw_only=True):
    """A run of train-student."""

    kind: ClassVar[str] = "student"

    model: Annotated[ModelSettings, about("", flags={"architecture": "--student"})]
    cache: Annotated[Cache, about("", shared=True)]
    also: Annotated[tuple[str, ...], about(
        "Another teacher's cache of the same views, to be averaged; may be repeated.",
        "--also", metavar="CACHE", takes="folder", group="data", decides="contents",
        shared=True)] = ()
    views: Annotated[FirstViews, about("", shared=True)] = None
    slab_memory: Annotated[str | None, about(
        "Memory for targets, 2GB for example; where two views take more, epochs are read in groups"
        " of chunks, in the same order for every loss.",
        "--slab-memory", metavar="SIZE", decides="weights", shared=True)] = None
    loss: LossSettings = LossSettings()
    bias: BiasSettings = BiasSettings()
    accept_pixel_drift: Annotated[bool, about(
        "Go on with a warning where pixel probes differ.",
        "--accept-pixel-drift", group="data", decides="weights")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.slab_bytes

    @property
    def slab_bytes(self) -> int | None:
        """What `slab_memory` says."""
        return None if self.slab_memory is None else parse_bytes(self.slab_memory, "slab_memory")


CONFIGS = {
    "train-teacher": TeacherConfig,
    "cache-teacher": CacheConfig,
    "rectify": RectifyConfig,
    "train-student": StudentConfig,
}
"""The commands that take `--config`, and what it holds."""


def keys_deciding(*what: Decides) -> frozenset[str]:
    """The keys of training runs whose settings decide this."""
    every = {**settings_of(TeacherConfig), **settings_of(StudentConfig)}
    return frozenset(key for key, setting in every.items() if setting.decides in what)
