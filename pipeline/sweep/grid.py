"""From grids to runs: what is multiplied out, what a run is called, where it goes.

In a grid a key whose value is a list takes each of its values, with each of every other such key:
later keys vary fastest. A key that is a list itself (train.milestones, also, model.mean) takes each
of a list of lists. Names do not depend on the grids that come later, so that runs can be added.
"""

import itertools
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_origin

import msgspec

from pipeline.config import alternatives, convert, field_type, put
from pipeline.sweep.file import SweepFile, check_whole
from stages.errors import ConfigError
from stages.settings import StudentConfig

_LONGEST = 80
"""Letters of a folder's name before the seed; file systems take 255 bytes."""


@dataclass(frozen=True)
class Run:
    """One student. label: of its group, the runs that differ in seeds alone. keys: what its grid
    sets, dotted, without seeds. name: of its folder.
    """

    name: str
    label: str
    keys: Mapping[str, Any]
    config: StudentConfig

    @property
    def seeds(self) -> tuple[int, int]:
        """What pairs it with a run of another group."""
        return self.config.seed.data, self.config.seed.init


def expand(sweep: SweepFile) -> list[Run]:
    """Every run of a sweep, in its order. Raises ConfigError, also for two equal runs."""
    runs: list[Run] = []
    labels: dict[str, Mapping[str, Any]] = {}
    slugs: dict[str, str] = {}
    for names, keys, settings in _settings(sweep):
        config = _config(names[0], settings)
        label = _free(names, keys, labels)
        name = f"{_slug(label, slugs)}-s{config.seed.init}"
        if config.seed.data != config.seed.init:
            name += f"-d{config.seed.data}"
        runs.append(Run(name, label, keys, config))
    check_distinct(runs)
    return runs


def check_distinct(runs: Sequence[Run]) -> None:
    """Raise ConfigError where two runs have the same configuration."""
    seen: dict[StudentConfig, Run] = {}
    for run in runs:
        first = seen.setdefault(run.config, run)
        if first is not run:
            raise ConfigError(
                f"two runs are the same: '{first.label}' and '{run.label}', seed {run.seeds[1]}",
                "Leave one of them out.",
            )


def multiplied(grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of a grid's values. Raises ConfigError for an empty list."""
    choices = {key: _choices(key, value) for key, value in grid.items()}
    return [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]


def _choices(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    if _is_sequence(key):
        return value if any(isinstance(v, list) or v is None for v in value) else [value]
    if not value:
        raise ConfigError(
            f"'{key}' has an empty list of values", "Give it a value, or leave it out."
        )
    return value


def _is_sequence(key: str) -> bool:
    kinds = alternatives(field_type(StudentConfig, key))
    return any(get_origin(kind) in (tuple, list) for kind in kinds)


def _settings(sweep: SweepFile) -> Iterator[tuple[list[str], dict[str, Any], dict[str, Any]]]:
    """Every run: labels for its group, the best first; what its grid sets, without seeds; all that
    is set.
    """
    for grid in sweep.runs:
        own, grid = grid.get("label"), {k: v for k, v in grid.items() if k != "label"}
        told = {key: _told(key, _choices(key, value)) for key, value in grid.items()}
        varied = {key for key in grid if len(told[key]) > 1}
        for chosen in multiplied(grid):
            keys = {k: v for k, v in chosen.items() if not k.startswith("seed.")}
            shown = [told[k][repr(v)] for k, v in keys.items() if own is None or k in varied]
            names = [", ".join(([] if own is None else [own]) + shown) or "base"]
            if own is None:
                names.append(", ".join(f"{key}={value}" for key, value in keys.items()))
            for seeds in _seeds(sweep.base | chosen, sweep.seeds):
                yield names, keys, {**sweep.base, **chosen, **seeds}


def _seeds(given: Mapping[str, Any], seeds: Sequence[int]) -> list[dict[str, int]]:
    """What every seed sets; nothing where a run sets both seeds itself."""
    own = [key for key in ("seed.data", "seed.init") if key not in given]
    return [dict.fromkeys(own, seed) for seed in seeds] if own else [{}]


def _config(label: str, settings: Mapping[str, Any]) -> StudentConfig:
    for key in ("cache", "data.dataset", "model.architecture"):
        if settings.get(key) is None:
            raise ConfigError(f"'{key}' is missing in '{label}'", "Add it to base, or to the run.")
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key.startswith("seed."):
            check_whole(key, value)
        put(values, key, value)
    try:
        return convert(StudentConfig, values)
    except ConfigError as error:
        raise ConfigError(f"in '{label}': {error.cause}", error.remedy) from error


# ---- names ----------------------------------------------------------------------------------


def _told(key: str, choices: Sequence[Any]) -> dict[str, str]:
    """A few words for every value of a key, by its repr; different for different values."""
    short = {repr(value): _words(key, value) for value in choices}
    if len(set(short.values())) == len(short):
        return short
    return {repr(value): f"{key}={value}" for value in choices}


def _words(key: str, value: Any) -> str:
    name = key.rsplit(".", 1)[-1]
    if isinstance(value, str) and value not in ("none", "auto"):
        path = key == "cache" or "/" in value
        return value.rstrip("/").rsplit("/", 1)[-1].removesuffix(".zarr") if path else value
    if isinstance(value, str) and name in ("mode", "name"):
        return f"{key.split('.')[0]} {value}"
    if isinstance(value, list):
        text = ",".join(map(str, value))
    else:  # as YAML writes it: true, null, 0.5
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return f"{name}={text}"


def _free(
    names: Sequence[str], keys: Mapping[str, Any], labels: dict[str, Mapping[str, Any]]
) -> str:
    """The first of these names that no group with other keys has; from now on it is taken."""
    for name in names:
        if labels.setdefault(name, keys) == keys:
            return name
    raise ConfigError(
        f"two groups are called '{names[0]}': {dict(labels[names[0]])} and {dict(keys)}",
        "Give one of them another label.",
    )


def _slug(label: str, slugs: dict[str, str]) -> str:
    """A folder's name for a label, which no other label has."""
    slug = re.sub(r"[^\w.+]+", "-", label, flags=re.ASCII).strip("-.")
    if len(slug) > _LONGEST or slugs.setdefault(slug.lower(), label) != label or not slug:
        slug = f"{slug[:_LONGEST]}-{zlib.crc32(label.encode()):08x}".lstrip("-")
    return slug
