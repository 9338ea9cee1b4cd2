"""The commands as `torchrun ... -m pipeline` runs them."""

import os
import subprocess
import sys
from pathlib import Path

import forks
import msgspec
import pytest
from damage import tree
from helpers import Command

from pipeline.ranks import ON_SEVERAL_RANKS
from stages.cache_teacher import cache_teacher, prepare
from stages.data import Splits
from stages.settings import CacheConfig

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
VIEWS = 3


def launch(ranks: int, *arguments: str | Path) -> "subprocess.Popen[str]":
    start = (*TORCHRUN, f"--nproc-per-node={ranks}")
    return subprocess.Popen(
        [*start, "-m", "pipeline", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def caching(teacher: Path, out: Path) -> list[str | Path]:
    """The arguments that make what `cache_config` makes."""
    return [
        *("cache-teacher", "--dataset", "digits", "--workers", "0", "--weights", teacher),
        *("--views", str(VIEWS), "--augment", "pad-crop:pad=2", "--device", "cpu"),
        *("--encoding", "float32", "--set", "block_rows=350", "--out", out),
    ]


@pytest.mark.slow
def test_two_ranks_make_the_store_of_one_process(
    teacher_run: Path, cache_config: CacheConfig, digits: Splits, tmp_path: Path
) -> None:
    config = msgspec.structs.replace(cache_config, encoding="float32")
    cache_teacher(prepare(config, digits), tmp_path / "one.zarr")
    whole = tree(tmp_path / "one.zarr")  # commit records and provenance included
    arguments = map(str, caching(teacher_run, tmp_path / "two.zarr"))
    ranks = forks.start_ranks(["-m", "pipeline", *arguments], 2)
    for rank in ranks:
        assert rank.wait() == 0, rank.stderr
    out = "".join(rank.stdout for rank in ranks)
    ours = tree(tmp_path / "two.zarr")
    assert ours.keys() == whole.keys()
    assert {name for name in ours if ours[name] != whole[name]} == set()
    assert out.count("blocks (missing)") == out.count("blocks computed now") == 1
    assert "if 2 ranks are as fast each" in out
    assert "9 blocks computed now" in out


@pytest.mark.slow
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


@pytest.mark.parametrize("words", ["inspect c", "verify c --live 5", "demo", "train-teacher"])
def test_what_runs_in_one_process_says_so(
    words: str, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    answer = command(words)
    assert answer.code == 2
    told = f"error: {words.split()[0]} runs in one process, this launch has 2"
    assert answer.err.startswith(told)
    assert all(name in answer.err for name in ON_SEVERAL_RANKS)
    assert len(answer.err.splitlines()) == 2
