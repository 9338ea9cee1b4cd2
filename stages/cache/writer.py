"""Writing overlaps computing: one thread, a bounded queue, and no failure that goes unnoticed."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Item = TypeVar("Item")


class BackgroundWriter(Generic[Item]):
    """Calls `write` for every item, in order, in another thread. At most two items wait.

    A failure is raised by the next `put`, or at the end of `running`.
    """

    def __init__(self, write: Callable[[Item], None]) -> None:
        self._write = write
        self._queue: queue.Queue[Item | None] = queue.Queue(maxsize=2)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)

    def put(self, item: Item) -> None:
        """Hand over an item; waits while two others do."""
        self._raise()
        self._queue.put(item)

    @contextmanager
    def running(self) -> Iterator["BackgroundWriter[Item]"]:
        """The writer at work; on leaving, everything handed over is written or an error raised."""
        self._thread.start()
        try:
            yield self
        finally:
            self._queue.put(None)
            self._thread.join()
        self._raise()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:  # after a failure the queue is only emptied
                try:
                    self._write(item)
                except BaseException as error:
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
