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
with lock.exclusive(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


def test_a_second_launch_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    first = forks.Started(["-c", HOLDER, str(tmp_path)])
    while first.stdout != "held\n":
        assert first.poll() is None
        time.sleep(0.01)

    with pytest.raises(CacheError, match=f"writing to {tmp_path}"), lock.exclusive(tmp_path):
        pytest.fail("two writers")

    first.kill()
    first.wait()
    with lock.exclusive(tmp_path):
        pass


def test_other_caches_are_not_locked(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with lock.exclusive(tmp_path / "a"), lock.exclusive(tmp_path / "b"):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EROFS, "Read-only file system"),
        OSError("odd"),
        ModelError("mine", "do this"),
        ZeroDivisionError(),
    ],
    ids=["full", "read-only", "without-number", "ours", "another"],
)
def test_what_the_disk_refuses_is_told_with_its_remedy(tmp_path: Path, error: Exception) -> None:
    """Other errors come through as they are; whatever happens lets go."""
    told = CacheError if isinstance(error, OSError) else type(error)
    with pytest.raises(told) as caught, lock.exclusive(tmp_path):
        raise error
    if told is CacheError:
        assert f"{tmp_path} cannot be written: " in str(caught.value)
        assert error.args[-1] in str(caught.value)
        assert caught.value.__cause__ is error
        assert "again" in str(caught.value).splitlines()[-1]
    else:
        assert caught.value is error
    with lock.exclusive(tmp_path):
        pass


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
