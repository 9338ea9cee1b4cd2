"""What Tab completes: the names that the stages know, without importing them."""

from pathlib import Path

import pytest
from click.shell_completion import get_completion_class
from helpers import imported, outside
from torchvision.models import list_models

from pipeline import choices
from pipeline.cli import cli
from stages.cache.encoding import ENCODINGS
from stages.inputs.cifar_models import cifar_model_names
from stages.inputs.datasets import SOURCES
from stages.inputs.views import BASES
from stages.inputs.views import ON_TOP as PARTS
from stages.objectives.losses import DEFINITIONS


def test_the_names_are_those_that_the_stages_know() -> None:
    assert set(choices.LOSSES) == set(DEFINITIONS)
    assert set(choices.ENCODINGS) == {"auto", *ENCODINGS}
    assert set(choices.POLICIES) == set(BASES)
    assert set(choices.ON_TOP) == set(PARTS)
    assert {*choices.DATASETS, *choices.TAKEN["dataset"].folders} == set(SOURCES)
    models = {name for name in choices.MODELS if not name.endswith(":")}
    assert models <= {*list_models(), *cifar_model_names()}


def complete(words: str, shell: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a shell is answered to these words; the last one is what was begun."""
    begun = "" if words.endswith(" ") else words.split()[-1]
    monkeypatch.setenv("COMP_WORDS", words)
    # fish has the begun word itself there, the others its number
    monkeypatch.setenv("COMP_CWORD", begun if shell == "fish" else str(len(words.split(" ")) - 1))
    asked = get_completion_class(shell)
    assert asked is not None
    return asked(cli, {}, "pipeline", "_PIPELINE_COMPLETE").complete().splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_values_are_offered(monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    for words, found in {
        "train-student c.zarr --loss t": {"ttm"},
        "train-student c.zarr --dtype b": {"bfloat16"},
        "train-student c.zarr --student resnet32": {"resnet32", "resnet32x4"},
        "cache-teacher --dataset fa": {"fashion-mnist"},
        "cache-teacher --augment none+mix": {"none+mixup"},
        "cache-teacher --weights pre": {"pretrained"},
        "rectify c.zarr --method ": {"pairwise", "swap", "blend"},
        "tra": {"train-student", "train-teacher"},
        "evaluate --da": {"--dataset"},
        "config train-s": {"train-student"},
    }.items():
        text = complete(f"pipeline {words}", shell, monkeypatch)
        values = {part for line in text for part in line.replace("\t", ",").split(",")}
        assert found <= values
        assert "kd" not in values


def test_paths_are_left_to_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, kind in {
        "inspect c": "dir",
        "train-student c --out r": "dir",
        "train-student c --config f": "file",
        "cache-teacher --weights w": "file",
    }.items():
        answer = complete(f"pipeline {words}", "bash", monkeypatch)
        assert answer == [f"{kind},{words.split()[-1]}"]


@pytest.mark.parametrize(
    ("shell", "words", "answer"),
    [
        ("bash", "folder : da", ["plain,data/"]),  # bash takes words apart at a colon
        ("bash", "folder : data/", ["plain,data/images/"]),
        ("zsh", "folder:da", ["folder:data/"]),
        ("fish", "folder:da", ["plain,folder:data/"]),
    ],
)
def test_folders_of_images_are_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str, words: str, answer: list[str]
) -> None:
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data.txt").touch()
    monkeypatch.chdir(tmp_path)
    found = complete(f"pipeline cache-teacher --dataset {words}", shell, monkeypatch)
    assert set(answer) <= {line.replace("\\:", ":") for line in found}
    assert not any("data.txt" in line for line in found)


def test_an_answer_imports_nothing_heavy() -> None:
    asked = {"COMP_WORDS": "pipeline train-student c --loss ", "COMP_CWORD": "4"}
    asked["_PIPELINE_COMPLETE"] = "bash_complete"
    done = outside("-X", "importtime", "-m", "pipeline", **asked)
    assert set(done.stdout.split()) == {f"plain,{name}" for name in choices.LOSSES}
    heavy = {"torch", "torchvision", "zarr", "dask", "numpy", "yaml", "rich", "click"}
    assert imported(done.stderr) & heavy == {"click"}
