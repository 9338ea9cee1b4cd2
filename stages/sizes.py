"""Sizes of memory as people write them: 2GB, 1.5GiB, 800M."""

import math
import re

from stages.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_bytes(text: str, name: str) -> int:
    """Bytes of `2GB` (10^9), `1.5GiB` (2^30), `800M`, `4096`. Raises ConfigError, naming `name`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise ConfigError(f"{name} is '{text}', not a size", "Write 2GB, 1.5GiB or 800MB.")
    number, unit, binary = match.groups()
    return round(float(number) * (_BINARY if binary else _UNITS)[unit.upper()])


def in_words(count: float) -> str:
    """A size that `parse_bytes` takes, rounded up: 25MB, 1.63GB."""
    prefix, factor = next(((p, f) for p, f in reversed(_UNITS.items()) if count >= f), ("", 1))
    return f"{math.ceil(count / factor * 100) / 100:g}{prefix.replace('K', 'k')}B"
