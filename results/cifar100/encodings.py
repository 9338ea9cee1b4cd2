"""One teacher pass, every encoding: bytes and truth of each, and what its students reach.

    python results/cifar100/encodings.py --cache exact.zarr --data DIR --out runs/encodings

CACHE holds the exact rows (`cache-teacher --encoding float32`); every other encoding is written
from it, as stage one would write it. Runs and caches that have finished are kept, so that the
command may be stopped and given again. Writes encodings.md and encodings.jsonl.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch
from recode import recoded
from torch import Tensor

from pipeline.config import read_config
from pipeline.console import Console
from stages.cache import LogitCache
from stages.cache.encoding import row_kl
from stages.data import load_data
from stages.settings import DataSettings, StudentConfig
from stages.train_student import train_student

HERE = Path(__file__).parent
STUDENTS = ("float32", "uint8", "klt", "klt-top", "topk")


@click.command()
@click.option("--cache", required=True, help="The float32 cache.")
@click.option("--data", required=True, help="CIFAR-100 as an image folder.")
@click.option("--out", default="runs/encodings", show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--threads", default=0, help="CPU threads; all if 0.")
def main(cache: str, data: str, out: str, seeds: int, threads: int) -> None:
    """Recode, measure, train, and write the tables."""
    if threads:
        torch.set_num_threads(threads)
    exact, folder = LogitCache.open(cache), Path(out)
    paths = {name: folder / f"{name.replace(':', '-').replace('=', '')}.zarr" for name in NAMES}
    rows = [measured(exact, recoded(exact, path, name)) for name, path in paths.items()]
    rows += peers(exact)
    write_table(rows, folder)
    train(cache, data, folder, seeds)
    write_table(rows, folder)


NAMES = ("float32", "float16", "uint8", "klt", "klt-top", "topk", "topk:k=25")


def measured(exact: LogitCache, cache: LogitCache) -> dict[str, Any]:
    """Bytes, truth over all rows, and speed. fixed_bytes: what does not grow with the
    views: labels, the test split's logits, metadata.
    """
    whole = sum(f.stat().st_size for f in Path(cache.path).rglob("*") if f.is_file())
    views, samples = range(cache.num_views), torch.arange(cache.num_samples)
    records = sum(f.stat().st_size for f in Path(cache.path, "commits/logits").rglob("*.json"))
    grows = records + cache.commits.extent(views).bytes
    kls: dict[float, list[float]] = {1.0: [], 4.0: []}
    agreed, read, decode = [], [], []
    for view in views:
        started = time.perf_counter()
        ours = cache.read_view(view)
        read.append(time.perf_counter() - started)
        for part in samples.split(256):
            ours.rows(part)
        decode.append(time.perf_counter() - started - read[-1])
        theirs = exact.read_view(view)
        for part in samples.split(8192):
            rows = theirs.rows(part)
            for temperature, found in kls.items():
                found.append(float(row_kl(rows, ours.rows(part, temperature), temperature).sum()))
            agreed.append(int((ours.rows(part).argmax(1) == rows.argmax(1)).sum()))
    rows_in_all = cache.num_samples * len(views)
    return {
        "format": Path(cache.path).stem,
        "bytes_a_view": grows / rows_in_all,
        "fixed_bytes": whole - grows,
        "bytes_at_162_views": (grows / len(views) + (whole - grows) / 162) / cache.num_samples,
        "kl_1": sum(kls[1.0]) / rows_in_all,
        "kl_4": sum(kls[4.0]) / rows_in_all,
        "top1_agreement": sum(agreed) / rows_in_all,
        "slab_read_seconds": statistics.median(read),
        "slab_decode_seconds": statistics.median(decode),
    }


def peers(exact: LogitCache) -> list[dict[str, Any]]:
    """The largest probabilities at T=1, the rest spread evenly, in the bytes that the peers' own
    figures give: FKD 57 (float32) for five, TinyViT 44 for ten with a seed, ml-dr 62.5 for ten.
    """
    logits = exact.read_view(0).rows(torch.arange(exact.num_samples))
    layouts = (
        ("five largest, float32 (FKD)", 57.0, 5, torch.float32),
        ("ten largest, float16, and a seed (TinyViT)", 44.0, 10, torch.float16),
        ("ten largest (ml-dr)", 62.5, 10, torch.float32),
    )
    rows = []
    for name, size, k, dtype in layouts:
        restored = largest_probabilities(logits, k, dtype)
        rows.append(
            {
                "format": name,
                "bytes_at_162_views": size,
                "kl_1": float(row_kl(logits, restored, 1.0).mean()),
                "kl_4": float(row_kl(logits, restored, 4.0).mean()),
                "top1_agreement": float((restored.argmax(1) == logits.argmax(1)).double().mean()),
            }
        )
    return rows


def largest_probabilities(logits: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """log-probabilities (n, C) that a reader of such a record has."""
    top = logits.softmax(1).topk(k)
    values = top.values.to(dtype).float()
    rest = (1 - values.sum(1, keepdim=True)).clamp(min=1e-8) / (logits.shape[1] - k)
    return rest.expand_as(logits).scatter(1, top.indices, values.clamp(min=1e-8)).log()


def train(cache: str, data: str, folder: Path, seeds: int) -> None:
    """The student `KD, 8 cached views` of students.yaml from each encoding."""
    splits, console = load_data(DataSettings(dataset=f"folder:{data}")), Console()
    for seed in range(seeds):
        for name in STUDENTS:
            out = folder / f"student-{name}-{seed}"
            if (out / "summary.json").exists():
                continue
            console.say(f"== {name}, seed {seed}")
            flags = {"cache": str(folder / f"{name}.zarr"), "data.dataset": f"folder:{data}"}
            seeded = {"seed.data": seed, "seed.init": seed}
            config = read_config(StudentConfig, str(HERE / "base.yaml"), flags | seeded, [])
            train_student(config, out, splits=splits, overwrite=True, reporter=console)


def write_table(rows: list[dict[str, Any]], folder: Path) -> None:
    """encodings.md and encodings.jsonl, beside this file."""
    lines = [
        "| format | bytes a view | KL T=1 | KL T=4 | same top-1 | slab read | decoded rows/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        read = f"{row['slab_read_seconds'] * 1e3:.0f} ms" if "slab_read_seconds" in row else ""
        speed = f"{50_000 / row['slab_decode_seconds'] / 1e6:.2f} M" if read else ""
        lines.append(
            f"| {row['format']} | {row['bytes_at_162_views']:.1f} | {row['kl_1']:.1e} | "
            f"{row['kl_4']:.1e} | {row['top1_agreement']:.2%} | {read} | {speed} |"
        )
    lines += ["", "| student's cache | test top-1, last epoch | n | epoch |", "|---|---|---|---|"]
    for name in STUDENTS:
        runs = [
            json.loads(p.read_text()) for p in sorted(folder.glob(f"student-{name}-*/summary.json"))
        ]
        if runs:
            top1 = [100 * run["last"]["test_top1"] for run in runs]
            spread = f" +- {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
            epoch = statistics.median(run["train_seconds"] / run["epochs"] for run in runs)
            lines.append(
                f"| {name} | {statistics.mean(top1):.2f}{spread} | {len(top1)} | {epoch:.1f} s |"
            )
            rows = [*rows, {"student": name, "top1": top1, "epoch_seconds": epoch}]
    (HERE / "encodings.md").write_text("\n".join(lines) + "\n")
    (HERE / "encodings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
