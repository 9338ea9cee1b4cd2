"""In which settings runs differ, which of them decide a result, and what groups of runs are called.

The report, the tables of a sweep and its estimates all go by this list.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stages.settings import keys_deciding

_INDIFFERENT = keys_deciding("weights", "place", "nothing") | {"kind"}
"""Settings that decide neither what is learned nor from what. Every other one tells runs apart."""
METHOD = ("loss", "bias")
"""Sections that say how a student learns. Groups that differ in nothing else had the same budget:
the same images, views, teachers, model and optimisation."""


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings by dotted keys, those that decide a result.

    What is None or False counts as left out: an older run has not the settings newer than it. So do
    digests of what a run was made from, which older runs have not.
    """
    return {
        key: value
        for key, value in config.items()
        if not (key in _INDIFFERENT or key.startswith("made_from."))
        if value is not None and value is not False
    }


def budget(config: Mapping[str, Any]) -> dict[str, Any]:
    """The deciding settings without those of the method: equal where runs are comparable."""
    return {k: v for k, v in deciding(config).items() if k.partition(".")[0] not in METHOD}


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which settings differ, in alphabetical order; values as text."""
    keys = sorted({key for each in settings for key in each})
    return [key for key in keys if len({str(each.get(key)) for each in settings}) > 1]


def words(key: str, values: Sequence[Any]) -> dict[str, str]:
    """A few words for every value of a setting, by its repr; different for different values."""
    short = {repr(value): _words(key, value) for value in values}
    if len(set(short.values())) == len(short):
        return short
    return {repr(value): f"{key}={value}" for value in values}


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
