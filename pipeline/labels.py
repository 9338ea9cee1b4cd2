"""What groups of runs are called: a few words for each setting that tells them apart."""

from collections.abc import Sequence
from typing import Any

import msgspec


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
