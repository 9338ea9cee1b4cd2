"""What `klt-anchored` saves against `klt-top` at the same KL, and what it costs to decode.

    python results/cifar100/anchored_rows.py --rows logits-resnet9.npz

FILE has `logits` float16 (views, N, C), three views at the least. Both encodings are fitted to
8,192 random samples, with the same budgets; the KLs are of the third view, which neither was fitted
to. Bytes are those of shards of all rows, `prediction` with them. Decoding is timed in turns, in
batches of 256 rows, by the seconds that this thread computes. Writes anchored_rows.md beside this
file.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from stages.cache.encoding import Encoding, fit_encoding, mean_kl, row_bytes_on_disk
from stages.cache.encoding.fidelity import TEMPERATURES
from stages.sizes import parse_budget

HERE = Path(__file__).parent
FITTED, BATCH, TURNS, VIEWS = 8192, 256, 101, (2, 4, 8, 162)
BUDGETS = ("0.03@1,0.008@4", "0.004@4", "0.02@4")


def timed(coding: Encoding, arrays: Mapping[str, Tensor]) -> Callable[[], float]:
    """Seconds of one core to decode a batch; the next one each time."""
    batches = [{n: a[i * BATCH : (i + 1) * BATCH] for n, a in arrays.items()} for i in range(16)]
    turn = iter(range(10**9))

    def work() -> float:
        batch = batches[next(turn) % len(batches)]
        started = time.thread_time()
        coding.decode(batch)
        return time.thread_time() - started

    return work


@click.command()
@click.option("--rows", required=True, help="The teacher's rows.")
@click.option("--budget", multiple=True, default=BUDGETS, show_default=True)
def main(rows: str, budget: tuple[str, ...]) -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    with np.load(rows, allow_pickle=False) as found:
        logits = torch.from_numpy(found["logits"][:3])
    order = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(0))
    first, second, third = logits[:, order].float()
    labels = torch.full((len(first),), -1)
    some = slice(FITTED)
    lines = [
        "| budget | | steps | first view | other views | "
        + " | ".join(f"KL T={t:g}" for t in TEMPERATURES)
        + " | "
        + " | ".join(f"{v} views" for v in VIEWS)
        + " | decoded |",
        "|" + "---|" * (6 + len(TEMPERATURES) + len(VIEWS)),
    ]
    for asked in budget:
        limits = parse_budget(asked, "budget")
        fitted = [
            fit_encoding(name, first[some], labels[some], limits, second[some])
            for name in ("klt-top", "klt-anchored")
        ]
        sizes, works, cells = [], [], []
        for coding in fitted:
            arrays = coding.encode(first)
            if coding.of_anchor:
                arrays = coding.encode_beside(coding.as_anchor(arrays), third)
            else:
                arrays = coding.encode(third)
            decoded = coding.decode(arrays)
            sizes.append([row_bytes_on_disk(coding, first, labels, third, v) for v in VIEWS])
            two, most = sizes[-1][0], sizes[-1][-1]
            others = most + (most - two) * 2 / (VIEWS[-1] - 2)  # two = (first + others) / 2
            works.append(timed(coding, arrays))
            shown = coding.shown
            steps = f"{shown['step']:.2f}"
            if "anchor_step" in shown:
                steps = f"{shown['anchor_step']:.2f}, {steps}"
            kls = [f"{float(mean_kl(third, decoded, t)):.4f}" for t in TEMPERATURES]
            cells.append(
                [f"`{coding.name}`", steps, f"{2 * two - others:.2f}", f"{others:.2f}", *kls]
            )
        seconds = [[work() for work in works] for _ in range(TURNS)]
        ratio = statistics.median(b / a for a, b in seconds)
        for cell, size, speed in zip(cells, sizes, ("1", f"{ratio:.2f}"), strict=True):
            saved = [
                f"{own:.2f}" + (f" ({own / plain - 1:+.1%})" if size is not sizes[0] else "")
                for own, plain in zip(size, sizes[0], strict=True)
            ]
            lines.append("| " + " | ".join([asked, *cell, *saved, speed]) + " |")
            print(lines[-1], flush=True)
    (HERE / "anchored_rows.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
