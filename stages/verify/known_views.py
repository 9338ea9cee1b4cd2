"""How many views a cache has, by everything in it that says so.

The document of one array may be damaged, records and shards may be lost. Each of them says how far
the cache went: documents by their shape, records and shards by their names, rectifications by their
statistics, provenance by the settings of the first run. Repair goes by the largest of these.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zarr.abc.store import Store

from stages.cache.commits import CommitLog
from stages.cache.layout import MAX_VIEWS, rectified_arrays
from stages.cache.metadata import check_seal
from stages.cache.storage import folders, read_object
from stages.errors import CacheError

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Claim:
    """So many views there are, and what says so."""

    views: int
    where: str


def known_views(
    store: Store, arrays: Sequence[str], num_samples: int, provenance: Mapping[str, Any]
) -> Claim:
    """The largest number of views that anything trustworthy in a cache knows of; 0 for none.

    arrays: the root's arrays that are written block by block.
    """
    rectified = _rectifications(store)
    claims = [_by_documents(store, arrays, rectified, num_samples)]
    claims.append(Claim(_count(provenance.get("config"), "views"), "provenance"))
    claims += [Claim(_measured(store, name), f"rectified/{name}") for name in rectified]
    lying: dict[int, set[str]] = defaultdict(set)
    for part, folder, names in _parts(arrays, rectified):
        for view, where in _lying(store, part, folder, names).items():
            lying[view] |= where
    parts = [part for part, _, _ in _parts(arrays, rectified)]
    return _with_names(store, parts, max(claims, key=lambda claim: claim.views), lying)


def rectified_views(store: Store, name: str, num_views: int) -> int:
    """How many views a rectification covers, by its statistics, its records and its shards; at
    most `num_views`.
    """
    part = f"rectified/{name}"
    lying = _lying(store, part, f"{part}/", tuple(rectified_arrays(True)))
    known = _with_names(store, [part], Claim(_measured(store, name), part), lying)
    return min(known.views, num_views)


def _rectifications(store: Store) -> list[str]:
    return sorted({*folders(store, "rectified"), *folders(store, "commits/rectified")})


def _parts(arrays: Sequence[str], rectified: Iterable[str]) -> list[tuple[str, str, Sequence[str]]]:
    """Of each part: its name, the folder of its arrays, their names."""
    more = tuple(rectified_arrays(True))
    return [
        ("logits", "", arrays),
        *((f"rectified/{n}", f"rectified/{n}/", more) for n in rectified),
    ]


def _by_documents(
    store: Store, arrays: Sequence[str], rectified: Sequence[str], num_samples: int
) -> Claim:
    """What the arrays' documents say. One that says more than all others has grown alone: an
    append was stopped there, or the number is damaged.
    """
    root = _rooms(store, arrays, num_samples)
    if len(root) < 2:  # the others are damaged: the next that grow with them
        names = [f"rectified/{n}/{array}" for n in rectified for array in rectified_arrays(True)]
        root += _rooms(store, names, num_samples)
    claims = sorted(root, key=lambda claim: claim.views, reverse=True)
    return [*claims, Claim(0, "")][1 if len(claims) > 1 else 0]


def _rooms(store: Store, arrays: Iterable[str], num_samples: int) -> list[Claim]:
    """For how many views the documents of these arrays have room, of those that can be read."""
    claims = []
    for name in arrays:
        try:
            shape = json.loads(read_object(store, f"{name}/zarr.json") or b"")["shape"]
            views, samples = shape[:2]
        except (KeyError, TypeError, ValueError):
            continue
        if type(views) is int and 0 < views <= MAX_VIEWS and samples == num_samples:
            claims.append(Claim(views, f"{name}/zarr.json"))
    return claims


def _measured(store: Store, name: str) -> int:
    """How many views the statistics of a rectification are of."""
    try:
        document = json.loads(read_object(store, f"rectified/{name}/zarr.json") or b"")
        check_seal(document["attributes"], name)
        return min(len(document["attributes"]["statistics"]["top1_per_view"]), MAX_VIEWS)
    except (CacheError, AttributeError, KeyError, TypeError, ValueError):
        return 0


def _count(settings: Any, key: str) -> int:
    found = settings.get(key) if isinstance(settings, Mapping) else None
    return found if isinstance(found, int) and 0 < found <= MAX_VIEWS else 0


def _lying(store: Store, part: str, folder: str, arrays: Iterable[str]) -> dict[int, set[str]]:
    """Of which views records (damaged ones as well) and shards lie there: view -> where."""
    lying: dict[int, set[str]] = defaultdict(set)
    for view in CommitLog(store, part, 1).listed:
        lying[view].add(f"commits/{part}")
    for name in arrays:
        for number in folders(store, f"{folder}{name}/c"):
            if _NUMBER.fullmatch(number):
                lying[int(number)].add(f"{folder}{name}/c")
    return lying


def _with_names(
    store: Store, parts: Sequence[str], known: Claim, lying: Mapping[int, set[str]]
) -> Claim:
    """A claim, raised by what lies there of views beyond it: of the next view anything, of later
    ones an intact record, or names in two places.
    """
    for view in sorted(lying):
        if known.views <= view < MAX_VIEWS and (
            view == known.views or len(lying[view]) > 1 or _committed(store, parts, view)
        ):
            known = Claim(view + 1, min(lying[view]))
    return known


def _committed(store: Store, parts: Iterable[str], view: int) -> bool:
    """Whether an intact record of a block of this view names objects of this view."""
    for part in parts:
        log = CommitLog(store, part, 1)
        for _, records, _ in log.inspect({view: log.block_files(view)}):
            for record in records.values():
                objects = record.get("objects")
                if isinstance(objects, dict) and any(f"/c/{view}/" in key for key in objects):
                    return True
    return False
