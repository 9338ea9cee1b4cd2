"""Several processes of one launch, as torchrun starts them, and what they do together.

    torchrun --nproc-per-node=8 -m pipeline cache-teacher ...

    ranks = launched_ranks()  # ALONE where torchrun did not start this
    with process_group(ranks, device):
        plan = first_rank_does(ranks, make_plan)  # one works; all have its result, or its error
        barrier(ranks)

With one rank every function is a plain call. If a rank fails or is killed, the launch ends:
torchrun stops the others, and those that wait for it here raise RankError.
"""

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stages.errors import ConfigError, PipelineError, RankError

TIMEOUT = timedelta(hours=1)
"""How long a rank waits for another that makes no progress."""
_REPORTING, _POLL_SECONDS = timedelta(seconds=10), 0.1
_AGAIN = "Run the same command again: what is finished is kept."
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_groups, _counts = itertools.count(), itertools.count()
"""Every rank counts alike: equal numbers mean the same object."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """Which process of a launch this is: rank in [0, world), local_rank on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that does what must be done once."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` things are this rank's: a run, as even as possible."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)


ALONE = Ranks()
"""The one process of an ordinary run."""


def launched_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The rank that torchrun gave this process. Raises ConfigError where it makes no sense."""
    if not (given := {name: environment[name] for name in _NAMES if name in environment}):
        return ALONE
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    remedy = f"Start with torchrun, which sets {', '.join(_NAMES)}, or unset them all."
    if missing := [name for name in _NAMES if name not in given]:
        raise ConfigError(f"{shown} is set, {' and '.join(missing)} not", remedy)
    if not all(value.isdecimal() for value in given.values()):
        raise ConfigError(f"{shown} are not all whole numbers", remedy)
    rank, world, local = (int(given[name]) for name in _NAMES)
    if not local <= rank < world:
        raise ConfigError(f"{shown}: ranks are numbered from 0, on a machine and in all", remedy)
    return Ranks(rank, world, local)


@contextlib.contextmanager
def process_group(
    ranks: Ranks, device: torch.device | None = None, timeout: timedelta = TIMEOUT
) -> Iterator[None]:
    """Connect the ranks while this is open: with gloo, and NCCL for tensors on a GPU.

    device: where the tensors lie that collectives are for, None for the CPU. timeout: of every
    collective. Raises RankError if the ranks do not find one another.
    """
    if ranks.world == 1:
        yield
        return
    nccl = device is not None and device.type == "cuda"
    with _together():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=dist.PrefixStore(f"group{next(_groups)}", _meeting_place(ranks)),
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=timeout,
        )
    try:
        yield
    except BaseException:
        _fails_first(ranks)  # before the others notice that this rank is gone
        if not nccl:  # NCCL ends only when all ranks agree to, or with the process
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def barrier(ranks: Ranks) -> None:
    """Wait until every rank is here. Raises RankError if one ended instead."""
    summed(ranks, torch.zeros(1))


def summed(ranks: Ranks, value: Tensor) -> Tensor:
    """The sum of every rank's tensor, on every rank; all have the same shape and dtype."""
    if ranks.world == 1:
        return value
    total = value.clone()
    with _together():
        dist.all_reduce(total)
    return total


def take_from_first(ranks: Ranks, tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of the first rank."""
    if ranks.world > 1:
        with _together():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def broadcast_object(ranks: Ranks, value: Result) -> Result:
    """The first rank's value, on every rank; of the others `value` is not looked at.

    Raises RankError if a rank ended instead. The value must pickle.
    """
    if ranks.world == 1:
        return value
    held = [value]
    with _together():
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
    return held[0]


def first_rank_does(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Call `work` on the first rank only; what it returns or raises is had by every rank.

    Raises the first rank's PipelineError on all; for any other exception the others have a
    RankError.
    """
    result: Result
    if not ranks.first:
        result = _answer_of_first(ranks)
        return result
    with _failure_sent(ranks):
        result = work()
    broadcast_object(ranks, (result, None))
    return result


@contextlib.contextmanager
def first_rank_first(ranks: Ranks) -> Iterator[None]:
    """Every rank runs what is inside, the first before the others: what it downloads or keeps is
    there for them. Where it fails, they raise as in `first_rank_does`, and do not begin.
    """
    if not ranks.first:
        _answer_of_first(ranks)
        yield
        return
    with _failure_sent(ranks):
        yield
    broadcast_object(ranks, (None, None))


class SharedProgress:
    """A number that all ranks add to. Every rank makes its own of each in the same order.

    shown: called with the number and with `total`, what is expected, whenever it is looked at.
    """

    def __init__(
        self, ranks: Ranks, shown: Callable[[int, int], object] | None = None, total: int = 0
    ) -> None:
        self._ranks, self._key, self._own = ranks, f"count{next(_counts)}", 0
        self._shown, self.total = shown, total

    def add(self, number: int = 0) -> int:
        """Add to it; what all ranks have added so far."""
        self._own = done = self._own + number
        if self._ranks.world > 1:
            with _together():
                done = int(_meeting_place(self._ranks).add(self._key, number))
        if self._shown is not None:
            self._shown(done, self.total)
        return done

    def wait_for_all(self, timeout: timedelta = TIMEOUT) -> None:
        """Wait until every rank is here, however long, as long as they add something now and then.
        Raises RankError if one has failed, or nothing is added for `timeout`.
        """
        ranks = self._ranks
        if ranks.world == 1:
            return
        here = (arrived := SharedProgress(ranks)).add(1)
        known, since = self.add(), time.monotonic()
        while here < ranks.world:
            time.sleep(_POLL_SECONDS)
            here = arrived.add()
            if _failures(ranks):
                raise RankError("another rank has failed", _AGAIN)
            if (now := self.add()) != known:
                known, since = now, time.monotonic()
            elif time.monotonic() - since > timeout.total_seconds():
                raise RankError(f"{ranks.world - here} other rank(s) make no progress", _AGAIN)
        barrier(ranks)


@contextlib.contextmanager
def reported_once() -> Iterator[bool]:
    """Around reporting an error: whether this rank of the launch is the one that reports it.

    The others wait until it has: torchrun stops all ranks when the first one ends.
    """
    ranks = ALONE
    with contextlib.suppress(ConfigError):
        ranks = launched_ranks()
    mine = _fails_first(ranks)
    try:
        yield mine
    finally:
        if ranks.world > 1:
            with contextlib.suppress(RuntimeError, ConfigError):
                store = _meeting_place(ranks)
                store.set("reported", "") if mine else store.wait(["reported"], _REPORTING)


# ---- details --------------------------------------------------------------------------------


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """torch.distributed raises RuntimeError for everything, often over many lines."""
    try:
        yield
    except RuntimeError as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise RankError(f"another rank has ended or does not answer: {first}", _AGAIN) from error


@functools.cache
def _meeting_place(ranks: Ranks) -> dist.Store:
    """The key-value store of this launch: torchrun's own, else the first rank's."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "there are several ranks, but MASTER_ADDR and MASTER_PORT do not say where they meet",
            "Start with torchrun, which sets them.",
        ) from error
    serves = ranks.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(address, port, ranks.world, serves, wait_for_workers=False)
    # torchrun's store outlives the ranks: another attempt must not find what the last one left
    return dist.PrefixStore(f"launch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _answer_of_first(ranks: Ranks) -> Any:
    """What the first rank sends when its work is done. Raises what it failed with."""
    result, failure = broadcast_object(ranks, (None, None))
    if failure is not None:
        raise failure
    return result


@contextlib.contextmanager
def _failure_sent(ranks: Ranks) -> Iterator[None]:
    """What the first rank raises inside is sent to the others, and raised here."""
    try:
        yield
    except Exception as error:
        _fails_first(ranks)  # before the others hear of it
        message = f"rank 0 failed: {type(error).__name__}: {error}"
        failure = error if isinstance(error, PipelineError) else RankError(message)
        with contextlib.suppress(RankError):  # what went wrong here matters more
            broadcast_object(ranks, (None, failure))
        raise


def _failures(ranks: Ranks, more: int = 0) -> int:
    """How many ranks have failed, with so many more."""
    with _together():
        return int(_meeting_place(ranks).add("failed", more))


@functools.cache
def _fails_first(ranks: Ranks) -> bool:
    """Whether this rank is the first of its launch to fail; also if the store does not answer."""
    with contextlib.suppress(PipelineError):
        return ranks.world == 1 or _failures(ranks, 1) == 1
    return True
