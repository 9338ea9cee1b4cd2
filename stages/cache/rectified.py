"""Rectifications of a cache: groups rectified/<name> beside the logits that they belong to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import zarr

from stages.cache import arrays, layout
from stages.cache.arrays import array_faults
from stages.cache.blocks import BlockGroup
from stages.cache.commits import CommitLog
from stages.cache.description import CacheDescription
from stages.cache.metadata import check_seal, sealed
from stages.cache.storage import entries, folders
from stages.cache.targets import RectifiedValues
from stages.errors import CacheError


class RectificationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What decides the numbers of a rectification, beside its cache.

    temperature: the one its values belong to, unless it is `temperature_free`. trusted_above: rows
    that give another class than the label at least this probability at T=1 are left as they are;
    None for none of them.
    """

    method: str
    space: str
    temperature: float
    temperature_free: bool
    materialised: bool = False
    trusted_above: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, without what is None."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return {name: value for name, value in plain.items() if value is not None}

    @staticmethod
    def of_attributes(attributes: Mapping[str, Any]) -> "RectificationSettings":
        """Those among a group's attributes. Raises msgspec.ValidationError for any others."""
        known = {f: attributes.get(f) for f in RectificationSettings.__struct_fields__}
        return msgspec.convert(known, RectificationSettings)


@dataclass(frozen=True)
class Rectification:
    """An open rectification; `LogitCache.rectification` gives it."""

    name: str
    settings: RectificationSettings
    blocks: BlockGroup

    @property
    def commits(self) -> CommitLog:
        """The records of its blocks."""
        return self.blocks.commits

    @property
    def statistics(self) -> dict[str, Any]:
        """What stage two measured; empty until it has finished, with all views that are there."""
        found: Any = self.blocks.group.attrs.asdict().get("statistics", {})
        if not isinstance(found, dict):
            return {}
        measured = found.get("top1_per_view", ())
        return dict(found) if len(measured) == len(self.commits.listed) else {}

    def write_statistics(self, statistics: Mapping[str, Any]) -> None:
        """Keep what stage two measured among the group's attributes."""
        attributes = self.blocks.group.attrs
        attributes.put(sealed({**attributes.asdict(), "statistics": statistics}))

    def read_values(self, view: int, runs: Sequence[slice]) -> RectifiedValues:
        """The replaced logits of some runs of rows of a complete view."""
        values = self.blocks.read(["label_logit", "predicted_logit"], view, runs)
        return RectifiedValues(**values, some_trusted=self.settings.trusted_above is not None)

    def check_temperature(self, temperature: float) -> None:
        """Raise CacheError unless the rectification can be used at this temperature."""
        if not self.settings.temperature_free and self.settings.temperature != temperature:
            raise CacheError(
                f"rectification '{self.name}' belongs to temperature "
                f"{self.settings.temperature:g}, not {temperature:g}",
                f"Rectify again with --temperature {temperature:g}, or --space probability-1.",
            )


def rectification_names(cache: CacheDescription) -> list[str]:
    """The rectifications of a cache. Raises CacheError where the metadata of one are missing."""
    store, names = cache.group.store, []
    for name in folders(store, "rectified"):
        described = "zarr.json" in entries(store, f"rectified/{name}")
        if described and _group(cache, name).attrs.asdict():
            names.append(name)
        elif entries(store, f"commits/rectified/{name}"):
            raise CacheError(
                f"{cache.path}: the metadata of rectification '{name}' are missing",
                "Run `pipeline verify CACHE --repair`.",
            )
        # else a creation that stopped before its attributes, or not ours
    return names


def open_rectification(cache: CacheDescription, name: str) -> Rectification:
    """Raises CacheError if there is none of this name, it belongs to another cache, or its metadata
    are damaged.
    """
    names = rectification_names(cache)
    if name not in names:
        raise CacheError(
            f"{cache.path} has no rectification '{name}'"
            + (f"; it has {', '.join(names)}" if names else ""),
            f"Make one with `pipeline rectify {cache.path}`.",
        )
    group = _group(cache, name)
    attributes = group.attrs.asdict()
    check_seal(attributes, f"rectification '{name}'")
    if attributes.get("identity_digest") != cache.identity_digest:
        raise CacheError(
            f"rectification '{name}' belongs to another cache than the one it lies in",
            f"Remove rectified/{name} and run `pipeline rectify` again.",
        )
    try:
        settings = RectificationSettings.of_attributes(attributes)
    except msgspec.ValidationError as error:
        raise CacheError(f"rectification '{name}' is not readable: {error}") from error
    specs = layout.rectified_arrays(settings.materialised)
    if faults := array_faults(group, specs, cache.sizes, cache.grid):
        raise CacheError(
            f"rectification '{name}': {faults[0]}", "Run `pipeline verify CACHE --repair`."
        )
    return Rectification(name, settings, BlockGroup(group, _log(cache, name), cache.grid, specs))


def create_rectification(
    cache: CacheDescription, name: str, settings: RectificationSettings
) -> Rectification:
    """A new rectification, or the one of this name if it has the same settings.

    Raises CacheError if it has others.
    """
    if name not in rectification_names(cache):
        _check_free(cache, name)
        arrays.member(cache.group, "rectified")  # zarr says less of damaged metadata
        group = cache.group.create_group(f"rectified/{name}", overwrite=True)
        _log(cache, name).clear()
        for array, spec in layout.rectified_arrays(settings.materialised).items():
            arrays.create_array(group, array, spec, cache.sizes, cache.grid)
        known = settings.to_json()
        # The attributes come last and make it one.
        group.attrs.put(sealed({**known, "identity_digest": cache.identity_digest}))
    rectification = open_rectification(cache, name)
    if rectification.settings != settings:
        there = rectification.settings
        raise CacheError(
            f"rectification '{name}' exists with other settings: {there.method}, "
            f"{there.space}, T={there.temperature:g}"
            + (f", trusted from {there.trusted_above:g}" if there.trusted_above else ""),
            "Choose another --name.",
        )
    return rectification


def _group(cache: CacheDescription, name: str) -> zarr.Group:
    return arrays.subgroup(cache.group, f"rectified/{name}")


def _log(cache: CacheDescription, name: str) -> CommitLog:
    store, blocks = cache.group.store, cache.grid.num_blocks
    return CommitLog(store, f"rectified/{name}", blocks, cache.identity_digest)


def _check_free(cache: CacheDescription, name: str) -> None:
    """Raise CacheError if something else lies where the rectification would."""
    ours = set(layout.RECTIFIED_ARRAYS)
    store = cache.group.store
    if theirs := [n for n in folders(store, f"rectified/{name}") if n not in ours]:
        raise CacheError(
            f"{cache.path}: rectified/{name} holds something that is no rectification: {theirs[0]}",
            "Choose another --name.",
        )
