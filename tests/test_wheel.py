"""The wheel's configuration against the files that the program reads from beside its code."""

import tomllib
from pathlib import Path

import pipeline
import stages.inputs.datasets

ROOT = Path(__file__).parents[1]
WHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
    "wheel"
]


def test_the_wheel_has_the_program_and_nothing_else() -> None:
    assert {*WHEEL} == {"packages", "force-include"}  # no file of a package is left out
    assert {*WHEEL["packages"]} == {pipeline.__name__, stages.__name__}
    ignored = (ROOT / ".gitignore").read_text().split()
    assert not [name for name in ignored if name.startswith(("*.html", "*.css", "*.js"))]


def test_files_from_outside_the_packages_come_to_lie_where_they_are_read() -> None:
    (place,) = stages.inputs.datasets.__path__
    installed = {ROOT / "data" / "digits.npz": Path(place) / "digits.npz"}
    assert {ROOT / a: ROOT / b for a, b in WHEEL["force-include"].items()} == installed
    assert all(path.is_file() for path in installed)
