import errno
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from stages.cache import lock
from stages.cache.storage import half_written
from stages.errors import CacheError, ModelError

# Loads the one file: importing stages.cache would bring torch, which takes seconds.
HOLDER = f"""
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("lock", {lock.__file__!r})
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
try:
    with lock.exclusive(__import__("pathlib").Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except lock.CacheError as error:
    print(error.cause)
"""


def launch(path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_second_launch_waits_for_the_first_to_end_however_it_ends(tmp_path: Path) -> None:
    with launch(tmp_path) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"

        with pytest.raises(CacheError, match=f"writing to {tmp_path}"), lock.exclusive(tmp_path):
            pytest.fail("two writers")
        with launch(tmp_path) as second:
            assert "another process is writing" in second.communicate(timeout=20)[0]

        first.kill()
        first.wait(20)
    with lock.exclusive(tmp_path), launch(tmp_path) as third:
        assert "another process is writing" in third.communicate(timeout=20)[0]


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
