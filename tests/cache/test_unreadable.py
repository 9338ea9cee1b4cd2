"""What is there and cannot be read is told as what it is: nothing is computed again for it."""

import contextlib
import errno
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from damage import everything, flip, tree

from stages.cache import LogitCache
from stages.cache_teacher import CacheJob
from stages.errors import CacheError, UnansweredError
from stages.repair import repair
from stages.verify import verify


def dangling(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


def folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


IN_PLACE: list[tuple[Callable[[Path], None], str]] = [
    (os.mkfifo, "is a named pipe"),
    (dangling, "is a link to /nowhere/at/all"),
    (folder, "is a folder"),
]
KEYS = [
    *("zarr.json", "commits/attributes.json", "logits/c/1/0/0", "commits/logits/v00001.json"),
    *("rectified/pairwise-T4/zarr.json", "label/c/0"),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("number", "key"), [*enumerate(KEYS)], ids=KEYS)
def test_what_is_no_file_is_told_and_left_alone(
    tiny_copy: Path, tiny_job: CacheJob, number: int, key: str
) -> None:
    put, words = IN_PLACE[number % len(IN_PLACE)]
    (tiny_copy / key).unlink()
    put(tiny_copy / key)
    before = tree(tiny_copy)

    works: list[Callable[[], object]] = [
        lambda: verify(tiny_copy),
        lambda: repair(tiny_copy, tiny_job, []),
    ]
    if key != "commits/attributes.json":  # which only these two read
        works.append(lambda: everything(tiny_copy))
    for work in works:
        with pytest.raises(UnansweredError, match=f"{key} {words}") as caught:
            work()
        assert "--repair" in caught.value.remedy
    assert tree(tiny_copy) == before
    assert os.path.lexists(tiny_copy / key)


@pytest.mark.parametrize("name", ["logits", "commits", "rectified/pairwise-T4"])
def test_a_folder_that_became_something_else_is_told(
    tiny_copy: Path, tiny_job: CacheJob, name: str, tmp_path: Path
) -> None:
    for put, words in ((dangling, "is a link"), (lambda p: p.write_text("x"), "is a file, not")):
        store = tmp_path / words.replace(" ", "-")
        shutil.copytree(tiny_copy, store)
        shutil.rmtree(store / name)
        put(store / name)
        for work in (lambda s=store: verify(s), lambda s=store: repair(s, tiny_job, [])):
            with pytest.raises(UnansweredError, match=words):
                work()


@contextmanager
def refusing(path: Path, number: int) -> Iterator[None]:
    """One file that the system does not open. (Permissions do not bind root.)"""
    read = Path.read_bytes

    def refused(self: Path) -> bytes:
        if self == path:
            raise OSError(number, os.strerror(number), str(path))
        return read(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        yield


@pytest.mark.parametrize(
    ("key", "number", "remedy"),
    [
        ("logits/c/0/1/0", errno.EACCES, "permission"),
        pytest.param("zarr.json", errno.EPERM, "permission", marks=pytest.mark.slow),
        pytest.param("rectified/pairwise-T4/zarr.json", errno.ESTALE, "", marks=pytest.mark.slow),
        pytest.param("label/c/0", errno.EMFILE, "ulimit", marks=pytest.mark.slow),
    ],
)
def test_a_file_that_cannot_be_opened_is_told_and_left_alone(
    tiny_copy: Path, tiny_job: CacheJob, key: str, number: int, remedy: str
) -> None:
    flip(tiny_copy / "prediction/c/0/0")
    before, faults = tree(tiny_copy), verify(tiny_copy).faults
    with refusing(tiny_copy / key, number):
        for work in (lambda: verify(tiny_copy), lambda: repair(tiny_copy, tiny_job, faults)):
            with pytest.raises(UnansweredError, match=re.escape(key)) as caught:
                work()
            assert remedy in caught.value.remedy
        with pytest.raises((CacheError, UnansweredError)):  # or the damage, where that is met first
            everything(tiny_copy)

    kept, after = ({k: c for k, c in found.items() if not k.startswith("commits/logits")}
                   for found in (before, tree(tiny_copy)))  # fmt: skip
    assert after == kept
    assert repair(tiny_copy, tiny_job, faults).faults == []


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission_is_told(small_copy: Path) -> None:
    closed = small_copy / "commits/logits"
    closed.chmod(0)
    try:
        with pytest.raises(UnansweredError, match="Permission denied"):
            verify(small_copy)
    finally:
        closed.chmod(0o755)


def test_too_few_open_files_are_told_as_that(tiny_copy: Path) -> None:
    cache = LogitCache.open(tiny_copy)  # whatever has to be imported is
    verify(tiny_copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(used, soft), hard))
    try:
        spare = []
        with contextlib.suppress(OSError):
            while True:
                spare.append(os.open("/dev/null", os.O_RDONLY))
        for work in (lambda: verify(tiny_copy), lambda: cache.read_view(0)):
            with pytest.raises(UnansweredError, match="Too many open files") as caught:
                work()
            assert "ulimit" in caught.value.remedy
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in spare:
            os.close(number)
    assert verify(tiny_copy).faults == []
