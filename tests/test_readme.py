"""README's Python runs as it stands, in a folder that holds the cache it names."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import weights

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_there_are_blocks_to_run() -> None:
    assert len(BLOCKS) >= 2
    assert len(BLOCKS[0].splitlines()) <= 18


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block(
    block: str,
    finished_cache: Path,
    teacher_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(finished_cache, tmp_path / "digits.zarr")
    shutil.copytree(teacher_run, tmp_path / "runs" / "student")  # of the same architecture
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), found)
    if "load_file" in block:
        run = weights(teacher_run)
        assert all(torch.equal(t, run[n]) for n, t in found["student"].state_dict().items())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    """What README gives the shell to evaluate is a script, and it answers."""
    assert f"_PIPELINE_COMPLETE={shell}_source" in TEXT or f"`{shell}_source`" in TEXT
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("click asks bash for its version")
    script = completion({"_PIPELINE_COMPLETE": f"{shell}_source"})
    assert "_PIPELINE_COMPLETE=" in script
    assert "pipeline" in script


def test_completion_of_commands_and_options() -> None:
    asked = {"_PIPELINE_COMPLETE": "bash_complete", "COMP_CWORD": "1", "COMP_WORDS": "pipeline tra"}
    assert completion(asked).split() == ["plain,train-student", "plain,train-teacher"]
    words = {"COMP_WORDS": "pipeline evaluate --da", "COMP_CWORD": "2"}
    assert completion(asked | words).split() == ["plain,--dataset"]


def completion(environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline"],
        env=os.environ | environment,
        cwd=README.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
