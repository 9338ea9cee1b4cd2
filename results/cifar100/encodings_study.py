r"""What students lose to an encoding, paired by seed with those of the exact rows.

    python results/cifar100/halve.py cifar100 cifar100-16
    pipeline train-teacher --config results/cifar100/encodings_teacher.yaml --out runs/teacher-16
    pipeline cache-teacher --dataset folder:cifar100-16 --weights runs/teacher-16 --views 8 \
        --encoding float32 --out runs/encodings-study/float32.zarr
    python results/cifar100/encodings_study.py caches
    pipeline sweep results/cifar100/encodings_study.yaml
    python results/cifar100/encodings_study.py summary

Every command may be stopped and given again. `summary` writes encodings_study.md and .jsonl beside
this file, of the runs that have finished.
"""

import functools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import click
import torch
from peers import k_largest, sampled
from recode import recoded

from stages.cache import LogitCache
from stages.cache.encoding import row_kl

HERE, FOLDER = Path(__file__).parent, Path("runs/encodings-study")
CACHES = {
    "klt": ("klt", None),
    "klt-top-fine": ("klt-top", "0.015@1,0.004@4"),
    "klt-top": ("klt-top", None),
    "klt-top-coarse": ("klt-top", "0.06@1,0.016@4"),
    "topk-10": ("topk:k=10,temperatures=1/4", None),
}
DRAWS = 50
PEERS = {
    "ten-largest": (44.0, k_largest, {"k": 10, "dtype": torch.float16}),
    "fifty-draws": (None, sampled, {"draws": DRAWS}),
}
"""What others keep (TinyViT, random sampling KD), in the bytes of their own records; of draws,
a byte for each class and one for its count. What a reader has of it is kept as a float32 cache.
"""
EXACT = "float32"
STUDENTS_T = {  # two-sided 95 % of Student's t, by degrees of freedom
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
    10: 2.228, 11: 2.201, 12: 2.179, 13: 2.160, 14: 2.145, 15: 2.131,
}  # fmt: skip


@click.group()
def main() -> None:
    """The caches of the study, and what came of it."""


@main.command()
def caches() -> None:
    """Write the rows of the float32 cache in every other encoding."""
    exact = LogitCache.open(FOLDER / f"{EXACT}.zarr")
    for name, (spec, max_kl) in CACHES.items():
        recoded(exact, FOLDER / f"{name}.zarr", spec, max_kl)
    for name, (_, kept, settings) in PEERS.items():
        torch.manual_seed(0)
        change = functools.partial(kept, **settings)
        recoded(exact, FOLDER / f"{name}.zarr", EXACT, change=change)


@main.command()
@click.option("--students", default=str(FOLDER / "students"), show_default=True)
def summary(students: str) -> None:
    """Mean differences to the exact rows, with 95 % intervals."""
    top1 = finished(Path(students))
    rows = [row for name in (EXACT, *CACHES, *PEERS) for row in compared(name, top1)]
    lines = [
        "| cache | bytes a row | KL T=1 | KL T=4 | student's T | top-1 | to exact rows | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kls = " | ".join(f"{row[f'kl_{t}']:.1e}" for t in (1, 4))
        lines.append(
            f"| {row['cache']} | {row['bytes']:.1f} | {kls} | {row['temperature']:g} | "
            f"{row['top1']:.2f} | {row['difference']:+.2f} ± {row['interval']:.2f} | {row['n']} |"
        )
    (HERE / "encodings_study.md").write_text("\n".join(lines) + "\n")
    (HERE / "encodings_study.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("\n".join(lines))


def finished(students: Path) -> dict[tuple[str, float], dict[int, float]]:
    """Test top-1 of the last epoch in percent, by cache and temperature, and then by seed."""
    found: dict[tuple[str, float], dict[int, float]] = {}
    for line in (students / "results.jsonl").read_text().splitlines():
        run = json.loads(line)
        if run["status"] == "done":
            key = Path(run["cache"]).stem, float(run["keys"]["loss.temperature"])
            found.setdefault(key, {})[run["seed"]] = 100 * run["summary"]["last"]["test_top1"]
    return found


def compared(name: str, top1: dict[tuple[str, float], dict[int, float]]) -> list[dict[str, Any]]:
    """A row for each temperature: differences to the students of the exact rows, seed by seed."""
    size, kls, rows = *bytes_and_kl(name), []
    for temperature in sorted(t for known, t in top1 if known == name):
        ours, theirs = top1[name, temperature], top1.get((EXACT, temperature), {})
        differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
        count = len(differences)
        interval = math.nan
        if count > 1:
            deviation = statistics.stdev(differences)
            interval = STUDENTS_T[count - 1] * deviation / math.sqrt(count)
        rows.append(
            {
                "cache": name,
                "bytes": size,
                "kl_1": kls[0],
                "kl_4": kls[1],
                "temperature": temperature,
                "top1": statistics.mean(ours.values()),
                "difference": statistics.mean(differences) if differences else math.nan,
                "interval": interval,
                "n": count,
                "differences": differences,
            }
        )
    return rows


def bytes_and_kl(name: str) -> tuple[float, tuple[float, float]]:
    """Of a row: on disk, of the blocks alone, or in a peer's own records; and at T=1 and 4."""
    cache = LogitCache.open(FOLDER / f"{name}.zarr")
    if name not in PEERS:
        there, known = cache.commits.extent(), cache.fidelity
        assert known is not None
        return there.bytes / there.rows, (known.known_kl(1.0), known.known_kl(4.0))
    exact = LogitCache.open(FOLDER / f"{EXACT}.zarr").read_block(0, 0).logits
    kept = cache.read_block(0, 0).logits
    drawn = (kept > kept.amin(1, keepdim=True)).sum(1).double().mean().item()
    size, _, _ = PEERS[name]
    kl_1, kl_4 = (float(row_kl(exact, kept, t).mean()) for t in (1.0, 4.0))
    return size or 2 * drawn, (kl_1, kl_4)


if __name__ == "__main__":
    main()
