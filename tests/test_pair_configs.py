"""The CIFAR-100 recipes in results/: read by the real reader, their losses and models real."""

from pathlib import Path

import msgspec
import pytest

from pipeline.config import read_config
from pipeline.sweep.grid import expand, read_sweep
from stages.inputs.cifar_models import cifar_model_names
from stages.settings import StudentConfig, TeacherConfig, TrainSettings
from stages.training.objective import student_loss

PAIRS = Path(__file__).parents[1] / "results" / "cifar100" / "pairs"
SWEEPS = sorted(PAIRS.glob("*-*.yaml"))
LIGHT = {"ShuffleV1", "ShuffleV2", "mobile_half"}
OFFICIAL = TrainSettings(
    epochs=240,
    batch_size=64,
    optimizer="sgd",
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="multistep",
    milestones=(150, 180, 210),
    gamma=0.1,
)
BETA = {  # mdistiller's configurations; resnet110-resnet20 has none
    ("resnet32x4", "resnet8x4"): 8,
    ("resnet32x4", "ShuffleV1"): 8,
    ("resnet32x4", "ShuffleV2"): 8,
    ("ResNet50", "mobile_half"): 8,
    ("wrn_40_2", "ShuffleV1"): 8,
    ("wrn_40_2", "wrn_16_2"): 6,
    ("wrn_40_2", "wrn_40_1"): 6,
    ("vgg13", "vgg8"): 6,
    ("vgg13", "mobile_half"): 6,
    ("resnet56", "resnet20"): 2,
    ("resnet110", "resnet32"): 2,
    ("resnet110", "resnet20"): 2,
}


def test_the_single_recipes_are_the_official_one() -> None:
    teacher = read_config(
        TeacherConfig, str(PAIRS / "teacher.yaml"), {"model.architecture": "vgg13"}, ()
    )
    flags = {"model.architecture": "vgg8", "cache": "vgg13.zarr"}
    student = read_config(StudentConfig, str(PAIRS / "student.yaml"), flags, ())
    assert teacher.train == student.train == OFFICIAL
    assert teacher.augment == "pad-crop-flip"
    assert teacher.data.dataset == student.data.dataset == "cifar100"


def test_every_pair_is_there_and_described() -> None:
    assert {tuple(path.stem.split("-")) for path in SWEEPS} == BETA.keys()
    assert {name for pair in BETA for name in pair} <= {*cifar_model_names()}
    described = (PAIRS / "README.md").read_text()
    for path in SWEEPS:
        teacher, student = path.stem.split("-")
        assert f"[{teacher} → {student}]({path.name})" in described
        assert f"| `{teacher}` |" in described


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_trains_its_pair_as_published(path: Path) -> None:
    teacher, student = path.stem.split("-")
    sweep = read_sweep(path)
    runs = expand(sweep)
    assert sweep.out == f"runs/pairs/{path.stem}"
    assert len(runs) == 3 * len(sweep.runs)
    lr = 0.01 if student in LIGHT else 0.05
    for run in runs:
        assert run.config.cache == f"runs/pairs/{teacher}.zarr"
        assert run.config.model.architecture == student
        assert run.config.data.dataset == "cifar100"
        assert run.config.train == msgspec.structs.replace(OFFICIAL, lr=lr)
    losses = {run.label: student_loss(run.config.loss).settings for run in runs}
    assert (losses["KD"].ce_weight, losses["KD"].weight) == (0.1, 0.9)
    assert losses["KD"].temperature == losses["DKD"].temperature == 4
    assert losses["DIST"].temperature == 4
    assert losses["DKD"].beta == BETA[teacher, student]
    assert (losses["DKD"].alpha, losses["DKD"].warmup, losses["DKD"].ce_weight) == (1, 20, 1)
    assert {label for label in losses if losses[label].standardise} == {
        label for label in losses if label.endswith("+LS")
    }
    modes = {run.label: run.config.bias.mode for run in runs}
    assert {label for label in modes if modes[label] != "none"} == {"KD, bias-aware"}
