"""The targets of the epoch at hand, and those of the next read meanwhile.

A slab is all rows of one view. It is read whole, in a thread of its own, while the slab before it
trains; shuffling happens in memory.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Slab = TypeVar("Slab")

RESIDENT_BYTES = 2**30
"""Slabs of all views are kept where they take no more than this together."""


class SlabReader(Generic[Slab]):
    """Slabs in the order of the epochs. `waited`: seconds spent waiting, in total."""

    def __init__(
        self,
        read: Callable[[int], Slab],
        view_of_epoch: Callable[[int], int],
        epochs: int,
        resident: bool,
    ) -> None:
        self._read, self._view_of_epoch, self._epochs = read, view_of_epoch, epochs
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="slab")
        self._ahead: dict[int, Future[Slab]] = {}
        self._resident = resident
        self.waited = 0.0

    def slab(self, epoch: int) -> Slab:
        """The slab of an epoch; starts reading the next one."""
        started = time.perf_counter()
        slab = self._future(self._view_of_epoch(epoch)).result()
        self.waited += time.perf_counter() - started
        needed = {self._view_of_epoch(e) for e in (epoch, epoch + 1) if e < self._epochs}
        if not self._resident:
            self._ahead = {v: f for v, f in self._ahead.items() if v in needed}
        for view in needed:
            self._future(view)
        return slab

    def _future(self, view: int) -> Future[Slab]:
        if view not in self._ahead:
            self._ahead[view] = self._pool.submit(self._read, view)
        return self._ahead[view]
