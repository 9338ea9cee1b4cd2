"""The sweep file, and the runs that its grids are multiplied out to.

    out: runs/ablation
    base: {cache: digits.zarr, data: {dataset: digits}, model.architecture: resnet8}
    runs:
      - {loss.name: ce}
      - {loss.name: kd, bias.mode: [none, eliminate, rectify]}
    seeds: [0, 1, 2]

In a grid a key whose value is a list takes each of its values, with each of every other such key:
later keys vary fastest. A key that is a list itself (train.milestones, also, model.mean) takes each
of a list of lists. Names do not depend on the grids that come later, so that runs can be added.
"""

import itertools
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pipeline.compared import words
from pipeline.config import check_key, convert, put, read_yaml
from stages.errors import ConfigError
from stages.schema import Settings, about, check_bounds, settings_of
from stages.settings import MOST_WORKERS, StudentConfig

_LONGEST = 80
"""Letters of a folder's name before the seed; file systems take 255 bytes."""


class SweepFile(Settings, frozen=True, kw_only=True):
    """out: the sweep's folder. base, baseline, and each of runs: keys of train-student, dotted
    once they are read; a grid may have a `label` as well. seeds: each sets seed.data and
    seed.init. together: train runs that agree in all but model, loss, bias and seed.init in one
    process, from one stream of batches; a number is the most of them in one group. workers:
    processes, on each GPU where there are several.
    """

    runs: tuple[dict[str, Any], ...]
    out: str
    base: dict[str, Any] = msgspec.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    baseline: dict[str, Any] | None = None
    together: bool | int = False
    workers: Annotated[int, about("", above=0, most=MOST_WORKERS)] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.together is not True and self.together is not False:
            check_bounds("together", self.together, above=0)
        for name in ("runs", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"'{name}' is an empty list", "Give at least one.")

    @property
    def most_together(self) -> int | None:
        """The most runs in one group, None for any number."""
        if isinstance(self.together, bool):
            return None if self.together else 1
        return self.together


def read_sweep(path: str | Path, **flags: Any) -> SweepFile:
    """A sweep file; flags replace its keys unless they are None. Raises ConfigError."""
    values = read_yaml(Path(path))
    for key in values:
        check_key(SweepFile, key)
    values = {"out": f"runs/{Path(path).stem}"} | values
    values |= {key: value for key, value in flags.items() if value is not None}
    if values.get("runs") is None:
        raise ConfigError(
            f"{path} has no 'runs'", "List what is to be trained: runs: [{loss.name: [ce, kd]}]."
        )
    for seed in _items(values.get("seeds")):
        check_whole("seeds", seed)
    sweep = convert(SweepFile, values)
    labels = [_label(grid) for grid in sweep.runs]
    runs = [dotted({k: v for k, v in grid.items() if k != "label"}) for grid in sweep.runs]
    return msgspec.structs.replace(
        sweep,
        base=dotted(sweep.base),
        runs=tuple(
            {**({} if label is None else {"label": label}), **run}
            for label, run in zip(labels, runs, strict=True)
        ),
        baseline=None if sweep.baseline is None else dotted(sweep.baseline),
    )


def dotted(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Keys of train-student, nested or dotted, as dotted ones.

    Raises ConfigError for a key that is unknown, or given twice, or holds keys and got a value.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        check_key(StudentConfig, key)
        inner = key not in settings_of(StudentConfig)
        if inner and value is not None and not isinstance(value, Mapping):
            raise ConfigError(
                f"'{key}' holds keys, not the value {value!r}", f"Write {key}.NAME, one by one."
            )
        given = dotted(value or {}, f"{key}.") if inner else {key: value}
        if twice := sorted(found.keys() & given.keys()):
            raise ConfigError(f"'{twice[0]}' is given twice")
        found |= given
    return found


def check_whole(key: str, value: Any) -> None:
    """Raise ConfigError unless a seed is a whole number: YAML's true and 1.0 are not."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key}: {value!r} is not a whole number", "Write for example 0, 1, 2.")


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _label(grid: Mapping[str, Any]) -> str | None:
    label = grid.get("label")
    if label is not None and not (isinstance(label, str) and label.strip()):
        raise ConfigError(f"label: {label!r} is not a text", "Put it between quotes.")
    if label is not None and not label.isprintable():
        raise ConfigError(
            f"label: {label!r} is not one line of text",
            "Leave out line breaks and control characters.",
        )
    return label


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
    if settings_of(StudentConfig)[key].several:
        return value if any(isinstance(v, list) or v is None for v in value) else [value]
    if not value:
        raise ConfigError(
            f"'{key}' has an empty list of values", "Give it a value, or leave it out."
        )
    return value


def _settings(sweep: SweepFile) -> Iterator[tuple[list[str], dict[str, Any], dict[str, Any]]]:
    """Every run: labels for its group, the best first; what its grid sets, without seeds; all that
    is set.
    """
    for grid in sweep.runs:
        own, grid = grid.get("label"), {k: v for k, v in grid.items() if k != "label"}
        described = {key: words(key, _choices(key, value)) for key, value in grid.items()}
        varied = {key for key in grid if len(described[key]) > 1}
        for chosen in multiplied(grid):
            keys = {k: v for k, v in chosen.items() if not k.startswith("seed.")}
            shown = [described[k][repr(v)] for k, v in keys.items() if own is None or k in varied]
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
