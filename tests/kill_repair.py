"""Damage a cache, start its repair, SIGKILL it at a random moment, start it again; see
test_repair.py.

    python kill_repair.py RUN OUT KILLS SEED

RUN is a teacher's run directory. OUT/undisturbed is a cache that nothing happened to;
OUT/killed-0, killed-1, ... are copies, damaged alike, repaired by runs that were killed until one
came through. Prints one JSON object: how many stores, and how many faults there were at each kill.

Every run is a fork of this process, as in cache/kill_stages.py; nothing here touches Zarr before
it forks.
"""

import json
import random
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("cache")))
from damage import flip
from helpers import DIGITS, first, job_of
from kill_stages import ended, fork, kill_after, undisturbed

from stages.cache_teacher import CacheJob, cache_teacher
from stages.data import Splits, load_data
from stages.errors import CacheError
from stages.rectify import rectify
from stages.repair import repair
from stages.settings import RectifyConfig
from stages.verify import verify

DAMAGED = (
    "zarr.json",
    "label/zarr.json",
    "logits_code/c/0/1/0",
    "prediction/c/1/2",
    "eval_logits/c/0/0",
    "commits/logits/v00001.json",
    "rectified/pairwise-T4/label_logit/c/0/2",
)


def damaged_copy(whole: Path, store: Path) -> None:
    shutil.copytree(whole, store)
    for key in DAMAGED:
        flip(store / key)


def repaired(store: Path, job: CacheJob) -> None:
    """What `pipeline verify CACHE --repair` does."""
    if (faults := verify(store, threads=1).faults) and repair(store, job, faults).faults:
        raise SystemExit("not repaired")


def count_faults(store: Path) -> None:
    """The number of faults, beside the store: Zarr stays out of the parent."""
    try:
        faults = len(verify(store, threads=1).faults)
    except CacheError:
        faults = -1
    store.with_suffix(".faults").write_text(str(faults))


def main(run: str, out: Path, kills: int, seed: int) -> None:
    digits, whole = load_data(DIGITS), out / "undisturbed"
    splits = Splits(first(digits.train, 90), first(digits.test, 20))
    job = job_of(run, splits, encoding="klt", block_rows=30)
    undisturbed(lambda: (cache_teacher(job, whole), rectify(whole, RectifyConfig())))
    damaged_copy(whole, out / "first")
    seconds = undisturbed(lambda: repaired(out / "first", job))

    moments, stores, at_kill = random.Random(seed), 0, []
    while True:
        store = out / f"killed-{stores}"
        if not store.exists():
            damaged_copy(whole, store)
        child = fork(lambda store=store: repaired(store, job))
        if len(at_kill) < kills:
            status = kill_after(child, moments.uniform(0, 1.3 * seconds))
        else:
            status = ended(child)
        if status == -signal.SIGKILL:
            undisturbed(lambda store=store: count_faults(store))
            at_kill.append(int(store.with_suffix(".faults").read_text()))
        elif status == 0:
            stores += 1
            if len(at_kill) == kills:
                break
        else:
            sys.exit(f"a run after a kill ended with {status}")
    print(json.dumps({"stores": stores, "seconds": seconds, "faults_at_kill": at_kill}))


if __name__ == "__main__":
    run, out, *numbers = sys.argv[1:]
    main(run, Path(out), *map(int, numbers))
