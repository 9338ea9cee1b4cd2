"""The commands as `torchrun ... -m pipeline` runs them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import msgspec
import pytest

from pipeline.cli import main
from pipeline.ranks import ON_SEVERAL_RANKS
from stages.cache_teacher import cache_teacher, prepare
from stages.data import Splits
from stages.settings import CacheConfig

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
VIEWS = 3


def launch(ranks: int, *arguments: str | Path) -> "subprocess.Popen[str]":
    start = (sys.executable,) if ranks == 1 else (*TORCHRUN, f"--nproc-per-node={ranks}")
    return subprocess.Popen(
        [*start, "-m", "pipeline", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def caching(teacher: Path, out: Path, encoding: str = "float32") -> list[str | Path]:
    """The arguments that make what `cache_config` makes."""
    return [
        *("cache-teacher", "--dataset", "digits", "--workers", "0", "--weights", teacher),
        *("--views", str(VIEWS), "--augment", "pad-crop:pad=2", "--device", "cpu"),
        *("--encoding", encoding, "--set", "block_rows=350", "--out", out),
    ]


def content(store: Path) -> dict[str, bytes]:
    files = (path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def one_process(config: CacheConfig, splits: Splits, out: Path) -> dict[str, bytes]:
    """What the store of one process holds, commit records and provenance included."""
    cache_teacher(prepare(config, splits), out)
    return content(out)


def test_two_ranks_make_the_store_of_one_process(
    teacher_run: Path, cache_config: CacheConfig, digits: Splits, tmp_path: Path
) -> None:
    whole = one_process(
        msgspec.structs.replace(cache_config, encoding="float32"), digits, tmp_path / "one.zarr"
    )

    arguments = map(str, caching(teacher_run, tmp_path / "two.zarr"))
    ranks = forks.start_ranks(["-m", "pipeline", *arguments], 2)
    for rank in ranks:
        assert rank.wait() == 0, rank.stderr

    out = "".join(rank.stdout for rank in ranks)
    ours = content(tmp_path / "two.zarr")
    assert ours.keys() == whole.keys()
    assert {name for name in ours if ours[name] != whole[name]} == set()
    assert out.count("blocks (missing)") == out.count("blocks computed now") == 1
    assert "if 2 ranks are as fast each" in out
    assert "9 blocks computed now" in out


def test_an_error_is_told_once(tmp_path: Path) -> None:
    with launch(2, *caching(tmp_path / "nowhere", tmp_path / "c.zarr")) as ranks:
        out, err = ranks.communicate(timeout=200)

    assert ranks.returncode != 0
    assert "samples x views" not in out
    assert err.count("error: ") == 1
    assert err.count("nowhere") == 1
    assert err.count("exitcode  : 2") >= 1  # torchrun's own report
    assert 'File "' not in err.partition("ChildFailedError")[0].partition("torch/distributed")[0]
    assert not (tmp_path / "c.zarr").exists()


@pytest.mark.parametrize(
    "command",
    ["inspect c.zarr", "verify c.zarr --live 5", "rectify c.zarr", "demo", "train-teacher"],
)
def test_what_runs_in_one_process_says_so(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline", *command.split()])
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)

    with pytest.raises(SystemExit) as caught:
        main()

    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {command.split()[0]} runs in one process, this launch has 2")
    assert all(name in told for name in ON_SEVERAL_RANKS)
    assert len(told.splitlines()) == 2


# ---- slow -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("then", [1, 3])
def test_a_killed_rank_ends_the_launch_and_another_completes_the_store(
    teacher_run: Path,
    cache_config: CacheConfig,
    digits: Splits,
    tmp_path: Path,
    rank: int,
    then: int,
) -> None:
    whole = one_process(
        msgspec.structs.replace(cache_config, encoding="klt", views=VIEWS),
        digits,
        tmp_path / "one.zarr",
    )
    arguments = caching(teacher_run, tmp_path / "two.zarr", "klt")

    with launch(2, *arguments) as ranks:
        records = tmp_path / "two.zarr" / "commits" / "logits"
        while not any(records.rglob("b*.json")):
            assert ranks.poll() is None
            time.sleep(0.005)
        os.kill(process_of(ranks.pid, rank), signal.SIGKILL)
        _, err = ranks.communicate(timeout=60)
    assert ranks.returncode != 0
    assert "SIGKILL" in err or "Signal 9" in err

    with launch(then, *arguments) as ranks:
        _, err = ranks.communicate(timeout=200)
    assert ranks.returncode == 0, err
    assert content(tmp_path / "two.zarr") == whole


def process_of(torchrun: int, rank: int) -> int:
    """The process id of a rank."""
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(child)
    raise AssertionError(f"rank {rank} is not there")


@pytest.mark.slow
def test_a_dry_run_writes_nothing(teacher_run: Path, tmp_path: Path) -> None:
    with launch(2, *caching(teacher_run, tmp_path / "c.zarr"), "--dry-run") as ranks:
        out, err = ranks.communicate(timeout=200)

    assert ranks.returncode == 0, err
    assert out.count("samples x views") == 1
    assert not (tmp_path / "c.zarr").exists()


@pytest.mark.slow
def test_a_wrong_option_is_told_once(tmp_path: Path) -> None:
    with launch(2, "cache-teacher", "--vews", "3") as ranks:
        _, err = ranks.communicate(timeout=200)

    assert ranks.returncode != 0
    assert err.count("No such option") == 1
