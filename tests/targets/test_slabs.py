"""Slabs are read ahead, in a thread; waiting is counted and failures come out."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from stages.targets.reader import SlabReader

VIEWS = [2, 0, 1, 1, 0, 2]


class Shelf:
    """Says what was read, when, and can hold a read back."""

    def __init__(self, hold: bool = False) -> None:
        self.read_views: list[int] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        if not hold:
            self.gate.set()

    def __call__(self, view: int) -> str:
        assert self.gate.wait(10)
        self.threads.add(threading.current_thread().name)
        self.read_views.append(view)
        return f"slab {view}"


@pytest.fixture
def my_shelf() -> Iterator[Shelf]:
    shelf = Shelf(hold=True)
    yield shelf
    shelf.gate.set()


def reader(
    read: Callable[[int], str], epochs: int = len(VIEWS), resident: bool = False
) -> SlabReader[int, str]:
    return SlabReader(read, lambda epoch: [VIEWS[epoch]], epochs, resident)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 10 seconds"
        time.sleep(0.001)


def test_the_next_view_is_read_meanwhile_and_none_beyond_the_last() -> None:
    shelf = Shelf()
    slabs = reader(shelf, epochs=3)
    slabs.slab(0)
    until(lambda: shelf.read_views == [2, 0])
    slabs.slab(1)
    until(lambda: shelf.read_views == [2, 0, 1])
    slabs.slab(2)
    time.sleep(0.02)
    assert shelf.read_views == [2, 0, 1]
    assert threading.current_thread().name not in shelf.threads


@pytest.mark.parametrize(("resident", "reads"), [(True, [2, 0, 1]), (False, [2, 0, 1, 0, 2])])
def test_every_epoch_gets_its_view_and_resident_ones_are_read_once(
    resident: bool, reads: list[int]
) -> None:
    shelf = Shelf()
    slabs = reader(shelf, resident=resident)
    assert [slabs.slab(epoch) for epoch in range(6)] == [f"slab {v}" for v in VIEWS]
    assert shelf.read_views == reads


def test_waiting_is_counted(my_shelf: Shelf) -> None:
    slabs = reader(my_shelf)
    threading.Timer(0.1, my_shelf.gate.set).start()
    slabs.slab(0)
    assert 0.05 < slabs.waited[0] < 5
    until(lambda: my_shelf.read_views == [2, 0])
    slabs.slab(1)
    assert slabs.waited[1] < 0.05  # it lay there already


def test_a_failed_read_comes_out_in_its_epoch() -> None:
    def read(view: int) -> str:
        if view == 0:
            raise OSError("disk on fire")
        return f"slab {view}"

    slabs = reader(read)
    assert slabs.slab(0) == "slab 2"
    with pytest.raises(OSError, match="disk on fire"):
        slabs.slab(1)


PARTS = [["a", "b", "c"], ["d", "e"], ["f"]]


class Letter:
    def __init__(self, name: str) -> None:
        self.name = name


class Library:
    """Reads letters; remembers in what order, and what is still held of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.held: weakref.WeakValueDictionary[str, Letter] = weakref.WeakValueDictionary()
        self.most = 0
        self.slabs = SlabReader(self, PARTS.__getitem__, len(PARTS), resident=False)

    def __call__(self, name: str) -> Letter:
        letter = self.held[name] = Letter(name)
        self.asked.append(name)
        self.most = max(self.most, len(self.held))
        return letter


def test_parts_come_one_after_another() -> None:
    library = Library()
    slabs = library.slabs
    found = [slabs.slab(e, p).name for e, parts in enumerate(PARTS) for p in range(len(parts))]
    assert found == library.asked == list("abcdef")
    assert library.most <= 2


def test_two_parts_at_once_read_nothing_ahead() -> None:
    """As a batch across two groups needs; what comes next is read once the first is let go."""
    library = Library()
    slabs = library.slabs
    assert slabs.slab(0, 0).name == "a"
    for _ in range(3):
        assert [letter.name for letter in slabs.slabs(0, 0, 1)] == ["a", "b"]
    time.sleep(0.02)
    assert library.asked == ["a", "b"]
    assert slabs.slab(0, 1).name == "b"
    until(lambda: library.asked == ["a", "b", "c"])
    assert set(library.held) == {"b", "c"}
    assert library.most <= 2


def test_a_resumed_run_starts_in_its_own_part() -> None:
    library = Library()
    slabs = library.slabs
    assert slabs.slab(1, 1).name == "e"
    until(lambda: library.asked == ["e", "f"])
    assert slabs.slab(2).name == "f"
    time.sleep(0.02)
    assert library.asked == ["e", "f"]
