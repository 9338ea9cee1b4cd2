"""Every figure on a GPU, in a few minutes: `results/gpu.json` and the table of README.md.

    python -m benchmarks.gpu                      # --device cpu --quick proves the code's path

Teachers and students are larger than on a CPU, where an epoch of them would take minutes.
"""

import click

from benchmarks.suite import PARTS, Suite, run_suite
from benchmarks.worlds import digits, synthetic
from stages.device import choose_device


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--turns", default=9, show_default=True, help="Of students; else 3.")
@click.option("--seconds", default=1.0, show_default=True, help="Longer epochs are cut short.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only these.")
@click.option("--quick", is_flag=True, help="Digits alone, one turn.")
@click.option("--out", default=None, help="JSON; benchmarks/results/gpu.json if left out.")
def main(
    device: str, turns: int, seconds: float, parts: tuple[str, ...], quick: bool, out: str | None
) -> None:
    """Measure everything on a GPU."""
    if device != "cpu":
        choose_device(device)
    elif out is None:
        raise click.UsageError("--device cpu shows that the code runs: give --out FILE.json")
    plans = [digits("bfloat16")]
    if not quick:
        plans += [
            synthetic("resnet9_w32", ("resnet8x4", "resnet9_w8"), "bfloat16", 256),
            synthetic("resnet32x4", ("resnet8x4",), "bfloat16", 256),
        ]
    turns = 1 if quick else turns
    whole = not (quick or parts)
    suite = Suite(plans, device, turns, seconds, quick, whole, accelerated=True)
    run_suite(suite, parts or PARTS, out)


if __name__ == "__main__":
    main()
