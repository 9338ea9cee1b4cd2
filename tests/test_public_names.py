"""`from stages import ...`: every public name, and no torch before one is asked for."""

import importlib
import subprocess
import sys

import stages


def test_every_public_name_is_the_one_of_its_module() -> None:
    found = {name: getattr(stages, name) for name in stages.__all__}
    assert {*found} <= {*dir(stages)}
    for name, value in found.items():
        module = importlib.import_module(getattr(value, "__module__", "stages.objectives.losses"))
        assert module.__name__.startswith("stages")
        assert name == "LOSSES" or getattr(module, name) is value
    assert not hasattr(stages, "LogitCash")


def test_importing_the_package_loads_no_torch() -> None:
    program = "import stages, stages.settings, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
