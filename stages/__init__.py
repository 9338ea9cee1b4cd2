"""The library: what a training loop needs of a cache.

    from stages import CachedDataset, EpochSampler, LOSSES

Each name is loaded when it is first asked for: `import stages` loads no torch. docs/library.md
describes all of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.cache import LogitCache
    from stages.cached_dataset import CachedDataset
    from stages.cached_epochs import CachedEpochs
    from stages.epoch_sampler import EpochSampler
    from stages.inputs.views import view_policy
    from stages.objectives.losses import LOSSES
    from stages.objectives.rectification import rectify_rows
else:
    _HOMES = {
        "LogitCache": "stages.cache",
        "CachedDataset": "stages.cached_dataset",
        "EpochSampler": "stages.epoch_sampler",
        "CachedEpochs": "stages.cached_epochs",
        "LOSSES": "stages.objectives.losses",
        "view_policy": "stages.inputs.views",
        "rectify_rows": "stages.objectives.rectification",
    }

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'stages' has no attribute '{name}'")
        return getattr(importlib.import_module(_HOMES[name]), name)


__all__ = [
    "LOSSES",
    "CachedDataset",
    "CachedEpochs",
    "EpochSampler",
    "LogitCache",
    "rectify_rows",
    "view_policy",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
