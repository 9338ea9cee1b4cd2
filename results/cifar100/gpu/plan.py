"""How much of the experiment fits in some minutes, by rates that were measured on the device."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.book import Run
from stages.errors import ConfigError

FIGURES: Mapping[str, Sequence[str]] = {
    "teacher": [
        r"resnet32x4, batch \d+: captured, trained on hard labels, training images",
        r"resnet32x4, batch \d+: trained on hard labels, training images",
    ],
    "views": [r"resnet32x4, 32 px: stage one, training images"],
    "students": [
        r"resnet8x4, batch \d+: \d+ captured students together, training images of all",
        r"resnet8x4, batch \d+: \d+ students together, training images of all",
    ],
    "alone": [
        r"resnet8x4, batch 64: captured student, training images",
        r"resnet8x4, batch 64: cached student, training images",
    ],
}
"""What each rate is called in a book of `benchmarks.gpu`; of several the first that is there."""
START_SECONDS, PIECE_SECONDS, RECTIFY_SECONDS = 30.0, 10.0, 0.15
"""Reading the images; recording, writing, the first epoch of a piece; rectifying a view."""
MARGIN = 1.15
"""Times what arithmetic says: rates are of epochs, without what lies between them."""


@dataclass(frozen=True)
class Size:
    """Epochs of the teacher, cached views, epochs of a student."""

    teacher: int
    views: int
    students: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        """`60,162,30`. Raises ConfigError."""
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){2}", text):
            raise ConfigError(
                f"'{text}' is no size", "Write epochs of the teacher, views, epochs: 60,162,30."
            )
        return cls(*map(int, text.split(",")))

    def __str__(self) -> str:
        return f"{self.teacher},{self.views},{self.students}"


SIZES = (
    *(Size(60, 162, epochs) for epochs in (240, 120, 60, 30)),
    Size(30, 162, 30),
    Size(30, 60, 30),
    Size(20, 30, 20),
)
"""From the largest: the first that fits is taken."""


@dataclass(frozen=True)
class Rates:
    """Images a second: of training the teacher, of stage one, of students together (all of them),
    of one student of the full recipe.
    """

    teacher: float
    views: float
    students: float
    alone: float

    @classmethod
    def of(cls, runs: Sequence[Run], device: str) -> "Rates":
        """Those of the last run of a device that has them. Raises ConfigError where there is none,
        or it lacks one.
        """
        figures: dict[str, float] = {}
        for run in runs:
            if run.machine.get("device") == device:
                figures |= {f.name: f.value for part in run.parts for f in part.figures}
        found = {what: _first(names, figures) for what, names in FIGURES.items()}
        missing = [what for what, rate in found.items() if rate is None]
        if missing:
            raise ConfigError(
                f"no rates of {device} are known: of {', '.join(missing)}",
                "Measure them first: python -m benchmarks.gpu --seconds 150, see --rates.",
            )
        return cls(**{what: rate for what, rate in found.items() if rate is not None})


def _first(names: Sequence[str], figures: Mapping[str, float]) -> float | None:
    for name in names:
        for known, value in figures.items():
            if re.fullmatch(name, known):
                return value
    return None


@dataclass(frozen=True)
class Work:
    """samples, tested: images of both splits. left: students of each seed that are not done.
    full_epochs: of the full recipe.
    """

    samples: int
    tested: int
    left: Mapping[int, int]
    full_epochs: int = 240

    def pieces(self, size: Size, rates: Rates) -> dict[str, float]:
        """Seconds of every piece at a size, in order: `teacher`, `cache`, `seed N`, `full`."""
        images = self.samples + self.tested / 3  # a test image has no backward pass

        def lasts(seconds: float) -> float:
            return MARGIN * seconds + PIECE_SECONDS

        caching = (size.views * self.samples + self.tested) / rates.views
        return {
            "teacher": lasts(size.teacher * images / rates.teacher),
            "cache": lasts(caching + RECTIFY_SECONDS * size.views),
            **{
                f"seed {seed}": lasts(count * size.students * images / rates.students)
                for seed, count in self.left.items()
            },
            "full": lasts(self.full_epochs * images / rates.alone),
        }


@dataclass(frozen=True)
class Plan:
    """seconds: of every piece that is not done, in order; `full` is not among them where it does
    not fit.
    """

    size: Size
    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds of all of it, from the start of a launch."""
        return START_SECONDS + sum(self.seconds.values())


def plan(
    work: Work,
    rates: Rates,
    done: Callable[[str], bool],
    seconds: float,
    sizes: Sequence[Size] = SIZES,
) -> Plan:
    """What is left at the largest size that fits in some seconds, and `full` where that fits too.

    done: whether a piece is. Raises ConfigError where no size fits.
    """
    for size in sizes:
        pieces = {n: s for n, s in work.pieces(size, rates).items() if not done(n)}
        if not any(name != "teacher" and name != "cache" for name in pieces):
            pieces.pop("cache", None)  # nobody needs it any more
        whole = Plan(size, pieces)
        if whole.total <= seconds:
            return whole
        least = Plan(size, {n: s for n, s in pieces.items() if n != "full"})
        if least.total <= seconds:
            return least
    raise ConfigError(
        f"the experiment takes {least.total / 60:.1f} minutes at its smallest size "
        f"({least.size}), {seconds / 60:g} are given",
        f"Give --minutes {least.total / 60:.0f}, or --launches where several of them add up.",
    )
