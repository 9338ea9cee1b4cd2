"""Where the stages meet: the store of a teacher's logits."""

from stages.cache.store import LogitCache

__all__ = ["LogitCache"]
