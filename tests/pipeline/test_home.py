from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli import cli
from pipeline.config import read_yaml
from pipeline.home import expanded


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def test_home_is_put_in_and_all_else_stays(tmp_path: Path) -> None:
    own = ("~", "~/x", "folder:~/x", "hf:~", "--out=~/x y", "data.root=~/x", "--dataset=folder:~/x")
    for text in own:
        assert expanded(text) == text.replace("~", str(tmp_path))
    for text in ("", "a~", "a/~/b", "pad-crop:pad=2", "~nobody-of-this-name/x", "x~y"):
        assert expanded(text) == text


def test_in_arguments_and_in_files(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {dataset: 'folder:~/d', root: ~/r}\nalso: [~/a, b]\n")
    assert read_yaml(tmp_path / "c.yaml") == {
        "data": {"dataset": f"folder:{tmp_path}/d", "root": f"{tmp_path}/r"},
        "also": [f"{tmp_path}/a", "b"],
    }
    answer = CliRunner().invoke(cli, ["inspect", "~/no-such-cache"])
    assert str(tmp_path / "no-such-cache") in str(answer.exception)
