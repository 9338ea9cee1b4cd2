"""A loss as a student is trained with it: defaults filled in, what it can be fed checked."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.encoding import check_temperature
from stages.errors import CacheError, ConfigError
from stages.objectives.losses import (
    PARAMETERS,
    Definition,
    LearningLoss,
    TeacherRows,
    changed,
    definition_of,
    standardised,
)
from stages.settings import LossSettings, StudentConfig


@dataclass(frozen=True)
class StudentLoss:
    """The loss of a student. settings: with the loss's own defaults where they named nothing.
    definition: what is known of the loss.
    """

    settings: LossSettings
    definition: Definition

    @property
    def reads_teacher(self) -> bool:
        """Whether it is against a teacher's rows, and not cross-entropy alone."""
        return self.settings.name != "ce"

    @property
    def parameters(self) -> dict[str, Any]:
        """Its own parameters, those that are set."""
        return _parameters(self.settings, self.definition)

    @property
    def standardised_first(self) -> bool:
        """Whether logits of both sides are standardised before the loss has them."""
        return self.settings.standardise and not self.definition.standardises

    @property
    def reads_offset(self) -> bool:
        """Whether a constant that is added to a row of the teacher changes it."""
        return self.definition.reads_offset and not self.settings.standardise

    @property
    def rectified_at(self) -> float | None:
        """The temperature at which rectified rows must be distributions: its own; None where it has
        none, as it is learned, or another for each row.
        """
        if self.settings.standardise or self.definition.learns:
            return None
        return self.settings.temperature or 1.0

    def temperatures(self) -> list[float]:
        """At which temperatures rows are read that are known in part. Raises ConfigError for a loss
        that needs whole rows.
        """
        if self.settings.standardise:
            raise ConfigError(
                "logits can be standardised where whole rows are known, the cache keeps part of "
                "each",
                "Leave loss.standardise out, or cache with another --encoding.",
            )
        return self.definition.temperatures(self.parameters)

    def check_rows(self, cache: LogitCache) -> None:
        """Raise ConfigError or CacheError where a cache keeps less of its rows than is read."""
        if cache.encoding.keeps_all:
            return
        if self.settings.calibrate:
            raise CacheError(
                f"{cache.path} keeps part of each row, and calibration divides all of it",
                "Leave --calibrate out, or cache with another --encoding.",
            )
        if self.reads_teacher:
            for temperature in self.temperatures():
                check_temperature(cache.encoding, temperature)

    def having(self, **changes: Any) -> "StudentLoss":
        """The same loss with other settings."""
        return replace(self, settings=msgspec.structs.replace(self.settings, **changes))


@dataclass(frozen=True)
class Student:
    """A student before its first step. config: complete, with what the loss and the cache decide
    filled in. loss: what it minimises.
    """

    config: StudentConfig
    loss: StudentLoss

    @staticmethod
    def of(config: StudentConfig) -> "Student":
        """Of a complete configuration."""
        return Student(config, StudentLoss(config.loss, definition_of(config.loss.name)))


def student_loss(settings: LossSettings) -> StudentLoss:
    """The loss that settings name, with its own defaults where they name nothing else.

    Raises ConfigError for an unknown loss, or a parameter that the loss does not have.
    """
    definition = definition_of(settings.name)
    if settings.name == "ce":
        return StudentLoss(LossSettings(name="ce"), definition)
    given = _parameters(settings, definition)
    weights = {key: getattr(definition, key) for key in ("ce_weight", "weight", "warmup")}
    given |= {key: v for key in weights if (v := getattr(settings, key)) is not None}
    standard = dict(definition.lskd) if settings.standardise else {}
    values = weights | definition.defaults | standard | given
    known = {key: v for key, v in values.items() if key in settings.__struct_fields__}
    return StudentLoss(msgspec.structs.replace(settings, **known), definition)


def unused_settings(settings: LossSettings) -> list[str]:
    """The settings that were given and that the loss `ce` passes over, by dotted keys."""
    if settings.name != "ce":
        return []
    given, plain = map(msgspec.structs.asdict, (settings, LossSettings(name="ce")))
    return [f"loss.{key}" for key in given if given[key] != plain[key]]


def _parameters(settings: LossSettings, definition: Definition) -> dict[str, Any]:
    """The loss's own parameters, those that are set. Raises ConfigError for one that it has not."""
    named = settings.__struct_fields__
    given = {key: getattr(settings, key) for key in PARAMETERS if key in named}
    others = dict(text.partition("=")[::2] for text in settings.parameters or ())
    given = {key: value for key, value in given.items() if value is not None}
    definition.check(given | others)
    defaults = definition.defaults
    return given | {key: _value(key, text, defaults[key]) for key, text in others.items()}


def _value(key: str, text: str, default: Any) -> Any:
    """A parameter of the type that its default has."""
    kind = float if default is None else type(default)
    try:
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError:
        raise ConfigError(f"loss.parameters: {key} must be {kind.__name__}, was '{text}'") from None


class Objective:
    """What is minimised against teacher rows.

    on_host: the loss takes steps on the host, or may.
    couples_rows: the value is no mean of row losses. views: how many views of a sample it sees at
    once. learned: what it learns itself, else None.
    """

    def __init__(self, loss: StudentLoss) -> None:
        self.settings, definition, parameters = loss.settings, loss.definition, loss.parameters
        if definition.standardises:
            parameters["standardise"] = self.settings.standardise
        self._standardises = loss.standardised_first
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
