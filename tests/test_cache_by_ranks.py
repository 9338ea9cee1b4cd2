"""Several ranks leave the store of one process byte for byte, whoever was killed meanwhile."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import pytest

from stages.cache.layout import BlockId
from stages.distributed import Ranks
from stages.teacher.blocks import my_runs

VIEWS, BLOCKS = 3, 7
EVERY = [[view, block] for view in range(VIEWS) for block in range(BLOCKS)]

pytestmark = pytest.mark.slow


@dataclass
class Played:
    """The scenarios of cache_by_ranks.py: what became of each rank, and the folder of stores."""

    found: dict[str, Any]
    folder: Path

    def ranks(self, scenario: str) -> list[Any]:
        found: list[Any] = self.found[scenario]["ranks"]
        return found

    def committed(self, scenario: str) -> int:
        return int(self.found[scenario]["committed"])

    def own(self, scenario: str) -> list[list[int]]:
        """The blocks that a run committed, rank by rank."""
        return [pair for rank in self.ranks(scenario) for pair in rank["returned"]["own"]]


@pytest.fixture(scope="module", params=["klt", "klt-anchored"])
def played(
    request: pytest.FixtureRequest, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Played:
    script, out = Path(__file__).with_name("cache_by_ranks.py"), tmp_path_factory.mktemp("ranks")
    done = forks.run([str(script), str(teacher_run), str(out), request.param], timeout=200)
    assert done.returncode == 0, done.stderr
    return Played(json.loads(done.stdout), out)


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store, commit records and provenance included."""
    files = (path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "store", ["two", "three", "killed-0", "killed-1", "at-once", "failed", "contested"]
)
def test_every_file_is_that_of_one_process(played: Played, store: str) -> None:
    whole, ours = content(played.folder / "whole"), content(played.folder / store)

    assert played.committed("one") == len(EVERY)
    assert ours.keys() == whole.keys()
    assert {name for name in ours if ours[name] != whole[name]} == set()


@pytest.mark.parametrize("scenario", ["two", "three"])
def test_every_block_is_one_ranks_and_every_rank_has_some(played: Played, scenario: str) -> None:
    assert sorted(played.own(scenario)) == EVERY
    for rank in played.ranks(scenario):
        assert rank["returned"]["own"]
        assert (rank["returned"]["computed"], rank["returned"]["views"]) == (len(EVERY), VIEWS)


@pytest.mark.parametrize(
    ("scenario", "then"),
    [
        ("killed-0", "killed-0, then three"),
        ("killed-1", "killed-1, then one"),
        ("failing", "failing, then two"),
        ("beside one that is left", "beside none"),
    ],
)
def test_another_number_of_ranks_does_the_rest(played: Played, scenario: str, then: str) -> None:
    before, killed = played.committed(scenario), scenario.removeprefix("killed-")

    assert killed == scenario or played.ranks(scenario)[int(killed)] == -9
    assert 0 < before < len(EVERY)
    computed = played.own(then)
    assert len(computed) == len(EVERY) - before
    assert sorted(computed) == sorted(map(list, {*map(tuple, computed)}))


def test_a_rank_that_cannot_go_on_stops_the_others(played: Played) -> None:
    first, second = played.ranks("failing")

    assert (second["raised"], second["reported"]) == ("ModelError", True)
    assert (first["raised"], first["reported"]) == ("RankError", False)
    assert "another rank has failed" in first["text"]


def test_a_second_launch_is_refused_while_any_rank_of_the_first_lives(played: Played) -> None:
    for scenario, ranks in (("beside two", 2), ("beside one that is left", 1)):
        outcomes = played.ranks(scenario)
        assert len(outcomes) == ranks
        for outcome in outcomes:
            assert outcome["raised"] == "CacheError"
            assert "another process is writing" in outcome["text"]
        assert sum(outcome["reported"] for outcome in outcomes) == 1
    assert played.found["contested"] == [-9, -9]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_shares_are_disjoint_and_cover_what_is_missing(world: int, at_once: int) -> None:
    missing = [BlockId(view, block) for view in range(3) for block in range(3)]

    shares = [my_runs(missing, at_once, Ranks(rank, world)) for rank in range(world)]

    blocks = [[(view, run.block) for run in runs for view in run.views] for runs in shares]
    assert sorted(at for of_rank in blocks for at in of_rank) == missing
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
