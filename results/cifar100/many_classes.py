"""Rows of 21,841 classes: real features under a synthetic head; seconds, bytes and KL.

    python results/cifar100/many_classes.py --rows logits-lite0.npz

FILE is what lite0_rows.py writes. A class's weights are those of one of the network's 1,000 and a
draw with the covariance of all of them, .7 of both, around their mean: so a class has others like
it, and rows spread as the network's own do. 3,072 rows are fitted and 512 others measured, the KL
on 128 of them. About two minutes on two idle cores.
"""

import time

import click
import numpy as np
import torch
from torch import Tensor

from stages.cache.encoding import fit_encoding, measure, row_bytes_on_disk
from stages.sizes import KL_TEMPERATURES, parse_budget

CLASSES, FITTED, MEASURED, COMPARED = 21_841, 3072, 512, 128
SPECS = (
    *("klt-top", "klt-top 0.008@4", "klt:step=6,top=16", "klt:step=12,top=16"),
    "topk:k=10,temperatures=1/2/4/10",
)
"""After a space: the budget, as --max-kl has it."""


def synthetic_head(weights: Tensor) -> Tensor:
    """float32 (21841, F) from the head's own weights (1000, F)."""
    generator = torch.Generator().manual_seed(0)
    mean = weights.mean(0)
    apart = weights - mean
    draws = torch.randn(CLASSES, len(apart), generator=generator) @ apart / len(apart) ** 0.5
    return mean + 0.7 * apart[torch.arange(CLASSES) % len(apart)] + 0.7 * draws


@click.command()
@click.option("--rows", required=True, help="What lite0_rows.py wrote.")
def main(rows: str) -> None:
    """Measure and print."""
    with np.load(rows, allow_pickle=False) as found:
        features, weights, own = (
            torch.from_numpy(found[name]).float() for name in ("features", "head", "logits")
        )
    head = synthetic_head(weights)
    fitted, others = (
        features[some] @ head.T for some in (slice(FITTED), slice(FITTED, FITTED + MEASURED))
    )
    spread = (float(x.std(1).mean()) for x in (own[0], fitted))
    print("standard deviation of a row: {:.2f} of the network's, {:.2f} here".format(*spread))
    labels = others.argmax(1)
    for spec in SPECS:
        started = time.process_time()
        name, _, budget = spec.partition(" ")
        held = parse_budget(budget, "budget") if budget else None
        coding = fit_encoding(name, fitted, fitted.argmax(1), budget=held)
        taken = time.process_time() - started
        fidelity = measure(coding, others[:COMPARED], labels[:COMPARED])
        kls = zip(KL_TEMPERATURES, fidelity.mean_kl, strict=True)
        print(
            f"{spec} {coding.shown}: fitted in {taken:.0f} s of CPU, "
            f"{row_bytes_on_disk(coding, others, labels):.0f} bytes a row, "
            + ", ".join(f"{kl:.2g} at T={t:g}" for t, kl in kls),
            flush=True,
        )


if __name__ == "__main__":
    main()
