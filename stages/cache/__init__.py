"""Where the stages meet: the store of a teacher's logits.

`LogitCache` is loaded when it is asked for: paths, layout and locks need no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.cache.store import LogitCache

__all__ = ["LogitCache"]


def __getattr__(name: str) -> Any:
    if name != "LogitCache":
        raise AttributeError(f"module 'stages.cache' has no attribute '{name}'")
    from stages.cache.store import LogitCache

    return LogitCache
