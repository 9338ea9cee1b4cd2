"""The sweep file: what all runs share, and grids of what they differ in.

out: runs/ablation
base: {cache: digits.zarr, data: {dataset: digits}, model.architecture: resnet8}
runs:
  - {loss.name: ce}
  - {loss.name: kd, bias.mode: [none, eliminate, rectify]}
seeds: [0, 1, 2]
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pipeline.config import check_key, convert, field_type, read_yaml, section
from stages.errors import ConfigError
from stages.settings import MOST_WORKERS, Settings, StudentConfig, counted, positive


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
    workers: int = 1

    def __post_init__(self) -> None:
        counted("workers", self.workers, MOST_WORKERS)
        if self.together is not True and self.together is not False:
            positive("together", self.together)
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
        inner = section(field_type(StudentConfig, key)) is not None
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
