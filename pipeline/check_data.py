"""`pipeline check-data`: what is wrong with a dataset's images, as a table and a line each."""

from pipeline.arguments import CheckDataSettings
from pipeline.console import Console, counted
from stages.check_data import KINDS, check_data, write_skip_list
from stages.errors import ConfigError


def amount_of(check: str) -> int | None:
    """How many images of a split `--check` asks for: None for all. Raises ConfigError."""
    if check == "all":
        return None
    if not check.isdecimal() or not 0 < int(check) < 2**31:
        raise ConfigError(f"--check {check} is no number of images", "Give all, or a number.")
    return int(check)


def run_check_data(console: Console, settings: CheckDataSettings) -> bool:
    """Show what was found, and write the skip list; return whether no image is broken."""
    dataset, amount = settings.dataset, amount_of(settings.check)
    checked = check_data(dataset, settings.root, settings.workers, amount, console, settings.test)
    for finding in checked.findings:
        console.say(f"{finding.kind}: {finding.name}: {finding.what}")
    splits = [*checked.images]
    counts = [(kind, *(f"{checked.count(split, kind):,}" for split in splits)) for kind in KINDS]
    looked_at = ("images looked at", *(f"{count:,}" for count in checked.images.values()))
    console.table(dataset, ["", *splits], [looked_at, *counts])
    broken, file = checked.broken, settings.skip_out
    if file and broken:
        new = write_skip_list(file, broken)
        console.say(f"\n{file}: {counted(new, 'image')} more. Use it with --skip {file}.")
    elif broken:
        console.say("\nReplace the broken images, or write a skip list with --skip-out FILE.")
    elif file:
        console.say(f"\nno image is broken: {file} is not written")
    return not broken
