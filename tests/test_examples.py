"""Every example runs as it stands, and its student learns; Lightning on two ranks as well."""

import importlib.util
import json
import os
from pathlib import Path

import forks
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"plain_pytorch": "torch", "lightning_module": "lightning", "timm_loop": "timm"}
TEACHER = "efficientnet_lite0"
"""No loop, but a teacher: test_pretrained_network.py has it."""
RUN = {
    "plain_pytorch": "example.train(sys.argv[1], 2)",
    # The example's own network takes seconds an epoch; old versions of timm have no smaller one.
    "timm_loop": """example.train(
        sys.argv[1], *(6, name) if example.timm.is_model(name := "test_efficientnet") else (4,)
    )""",
}
SPY = """
import json, sys
import lightning_module as example

seen = [[] for _ in range(4)]  # of each epoch
step = example.Student.training_step

def training_step(self, batch, number):
    seen[self.current_epoch] += batch.samples.tolist()
    return step(self, batch, number)

example.Student.training_step = training_step
top1 = example.train(sys.argv[1], num_epochs=4, devices=2)
print(json.dumps([top1, seen]))
"""


@pytest.fixture
def path_of_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}")


def needed(name: str) -> None:
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")


def test_every_example_is_run_and_described() -> None:
    examples = {path.stem for path in EXAMPLES.glob("*.py")}
    assert examples == {*NEEDS, TEACHER}
    described = (EXAMPLES / "README.md").read_text()
    assert all(f"({name}.py)" in described for name in examples)


@pytest.mark.parametrize(
    "name", ["plain_pytorch", pytest.param("timm_loop", marks=pytest.mark.slow)]
)
@pytest.mark.usefixtures("path_of_examples")
def test_example(name: str, finished_cache: Path, tmp_path: Path) -> None:
    needed(name)
    program = f"import sys, {name} as example; print('top-1', {RUN[name]})"
    done = forks.run(["-c", program, str(finished_cache)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    top1 = float(done.stdout.rsplit("top-1 ", 1)[1])
    assert 0.2 < top1 <= 1  # ten classes
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("path_of_examples")
def test_lightning_on_two_ranks(
    finished_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed("lightning_module")
    monkeypatch.chdir(tmp_path)
    ranks = forks.start_ranks(["-c", SPY, str(finished_cache)], 2)
    ended = [(rank.wait(), rank.stderr) for rank in ranks]
    assert [code for code, _ in ended] == [0, 0], ended
    said = [json.loads(rank.stdout.splitlines()[-1]) for rank in ranks]
    assert all(0.2 < top1 <= 1 for top1, _ in said)  # ten classes
    seen = [samples for _, samples in said]
    for first, second in zip(*seen, strict=True):
        assert len(first) == len(second) > 450
        assert len({*first, *second}) == len(first) + len(second)
    assert seen[0][0] != seen[0][1]
