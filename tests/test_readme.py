"""README's Python runs as it stands, in a folder that holds the cache it names."""

import re
import shutil
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_are_blocks_to_run() -> None:
    assert len(BLOCKS) >= 2
    assert len(BLOCKS[0].splitlines()) <= 18


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block(
    block: str, finished_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished_cache, tmp_path / "digits.zarr")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
