"""One rectification of a cache: a group rectified/<name> beside the logits it belongs to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import zarr
from torch import Tensor

from stages.cache import arrays, layout
from stages.cache.blocks import BlockGroup
from stages.cache.commits import CommitLog, Record
from stages.cache.layout import ArraySpec, BlockGrid, BlockId
from stages.cache.metadata import array_fault, check_seal, sealed
from stages.cache.targets import RectifiedValues
from stages.errors import CacheError


class RectificationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What decides the numbers of a rectification, beside its cache.

    temperature: the one its values belong to, unless it is `temperature_free`.
    """

    method: str
    space: str
    temperature: float
    temperature_free: bool
    materialised: bool = False

    @staticmethod
    def of_attributes(attributes: Mapping[str, Any]) -> "RectificationSettings":
        """Those among a group's attributes. Raises msgspec.ValidationError for any others."""
        known = {f: attributes.get(f) for f in RectificationSettings.__struct_fields__}
        return msgspec.convert(known, RectificationSettings)


@dataclass(frozen=True)
class Rectification:
    """An open rectification; `LogitCache.rectification` gives it."""

    name: str
    group: zarr.Group
    grid: BlockGrid
    settings: RectificationSettings

    @staticmethod
    def create(
        group: zarr.Group,
        grid: BlockGrid,
        sizes: Mapping[str, int],
        settings: RectificationSettings,
        identity_digest: str,
    ) -> None:
        """Write the metadata into an empty group; the attributes come last and make it one."""
        for name, spec in layout.rectified_arrays(settings.materialised).items():
            arrays.create_array(group, name, spec, sizes, grid)
        known = {**msgspec.to_builtins(settings), "identity_digest": identity_digest}
        group.attrs.put(sealed(known))

    @staticmethod
    def open(
        name: str,
        group: zarr.Group,
        grid: BlockGrid,
        sizes: Mapping[str, int],
        identity_digest: str,
    ) -> "Rectification":
        """Raises CacheError if it belongs to another cache, or its metadata are damaged."""
        attributes = group.attrs.asdict()
        check_seal(attributes, f"rectification '{name}'")
        if attributes.get("identity_digest") != identity_digest:
            raise CacheError(
                f"rectification '{name}' belongs to another cache than the one it lies in",
                f"Remove rectified/{name} and run `pipeline rectify` again.",
            )
        try:
            settings = RectificationSettings.of_attributes(attributes)
        except msgspec.ValidationError as error:
            raise CacheError(f"rectification '{name}' is not readable: {error}") from error
        rectification = Rectification(name, group, grid, settings)
        if faults := rectification.document_faults(sizes):
            raise CacheError(
                f"rectification '{name}': {faults[0]}", "Run `pipeline verify CACHE --repair`."
            )
        return rectification

    @property
    def specs(self) -> dict[str, ArraySpec]:
        return layout.rectified_arrays(self.settings.materialised)

    def document_faults(self, sizes: Mapping[str, int]) -> list[str]:
        """What is wrong with the metadata of its arrays."""
        specs = self.specs.items()
        faults = (array_fault(self.group, n, spec, sizes, self.grid) for n, spec in specs)
        return [fault for fault in faults if fault is not None]

    @cached_property
    def commits(self) -> CommitLog:
        part, identity = f"rectified/{self.name}", self.group.attrs.asdict()["identity_digest"]
        return CommitLog(self.group.store, part, self.grid.num_blocks, str(identity))

    @cached_property
    def blocks(self) -> BlockGroup:
        return BlockGroup(self.group, self.commits, self.grid, self.specs)

    @property
    def statistics(self) -> dict[str, Any]:
        """What stage two measured; empty until it has finished, with all views that are there."""
        found: Any = self.group.attrs.asdict().get("statistics", {})
        if not isinstance(found, dict):
            return {}
        measured = found.get("top1_per_view", ())
        return dict(found) if len(measured) == len(self.commits.listed) else {}

    def write_statistics(self, statistics: Mapping[str, Any]) -> None:
        self.group.attrs.put(sealed({**self.group.attrs.asdict(), "statistics": statistics}))

    def write_block(
        self, view: int, block: int, values: Mapping[str, Tensor], record: Record
    ) -> None:
        """Write and commit a block: its arrays as layout.py names them."""
        self.blocks.write(BlockId(view, block), values, record)

    def read_values(self, view: int, runs: Sequence[slice]) -> RectifiedValues:
        """The replaced logits of some runs of rows of a complete view."""
        return RectifiedValues(**self.blocks.read(["label_logit", "predicted_logit"], view, runs))

    def check_temperature(self, temperature: float) -> None:
        """Raise CacheError unless the rectification can be used at this temperature."""
        if not self.settings.temperature_free and self.settings.temperature != temperature:
            raise CacheError(
                f"rectification '{self.name}' belongs to temperature "
                f"{self.settings.temperature:g}, not {temperature:g}",
                f"Rectify again with --temperature {temperature:g}, or --space probability-1.",
            )
