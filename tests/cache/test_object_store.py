"""Caches behind s3:// URLs, on a real server of S3 on loopback; and what its connection can do."""

import contextlib
import http.client
import http.server
import sys
import threading
import time
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from click.testing import CliRunner
from damage import everything, flipped, records, same, tree, values
from helpers import refusal, resized, student_of

from pipeline.cli import cli
from stages.cache import LogitCache, stores
from stages.cache.layout import BlockId
from stages.cache_teacher import CacheJob, cache_teacher
from stages.errors import CacheError, UnansweredError
from stages.rectify import rectify
from stages.repair import repair
from stages.settings import (
    BiasSettings,
    RectifyConfig,
)
from stages.train_student import train_student
from stages.verify import verify

obstore = pytest.importorskip("obstore")
moto = pytest.importorskip("moto.server", reason="needs moto, flask and flask-cors")

SECONDS = 20
"""Within these every refusal has to be told, waiting for a retry included."""


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    """Host and port of an S3 server with the bucket `caches`."""
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    make = urllib.request.Request(f"http://{host}:{port}/caches", method="PUT")
    with urllib.request.urlopen(make) as answer:
        assert answer.status == 200
    yield host, port
    running.stop()


def point_to(patch: pytest.MonkeyPatch, host: str, port: int, retry: float = 1) -> None:
    patch.setenv("AWS_ACCESS_KEY_ID", "me")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_REGION", "us-east-1")
    patch.setenv("AWS_ALLOW_HTTP", "true")
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    patch.setenv("TEACHER_CACHE_RETRY_SECONDS", str(retry))


@pytest.fixture
def url(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a new cache may lie."""
    point_to(monkeypatch, *server)
    return f"s3://caches/{uuid4().hex}/my.zarr"


@pytest.fixture(scope="module")
def one_job(tiny_job: CacheJob) -> CacheJob:
    """One view in one block: few objects, for each has to be asked for again and again."""
    return resized(tiny_job, 60, 20, views=1, block_rows=60)


@pytest.fixture(scope="module")
def one_cache(one_job: CacheJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one") / "one.zarr"
    cache_teacher(one_job, path)
    rectify(path, RectifyConfig())
    return path


def objects(url: str) -> dict[str, bytes]:
    """Everything under a URL: relative key -> content."""
    store = obstore.store.from_url(url)
    keys = [found["path"] for found in obstore.list(store).collect()]
    return {key: bytes(obstore.get(store, key).bytes()) for key in keys}


def put(url: str, key: str, content: bytes) -> None:
    obstore.put(obstore.store.from_url(url), key, content)


def uploaded(store: Path, url: str) -> None:
    for key, content in tree(store).items():
        put(url, key, content)


# ---- from end to end ------------------------------------------------------------------------


def test_a_cache_in_a_bucket_is_the_cache_on_disk(
    url: str, one_job: CacheJob, one_cache: Path
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache_teacher(one_job, url)
        rectify(url, RectifyConfig())
        assert same(everything(url, views=1), everything(one_cache, views=1))
        verified = verify(url)

    assert objects(url) == tree(one_cache)
    assert [str(warning.message) for warning in caught] == []  # Zarr calls these stores new
    assert (verified.faults, verified.blocks) == ([], 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_missing_is_completed_and_views_are_appended(
    url: str, one_job: CacheJob, tmp_path: Path
) -> None:
    """Of an encoding whose views depend on the first."""

    def job(views: int) -> CacheJob:
        spec = "klt-anchored:step=0.4,top=3"
        return resized(one_job, 60, 20, views=views, block_rows=30, encoding=spec)

    local = tmp_path / "c.zarr"
    cache_teacher(job(2), local)
    rectify(local, RectifyConfig())
    uploaded(local, url)
    for at in (BlockId(0, 1), BlockId(1, 0)):
        LogitCache.open(url, writable=True).commits.forget(at)
    assert cache_teacher(job(2), url).computed_blocks == 2
    assert objects(url) == tree(local)

    for out in (url, local):
        assert cache_teacher(job(3), out).computed_blocks == 2
        rectify(out, RectifyConfig())

    assert objects(url) == tree(local)
    assert same(everything(url, views=3), everything(local, views=3))


def test_what_lies_under_a_prefix_is_never_removed(url: str, one_job: CacheJob) -> None:
    others = {"notes.txt": b"mine", "a.zarr/zarr.json": b"{}", "b/commits/x.json": b"1"}
    for key, content in others.items():
        put(url, key, content)
    with pytest.raises(CacheError, match="not a teacher-logit cache") as caught:
        cache_teacher(one_job, url)
    assert "prefix" in caught.value.remedy
    assert objects(url) == others


@pytest.mark.slow
def test_damage_in_a_bucket_is_found_and_repaired(
    url: str, one_job: CacheJob, one_cache: Path
) -> None:
    uploaded(one_cache, url)
    truth, store = objects(url), obstore.store.from_url(url)
    for key in ("logits/c/0/0/0", "label/zarr.json", "commits/eval/v00000.json"):
        put(url, key, flipped(truth[key], len(truth[key]) // 2))
    obstore.delete(store, "rectified/pairwise-T4/wrong/c/0/0")

    faults = verify(url).faults
    with pytest.raises(CacheError):
        everything(url, views=1)
    assert repair(url, one_job, faults).faults == []
    assert objects(url) == truth

    obstore.delete(store, "zarr.json")  # which makes it no empty place
    with pytest.raises(CacheError, match="root document"):
        cache_teacher(one_job, url)
    assert repair(url, one_job, verify(url).faults).faults == []
    assert objects(url) == truth


@pytest.mark.slow
def test_a_student_learns_the_same_from_a_bucket(
    url: str, one_job: CacheJob, one_cache: Path, tmp_path: Path
) -> None:
    uploaded(one_cache, url)
    for name, cache in (("remote", url), ("local", str(one_cache))):
        config = student_of(cache, bias=BiasSettings(mode="rectify"))
        train_student(config, tmp_path / name, splits=one_job.splits)
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("remote", "local")]
    assert weights[0] == weights[1]


def test_the_command_line_takes_urls(url: str, one_cache: Path) -> None:
    uploaded(one_cache, url)
    done = CliRunner().invoke(cli, ["inspect", url])
    assert done.exit_code == 0
    assert url in done.output


# ---- connections ----------------------------------------------------------------------------


class Proxy(http.server.ThreadingHTTPServer):
    """Hands requests to a server, unless `fault` does something else with them first."""

    daemon_threads = True

    def __init__(self, behind: tuple[str, int], fault: "Fault") -> None:
        super().__init__(("127.0.0.1", 0), Forward)
        self.behind, self.fault, self.seen = behind, fault, Counter[str]()
        self.lock = threading.Lock()

    def times_seen(self, what: str) -> int:
        """How often this was asked for before."""
        with self.lock:
            self.seen[what] += 1
            return self.seen[what] - 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave early are what these tests are about."""


class Forward(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a body waits 40 ms for the answer to its headers
    server: Proxy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.fault(self, body):
            return
        status, headers, content = self.ask(body)
        self.answer(status, headers, content)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """What the server behind says."""
        behind = http.client.HTTPConnection(*self.server.behind, timeout=20)
        try:
            behind.request(self.command, self.path, body, dict(self.headers))
            answer = behind.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            behind.close()

    def answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        length: int | None = None,
    ) -> None:
        """length: how long the content is said to be."""
        self.send_response_only(status)
        hop = {"transfer-encoding", "connection"}
        if self.command != "HEAD":
            hop.add("content-length")
        for name, value in headers:
            if name.lower() not in hop:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: Any) -> None: ...


Fault = Callable[[Forward, bytes], bool]


def error_first(request: Forward, body: bytes) -> bool:
    """500 to the first request of each kind for each object."""
    if request.server.times_seen(f"{request.command} {request.path}"):
        return False
    request.answer(500, [], b"<Error><Code>InternalError</Code></Error>")
    return True


def cut_first(request: Forward, body: bytes) -> bool:
    """The first answer to each request ends in the middle of its body."""
    if request.server.times_seen(f"{request.command} {request.path}"):
        return False
    status, headers, content = request.ask(body)
    if request.command == "HEAD" or len(content) < 2:
        request.answer(status, headers, content)
        return True
    request.answer(status, headers, content[: len(content) // 2], len(content))
    request.wfile.flush()
    request.hang_up()
    return True


def hang_up_first(request: Forward, body: bytes) -> bool:
    """The first request of each kind for each object is never answered, though it is heard."""
    if request.server.times_seen(f"{request.command} {request.path}"):
        return False
    request.ask(body)
    request.hang_up()
    return True


def denied(key: str, times: int = 10**9) -> Fault:
    """404 to whoever reads this object, so many times; listings have it."""

    def fault(request: Forward, body: bytes) -> bool:
        if request.command not in ("GET", "HEAD") or not request.path.endswith(key):
            return False
        if request.server.times_seen(key) >= times:
            return False
        request.answer(404, [], b"<Error><Code>NoSuchKey</Code></Error>")
        return True

    return fault


def refuse(request: Forward, body: bytes) -> bool:
    request.hang_up()
    return True


def forbid(request: Forward, body: bytes) -> bool:
    request.answer(403, [], b"<Error><Code>AccessDenied</Code></Error>")
    return True


@contextmanager
def through(server: tuple[str, int], fault: Fault, retry: float = 1) -> Iterator[Proxy]:
    """The environment points to a proxy with this fault; requests are tried so many seconds."""
    proxy = Proxy(server, fault)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        point_to(patch, "127.0.0.1", proxy.server_address[1], retry)
        try:
            yield proxy
        finally:
            proxy.shutdown()
            proxy.server_close()
            thread.join()


FAULTS: dict[str, Fault] = {"500": error_first, "cut": cut_first, "hung-up": hang_up_first}
each_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


def until_it_works(work: Callable[[], Any], fault: Fault) -> Any:
    """Run a command until it comes through."""
    for _ in range(60 if fault is cut_first else 2):
        with contextlib.suppress(CacheError, UnansweredError):
            return work()
    pytest.fail("no success")


@pytest.mark.slow
@pytest.mark.timeout(600)
@each_fault
def test_writing_over_a_bad_connection_gives_the_same_bytes(
    url: str, server: tuple[str, int], one_job: CacheJob, one_cache: Path, fault: Fault
) -> None:
    with through(server, fault) as proxy:
        until_it_works(lambda: (cache_teacher(one_job, url), rectify(url, RectifyConfig())), fault)
    assert values(objects(url)) == values(tree(one_cache))
    assert records(url) == records(one_cache)
    assert sum(proxy.seen.values()) > len(proxy.seen)


@pytest.mark.slow
@pytest.mark.timeout(600)
@each_fault
def test_reading_over_a_bad_connection_gives_the_truth_and_no_damage(
    url: str, server: tuple[str, int], one_cache: Path, fault: Fault
) -> None:
    """What did not arrive is no reason to compute anything again."""
    uploaded(one_cache, url)
    with through(server, fault):
        found = until_it_works(lambda: everything(url, views=1), fault)
    with through(server, fault):
        assert until_it_works(lambda: verify(url), fault).faults == []
    assert same(found, everything(one_cache, views=1))


ACTIONS: dict[str, Callable[[str, CacheJob], object]] = {
    "open": lambda url, job: LogitCache.open(url),
    "cache-teacher": lambda url, job: cache_teacher(job, url),
    "rectify": lambda url, job: rectify(url, RectifyConfig()),
    "verify": lambda url, job: verify(url),
}


@pytest.mark.parametrize("act", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize("fault", [refuse, forbid])
def test_a_server_that_refuses_is_told_at_once(
    url: str, server: tuple[str, int], one_job: CacheJob, act: Any, fault: Fault
) -> None:
    started = time.monotonic()
    with through(server, fault, 0.2), pytest.raises(UnansweredError) as caught:
        act(url, one_job)
    assert time.monotonic() - started < SECONDS
    assert url.split("/")[3] in caught.value.cause
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("cache-teacher", 12),
        pytest.param("cache-teacher", 40, marks=pytest.mark.slow),
        pytest.param("rectify", 20, marks=pytest.mark.slow),
        pytest.param("verify", 20, marks=pytest.mark.slow),
    ],
)
# Zarr leaves the requests that it had not sent yet when one of several fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_server_that_goes_away_half_way_is_told_and_the_next_run_completes(
    url: str, server: tuple[str, int], one_job: CacheJob, one_cache: Path, name: str, after: int
) -> None:
    act = ACTIONS[name]
    if name != "cache-teacher":
        uploaded(one_cache, url)
    if name == "rectify":
        obstore.delete(obstore.store.from_url(url), "commits/rectified/pairwise-T4/v00000.json")

    def goes_away(request: Forward, body: bytes) -> bool:
        return request.server.times_seen("anything") >= after and refuse(request, body)

    started = time.monotonic()
    with through(server, goes_away, 0.2) as proxy:
        message = refusal(lambda: act(url, one_job))
        assert len(message.splitlines()) <= 3
        assert message or proxy.seen["anything"] <= after  # it had everything before
    assert time.monotonic() - started < SECONDS

    act(url, one_job)
    rectify(url, RectifyConfig())
    assert values(objects(url)) == values(tree(one_cache))
    assert records(url) == records(one_cache)


# ---- what cannot be -------------------------------------------------------------------------


def test_a_bucket_that_is_not_there_is_told(url: str, one_job: CacheJob) -> None:
    for act in ACTIONS.values():
        with pytest.raises(UnansweredError) as caught:
            act("s3://no-such-bucket/my.zarr", one_job)
        assert "no-such-bucket" in caught.value.cause


def test_without_credentials_the_cause_is_told(
    server: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(monkeypatch, "127.0.0.1", 9, 0.2)  # nobody answers there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")

    started = time.monotonic()
    with pytest.raises(UnansweredError, match=r"s3://caches/my\.zarr") as caught:
        LogitCache.open("s3://caches/my.zarr")

    assert "credentials" in caught.value.remedy
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("ftp://host/my.zarr", "not ftp://"),
        ("http://host/my.zarr", "not http://"),
        ("s3://", "cannot be used as an object store"),
    ],
)
def test_what_is_no_url_of_a_cache_is_told(value: str, words: str, one_job: CacheJob) -> None:
    for act in ACTIONS.values():
        with pytest.raises(CacheError, match=words):
            act(value, one_job)


def test_without_obstore_the_extra_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(CacheError, match="needs the package obstore") as caught:
        LogitCache.open(url)
    assert "teacher-cache[remote]" in caught.value.remedy


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_the_time_for_retries_is_a_positive_number(
    url: str, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("TEACHER_CACHE_RETRY_SECONDS", value)
    with pytest.raises(CacheError, match=f"TEACHER_CACHE_RETRY_SECONDS.*{value}"):
        LogitCache.open(url)


# ---- 404 of what is there -------------------------------------------------------------------

DENIED = [
    *("my.zarr/zarr.json", "commits/attributes.json", "label/zarr.json", "my.zarr/label/c/0"),
    *("logits/c/0/0/0", "commits/logits/v00000.json", "rectified/pairwise-T4/zarr.json"),
]


@pytest.mark.slow
@pytest.mark.parametrize("key", DENIED[1:])
def test_an_object_that_is_listed_is_not_taken_for_missing(
    url: str,
    server: tuple[str, int],
    one_job: CacheJob,
    one_cache: Path,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stores, "ASK_AGAIN_SECONDS", (0.0, 0.0))
    uploaded(one_cache, url)
    put(url, "prediction/c/0/0", b"damaged")
    before, faults = objects(url), verify(url).faults
    with through(server, denied(key)):
        for work in (lambda: verify(url), lambda: repair(url, one_job, faults)):
            with pytest.raises(UnansweredError):
                work()
    kept = before.keys() - {"prediction/c/0/0", "commits/logits/v00000.json"}
    assert {k: c for k, c in objects(url).items() if k in kept} == {k: before[k] for k in kept}

    with through(server, denied(key, times=1)):
        assert repair(url, one_job, faults).faults == []
    assert objects(url) == tree(one_cache)


def test_a_root_document_that_is_listed_is_not_taken_for_missing(
    url: str, server: tuple[str, int], one_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "ASK_AGAIN_SECONDS", (0.0, 0.0))
    uploaded(one_cache, url)
    with through(server, denied(DENIED[0])), pytest.raises(UnansweredError, match="404"):
        verify(url)
    with through(server, denied(DENIED[0], times=1)):
        assert LogitCache.open(url).complete_views == [0]
