"""Bytes on disk and truth of every encoding, on a teacher's rows; beside them what others keep.

    python results/cifar100/encoding_rows.py --rows logits-resnet9.npz
    python results/cifar100/encoding_rows.py --rows logits-lite0.npz --out encoding_rows_1000

FILE has `logits` float16 (views, N, C) and `labels` (N,): of CIFAR-100, or of 1,000 classes as
lite0_rows.py makes them. Encodings are fitted to 8,192 random rows of the first view, two thirds of
fewer than 12,288, and measured on 21,429 others, three chunks of a block of 50,000, or on what is
left. Bytes are those of the block's shards, with `prediction`; those of others are those of their
own records.
Writes OUT.md and OUT.jsonl beside this file.
"""

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from peers import k_largest
from torch import Tensor

from stages.cache.encoding import Fidelity, fit_encoding, measure, row_bytes_on_disk, row_kl
from stages.sizes import KL_TEMPERATURES, parse_budget

HERE = Path(__file__).parent
FITTED, MEASURED = 8192, 21_429
TOPK = ("topk:k=10,temperatures=1/2/4/10", "topk:k=25,temperatures=1/2/4/10")
SPECS = (
    *("float16", "uint8", "klt", "klt:step=1", "klt:step=2"),
    *("klt:step=0.5,top=8", "klt:step=1,top=8", "klt:step=2,top=8", "klt-top"),
    *("klt:step=3,top=8", "klt:step=4,top=8", "klt:step=4,top=16"),
    *TOPK,
)
OF_MANY = (
    *("float16", "uint8", "klt", "klt:step=2,top=16", "klt-top"),
    *("klt:step=4,top=16", "klt:step=4,top=32", "klt-top 0.04@4", "klt:step=8,top=16"),
    *TOPK,
)
"""Above 256 classes. After a space: the budget, as --max-kl has it."""
PEERS = (
    ("five largest, float32 (FKD)", 57.0, 5, torch.float32),
    ("ten largest, float16, and a seed (TinyViT)", 44.0, 10, torch.float16),
    ("ten largest (ml-dr)", 62.5, 10, torch.float32),
)
"""What others keep of a row, in the bytes that their own figures give: probabilities at T=1. A
reader spreads the rest evenly.
"""


@click.command()
@click.option("--rows", required=True, help="The teacher's rows.")
@click.option("--out", default="encoding_rows", show_default=True, help="Name of what is written.")
def main(rows: str, out: str) -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    with np.load(rows, allow_pickle=False) as found:
        logits, labels = torch.from_numpy(found["logits"][0]), torch.from_numpy(found["labels"])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    many = min(FITTED, 2 * len(order) // 3)
    fitted, some = order[:many], order[many:][-MEASURED:]
    seen, rest = logits[fitted].float(), logits[some].float()
    known = [
        of_encoding(spec, (seen, labels[fitted].long()), (rest, labels[some].long()))
        for spec in (SPECS if logits.shape[1] <= 256 else OF_MANY)
    ]
    known += [of_peer(*peer, rest) for peer in PEERS]
    columns = " | ".join(f"KL T={t:g}" for t in KL_TEMPERATURES)
    lines = [
        f"| | bytes a row | {columns} | same top-1 | same top-5 | rows decoded/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in known:
        kls = " | ".join(f"{kl:.4f}" for kl in row["kl"])
        speed = f"{row['decoded'] / 1e6:.3f} M" if row["decoded"] else ""
        lines.append(
            f"| {row['format']} | {row['bytes']:.1f} | {kls} | {row['top1']:.1%} | "
            f"{row['top5']:.1%} | {speed} |"
        )
    (HERE / f"{out}.md").write_text("\n".join(lines) + "\n")
    (HERE / f"{out}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known))
    print("\n".join(lines))


def of_encoding(
    spec: str, seen: tuple[Tensor, Tensor], rest: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """One of ours. seen: rows and labels that it is fitted to; rest: those that are measured."""
    name, _, budget = spec.partition(" ")
    coding = fit_encoding(name, *seen, budget=parse_budget(budget, "budget") if budget else None)
    arrays = coding.encode(*rest)
    batch = {key: array[:256] for key, array in arrays.items()}
    at_one = 1.0
    coding.decode(batch, at_one)
    started, turns = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < 0.5:
        coding.decode(batch, at_one)
        turns += 1
    fidelity: Fidelity = measure(coding, *rest)
    words = [f"`{name}`", *([f"KL {budget}"] if budget else [])]
    if spec.startswith("klt-"):
        words.append(f"step {coding.shown['step']}")
    return {
        "format": ", ".join(words),
        "bytes": row_bytes_on_disk(coding, *rest),
        "kl": fidelity.mean_kl,
        "top1": fidelity.top1_agreement,
        "top5": fidelity.top5_agreement,
        "decoded": 256 * turns / elapsed,
    }


def of_peer(name: str, size: float, k: int, dtype: torch.dtype, logits: Tensor) -> dict[str, Any]:
    """What a reader of the k largest probabilities at T=1 has."""
    found = k_largest(logits, k, dtype)
    least = found.gather(1, logits.topk(5).indices).amin(1)
    return {
        "format": name,
        "bytes": size,
        "kl": [float(row_kl(logits, found, t).mean()) for t in KL_TEMPERATURES],
        "top1": float((found.argmax(1) == logits.argmax(1)).double().mean()),
        "top5": float((least >= found.topk(5, dim=1).values[:, -1]).double().mean()),
        "decoded": 0,
    }


if __name__ == "__main__":
    main()
