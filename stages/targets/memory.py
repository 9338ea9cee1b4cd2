"""How much memory this process may still take: what its machine has free, and its container."""

from collections.abc import Iterator
from pathlib import Path

import psutil

_OWN_GROUPS = Path("/proc/self/cgroup")
_MOUNTED = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes. Of each control group that this process lies in (versions 1 and 2), what it may still
    take is its limit less what is used; files that the kernel may drop count as free.
    """
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            names = ("memory.max", "memory.current", "inactive_file")
            yield from _left(_MOUNTED, path, *names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _left(_MOUNTED / "memory", path, *names)


def _left(root: Path, path: str, limit: str, usage: str, droppable: str) -> Iterator[int]:
    """What a group and each of those around it may still take. In a container its own group is the
    root, whatever its path outside is.
    """
    folder = root / path.lstrip("/")
    for group in (folder, *(p for p in folder.parents if p.is_relative_to(root))):
        try:
            allowed, used = (int((group / name).read_text()) for name in (limit, usage))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or no limit: 'max'
            continue
        yield max(0, allowed - used + int(stat.get(droppable, 0)))
