"""How long a batch of rows takes to decode: `klt-top` against `klt`, `klt-anchored` against that,
all against a step of a resnet8x4.

    python -m benchmarks.decode_rows                  seconds to a minute
    python -m benchmarks.decode_rows --rows FILE      rows of a real teacher: results/cifar100

Without --rows the teacher is a random head of few features. Every ratio is that of two things done
in turns in one process; the step is forward, backward and SGD in float32 with hard labels.
"""

import itertools
from collections.abc import Callable

import click
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import Ratio, in_turns, new_report, steadily
from benchmarks.table import show_report
from pipeline.console import Console
from stages.cache.encoding import Encoding, fit_encoding
from stages.device import choose_device
from stages.inputs.models import build_model

STUDENT, BATCH, FITTED = "resnet8x4", 256, 4096
SHARE = 0.02
"""Of a step: what decoding a batch of 100 classes should take at the most."""


def head_rows(count: int, classes: int, features: int) -> tuple[Tensor, Tensor]:
    """Two views, float32 (n, C): rows of a random head, whose features fall off as a teacher's do.
    The second has a quarter of its features' deviation for itself.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(features, classes, generator=generator)
    scale = 3.0 / torch.arange(1, features + 1).sqrt()
    first, own = torch.randn(2, count, features, generator=generator).unbind()
    return first * scale @ weight, (first + 0.25 * own) * scale @ weight


def decoding(
    coding: Encoding, rows: Tensor, second: Tensor, device: torch.device
) -> Callable[[], object]:
    """Decodes one batch after another, of the second view."""
    moved, some = coding.to(device), slice(8 * BATCH)
    anchor = coding.as_anchor(coding.encode(rows[some]))
    arrays = coding.encode_beside(anchor, second[some])
    each = [
        {name: array[start : start + BATCH].to(device) for name, array in arrays.items()}
        for start in range(0, 8 * BATCH, BATCH)
    ]
    batches = itertools.cycle(each)
    return lambda: moved.decode(next(batches))


def step(device: torch.device, classes: int) -> Callable[[], object]:
    """One step of the student on noise of CIFAR's shape."""
    model = build_model(STUDENT, classes, 3).module.to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    images = torch.randn(BATCH, 3, 32, 32, device=device)
    labels = torch.randint(classes, (BATCH,), device=device)

    def work() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def decode_ratios(
    logits: Tensor, second: Tensor, device: torch.device, turns: int, with_step: bool
) -> list[Ratio]:
    """klt-top against klt, and klt-anchored against klt-top, on rows (n, C), 8 batches of them; and
    against a step. second: another view of the same samples.
    """
    labels, some = logits.argmax(1), slice(FITTED)
    codings = [
        fit_encoding(name, logits[some], labels[some], second=second[some])
        for name in ("klt-top", "klt", "klt-anchored")
    ]
    works = {coding.name: decoding(coding, logits, second, device) for coding in codings}
    if with_step:
        works["step"] = step(device, logits.shape[1])
    timed = {name: steadily(work, device) for name, work in works.items()}
    times = in_turns(timed, turns)
    note = f"{BATCH} x {logits.shape[1]}, {codings[0].shown['components']} components"

    def ratio(name: str, other: str, what: str, target: float | None) -> Ratio:
        return Ratio(
            name=f"a batch decoded, {name} / {what}",
            ours=times[name],
            yardstick=times[other],
            target=target,
            note=note,
        )

    found = [ratio("klt-top", "klt", "klt", 1.0), ratio("klt-anchored", "klt-top", "klt-top", None)]
    if with_step:
        found += [ratio(c.name, "step", f"a step of {STUDENT}", SHARE) for c in codings]
    return found


@click.command()
@click.option("--rows", help="npz with `logits` (views, N, C), in place of random ones.")
@click.option("--device", default="auto", show_default=True)
@click.option("--turns", type=click.IntRange(1), default=11, show_default=True)
@click.option("--threads", default=0, help="CPU threads; torch's choice if 0.")
@click.option("--out", help="A JSON file for the figures.")
def main(rows: str | None, device: str, turns: int, threads: int, out: str | None) -> None:
    """Measure and show; with random rows at 1,000 classes too."""
    if threads:
        torch.set_num_threads(threads)
    chosen = choose_device(device)
    report = new_report({"rows": rows, "turns": turns}, chosen)
    if rows is None:
        for classes, features, with_step in ((100, 100, True), (1000, 500, False)):
            views = head_rows(FITTED, classes, features)
            report.add(*decode_ratios(*views, chosen, turns, with_step))
    else:
        with np.load(rows, allow_pickle=False) as found:
            logits = torch.from_numpy(found["logits"][:2])
        order = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(0))
        first, second = logits[:, order[:FITTED]].float()
        report.add(*decode_ratios(first, second, chosen, turns, True))
    show_report(Console(), "decoding", report, out)


if __name__ == "__main__":
    main()
