"""What views would cost as residuals to one view of the same samples, against `klt-top` alone.

    python results/cifar100/anchored_rows.py --rows logits-resnet9.npz

FILE has `logits` float16 (views, N, C). The first view is coded by `klt-top`, in steps of several
sizes: the anchor. Each row of the second is predicted from the decoded row of the anchor, by linear
regression of all its logits; what is left has means of its predictions and a basis of its own, and
is coded, refined and packed just as `klt-top` does with whole rows. All is fitted to 8,192 random
samples. The step is the one at which the KL at T = 4 is that of `klt-top`. Bytes are those of the
shards of 50,000 rows with `prediction`, once as it is and once as its difference to the anchor's.
Writes anchored_rows.md beside this file.
"""

import dataclasses
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from stages.cache.arrays import encode_shard
from stages.cache.encoding import mean_kl, row_bytes_on_disk
from stages.cache.encoding.klt_basis import Rows
from stages.cache.encoding.klt_integers import integers
from stages.cache.encoding.klt_top import KltTop
from stages.cache.layout import base_arrays, block_grid

HERE = Path(__file__).parent
FITTED, VIEWS, TOP = 8192, (8, 162), 8
FINER = (1.0, 1.5, 2.5)
"""How many times finer than the default's the anchor's steps are."""
RIDGE = 1e-3
AT = 4.0


def centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(1, keepdim=True)


def around(coding: KltTop, base: Tensor) -> KltTop:
    """The coding of what is left beside `base`, float32 (n, C) in logits: its mean row is another
    one for each row.
    """
    made = dataclasses.replace(coding)
    made.__dict__["_mean"] = coding.mean.float() + (base / coding.unit).round()
    return made


class Anchored:
    """Rows of a view beside the decoded rows of another one."""

    def __init__(self, anchor: Tensor, rows: Tensor, fitted: Tensor) -> None:
        x, y = centred(anchor[fitted]), centred(rows[fitted])
        self._mean = x.mean(0)
        x = (x - self._mean).double()
        ridge = RIDGE * x.square().sum() / x.shape[1] * torch.eye(x.shape[1])
        weight = torch.linalg.solve(x.T @ x + ridge, x.T @ (y - y.mean(0)).double()).float()
        self.rows, self.base = rows, (centred(anchor) - self._mean) @ weight
        self._left = Rows.of(rows[fitted] - self.base[fitted], rows[fitted].argmax(1))

    def coding(self, step: float) -> KltTop:
        return around(KltTop(top=TOP, **integers(self._left, step)), self.base)

    def kl(self, step: float) -> float:
        coding = self.coding(step)
        return float(mean_kl(self.rows, coding.decode(coding.encode(self.rows)), AT))

    def step_of(self, kl: float) -> float:
        """The step at which the KL is as given, by halving."""
        low, high = 0.25, 32.0
        for _ in range(9):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.kl(middle) < kl else (low, middle)
        return low


def bytes_a_row(values: Tensor) -> float:
    """Of an array like `prediction` on disk."""
    grid, spec = block_grid(len(values), 100), base_arrays(100)["prediction"]
    return sum(
        len(encode_shard(spec, grid, b, values[grid.rows(b)])) for b in range(grid.num_blocks)
    ) / len(values)


@click.command()
@click.option("--rows", required=True, help="The teacher's rows.")
def main(rows: str) -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    with np.load(rows, allow_pickle=False) as found:
        logits = torch.from_numpy(found["logits"][:2])
    order = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(0))
    first, second = logits[:, order].float()
    labels, fitted = torch.full((len(first),), -1), torch.arange(FITTED)
    plain = KltTop.fit(first[fitted])
    alone = row_bytes_on_disk(plain, second, labels)
    wanted = float(mean_kl(second, plain.decode(plain.encode(second)), AT))
    lines = [
        "| anchor | its bytes | step of the others | their bytes | their KL T=4 | "
        "with predictions as differences | "
        + " | ".join(f"saved at {v} views" for v in VIEWS)
        + " |",
        "|" + "---|" * (6 + len(VIEWS)),
        f"| none: `klt-top` | | {plain.step:.2f} | {alone:.2f} | {wanted:.4f} | |"
        + " |" * len(VIEWS),
    ]
    for finer in FINER:
        coding = KltTop.fit(first[fitted], step=plain.step / finer, top=TOP)
        arrays = coding.encode(first)
        anchored = Anchored(coding.decode(arrays), second, fitted)
        step = anchored.step_of(wanted)
        anchor, left = (
            row_bytes_on_disk(*of, labels)
            for of in ((coding, first), (anchored.coding(step), second))
        )
        change = (second.argmax(1) - first.argmax(1)) % second.shape[1]
        least = left - bytes_a_row(second.argmax(1)) + bytes_a_row(change)
        saved = [1 - (anchor + (v - 1) * least) / (v * alone) for v in VIEWS]
        lines.append(
            f"| step {coding.step:.2f} | {anchor:.2f} | {step:.2f} | {left:.2f} | "
            f"{anchored.kl(step):.4f} | {least:.2f} | "
            + " | ".join(f"{s:.1%}" for s in saved)
            + " |"
        )
        print(lines[-1], flush=True)
    (HERE / "anchored_rows.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
