"""What verifying tells: faults, and how much was looked at."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """What is wrong, and where.

    part, view, block: the block that repair computes again, where it is one. key: the object that
    repair removes first. Anything else repair writes again.
    """

    where: str
    what: str
    part: str | None = None
    view: int = -1
    block: int = -1
    key: str | None = None


@dataclass(frozen=True)
class Verified:
    """What was looked at: blocks of logits and of rectifications, bytes of their objects."""

    faults: list[Fault]
    blocks: int
    bytes: int
