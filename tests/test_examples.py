"""Every example runs as it stands, and its student learns."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"plain_pytorch": "torch", "lightning_module": "lightning", "timm_loop": "timm"}


def test_every_example_is_run_and_described() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == NEEDS.keys()
    described = (EXAMPLES / "README.md").read_text()
    assert all(f"({name}.py)" in described for name in NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_example(name: str, finished_cache: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    program = f"import sys, {name}; print(f'top-1 {{{name}.train(sys.argv[1], 4):.3f}}')"
    done = subprocess.run(
        [sys.executable, "-c", program, str(finished_cache)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    top1 = float(done.stdout.rsplit("top-1 ", 1)[1])
    assert 0.2 < top1 <= 1  # ten classes
    assert not list(tmp_path.iterdir())
