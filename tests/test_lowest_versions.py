"""What pyproject.toml allows is what `make lowest` installs, and what constraints.txt pins."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
USED = [*PROJECT["dependencies"], *(r for e in EXTRAS if e != "dev" for r in EXTRAS[e])]


def pins(name: str) -> dict[str, Version]:
    text = (ROOT / name).read_text()
    found = re.findall(r"^([A-Za-z][\w.-]*)==(\S+)$", text, re.MULTILINE)
    return {name.lower().replace("_", "-"): Version(pin) for name, pin in found}


def lowest_allowed() -> dict[str, Version]:
    """Of every dependency, and of those of the extras that a user installs."""
    found = {}
    for requirement in map(Requirement, USED):
        (bound,) = requirement.specifier
        assert bound.operator == ">=", f"{requirement} has no lower bound"
        found[requirement.name] = Version(bound.version)
    return found


def test_the_lowest_versions_are_those_of_the_project() -> None:
    assert pins("constraints-lowest.txt") == lowest_allowed()


def test_the_pinned_versions_are_allowed() -> None:
    pinned = pins("constraints.txt")
    for requirement in map(Requirement, {*USED, *EXTRAS["dev"]}):
        assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement


def test_a_dependency_that_is_named_twice_has_one_bound() -> None:
    bounds = {Requirement(r).name: r for r in USED}
    for requirement in EXTRAS["dev"]:
        assert bounds.get(Requirement(requirement).name, requirement) == requirement


def test_make_lowest_has_every_extra_and_tests_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (extras,) = re.findall(r"-e '\.\[([\w,]+)\]' \\\n", makefile)
    assert {*extras.split(","), "dev"} == set(EXTRAS)
    (quick,) = re.findall(r"^QUICK := ((?:.*\\\n)*.*)$", makefile, re.MULTILINE)
    assert all((ROOT / path).exists() for path in quick.replace("\\", "").split())


def test_what_is_installed_is_allowed() -> None:
    for name, bound in lowest_allowed().items():
        assert Version(version(name)) >= bound, name


def test_every_dependency_is_imported() -> None:
    """But numcodecs, of which pyproject.toml says what it is there for."""
    modules = {
        "open-clip-torch": "open_clip",
        "pillow": "PIL",
        "pyyaml": "yaml",
        "tensorboard": r"torch\.utils\.tensorboard",
    }
    sources = [p for part in ("stages", "pipeline") for p in (ROOT / part).rglob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    for name in map(str.lower, lowest_allowed()):
        module = modules.get(name, name)
        pattern = rf"^\s*(?:import|from) {module}\b|(?:import_module|needed)\(\"{module}\""
        assert bool(re.search(pattern, text, re.M)) != (name == "numcodecs"), name
