"""A loss as a student is trained with it: defaults filled in, what it can be fed checked."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from torch import Tensor

from stages.errors import ConfigError
from stages.objectives.losses import (
    PARAMETERS,
    LearningLoss,
    TeacherRows,
    changed,
    definition_of,
    standardised,
)
from stages.settings import LossSettings


def resolved(settings: LossSettings) -> LossSettings:
    """The settings with the loss's own defaults where they name nothing.

    Raises ConfigError for an unknown loss, or a parameter that the loss does not have.
    """
    name = settings.name
    if name == "ce":
        return LossSettings(name="ce")
    definition, given = definition_of(name), _parameters(settings)
    weights = {key: getattr(definition, key) for key in ("ce_weight", "weight", "warmup")}
    given |= {key: v for key in weights if (v := getattr(settings, key)) is not None}
    standard = dict(definition.lskd) if settings.standardise else {}
    values = weights | definition.defaults | standard | given
    known = {key: v for key, v in values.items() if key in settings.__struct_fields__}
    return msgspec.structs.replace(settings, **known)


def unused_settings(settings: LossSettings) -> list[str]:
    """The settings that were given and that the loss `ce` passes over, by dotted keys."""
    if settings.name != "ce":
        return []
    given, plain = map(msgspec.structs.asdict, (settings, LossSettings(name="ce")))
    return [f"loss.{key}" for key in given if given[key] != plain[key]]


def _parameters(settings: LossSettings) -> dict[str, Any]:
    """The loss's own parameters, those that are set. Raises ConfigError for one that it has not."""
    named = settings.__struct_fields__
    given = {key: getattr(settings, key) for key in PARAMETERS if key in named}
    others = dict(text.partition("=")[::2] for text in settings.parameters or ())
    given = {key: value for key, value in given.items() if value is not None}
    defaults = definition_of(settings.name, given | others).defaults
    return given | {key: _value(key, text, defaults[key]) for key, text in others.items()}


def _value(key: str, text: str, default: Any) -> Any:
    """A parameter of the type that its default has."""
    kind = float if default is None else type(default)
    try:
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError:
        raise ConfigError(f"loss.parameters: {key} must be {kind.__name__}, was '{text}'") from None


class Objective:
    """What is minimised against teacher rows, of resolved settings.

    on_host: the loss takes steps on the host, or may.
    couples_rows: the value is no mean of row losses. views: how many views of a sample it sees at
    once. learned: what it learns itself, else None.
    """

    def __init__(self, settings: LossSettings) -> None:
        self.settings, definition = settings, definition_of(settings.name)
        parameters = _parameters(settings)
        if definition.standardises:
            parameters["standardise"] = settings.standardise
        self._standardises = settings.standardise and not definition.standardises
        self._loss: Callable[..., Tensor] = definition.make(parameters)
        self.on_host = definition.on_host
        self.couples_rows, self.views = definition.couples_rows, definition.views
        learned: object = self._loss
        self.learned = learned if isinstance(learned, LearningLoss) else None
        self.weight = 0.0

    def start_epoch(self, epoch: int) -> None:
        """epoch: from 0."""
        assert self.settings.weight is not None
        warmup = self.settings.warmup or 1
        self.weight = self.settings.weight * min((epoch + 1) / warmup, 1)
        if self.learned is not None:
            self.learned.start_epoch(epoch)

    def __call__(
        self, student: Tensor, teacher: TeacherRows, labels: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """The weighted loss, without `weight`: of every row, float32 (B,), or () where it couples
        rows. student: float32 (B, C), view after view. labels: int64 (B,). weights: float32 (B,), 1
        if None.
        """
        if self._standardises:
            student, teacher = standardised(student), changed(teacher, standardised)
        if self.views > 1:
            student = student.unflatten(0, (self.views, -1))
        if self.couples_rows:
            return self._loss(student, teacher, labels, weights=weights)
        rows = self._loss(student, teacher, labels, reduction="none")
        return rows if weights is None else weights * rows


def teacher_temperatures(settings: LossSettings) -> Sequence[float]:
    """At which temperatures rows are read that are known in part. Raises ConfigError for a loss
    that needs whole rows.
    """
    if settings.standardise:
        raise ConfigError(
            "logits can be standardised where whole rows are known, the cache keeps part of each",
            "Leave loss.standardise out, or cache with another --encoding.",
        )
    return definition_of(settings.name).temperatures(_parameters(settings))


def reads_offset(settings: LossSettings) -> bool:
    """Whether a constant that is added to a row of the teacher changes the loss."""
    return definition_of(settings.name).reads_offset and not settings.standardise


def views_seen(settings: LossSettings) -> int:
    """How many views of a sample the loss sees at once."""
    return definition_of(settings.name).views


def rectified_at(settings: LossSettings) -> float | None:
    """The temperature at which rectified rows must be distributions: that of the loss; None where
    it has none of its own, as it is learned, or another for each row.
    """
    if settings.standardise or definition_of(settings.name).learns:
        return None
    return settings.temperature or 1.0
