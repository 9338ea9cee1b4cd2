"""Which encoding: by name, fitted to real rows, or the smallest that is faithful enough."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stages.cache.arrays import encode_shard
from stages.cache.encoding.base import Encoding
from stages.cache.encoding.fidelity import Fidelity, compare
from stages.cache.encoding.floats import Float16, Float32
from stages.cache.encoding.klt import DEFAULT_MAX_KL, Klt, fit_klt
from stages.cache.encoding.topk import TopK
from stages.cache.encoding.uint8 import Uint8
from stages.cache.layout import base_arrays, block_grid
from stages.errors import CacheError, ConfigError

ENCODINGS: dict[str, type[Encoding]] = {
    coding.name: coding for coding in (Float32, Float16, Uint8, Klt, TopK)
}
FIT_ROWS = 8192
"""How many rows an encoding is fitted to."""
_MEASURED = 2**22
"""Logits that an encoding is measured on: all 8,192 rows of up to 512 classes, fewer of more."""
_EXACT_CLASSES = 10
"""Up to so many classes a row is small as it is."""
_KLT_CLASSES = 4096
"""Above, an eigenbasis costs more than it saves: C^2 numbers, and a product of that size a row."""


@dataclass(frozen=True)
class Measured:
    """An encoding on real rows: its fidelity, bytes a row on disk, rows decoded a second."""

    coding: Encoding
    fidelity: Fidelity
    row_bytes: float
    decoded_per_second: float


def check_encoding(spec: str) -> str:
    """The name in a spec such as `auto`, `klt` or `topk:k=20`.

    Raises CacheError if it is unknown, ConfigError for parameters that it does not take.
    """
    name, _, parameters = spec.partition(":")
    if name not in ("auto", *ENCODINGS):
        raise CacheError(f"unknown encoding '{name}'", f"Known: auto, {', '.join(ENCODINGS)}.")
    _parameters(name, parameters)
    return name


def is_encoding(spec: str, coding: Encoding) -> bool:
    """Whether an encoding is what a spec asks for, as far as it asks."""
    name, _, text = spec.partition(":")
    asked = json.loads(json.dumps(_parameters(name, text)))  # as attributes have them
    known = coding.parameters
    return name == "auto" or (name == coding.name and {**known, **asked} == known)


def fit_encoding(
    spec: str, logits: Tensor, labels: Tensor, max_kl: float | None = None
) -> Encoding:
    """The encoding of a spec, fitted to real rows.

    logits: float32 (n, C), a fair draw. labels: int64 (n,). `auto`: with a budget, the smallest
    that holds it; without, float32 up to 10 classes, then klt, and topk above 4,096 classes.
    max_kl: mean KL to the exact rows at T=1, in nats. Raises CacheError if it is not held.
    """
    name = check_encoding(spec)
    if max_kl is None:
        if name != "auto":
            return _fitted(spec, logits, DEFAULT_MAX_KL)
        return _fitted(_by_classes(logits.shape[1]), logits, DEFAULT_MAX_KL)
    if name != "auto":
        chosen = _measured(_fitted(spec, logits, max_kl), logits, labels)
        return _holding([chosen], max_kl).coding
    return _holding(measure_all(logits, labels, max_kl), max_kl).coding


def measure_all(
    logits: Tensor, labels: Tensor, max_kl: float | None = None, more: Encoding | None = None
) -> list[Measured]:
    """Every encoding on real rows, as `fit_encoding` takes them; and one more, where given."""
    fitted = {more.name: more} if more else {}
    for name in ENCODINGS:
        if name not in fitted and not (name == "klt" and logits.shape[1] > _KLT_CLASSES):
            try:
                fitted[name] = _fitted(name, logits, max_kl or DEFAULT_MAX_KL)
            except CacheError:  # klt, at a budget that only whole floats hold
                continue
    measured = []
    for name in ENCODINGS:
        if name in fitted:
            try:
                measured.append(_measured(fitted[name], logits, labels))
            except CacheError:  # logits beyond its range
                continue
    return measured


def _by_classes(num_classes: int) -> str:
    if num_classes <= _EXACT_CLASSES:
        return "float32"
    return "klt" if num_classes <= _KLT_CLASSES else "topk"


def _holding(measured: list[Measured], max_kl: float) -> Measured:
    able = [m for m in measured if m.fidelity.holds(max_kl)]
    if able:
        return min(able, key=lambda m: m.row_bytes)
    told = "; ".join(
        f"{m.coding.name} has {m.fidelity.mean_kl[0]:.2g}" for m in measured if m.fidelity.mean_kl
    )
    raise CacheError(
        f"no encoding that was asked for holds a mean KL of {max_kl:g} at T=1: {told}",
        "Give a larger --max-kl, or --encoding float32 without one.",
    )


def _measured(coding: Encoding, logits: Tensor, labels: Tensor) -> Measured:
    some = slice(max(1, _MEASURED // logits.shape[1]))
    logits, labels = logits[some], labels[some]
    arrays = coding.encode(logits, labels)
    fidelity = compare(coding, logits, arrays)
    started, turns = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < 0.02 or not turns:
        coding.decode(arrays, fidelity.temperatures[0] if fidelity.temperatures else 1.0)
        turns += 1
    return Measured(
        coding, fidelity, row_bytes_on_disk(coding, logits, labels), turns * len(logits) / elapsed
    )


def _fitted(spec: str, logits: Tensor, max_kl: float) -> Encoding:
    name, _, text = spec.partition(":")
    given = _parameters(name, text)
    classes = logits.shape[1]
    if name == "klt":
        if classes > _KLT_CLASSES:
            raise CacheError(
                f"klt is for up to {_KLT_CLASSES:,} classes, not {classes:,}",
                "Use --encoding topk.",
            )
        return fit_klt(logits, max_kl)
    if name == "topk":
        return TopK(classes, **{"k": min(TopK.k, classes), **given})
    return ENCODINGS[name]()


def _parameters(name: str, text: str) -> dict[str, Any]:
    """`k=20,temperatures=1/2/4` as keyword arguments."""
    known: dict[str, Callable[[str], Any]] = {}
    if name == "topk":
        known = {"k": int, "temperatures": _numbers}
    given: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        try:
            given[key] = known[key](value)
        except (KeyError, ValueError):
            raise ConfigError(
                f"'{part}' is not a parameter of the encoding {name}",
                f"It takes {', '.join(known) or 'none'}.",
            ) from None
    return given


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split("/")))


def row_bytes_on_disk(coding: Encoding, logits: Tensor, labels: Tensor) -> float:
    """Bytes a row and view: encoded, compressed and framed as a block would be.

    logits: float32 (n, C). labels: int64 (n,). Few rows overstate the size a little: their index
    weighs more.
    """
    rows, classes = logits.shape
    grid = block_grid(rows, classes)
    specs = coding.arrays() | {"prediction": base_arrays(classes)["prediction"]}
    values = coding.encode(logits, labels) | {"prediction": logits.argmax(1)}
    return (
        sum(
            len(encode_shard(spec, grid, block, values[name][grid.rows(block)]))
            for name, spec in specs.items()
            for block in range(grid.num_blocks)
        )
        / rows
    )
