"""Start a stage, SIGKILL it at a random moment, start it again, over and over; see test_kill.py.

    python kill_stages.py RUN OUT ENCODING CACHE_KILLS RECTIFY_KILLS REPAIR_KILLS SEED

RUN is a teacher's run directory, ENCODING the cache's. OUT/cache/undisturbed is made in one go;
OUT/cache/killed-0, killed-1, ... each by runs that were killed until one came through; OUT/rectify
likewise, and OUT/repair: copies of OUT/rectify/undisturbed, damaged alike. Prints one JSON object:
for each stage, how many blocks were committed at each kill.

Every run is a fork of this process, which has imported everything and loaded the teacher: a run
costs no start-up, and a kill lands in the stage and not in an import. Nothing here touches Zarr
before it forks, and torch has one thread.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import dask  # noqa: F401  imported before the forks, for their speed
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from damage import flip
from helpers import DIGITS, cache_config_of, committed, first

from stages.cache_teacher import cache_teacher, prepare
from stages.data import Splits, load_data
from stages.rectify import rectify
from stages.repair import repair
from stages.settings import RectifyConfig
from stages.verify import verify


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a child; its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # Makes the pool of threads that a fork loses. Two threads that do it at once fail.
            torch.set_num_threads(1)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)  # no clean-up of what belongs to the parent
    return child


def ended(child: int) -> int:
    """Wait for a child; its exit status, negative the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> int:
    """SIGKILL a child unless it has ended by then; its exit status as of `ended`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return ended(child)


def undisturbed(work: Callable[[], object]) -> float:
    """Seconds that a run takes."""
    started = time.monotonic()
    if status := ended(fork(work)):
        sys.exit(f"a run that nobody disturbed ended with {status}")
    return time.monotonic() - started


def kill_again_and_again(
    start: Callable[[Path], Callable[[], object]], part: str, out: Path, kills: int, seed: int
) -> dict[str, object]:
    """Make OUT/undisturbed and OUT/killed-*; how many stores, and what there was at each kill."""
    seconds = undisturbed(start(out / "undisturbed"))
    moments = random.Random(seed)
    at_kill: list[int] = []
    stores = 0
    while True:
        store = out / f"killed-{stores}"
        fresh, started = not store.exists(), time.monotonic()
        child = fork(start(store))
        if len(at_kill) < kills:
            status = kill_after(child, moments.uniform(0, 1.1 * seconds))
        else:
            status = ended(child)
        if status == 0 and fresh:  # too slow a guess lets most runs come through
            seconds = min(seconds, time.monotonic() - started)
        if status == -signal.SIGKILL:
            at_kill.append(committed(store, part))
        elif status == 0:
            stores += 1  # came through: the next run starts another store
            if len(at_kill) == kills:
                return {"stores": stores, "seconds": seconds, "committed_at_kill": at_kill}
        else:
            sys.exit(f"a run after a kill ended with {status}")


DAMAGED = ("zarr.json", "label/zarr.json", "prediction/c/1/2", "eval_logits/c/0/0",
           "logits_code/c/0/1/0", "rectified/pairwise-T4/label_logit/c/0/2")  # fmt: skip


def main(run: str, out: Path, encoding: str, *numbers: int) -> None:
    torch.set_num_threads(1)
    *kills, seed = numbers
    config = cache_config_of(run, encoding=encoding, block_rows=30, batch_size=64)
    digits = load_data(DIGITS)  # 200 of them: 7 blocks a view
    job = prepare(config, Splits(first(digits.train, 200), first(digits.test, 20)))

    def rectified(store: Path) -> Callable[[], object]:
        if not store.exists():
            shutil.copytree(out / "cache" / "undisturbed", store)
        return lambda: rectify(store, RectifyConfig(materialise=True))

    def repaired(store: Path) -> Callable[[], object]:
        if not store.exists():
            shutil.copytree(out / "rectify" / "undisturbed", store)
            for key in DAMAGED:
                flip(store / key)

        def work() -> None:
            """What `pipeline verify CACHE --repair` does."""
            faults = verify(store, threads=1).faults
            assert not (faults and repair(store, job, faults).faults)

        return work

    stages: dict[str, tuple[Callable[[Path], Callable[[], object]], str]] = {
        "cache": (lambda store: lambda: cache_teacher(job, store), "logits"),
        "rectify": (rectified, "rectified/pairwise-T4"),
        "repair": (repaired, "logits"),
    }
    figures = {
        name: kill_again_and_again(start, part, out / name, count, seed)
        for (name, (start, part)), count in zip(stages.items(), kills, strict=True)
        if count
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    run, out, encoding, *numbers = sys.argv[1:]
    main(run, Path(out), encoding, *map(int, numbers))
