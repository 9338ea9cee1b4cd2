"""Runs that differ in nothing but their seeds, put together; a group's name and numbers."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.runs import Run

SEEDS = frozenset({"seed.data", "seed.init"})
INDIFFERENT = SEEDS | {
    *("device", "accept_pixel_drift", "slab_memory", "tensorboard"),
    *(f"data.{key}" for key in ("workers", "download", "rescan", "root", "feeding")),
}
"""Settings that decide neither what is learned nor from what, beside the seeds."""
TELLING = (
    *("loss.name", "bias.mode", "model.architecture", "cache", "also", "views", "augment"),
    *("loss.temperature", "bias.rectified", "bias.schedule", "bias.reduction", "train.epochs"),
)
"""Which settings say best what a group is, where several would do."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1); std is None for a single number."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Group:
    """Runs that are one thing with several seeds. settings: what they have in common."""

    label: str
    runs: tuple[Run, ...]
    settings: Mapping[str, Any]

    def spread(self, value: Callable[[Run], float]) -> Spread:
        return spread([value(run) for run in self.runs])

    @property
    def seeds(self) -> int:
        """How many different seeds there are."""
        return len({run.seeds for run in self.runs})

    def curve(self, key: str) -> list[Spread]:
        """A metric epoch by epoch, over the runs; as far as all that have it go."""
        curves = [[line.get(key) for line in run.history] for run in self.runs if run.history]
        found = []
        for values in zip(*curves, strict=False):
            numbers = [value for value in values if value is not None]
            if len(numbers) != len(values):
                break
            found.append(spread(numbers))
        return found


def spread(values: Sequence[float]) -> Spread:
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), std, len(values))


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs. Those of a sweep have the sweep's labels; others are
    called by the fewest settings that tell them apart.
    """
    by_key: dict[Any, list[Run]] = {}
    for run in runs:
        by_key.setdefault(_key(run), []).append(run)
    members = list(by_key.values())
    settings = [_common(group) for group in members]
    loose = [at for at, group in enumerate(members) if group[0].group is None]
    labels = dict(zip(loose, distinguishing([settings[at] for at in loose]), strict=True))
    sweeps = {group[0].group[0] for group in members if group[0].group is not None}
    for at, group in enumerate(members):
        if (of_sweep := group[0].group) is not None:
            labels[at] = of_sweep[1] if len(sweeps) == 1 else f"{of_sweep[0]}: {of_sweep[1]}"
    return [Group(labels[at], tuple(group), settings[at]) for at, group in enumerate(members)]


def _key(run: Run) -> Any:
    if run.group is not None:
        return run.group
    return tuple(sorted((k, str(v)) for k, v in run.config.items() if _tells(k, v)))


def _tells(key: str, value: Any) -> bool:
    """An older run does not have the settings that are newer than it: what is off, or not given,
    counts as left out.
    """
    return key not in INDIFFERENT and value is not None and value is not False


def _common(group: Sequence[Run]) -> dict[str, Any]:
    """The settings that all runs of a group share; of a sweep's group, its keys are among them."""
    first, *others = [{k: v for k, v in run.config.items() if _tells(k, v)} for run in group]
    return {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which groups differ, the most telling first."""
    keys = {key for group in settings for key in group}
    found = [k for k in keys if len({str(group.get(k)) for group in settings}) > 1]
    return sorted(found, key=_rank)


def _rank(key: str) -> tuple[int, str]:
    return (TELLING.index(key) if key in TELLING else len(TELLING), key)


def distinguishing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each group: the keys that tell it from the others, without those that others
    make superfluous (a loss's weights where its name differs already).
    """
    keys = differing(settings)
    for key in reversed(keys[:]):
        fewer = [k for k in keys if k != key]
        if len({tuple(str(g.get(k)) for k in fewer) for g in settings}) == len(settings):
            keys = fewer
    if not keys:  # a single group: by what it is
        keys = [key for key in ("loss.name", "bias.mode") if any(key in g for g in settings)]
        keys = keys or ["model.architecture"]
    texts = {key: _texts([group.get(key) for group in settings]) for key in keys}
    return [" ".join(f"{k}={texts[k][at]}" for k in keys) for at in range(len(settings))]


def _texts(values: Sequence[Any]) -> list[str]:
    """Values in few letters; in full where two would look the same."""
    shortened = [short(value) for value in values]
    whole = [str(value) for value in values]
    return shortened if len(set(shortened)) == len(set(whole)) else whole


def short(value: Any) -> str:
    """A setting in few letters: the name of a path, what a list holds, no number's last digits."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return ",".join(map(short, value))
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text.rstrip("/").rpartition("/")[2] if "/" in text else text
