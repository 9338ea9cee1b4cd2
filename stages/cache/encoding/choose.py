"""Which encoding: by name, the smallest that is faithful enough, or the one of a store."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from torch import Tensor

from stages.cache.arrays import encode_shard
from stages.cache.encoding.base import ENCODINGS, Budget, Encoding
from stages.cache.encoding.fidelity import Fidelity, compare
from stages.cache.layout import ANCHOR, base_arrays, block_grid
from stages.errors import CacheError, PipelineError
from stages.sizes import budget_in_words

FIT_ROWS = 8192
"""How many rows an encoding is fitted to."""
_FITTED = 2**26
_MEASURED = 2**22
"""Logits that an encoding is measured on: all 8,192 rows of up to 512 classes, fewer of more."""


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
    _class(name).parse(parameters)
    return name


def is_encoding(spec: str, coding: Encoding) -> bool:
    """Whether an encoding is what a spec asks for, as far as it asks."""
    name, _, text = spec.partition(":")
    asked = json.loads(json.dumps(_class(name).parse(text)))  # as attributes have them
    stored = _class(name).stored_name(asked)
    return name == "auto" or (stored == coding.name and _among(asked, coding.parameters))


def _among(asked: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether all parameters that were asked for are so; a step may be kept in single precision."""
    return all(
        math.isclose(value, known[name], rel_tol=1e-6)
        if isinstance(value, float) and isinstance(known.get(name), float)
        else known.get(name) == value
        for name, value in asked.items()
    )


def _class(name: str) -> type[Encoding]:
    """The encoding of a name; for `auto` what all have in common."""
    return ENCODINGS.get(name, Encoding)


def views_to_fit(spec: str, views: int) -> tuple[int, ...]:
    """Of which views the rows are that an encoding is fitted to, of so many."""
    return (0, 1) if _class(spec.partition(":")[0]).of_anchor and views > 1 else (0,)


def fit_rows(num_classes: int) -> int:
    """How many rows an encoding is fitted to: 8,192, fewer of more than 8,192 classes."""
    return max(1, min(FIT_ROWS, _FITTED // num_classes))


def fit_encoding(
    spec: str,
    logits: Tensor,
    labels: Tensor,
    budget: Budget | None = None,
    second: Tensor | None = None,
) -> Encoding:
    """The encoding of a spec, fitted to real rows.

    logits: float32 (n, C), a fair draw. labels: int64 (n,). `auto`: with a budget, the smallest
    that holds it; without, float32 up to 10 classes, then klt-top; never one whose views depend on
    each other. budget: mean KL to the exact rows, in nats, at some temperatures. second: float32
    (n, C), another view of the same samples, for an encoding with an anchor. Raises CacheError if
    the budget is not held.
    """
    name = check_encoding(spec)
    rows = _Draw(logits, labels, second)
    if budget is None:
        return _default(logits) if name == "auto" else _fitted(spec, rows, None)
    if name != "auto":
        return _holding([_measured(_fitted(spec, rows, budget), rows)], budget).coding
    return _holding(measure_all(logits, labels, budget), budget).coding


def measure_all(
    logits: Tensor,
    labels: Tensor,
    budget: Budget | None = None,
    more: Encoding | None = None,
    second: Tensor | None = None,
    views: int = 2,
) -> list[Measured]:
    """Every encoding on real rows, as `fit_encoding` takes them; and one more, where given. views:
    how many there will be, which counts where some are coded beside another.
    """
    rows = _Draw(logits, labels, second, views)
    fitted = {more.name: more} if more else {}
    for name in ENCODINGS:
        if name not in fitted:
            # klt has too many classes, or a budget that only whole floats hold.
            with contextlib.suppress(CacheError):
                fitted[name] = _fitted(name, rows, budget)
    measured = []
    for name in filter(fitted.__contains__, ENCODINGS):
        with contextlib.suppress(CacheError):  # logits beyond its range
            measured.append(_measured(fitted[name], rows))
    return measured


@dataclass(frozen=True)
class _Draw:
    """Rows that encodings are fitted to and measured on, as `measure_all` takes them."""

    logits: Tensor
    labels: Tensor
    second: Tensor | None = None
    views: int = 2

    def first(self, rows: int) -> "_Draw":
        """Some of them."""
        second = None if self.second is None else self.second[:rows]
        return _Draw(self.logits[:rows], self.labels[:rows], second, self.views)


def _default(logits: Tensor) -> Encoding:
    able = [c for c in ENCODINGS.values() if c.default_up_to >= logits.shape[1]]
    chosen = min(able, key=lambda coding: coding.default_up_to)
    try:
        return chosen.fit(logits)
    except CacheError:
        if chosen.otherwise is None:
            raise
        return ENCODINGS[chosen.otherwise].fit(logits)


def _holding(measured: list[Measured], budget: Budget) -> Measured:
    able = [m for m in measured if m.fidelity.holds(budget)]
    if able:
        return min(able, key=lambda m: m.row_bytes)
    found = "; ".join(f"{m.coding.name} has {_known(m.fidelity, budget)}" for m in measured)
    raise CacheError(
        f"no encoding that was asked for holds a mean KL of {budget_in_words(budget)}: {found}",
        "Give a larger --max-kl, or --encoding float32 without one.",
    )


def _known(fidelity: Fidelity, budget: Budget) -> str:
    known = {t: fidelity.known_kl(t) for t in budget}
    return ", ".join("?" if kl is None else f"{kl:.2g}" for _, kl in sorted(known.items()))


def _measured(coding: Encoding, rows: _Draw) -> Measured:
    rows = rows.first(max(1, _MEASURED // rows.logits.shape[1]))
    logits = rows.logits
    arrays = coding.encode(logits, rows.labels)
    if coding.of_anchor and rows.second is not None:  # as most views are
        logits = rows.second
        arrays = coding.encode_beside(coding.as_anchor(arrays), logits, rows.labels)
    fidelity = compare(coding, logits, arrays)
    started, turns = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < 0.02 or not turns:
        coding.decode(arrays, fidelity.temperatures[0] if fidelity.temperatures else 1.0)
        turns += 1
    row_bytes = row_bytes_on_disk(coding, rows.logits, rows.labels, rows.second, rows.views)
    return Measured(coding, fidelity, row_bytes, turns * len(logits) / elapsed)


def _fitted(spec: str, rows: _Draw, budget: Budget | None) -> Encoding:
    name, _, text = spec.partition(":")
    chosen = ENCODINGS[name]
    more = {"second": rows.second} if chosen.of_anchor else {}
    return chosen.fit(rows.logits, budget, **more, **chosen.parse(text))


def row_bytes_on_disk(
    coding: Encoding,
    logits: Tensor,
    labels: Tensor,
    second: Tensor | None = None,
    views: int = 2,
) -> float:
    """Bytes a row and view: encoded, compressed and framed as a block would be.

    logits: float32 (n, C). labels: int64 (n,). second: float32 (n, C), another view; with an anchor
    the mean of `views` views, all but the first as long as this one. Few rows overstate the size a
    little: their index weighs more.
    """
    values = coding.encode(logits, labels)
    first = _block_bytes(coding, logits, values, ANCHOR)
    if not coding.of_anchor or second is None:
        return first
    values = coding.encode_beside(coding.as_anchor(values), second, labels)
    return (first + (views - 1) * _block_bytes(coding, second, values, ANCHOR + 1)) / views


def _block_bytes(
    coding: Encoding, logits: Tensor, values: Mapping[str, Tensor], view: int
) -> float:
    """Bytes a row of a view that is encoded as these values."""
    rows, classes = logits.shape
    grid = block_grid(rows, classes)
    specs = coding.arrays() | {"prediction": base_arrays(classes)["prediction"]}
    values = {**values, "prediction": logits.argmax(1)}
    shards = (
        encode_shard(spec, grid, block, values[name][grid.rows(block)])
        for name, spec in specs.items()
        for block in range(grid.num_blocks)
        if spec.of_view(view)
    )
    return sum(map(len, shards)) / rows


# ---- as the root attributes have it ---------------------------------------------------------


class EncodingAttributes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How rows are stored, as the root attributes say. digest: as `Encoding.digest`."""

    name: str
    parameters: dict[str, Any]
    digest: str


def encoding_attributes(coding: Encoding) -> dict[str, Any]:
    """The root attribute `encoding`."""
    attributes = EncodingAttributes(coding.name, coding.parameters, coding.digest())
    plain: dict[str, Any] = msgspec.to_builtins(attributes)
    return plain


def restored(
    attributes: EncodingAttributes, num_classes: int, read: Callable[[str], Tensor]
) -> Encoding:
    """The encoding that a store was written with. read: name of a calibration array -> values.

    Raises CacheError if it is unknown, or not what its digest says.
    """
    if attributes.name not in ENCODINGS:
        raise CacheError(
            f"unknown encoding '{attributes.name}'",
            "Install the version of teacher-cache that wrote it, or a newer one.",
        )
    try:
        made = ENCODINGS[attributes.name]
        coding = made.restore(attributes.parameters, num_classes, read)
    except PipelineError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise CacheError(f"the encoding's parameters are damaged: {error}") from error
    if coding.digest() != attributes.digest or coding.parameters != attributes.parameters:
        raise CacheError(
            f"the calibration of the encoding {coding.name} is not the one it was made with",
            "Run `pipeline verify CACHE --repair`.",
        )
    return coding
