"""What verifying tells: faults, and how much was looked at."""

from dataclasses import dataclass

from stages.cache.layout import BlockId


@dataclass(frozen=True)
class Fault:
    """What is wrong, and where.

    part, at: the block that repair computes again, where it is one. key: the object that repair
    removes first. Anything else repair writes again.
    """

    where: str
    what: str
    part: str | None = None
    at: BlockId | None = None
    key: str | None = None


@dataclass(frozen=True)
class Verified:
    """What was looked at: blocks of logits and of rectifications, bytes of their objects."""

    faults: list[Fault]
    blocks: int
    bytes: int
