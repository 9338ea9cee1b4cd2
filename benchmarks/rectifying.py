"""Stage two against a plain pass over what it must read anyway, on a cache of its own."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from benchmarks.excerpt import decoded_at, excerpt
from benchmarks.measure import Figure, Ratio, alternately, seconds
from stages.cache import LogitCache
from stages.cache.layout import ANCHOR
from stages.rectify import rectify
from stages.settings import RectifyConfig

VIEWS = 4
TARGET = 2.0


def rectify_figures(
    cache: LogitCache, folder: Path, turns: int, views: int = VIEWS, target: float | None = TARGET
) -> list[Ratio | Figure]:
    """All of stage two, its bookkeeping included, against reading and decoding. So many views of
    the cache are copied to `folder` first; the cache is only read. target: None for what is small.
    """
    where, runs = folder / "rectified.zarr", itertools.count()
    copy = excerpt(cache, where, views)

    def ours() -> float:
        return seconds(lambda: rectify(where, _config(cache, next(runs))))

    ours()  # Dask is imported, files are in the page cache
    return [
        alternately(
            "rectify / plain NumPy pass",
            ours,
            lambda: seconds(lambda: plain_pass(where)),
            turns,
            target=target,
            note=f"{views} views of {copy.num_samples:,} x {copy.num_classes}, "
            f"{copy.encoding.name}, {_wrong_rate(copy):.0%} wrong",
        )
    ]


def _wrong_rate(cache: LogitCache) -> float:
    """Only wrong rows are decoded: the ratio depends on how many there are."""
    top1 = cache.top1_per_view.values()
    return 1 - sum(top1) / len(top1)


def _config(cache: LogitCache, run: int) -> RectifyConfig:
    whole = cache.encoding.holds(RectifyConfig().temperature)
    temperature = RectifyConfig().temperature if whole else decoded_at(cache.encoding)
    return RectifyConfig(name=f"bench-{run}", temperature=temperature)


def plain_pass(path: Path) -> int:
    """How many rows of a cache are wrong, with every row decoded, by zarr and NumPy alone."""
    group = zarr.open_group(path, mode="r")
    label, wrong = read(group, "label"), 0
    predictions = group["prediction"]
    assert isinstance(predictions, zarr.Array)
    for view in range(predictions.shape[0]):
        plainly_decoded(group, view)
        wrong += int((read(group, "prediction", view) != label).sum())
    return wrong


def plainly_decoded(group: zarr.Group, view: int) -> NDArray[np.float32]:
    """float32 (N, C): the rows of a view, as docs/cache-format.md says to decode them."""
    encoding: dict[str, Any] = group.attrs.asdict()["encoding"]  # type: ignore[assignment]
    kind = encoding["name"]
    if kind in ("float32", "float16"):
        logits = read(group, "logits", view).astype(np.float32, copy=False)
        return logits if kind == "float32" else logits + read(group, "logits_offset", view)[:, None]
    if kind == "topk":
        return _topk(group, view)
    if kind == "klt-top":
        return _klt_top(group, view, encoding["parameters"])
    if kind == "klt-anchored":
        return _klt_anchored(group, view, encoding["parameters"])
    codes = read(group, "logits_code", view).astype(np.float32)
    if kind == "uint8":
        scale, offset = (
            read(group, f"logits_{name}", view).astype(np.float32)[:, None]
            for name in ("scale", "offset")
        )
        return codes * scale + offset
    basis, mean, step = (read(group, f"klt_{name}") for name in ("basis", "mean", "step"))
    rows: NDArray[np.float32] = (codes * step) @ basis + mean
    return rows


def _klt_anchored(group: zarr.Group, view: int, known: dict[str, Any]) -> NDArray[np.float32]:
    """The anchor, or a row beside it."""
    if view == ANCHOR:
        own = {name.removeprefix("anchor_"): known[name] for name in known if "anchor_" in name}
        return _klt_top(group, view, own, ("anchor", "anchor"))
    codes, _ = _codes(group, ANCHOR, ("anchor", "anchor"))
    beside: NDArray[np.int64] = codes @ _whole(group, "klt_predictor")
    return _klt_top(group, view, known, beside=beside)


def _whole(group: zarr.Group, name: str, view: int | None = None) -> NDArray[np.int64]:
    return read(group, name, view).astype(np.int64)


def _digits(group: zarr.Group, name: str, view: int, count: int, base: int) -> NDArray[np.int64]:
    packed = _whole(group, name, view)[:, :, None]
    each: NDArray[np.int64] = packed // base ** np.arange(count) % base - base // 2
    return each.reshape(len(packed), -1)


def _codes(
    group: zarr.Group, view: int, of: tuple[str, str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What the basis is multiplied by, and the offset's codes. of: what the arrays of rows and of
    the calibration begin with.
    """
    code = _whole(group, f"{of[0]}_code", view)
    kinds = (("pair", 2, 15), ("three", 3, 5), ("five", 5, 3))
    parts = [_digits(group, f"{of[0]}_{name}", view, n, base) for name, n, base in kinds]
    center = _whole(group, f"{of[1]}_center")[_whole(group, "prediction", view)]
    return np.concatenate([code[:, :-1], *parts], 1) + center, code[:, -1:]


def _klt_top(
    group: zarr.Group,
    view: int,
    known: dict[str, Any],
    of: tuple[str, str] = ("logits", "klt"),
    beside: NDArray[np.int64] | int = 0,
) -> NDArray[np.float32]:
    """In whole numbers, but for the last line. of: as of `_codes`."""
    codes, code = _codes(group, view, of)
    predicted = _whole(group, "prediction", view)
    z = _whole(group, f"{of[1]}_mean") + codes @ _whole(group, f"{of[1]}_basis") + beside
    order, each = z.copy(), np.arange(len(z))
    order[each, predicted] = 2**24
    leading = np.argsort(-order, axis=1, kind="stable")[:, : known["top"]]
    finer = _digits(group, f"{of[0]}_top", view, 2, 15)[:, : leading.shape[1]]
    z[each[:, None], leading] += known["fine"] * finer
    own = z[each, predicted]
    z[each, predicted] = -(2**24)
    z[each, predicted] = np.maximum(own, z.max(1) + max(1, known["fine"] // 8))
    offset = np.float32(known["offset"]) + np.float32(known["offset_step"]) * code
    rows: NDArray[np.float32] = z.astype(np.float32) * np.float32(known["unit"]) + offset
    return rows.astype(np.float32)


def _topk(group: zarr.Group, view: int) -> NDArray[np.float32]:
    """At the first temperature that the tails are kept for."""
    encoding: dict[str, Any] = group.attrs.asdict()["encoding"]  # type: ignore[assignment]
    temperature = encoding["parameters"]["temperatures"][0]
    index, values, tails = (
        read(group, f"topk_{name}", view) for name in ("index", "value", "tail")
    )
    classes = read(group, "eval_logits").shape[1]
    rest, tail = classes - index.shape[1], tails[:, :1]
    even = temperature * (tail - np.log(max(1, rest)))
    rows = np.repeat(even, classes, axis=1).astype(np.float32)
    np.put_along_axis(rows, index.astype(np.int64), values.astype(np.float32), axis=1)
    return rows


def read(group: zarr.Group, name: str, view: int | None = None) -> NDArray[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return np.asarray(array[slice(None) if view is None else view])
