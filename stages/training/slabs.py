"""The targets at hand, and those that come next read meanwhile.

A slab is what a student reads at once: all rows of one view (of two, for a loss that sees two at
once), or, where that is too much, a group of its chunks (`groups.py`). It is read in a thread of
its own while the slab before it trains, so that at most two are held: the one in use and the next.
"""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

What = TypeVar("What")
Slab = TypeVar("Slab")


class SlabReader(Generic[What, Slab]):
    """Slabs in the order of the epochs. `waited`: seconds spent waiting for those of each epoch.

    parts_of: what an epoch reads, one slab each, in the order in which they are used. resident:
    keep every slab that was read.
    """

    def __init__(
        self,
        read: Callable[[What], Slab],
        parts_of: Callable[[int], Sequence[What]],
        epochs: int,
        resident: bool,
    ) -> None:
        self._read, self._epochs = read, epochs
        self._parts_of = functools.lru_cache(maxsize=2)(parts_of)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="slab")
        self._ahead: dict[What, Future[Slab]] = {}
        self._resident = resident
        self.waited: defaultdict[int, float] = defaultdict(float)

    def slab(self, epoch: int, part: int = 0) -> Slab:
        """A slab of an epoch; starts reading the next one."""
        return self.slabs(epoch, part, part)[0]

    def slabs(self, epoch: int, first: int, last: int) -> list[Slab]:
        """The slabs first..last of an epoch, where a batch needs more than one. All others are let
        go; the next is read ahead where only one is in use.
        """
        started = time.perf_counter()
        parts = self._parts_of(epoch)
        needed = parts[first : last + 1]
        if not self._resident:
            kept = {*needed, *self._next(epoch, last)}
            self._ahead = {what: f for what, f in self._ahead.items() if what in kept}
        slabs = [future.result() for future in [self._future(what) for what in needed]]
        self.waited[epoch] += time.perf_counter() - started
        if first == last:
            for what in self._next(epoch, last):
                self._future(what)
        return slabs

    def _next(self, epoch: int, part: int) -> Sequence[What]:
        if part + 1 < len(parts := self._parts_of(epoch)):
            return parts[part + 1 : part + 2]
        return self._parts_of(epoch + 1)[:1] if epoch + 1 < self._epochs else ()

    def _future(self, what: What) -> Future[Slab]:
        if what not in self._ahead:
            self._ahead[what] = self._pool.submit(self._read, what)
        return self._ahead[what]
