"""Everything on a GPU, in bounded parts: does it work, and how fast is it?

    python -m benchmarks.gpu --smoke             does it work; under 90 seconds
    python -m benchmarks.gpu --seconds 150       how fast, as far as time allows
    python -m benchmarks.gpu --device cpu --quick --out FILE.json    a rehearsal, also of --smoke

The most important parts come first. Each prints a line and is added to results/gpu.json as soon as
it is done; given again, the command goes on with what is missing for this device and these sources.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.book import RATES_RUN, SMOKE_RUN, Book, Result
from benchmarks.parts import Part, Where, run_parts, this_run
from benchmarks.rates import RATES, REHEARSED
from benchmarks.smoke import SMOKE
from benchmarks.table import RESULTS, write_table

GPU = RESULTS / "gpu.json"


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--smoke", is_flag=True, help="Only whether everything works.")
@click.option("--quick", is_flag=True, help="Tiny sizes and one turn: a rehearsal.")
@click.option("--part", "wanted", multiple=True, help="Only parts whose name contains this.")
@click.option("--seconds", default=900.0, show_default=True, help="For all parts together.")
@click.option("--again", is_flag=True, help="Also what is there already.")
@click.option("--list", "listing", is_flag=True, help="Names and limits; nothing is run.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help=f"Instead of {GPU}.")
def main(
    device: str,
    smoke: bool,
    quick: bool,
    wanted: tuple[str, ...],
    seconds: float,
    again: bool,
    listing: bool,
    out: Path | None,
) -> None:
    """Show that everything works on a GPU, or measure how fast it is."""
    every = SMOKE if smoke else REHEARSED if quick else RATES
    chosen = [part for part in every if not wanted or any(word in part.name for word in wanted)]
    if listing:
        for part in chosen:
            click.echo(f"{part.limit:5.0f} s  {part.name}")
        return
    if out is None and (quick or device == "cpu"):
        raise click.UsageError("a rehearsal replaces no results: give --out FILE.json")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        where = Where(device, Path(folder), quick)
        try:
            book = Book(out or GPU, this_run(_kind(smoke, quick), where))
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
        failed = measure(chosen, where, book, seconds, again)
    if out is None and not smoke:
        write_table()
    sys.exit(min(1, failed))


def _kind(smoke: bool, quick: bool) -> str:
    return (SMOKE_RUN if smoke else RATES_RUN) + (", quick" if quick else "")


def measure(
    chosen: Sequence[Part], where: Where, book: Book, seconds: float, again: bool = False
) -> int:
    """Run the parts that are not in the book, or all of them; how many failed."""
    done = set() if again else book.done
    if known := [part for part in chosen if part.name in done]:
        click.echo(f"{len(known)} of {len(chosen)} parts are in {book.path} already")
    click.echo(f"on {book.run.machine['device']}, torch {book.run.versions['torch']}")

    def keep(result: Result) -> None:
        book.add(result)
        click.echo(result.line)

    results = run_parts([p for p in chosen if p.name not in done], where, keep, seconds)
    states = [result.state for result in results]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    click.echo(f"{sum(r.seconds for r in results):.0f} s in all: {counts or 'nothing to do'}")
    return states.count("failed")


if __name__ == "__main__":
    main()
