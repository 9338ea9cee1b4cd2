import subprocess
import sys
from pathlib import Path

import pytest

from stages.cache import lock
from stages.errors import CacheError

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


def test_what_a_killed_writer_left_half_written_is_removed(cache_copy: Path) -> None:
    files = {path for path in cache_copy.rglob("*") if path.is_file()}
    (cache_copy / "logits/c/0/0/0.0123abcd.partial").write_bytes(b"half")

    with lock.exclusive(cache_copy):
        assert {path for path in cache_copy.rglob("*") if path.is_file()} == files
