"""Several ranks act as one: the mechanics on three forks, the pipeline under torchrun itself."""

import json
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from helpers import refused

from stages.device import device_of_rank
from stages.distributed import (
    ALONE,
    Ranks,
    SharedProgress,
    barrier,
    broadcast_object,
    first_rank_does,
    first_rank_first,
    launched_ranks,
    process_group,
    reported_once,
)
from stages.errors import ConfigError


def test_ranks_come_from_the_environment() -> None:
    for rank, world, local, ranks in (
        ("", "", "", ALONE),
        ("0", "1", "0", Ranks()),
        ("11", "16", "3", Ranks(11, 16, 3)),  # the second of two nodes
    ):
        given = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local} if rank else {}
        assert launched_ranks(given | {"PATH": "/bin"}) == ranks
        assert ranks.first == (rank in ("", "0"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("0 - -", "RANK=0 is set, WORLD_SIZE and LOCAL_RANK not"),
        ("- 2 -", "WORLD_SIZE=2 is set, RANK and LOCAL_RANK not"),
        ("2 2 0", "RANK=2, WORLD_SIZE=2, LOCAL_RANK=0: "),
        ("0 2 1", "numbered from 0"),
        ("-1 2 0", "not all whole numbers"),
        ("a 2 0", "not all whole numbers"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(values: str, message: str) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {n: v for n, v in zip(names, values.split(), strict=True) if v != "-"}
    with refused(ConfigError, message, "torchrun"):
        launched_ranks(given)


@pytest.mark.parametrize(("count", "world"), [(0, 3), (1, 2), (7, 3), (9, 2), (4, 8)])
def test_shares_are_disjoint_cover_everything_and_are_even(count: int, world: int) -> None:
    shares = [Ranks(rank, world).share(count) for rank in range(world)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_each_rank_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    second = Ranks(3, 4, 1)
    assert device_of_rank(second) == device_of_rank(second, "cuda") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")] * 2
    assert device_of_rank(second, "cpu") == torch.device("cpu")
    assert device_of_rank(ALONE, "auto") == torch.device("cuda")
    with refused(ConfigError, "GPU 2, this machine has 2", "--nproc-per-node=2"):
        device_of_rank(Ranks(2, 3, 2))


def test_alone_everything_is_a_plain_call() -> None:
    alone, count = ALONE, SharedProgress(ALONE)
    with process_group(alone), reported_once() as mine:
        assert mine
        barrier(alone)
        count.wait_for_all()
        assert broadcast_object(alone, 3) == 3
        assert first_rank_does(alone, lambda: 4) == 4
        with first_rank_first(alone):
            assert broadcast_object(alone, 5) == 5
        assert (count.add(2), count.add(3), count.add()) == (2, 5, 5)
    assert not torch.distributed.is_initialized()
    with pytest.raises(ZeroDivisionError), process_group(alone):
        first_rank_does(alone, lambda: 1 // 0)


Outcomes = dict[str, list[Any]]


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    """Scenario of rank_processes.py -> what became of ranks 0, 1 and 2."""
    script = Path(__file__).with_name("rank_processes.py")
    done = forks.run([str(script)])
    assert done.returncode == 0, done.stderr
    found: Outcomes = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_three_ranks_act_as_one(outcomes: Outcomes) -> None:
    returned = [rank["returned"] for rank in outcomes["agree"]]
    for opening in range(2):
        values, own_work, ended, totals, polls = zip(*(r[opening] for r in returned), strict=True)
        assert values == ({"rank": 0},) * 3
        assert own_work == (True, False, False)
        assert min(ended[1:]) - ended[0] >= 0.2  # the others began after the first had ended
        assert totals == (10 + 11 + 12,) * 3
        assert polls[0] > polls[2]  # it showed how far all were while it waited for the last


@pytest.mark.slow
def test_what_the_first_rank_cannot_do_no_rank_can(outcomes: Outcomes) -> None:
    """A fault of the program keeps its traceback."""
    ranks, told = outcomes["the_first_cannot"], ("ModelError", "this rank cannot\ndo this")
    assert {(r["raised"], r["text"]) for r in ranks} == {told}
    assert [r["reported"] for r in ranks] == [True, False, False]
    assert all(r["waited"] for r in ranks[1:])  # else torchrun would stop the one that tells
    first, *others = outcomes["the_first_has_a_fault"]
    assert (first["raised"], first["reported"]) == ("ZeroDivisionError", True)
    for other in others:
        assert (other["raised"], other["reported"]) == ("RankError", False)
        assert "rank 0 failed: ZeroDivisionError" in other["text"]


@pytest.mark.slow
def test_the_rank_that_failed_tells_and_no_other(outcomes: Outcomes) -> None:
    for scenario, words in {
        "one_cannot_while_others_wait": "another rank has ended or does not answer",
        "one_cannot_while_others_have_finished": "another rank has failed",
    }.items():
        *others, last = outcomes[scenario]
        assert (last["raised"], last["reported"]) == ("ModelError", True)
        for other in others:
            assert (other["raised"], other["reported"]) == ("RankError", False)
            assert words in other["text"]
            assert len(other["text"].splitlines()) == 2
    ranks = outcomes["all_cannot_before_they_meet"]
    assert [r["raised"] for r in ranks] == ["ModelError"] * 3
    assert sum(r["reported"] for r in ranks) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("one_is_killed", "another rank has ended"),
        ("one_never_comes", "does not answer"),
        ("one_stands_still", "1 other rank(s) make no progress"),
    ],
)
def test_nobody_waits_forever(outcomes: Outcomes, scenario: str, words: str) -> None:
    first, second, third = outcomes[scenario]
    assert second == -9 or second["raised"] == "RankError"
    assert first["raised"] == third["raised"] == "RankError"
    (message,) = [rank["text"] for rank in (first, third) if rank["reported"]]
    assert words in message
