"""Sizes of memory and budgets as people write them: 2GB, 1.5GiB, 800M; 0.03@1,0.008@4."""

import math
import re
from collections.abc import Mapping

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


KL_TEMPERATURES = (1.0, 2.0, 4.0, 10.0)
"""At which the KL of an encoding is measured."""


def parse_budget(given: str | float, name: str) -> dict[float, float]:
    """Mean KL at each temperature: 0.005 (at T=1), `0.008@4`, `0.03@1,0.008@4`. Raises ConfigError,
    naming `name`.
    """
    budget: dict[float, float] = {}
    for part in str(given).split(","):
        kl, _, temperature = part.partition("@")
        try:
            at, most = float(temperature or 1), float(kl)
        except ValueError:
            raise ConfigError(
                f"{name} is '{given}', not a KL", "Write 0.005, 0.008@4 or 0.03@1,0.008@4."
            ) from None
        if at not in KL_TEMPERATURES:
            known = ", ".join(f"{t:g}" for t in KL_TEMPERATURES)
            raise ConfigError(f"{name} is for T = {known}, not {at:g}")
        if not 0 < most < math.inf:
            raise ConfigError(f"{name} must be positive, was {part}")
        budget[at] = most
    return budget


def budget_in_words(budget: Mapping[float, float]) -> str:
    """0.03 at T=1, 0.008 at T=4."""
    return ", ".join(f"{kl:g} at T={t:g}" for t, kl in sorted(budget.items()))
