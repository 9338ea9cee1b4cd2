import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.cache.lock import exclusive
from stages.errors import CacheError, ModelError
from stages.teacher.blocks import BackgroundWriter


def failing(at: int, error: BaseException, written: list[int]) -> Callable[[int], None]:
    def write(item: int) -> None:
        if item == at:
            raise error
        written.append(item)

    return write


def test_everything_is_written_in_order_in_another_thread() -> None:
    written: list[int] = []
    threads: set[int] = set()

    def write(item: int) -> None:
        written.append(item)
        threads.add(threading.get_ident())

    with BackgroundWriter(write).running() as writer:
        for item in range(50):
            writer.put(item)

    assert written == list(range(50))
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


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


def test_a_failure_of_the_last_item_is_raised_on_leaving() -> None:
    written: list[int] = []

    with pytest.raises(OSError, match="No space left"):
        hand_over(failing(2, OSError(errno.ENOSPC, "No space left"), written), 3)
    assert written == [0, 1]


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(OSError(errno.EIO, "I/O error"), id="os"),
        pytest.param(ModelError("mine"), id="ours"),
        pytest.param(ZeroDivisionError(), id="fault"),
        pytest.param(KeyboardInterrupt(), id="interrupt"),
    ],
)
def test_a_failure_is_raised_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        hand_over(failing(0, error, []), 1)
    assert caught.value is error


def test_a_full_disk_is_told_with_its_remedy_where_the_store_is_held(tmp_path: Path) -> None:
    write = failing(0, OSError(errno.ENOSPC, "No space left on device"), [])

    with pytest.raises(CacheError, match="No space left on device") as caught, exclusive(tmp_path):
        hand_over(write, 1)
    assert "again" in caught.value.remedy


def test_when_computing_fails_what_was_handed_over_is_still_written() -> None:
    written: list[int] = []

    with pytest.raises(ZeroDivisionError):
        hand_over(failing(-1, OSError(), written), 2, after=ZeroDivisionError())
    assert written == [0, 1]
