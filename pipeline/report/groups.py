"""Runs that differ in nothing but their seeds, put together; a group's name and numbers.

What decides a result, and what may differ where results are compared, is in `pipeline.compared`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import compared
from pipeline.compared import words
from pipeline.runs import Run, Spread, spread

TELLING = (
    *("loss.name", "bias.mode", "model.architecture", "cache", "also", "views", "augment"),
    *("loss.temperature", "bias.rectified", "bias.schedule", "bias.reduction", "train.epochs"),
)
"""Which settings say best what a group is, where several would do."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in seeds alone. settings: those that decide a result, by dotted keys."""

    label: str
    runs: tuple[Run, ...]
    settings: Mapping[str, Any]

    def spread(self, value: Callable[[Run], float]) -> Spread:
        """Mean and spread over the runs of something that each of them has."""
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


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs. Those of a sweep have the sweep's labels; others are
    called by the fewest settings that tell them apart.
    """
    members = _members(runs)
    settings = [_settings(group) for group in members]
    loose = [at for at, group in enumerate(members) if group[0].group is None]
    labels = dict(zip(loose, distinguishing([settings[at] for at in loose]), strict=True))
    sweeps = {group[0].group[0] for group in members if group[0].group is not None}
    for at, group in enumerate(members):
        if (of_sweep := group[0].group) is not None:
            labels[at] = of_sweep[1] if len(sweeps) == 1 else f"{of_sweep[0]}: {of_sweep[1]}"
    for label in {label for label in labels.values() if [*labels.values()].count(label) > 1}:
        same = [at for at, other in labels.items() if other == label]
        more = distinguishing([settings[at] for at in same])
        labels |= {at: f"{label}, {rest}" for at, rest in zip(same, more, strict=True)}
    return [Group(labels[at], tuple(group), settings[at]) for at, group in enumerate(members)]


def _members(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of one sweep's label (or of none) with the same deciding settings. A run whose folder is
    gone says too little of them: it belongs to the first group of its label.
    """
    by_key: dict[Any, list[Run]] = {}
    for run in sorted(runs, key=lambda run: not run.whole):
        settings = sorted((k, str(v)) for k, v in _own(run).items())
        key = (run.group, tuple(settings))
        if not run.whole:
            key = next((other for other in by_key if other[0] == run.group), key)
        by_key.setdefault(key, []).append(run)
    order = {id(run): at for at, run in enumerate(runs)}
    groups = [sorted(group, key=lambda run: order[id(run)]) for group in by_key.values()]
    return sorted(groups, key=lambda group: order[id(group[0])])


def _own(run: Run) -> dict[str, Any]:
    """Its deciding settings; of which images they are is said by the section it stands in."""
    return {k: v for k, v in compared.deciding(run.config).items() if k != "data.dataset"}


def _settings(group: Sequence[Run]) -> dict[str, Any]:
    return _own(next((run for run in group if run.whole), group[0]))


def comparable(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups in sets that differ in loss and bias alone: only within a set is one the best."""
    sets: list[tuple[dict[str, Any], list[Group]]] = []
    for group in groups:
        own = compared.budget(group.settings)
        found = next((members for budget, members in sets if not differing([budget, own])), None)
        if found is None:
            sets.append((own, [group]))
        else:
            found.append(group)
    return [members for _, members in sets]


def unlike(groups: Sequence[Group]) -> list[str]:
    """The keys beside loss and bias in which groups differ, the most telling first."""
    return differing([compared.budget(group.settings) for group in groups])


def settings_text(settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Some settings in words: train.epochs=3, views=8."""
    return ", ".join(f"{key}={short(settings.get(key))}" for key in keys)


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which settings differ, the most telling first."""
    return sorted(compared.differing(settings), key=_rank)


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
    texts = {key: words(key, [group.get(key) for group in settings]) for key in keys}
    return [", ".join(texts[key][repr(group.get(key))] for key in keys) for group in settings]


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
