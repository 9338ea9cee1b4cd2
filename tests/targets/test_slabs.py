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


@pytest.mark.parametrize("resident", [False, True])
def test_every_epoch_gets_its_view(resident: bool) -> None:
    slabs = reader(Shelf(), resident=resident)
    assert [slabs.slab(epoch) for epoch in range(6)] == [f"slab {v}" for v in VIEWS]


def test_the_next_view_is_read_meanwhile() -> None:
    shelf = Shelf()
    slabs = reader(shelf)
    slabs.slab(0)
    until(lambda: shelf.read_views == [2, 0])
    slabs.slab(1)
    until(lambda: shelf.read_views == [2, 0, 1])
    assert threading.current_thread().name not in shelf.threads


def test_nothing_is_read_beyond_the_last_epoch() -> None:
    shelf = Shelf()
    slabs = reader(shelf, epochs=2)
    slabs.slab(0)
    slabs.slab(1)
    time.sleep(0.02)
    assert shelf.read_views == [2, 0]


@pytest.mark.parametrize(("resident", "reads"), [(True, [2, 0, 1]), (False, [2, 0, 1, 0, 2])])
def test_resident_slabs_are_read_once(resident: bool, reads: list[int]) -> None:
    shelf = Shelf()
    slabs = reader(shelf, resident=resident)
    for epoch in range(6):
        slabs.slab(epoch)
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


# ---- epochs in several parts ----------------------------------------------------------------

PARTS = [["a", "b", "c"], ["d", "e"], ["f"]]


class Library:
    """Reads letters; remembers in what order, and what is still held of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.held: weakref.WeakValueDictionary[str, Letter] = weakref.WeakValueDictionary()
        self.most = 0

    def __call__(self, name: str) -> "Letter":
        letter = Letter(name)
        self.asked.append(name)
        self.held[name] = letter
        self.most = max(self.most, len(self.held))
        return letter


class Letter:
    def __init__(self, name: str) -> None:
        self.name = name


@pytest.fixture
def my_library() -> Library:
    return Library()


def in_parts(library: Library) -> SlabReader[str, Letter]:
    return SlabReader(library, PARTS.__getitem__, len(PARTS), resident=False)


def test_parts_come_one_after_another(my_library: Library) -> None:
    slabs = in_parts(my_library)
    found = [slabs.slab(e, p).name for e, parts in enumerate(PARTS) for p in range(len(parts))]
    assert found == my_library.asked == list("abcdef")
    assert my_library.most <= 2


def test_two_parts_at_once_read_nothing_ahead(my_library: Library) -> None:
    """As a batch across two groups needs; what comes next is read once the first is let go."""
    slabs = in_parts(my_library)
    assert slabs.slab(0, 0).name == "a"
    for _ in range(3):
        assert [letter.name for letter in slabs.slabs(0, 0, 1)] == ["a", "b"]
    time.sleep(0.02)
    assert my_library.asked == ["a", "b"]
    assert slabs.slab(0, 1).name == "b"
    until(lambda: my_library.asked == ["a", "b", "c"])
    assert set(my_library.held) == {"b", "c"}
    assert my_library.most <= 2


def test_a_resumed_run_starts_in_its_own_part(my_library: Library) -> None:
    slabs = in_parts(my_library)
    assert slabs.slab(1, 1).name == "e"
    until(lambda: my_library.asked == ["e", "f"])
    assert slabs.slab(2).name == "f"
    time.sleep(0.02)
    assert my_library.asked == ["e", "f"]
