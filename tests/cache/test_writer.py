import errno
import threading
from collections.abc import Callable

import pytest

from stages.errors import ModelError
from stages.teacher.blocks import BackgroundWriter


def failing(at: int, error: BaseException, written: list[int]) -> Callable[[int], None]:
    def write(item: int) -> None:
        if item == at:
            raise error
        written.append(item)

    return write


def test_everything_is_written_in_order_in_another_thread() -> None:
    written: list[tuple[int, int]] = []
    with BackgroundWriter(lambda n: written.append((n, threading.get_ident()))).running() as writer:
        for item in range(50):
            writer.put(item)
    assert [item for item, _ in written] == list(range(50))
    (thread,) = {thread for _, thread in written}
    assert thread != threading.get_ident()


def test_at_most_two_items_wait() -> None:
    gate, started, handed_over = threading.Event(), threading.Event(), threading.Semaphore(0)
    written: list[int] = []

    def write(item: int) -> None:
        started.set()
        assert gate.wait(10)
        written.append(item)

    def hand_over(writer: BackgroundWriter[int]) -> None:
        for item in range(5):
            writer.put(item)
            handed_over.release()

    with BackgroundWriter(write).running() as writer:
        other = threading.Thread(target=hand_over, args=(writer,))
        other.start()
        assert started.wait(10)
        for _ in range(3):  # one is being written, two wait
            assert handed_over.acquire(timeout=10)
        assert not handed_over.acquire(timeout=0.2)
        gate.set()
        other.join(10)

    assert written == list(range(5))


def hand_over(write: Callable[[int], None], count: int, after: Exception | None = None) -> None:
    with BackgroundWriter(write).running() as writer:
        for item in range(count):
            writer.put(item)
        if after is not None:
            raise after


def test_a_failure_is_raised_by_a_later_put() -> None:
    written: list[int] = []
    write = failing(1, OSError(errno.ENOSPC, "No space left on device"), written)
    with pytest.raises(OSError, match="No space left on device"):
        hand_over(write, 100, after=AssertionError("nobody was told"))
    assert written == [0]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "I/O error"), ModelError("mine"), ZeroDivisionError(), KeyboardInterrupt()],
    ids=["os", "ours", "fault", "interrupt"],
)
def test_a_failure_is_raised_as_it_is(error: BaseException) -> None:
    """Of the last item on leaving."""
    written: list[int] = []
    with pytest.raises(type(error)) as caught:
        hand_over(failing(2, error, written), 3)
    assert caught.value is error
    assert written == [0, 1]


def test_when_computing_fails_what_was_handed_over_is_still_written() -> None:
    written: list[int] = []
    with pytest.raises(ZeroDivisionError):
        hand_over(failing(-1, OSError(), written), 2, after=ZeroDivisionError())
    assert written == [0, 1]
