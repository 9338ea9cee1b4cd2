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
from stages.verify import verify

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


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("encoding", "kills"),
    [
        pytest.param("float32", (1, 1, 0), id="a-few"),
        pytest.param("klt", (40, 40, 25), id="many", marks=pytest.mark.slow),
        pytest.param("klt-anchored", (15, 1, 0), id="klt-anchored-many", marks=pytest.mark.slow),
    ],
)
def test_killed_and_run_again_equals_undisturbed(
    teacher_run: Path,
    tmp_path: Path,
    array_bytes: Callable[[Path], dict[str, bytes]],
    encoding: str,
    kills: tuple[int, int, int],
) -> None:
    words = [HELPER, teacher_run, tmp_path, encoding, *kills, 0]
    done = forks.run([*map(str, words)], timeout=1700)
    assert done.returncode == 0, done.stderr

    figures = json.loads(done.stdout)
    print(figures)  # shown by -s
    found = [len(stage["committed_at_kill"]) for stage in figures.values()]
    assert found == [number for number in kills if number]
    if kills[0] >= 40:  # where a few land is up to how busy the machine is
        assert any(0 < blocks < BLOCKS for blocks in figures["cache"]["committed_at_kill"])
    for stage, made in figures.items():
        whole = tmp_path / ("rectify" if stage == "repair" else stage) / "undisturbed"
        expected, described = array_bytes(whole), records(whole)
        assert described.keys() == blocks_of(expected)
        for name, description in described.items():
            digest = hashlib.sha256(expected[name]).hexdigest()
            assert (description["bytes"], description["sha256"]) == (len(expected[name]), digest)
        for number in range(made["stores"]):
            store = tmp_path / stage / f"killed-{number}"
            leftovers = half_written(store)
            assert not (leftovers and stage == "cache")  # stage one alone tidies up
            for leftover in leftovers:
                leftover.unlink()
            ours = array_bytes(store)
            assert ours.keys() == expected.keys()
            assert {name for name in ours if ours[name] != expected[name]} == set()
            assert records(store) == described
            cache, undisturbed = LogitCache.open(store), LogitCache.open(whole)
            assert cache.complete_views == list(range(VIEWS))
            assert cache.fidelity is not None
            assert cache.fidelity == undisturbed.fidelity
            assert cache.encoding.digest() == undisturbed.encoding.digest()
            assert stage != "repair" or verify(store).faults == []
