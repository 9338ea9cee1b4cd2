import errno
import time
from pathlib import Path
from uuid import uuid4

import forks
import pytest

from stages.cache import lock
from stages.cache.storage import half_written
from stages.errors import CacheError, ModelError

HOLDER = """
import pathlib, sys, time
from stages.cache import lock
try:
    with lock.exclusive(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(120)
except lock.CacheError as error:
    print(error.cause)
"""


def test_a_second_launch_waits_for_the_first_to_end_however_it_ends(tmp_path: Path) -> None:
    holder = ["-c", HOLDER, str(tmp_path)]
    first = forks.Started(holder)
    while first.stdout != "held\n":
        assert first.poll() is None
        time.sleep(0.01)

    with pytest.raises(CacheError, match=f"writing to {tmp_path}"), lock.exclusive(tmp_path):
        pytest.fail("two writers")
    assert "another process is writing" in forks.run(holder).stdout

    first.kill()
    first.wait()
    with lock.exclusive(tmp_path):
        assert "another process is writing" in forks.run(holder).stdout


def test_other_caches_are_not_locked(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()

    with lock.exclusive(tmp_path / "a"), lock.exclusive(tmp_path / "b"):
        pass


def test_a_failure_lets_go(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock.exclusive(tmp_path):
        raise ZeroDivisionError
    with lock.exclusive(tmp_path):
        pass


@pytest.mark.parametrize(
    ("error", "words"),
    [
        pytest.param(
            OSError(errno.ENOSPC, "No space left on device"), "No space left on device", id="full"
        ),
        pytest.param(
            PermissionError(errno.EROFS, "Read-only file system"), "Read-only", id="read-only"
        ),
        pytest.param(OSError("odd"), "odd", id="without-number"),
    ],
)
def test_what_the_disk_refuses_is_told_with_its_remedy(
    tmp_path: Path, error: OSError, words: str
) -> None:
    with (
        pytest.raises(CacheError, match=f"{tmp_path} cannot be written: .*{words}") as caught,
        lock.exclusive(tmp_path),
    ):
        raise error
    assert caught.value.__cause__ is error
    assert "again" in caught.value.remedy
    with lock.exclusive(tmp_path):
        pass


def test_other_errors_come_through_as_they_are(tmp_path: Path) -> None:
    error = ModelError("mine", "do this")
    with pytest.raises(ModelError) as caught, lock.exclusive(tmp_path):
        raise error
    assert caught.value is error


def test_only_what_zarr_left_half_written_counts_and_nothing_is_removed(tmp_path: Path) -> None:
    ours = tmp_path / "logits/c/0/0" / f"0.{uuid4().hex}.partial"
    for path in (
        ours,
        tmp_path / "film.mkv.partial",
        tmp_path / f"film.{uuid4().hex}",
        tmp_path / f"{uuid4().hex}.partial.txt",
        tmp_path / "logits/c/0/0/0.0123abcd.partial",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    before = set(tmp_path.rglob("*"))

    with lock.exclusive(tmp_path):
        assert half_written(tmp_path) == [ours]

    assert set(tmp_path.rglob("*")) == before
