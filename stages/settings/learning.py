"""Settings of what a student minimises: the loss, and how the teacher's mistakes are treated."""

# fmt: off

import contextlib
import math
from typing import Annotated, ClassVar, Literal

import msgspec

from stages.errors import ConfigError
from stages.schema import Settings, about
from stages.settings.sections import TEMPERATURES, BiasMode, Reduction, Schedule

_OWN = "A parameter of some losses, see docs/losses.md."


class LossSettings(Settings, frozen=True):
    """What a student minimises: ce_weight * CE + weight * min(epoch / warmup, 1) * loss.

    None is the loss's own default, see `stages.objectives.losses` (epochs count from 1; a warmup of
    0 is none). `ce` uses no targets, and ignores all but its name.
    """

    section: ClassVar[str] = "loss"

    name: Annotated[str, about(
        "The loss against the teacher's logits, module:callable for one of your own; ce: the "
        "cache's views without its targets.",
        "--loss", metavar="NAME", takes="loss")] = "kd"
    temperature: Annotated[float | None, about(
        "Of both softmaxes; the loss's own default if left out.",
        "--temperature", **TEMPERATURES)] = None
    ce_weight: Annotated[float | None, about(
        "Of the labels' cross-entropy; of this section, null is the loss's own default.",
        least=0)] = None
    weight: Annotated[float | None, about("Of the loss.", least=0)] = None
    warmup: Annotated[int | None, about(
        "Epochs in which the loss's weight grows to its value.", least=0)] = None
    until: Annotated[str | float | None, about(
        "When the loss is switched off and CE is left: after so many epochs, after a share of them "
        "below 1, or beats-teacher, once the student has more held-out samples right than the "
        "teacher.", "--until", metavar="EPOCHS|SHARE|beats-teacher")] = None
    standardise: Annotated[bool, about(
        "Bring the logits of both sides to one scale first.")] = False
    calibrate: Annotated[bool, about(
        "Divide the teacher's logits by the temperature that `pipeline calibrate` fitted, before "
        "all else.", "--calibrate")] = False
    alpha: Annotated[float | None, about(_OWN, least=0)] = None
    beta: Annotated[float | None, about(_OWN, least=0)] = None
    gamma: Annotated[float | None, about(_OWN, least=0)] = None
    epsilon: Annotated[float | None, about(_OWN, least=0, most=1)] = None
    sure_temperature: Annotated[float | None, about(_OWN, **TEMPERATURES)] = None
    sure_weak: Annotated[float | None, about(_OWN, least=0, most=1)] = None
    sure_strong: Annotated[float | None, about(_OWN, least=0, most=1)] = None
    t_start: Annotated[float | None, about(_OWN, **TEMPERATURES)] = None
    t_end: Annotated[float | None, about(_OWN, least=0, most=TEMPERATURES["most"])] = None
    decay: Annotated[float | None, about(_OWN, above=0)] = None
    average: Annotated[Literal["kind", "batch"] | None, about(_OWN)] = None
    parameters: Annotated[tuple[str, ...] | None, about(
        "Other parameters of a loss of your own, as [margin=0.5].")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.until not in (None, "beats-teacher"):  # 0.5 and "0.5" are one setting
            msgspec.structs.force_setattr(self, "until", _epochs_or_share(self.until))


class BiasSettings(Settings, frozen=True):
    """How the teacher's mistakes are treated: see `stages.objectives.bias`."""

    section: ClassVar[str] = "bias"

    mode: Annotated[BiasMode, about(
        "Leave out, or rectify, rows that the teacher has wrong; or correct the loss of every row "
        "to first order.", "--bias")] = "none"
    schedule: Annotated[Schedule | None, about(
        "How weight moves from right to wrong rows; constant if left out. Of rectify with "
        "--as-published or a reduction of its own: cosine.")] = None
    reduction: Annotated[Reduction | None, about(
        "Means over the rows of a kind, or the whole batch; batch for rectify and subset for "
        "eliminate if left out.")] = None
    as_published: Annotated[bool, about(
        "Rectify as the paper does, with a cosine schedule and means over the rows of a kind.",
        "--as-published")] = False
    rectified: Annotated[str | None, about(
        "Which rectification; may be left out where there is one.", "--rectified")] = None
    alpha: Annotated[float | None, about(
        "Of correct: the label's probability counts as at least this; .1 if left out.",
        above=0, most=1)] = None
    gamma: Annotated[float | None, about(
        "Of correct: its strength; 1, all of it, if left out.", least=0, most=1)] = None

    @property
    def weighs(self) -> bool:
        """Whether right and wrong rows have weights of their own."""
        return self.mode in ("eliminate", "rectify")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.as_published:
            return
        if not self.weighs:
            raise ConfigError(
                f"--as-published is for --bias rectify or eliminate, not for '{self.mode}'",
                "Leave it out.",
            )
        for key, value, published in (
            ("schedule", self.schedule, "cosine" if self.mode == "rectify" else "constant"),
            ("reduction", self.reduction, "subset"),
        ):
            if value not in (None, published):
                raise ConfigError(
                    f"--as-published means bias.{key}={published}, and bias.{key} was '{value}'",
                    "Leave one of the two out.",
                )

    @property
    def _published(self) -> bool:
        """Whether what is left out is as published. Runs that were made before `as_published` name
        a reduction, and no schedule where it is the published one.
        """
        return self.mode != "rectify" or self.as_published or self.reduction is not None

    @property
    def chosen_schedule(self) -> Schedule:
        """The schedule, or the default of the mode."""
        cosine = self.mode == "rectify" and self._published
        return self.schedule or ("cosine" if cosine else "constant")

    @property
    def chosen_reduction(self) -> Reduction:
        """The reduction, or the default of the mode."""
        return self.reduction or ("subset" if self._published else "batch")

    def resolved(self) -> "BiasSettings":
        """The same in the words of runs that were made before `as_published`."""
        schedule = self.schedule if self._published else self.chosen_schedule
        return msgspec.structs.replace(
            self, schedule=schedule, reduction=self.chosen_reduction, as_published=False
        )


def _epochs_or_share(value: str | float | None) -> float:
    """What `until` says: a number of epochs, or a share of them below 1."""
    number = math.nan
    with contextlib.suppress(TypeError, ValueError):
        number = float(value)  # type: ignore[arg-type]
    if 0 < number < 1 or (number >= 1 and number.is_integer()):
        return number
    raise ConfigError(
        f"loss.until must be a number of epochs, a share of them below 1 or beats-teacher, was "
        f"{str(value)[:100]!r}"
    )
