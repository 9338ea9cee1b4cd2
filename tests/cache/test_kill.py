"""Killed anywhere and run again, a stage leaves the bytes of an uninterrupted run."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest

from stages.cache import LogitCache
from stages.cache.storage import half_written

HELPER = Path(__file__).with_name("kill_stages.py")
VIEWS, BLOCKS = 2, 14


def records(store: Path) -> dict[str, dict[str, Any]]:
    """Object -> its description, from all commit records, however compacted."""
    found: dict[str, dict[str, Any]] = {}
    for file in (store / "commits").rglob("[vb]*.json"):
        for record in json.loads(file.read_text())["records"]:
            found |= record["objects"]
    return found


def blocks_of(store: dict[str, bytes]) -> set[str]:
    """The objects that commit records describe."""
    whole = ("label/", "eval_label/", "dataset_index/", "klt_")
    whole += tuple(f"anchor_{name}/" for name in ("basis", "mean", "center"))
    return {name for name in store if "/c/" in name and not name.startswith(whole)}


@pytest.mark.parametrize(
    ("encoding", "cache_kills", "rectify_kills"),
    [
        pytest.param("float32", 1, 1, id="a-few"),
        pytest.param("float32", 50, 50, id="many", marks=pytest.mark.slow),
        pytest.param("klt", 50, 50, id="klt-many", marks=pytest.mark.slow),
        pytest.param("klt-anchored", 20, 5, id="klt-anchored-many", marks=pytest.mark.slow),
    ],
)
def test_killed_and_run_again_equals_undisturbed(
    teacher_run: Path,
    tmp_path: Path,
    array_bytes: Callable[[Path], dict[str, bytes]],
    encoding: str,
    cache_kills: int,
    rectify_kills: int,
) -> None:
    numbers = [str(number) for number in (cache_kills, rectify_kills, 0)]
    done = forks.run(
        [str(HELPER), str(teacher_run), str(tmp_path), encoding, *numbers], timeout=1700
    )
    assert done.returncode == 0, done.stderr

    figures = json.loads(done.stdout)
    print(figures)  # shown by -s
    assert len(figures["cache"]["committed_at_kill"]) == cache_kills
    assert len(figures["rectify"]["committed_at_kill"]) == rectify_kills
    if cache_kills >= 50:  # where a few land is up to how busy the machine is
        assert any(0 < blocks < BLOCKS for blocks in figures["cache"]["committed_at_kill"])
    for stage, found in figures.items():
        whole = tmp_path / stage / "undisturbed"
        expected, described = array_bytes(whole), records(whole)
        assert described.keys() == blocks_of(expected)
        for name, description in described.items():
            content = expected[name]
            digest = hashlib.sha256(content).hexdigest()
            assert (description["bytes"], description["sha256"]) == (len(content), digest)
        for number in range(found["stores"]):
            store = tmp_path / stage / f"killed-{number}"
            leftovers = half_written(store)
            assert not (leftovers and stage == "cache")  # stage one alone tidies up
            for leftover in leftovers:
                leftover.unlink()
            ours = array_bytes(store)
            assert ours.keys() == expected.keys()
            assert {name for name in ours if ours[name] != expected[name]} == set()
            assert records(store) == described
            cache = LogitCache.open(store)
            assert cache.complete_views == list(range(VIEWS))
            assert cache.fidelity is not None
            assert cache.fidelity == LogitCache.open(whole).fidelity
            assert cache.encoding.digest() == LogitCache.open(whole).encoding.digest()
