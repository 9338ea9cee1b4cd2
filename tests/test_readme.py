"""The Python of README and docs/ runs as it stands, in a folder that holds the cache it names."""

import contextlib
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from helpers import weights

from pipeline.cli import cli
from stages.objectives.losses import DEFINITIONS

README = Path(__file__).parents[1] / "README.md"
LOSSES = README.parent / "docs" / "losses.md"
CHOICES = (README.parent / "docs" / "commands.md").read_text()
PAGES = [README, *(p for p in sorted(LOSSES.parent.glob("*.md")) if p.name != "cache-format.md")]
BLOCKS = {
    f"{page.name}-{number}": block
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*PAGES, README.parent / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)[)#]", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("name", BLOCKS)
def test_block(
    name: str,
    finished_cache: Path,
    teacher_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(finished_cache, tmp_path / "digits.zarr")
    shutil.copytree(teacher_run, tmp_path / "runs" / "student")  # of the same architecture
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(BLOCKS[name], name, "exec"), found)
    if "load_file" in BLOCKS[name]:
        run = weights(teacher_run)
        assert all(torch.equal(t, run[n]) for n, t in found["student"].state_dict().items())


def value_of(text: str) -> float | str | None:
    """A number; `temperature` and `unset`, where None stands for it; else a word."""
    with contextlib.suppress(ValueError):
        return float(text)
    return None if text in ("temperature", "unset") else text


def table_of_losses() -> dict[str, tuple[float, float, int, dict[str, Any]]]:
    """The page's first table: ce_weight, weight, warmup, parameters of every loss. Where a row is
    of two losses, a semicolon stands between what belongs to each.
    """
    found = {}
    for row in re.findall(r"^\| (`.*) \|$", LOSSES.read_text().split("\n## ")[0], re.MULTILINE):
        names, _, parameters, pairs, warmup, _ = re.split(r"(?<!\\) *\|", row)
        losses = re.findall(r"`(\w+)`", names)
        columns = zip(losses, parameters.split(";"), pairs.split(";"), strict=True)
        for loss, own, pair in columns:
            ce_weight, weight = map(float, pair.split(","))
            values = {k: value_of(v) for k, v in re.findall(r"(\w+)=([\w.]+)", own)}
            assert loss not in found
            found[loss] = (ce_weight, weight, int(warmup or 0), values)
    return found


def test_where_defaults_come_from_names_every_loss() -> None:
    table = LOSSES.read_text().partition("## Where defaults come from")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([\w, ]+) \|", table, re.MULTILINE)
    assert {name for row in rows for name in row.split(", ")} >= set(DEFINITIONS) - {"ce"}


def test_the_table_of_losses_has_their_defaults() -> None:
    expected = {
        name: (loss.ce_weight, loss.weight, loss.warmup, loss.defaults)
        for name, loss in DEFINITIONS.items()
        if name != "ce"  # hard labels alone: no row
    }
    assert table_of_losses() == expected


def test_every_loss_is_named() -> None:
    """On the page of commands and in the help."""
    row = re.search(r"^\| loss \| (.*) \|$", CHOICES, re.MULTILINE)
    (option,) = (o for o in cli.commands["train-student"].params if o.name == "loss_name")
    assert row is not None
    assert isinstance(option, click.Option)
    names = (option.help or "").partition("Names: ")[2].partition(".")[0]
    assert sorted(re.findall(r"`(\w+)`", row[1])) == sorted(DEFINITIONS)
    assert sorted(re.findall(r"\w+", names)) == sorted(DEFINITIONS)


# ---- commands -------------------------------------------------------------------------------


COMMANDS = sorted(
    {
        re.sub(r"\s*\\\n\s*", " ", line)
        .split("  #")[0]
        .split(" > ")[0]
        .removesuffix(" ...")
        .strip()
        for page in PAGES
        for line in re.findall(
            r"^    (pipeline [a-z](?:.*\\\n)*.*)$", page.read_text(), re.MULTILINE
        )
        if not line.endswith("...")  # the rest is left out
    }
)


def test_the_page_of_commands_has_all_of_them() -> None:
    assert {*re.findall(r"^\| `([a-z-]+)` \|", CHOICES, re.MULTILINE)} == {*cli.commands}
    assert all(f"{shell}_source" in CHOICES for shell in ("bash", "zsh", "fish"))
    assert len(COMMANDS) > 12
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_options_that_there_are(command: str) -> None:
    """As a page shows it, it is parsed; `pipeline demo` and the tests of commands run them."""
    name, *arguments = shlex.split(command)[1:]
    cli.commands[name].make_context(name, arguments)
