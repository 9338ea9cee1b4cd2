"""The experiment of results/cifar100/gpu: its arithmetic, its files, and a rehearsal."""

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from benchmarks.book import RATES_RUN, Result, Run
from benchmarks.measure import Figure
from pipeline.config import read_config
from pipeline.console import Console
from results.cifar100.gpu import carry, experiment, run
from results.cifar100.gpu.experiment import Experiment
from results.cifar100.gpu.plan import SIZES, Rates, Size, Work, plan
from stages.device import choose_device, device_name
from stages.errors import ConfigError
from stages.settings import CacheConfig, StudentConfig, TeacherConfig
from stages.training.objective import student_loss

FAST = Rates(teacher=15_000, views=45_000, students=200_000, alone=60_000)
WORK = Work(50_000, 10_000, {0: 6, 1: 6, 2: 6})
NAMES = {
    "resnet32x4, batch 128: trained on hard labels, training images": 9_000.0,
    "resnet32x4, batch 128: captured, trained on hard labels, training images": 15_000.0,
    "resnet32x4, 32 px: stage one, training images": 45_000.0,
    "resnet8x4, batch 128: 8 students together, training images of all": 200_000.0,
    "resnet8x4, batch 64: cached student, training images": 60_000.0,
}


def book(device: str, names: dict[str, float]) -> Run:
    figures = [Figure(name=name, value=value, unit="images/s") for name, value in names.items()]
    parts = [Result(name="all", state="ok", seconds=1, figures=figures)]
    return Run(kind=RATES_RUN, machine={"device": device}, versions={}, code="", parts=parts)


def nothing(piece: str) -> bool:
    return False


def test_seconds_by_hand() -> None:
    seconds = WORK.pieces(Size(60, 162, 30), FAST)
    images = 50_000 + 10_000 / 3
    assert seconds["teacher"] == pytest.approx(1.15 * 60 * images / 15_000 + 10)
    caching = (162 * 50_000 + 10_000) / 45_000 + 162 * 0.15
    assert seconds["cache"] == pytest.approx(1.15 * caching + 10)
    assert seconds["seed 2"] == pytest.approx(1.15 * 6 * 30 * images / 200_000 + 10)
    assert seconds["full"] == pytest.approx(1.15 * 240 * images / 60_000 + 10)
    assert list(seconds) == ["teacher", "cache", "seed 0", "seed 1", "seed 2", "full"]


@pytest.mark.parametrize("minutes", [5, 8, 12, 20, 60])
def test_the_largest_size_that_fits(minutes: float) -> None:
    def seconds(size: Size) -> float:
        return 30 + sum(s for n, s in WORK.pieces(size, FAST).items() if n != "full")

    fits = [size for size in SIZES if seconds(size) <= 60 * minutes]
    if not fits:
        with pytest.raises(ConfigError):
            plan(WORK, FAST, nothing, 60 * minutes)
        return
    planned = plan(WORK, FAST, nothing, 60 * minutes)
    assert planned.size == fits[0]
    assert planned.total <= 60 * minutes


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    """And what is done takes nothing."""
    with pytest.raises(ConfigError) as caught:
        plan(WORK, FAST, nothing, 60)
    minutes = float(caught.value.cause.split("takes ")[1].split()[0])
    assert plan(WORK, FAST, nothing, 60 * (minutes + 0.1)).size == SIZES[-1]
    done = {"teacher", "cache", "seed 0"}
    planned = plan(WORK, FAST, done.__contains__, 1e6, [Size(60, 162, 30)])
    assert list(planned.seconds) == ["seed 1", "seed 2", "full"]
    everyone = {"teacher", "seed 0", "seed 1", "seed 2", "full"}
    assert not plan(WORK, FAST, everyone.__contains__, 1e6).seconds  # no cache for nobody


def test_rates_are_those_of_the_device() -> None:
    slow = dict.fromkeys(NAMES, 1.0)
    runs = [book("H100", slow), book("H100", NAMES), book("other", slow)]
    assert Rates.of(runs, "H100") == FAST
    for text in ("60", "60,162,0", "60,162,x", ""):
        with pytest.raises(ConfigError):
            Size.parse(text)
    with pytest.raises(ConfigError, match="no rates of H200 are known"):
        Rates.of(runs, "H200")
    with pytest.raises(ConfigError, match="of views"):
        Rates.of([book("H100", {n: v for n, v in NAMES.items() if "stage one" not in n})], "H100")


def test_the_files_are_of_one_experiment() -> None:
    here = Experiment(Path("runs/gpu"), "cifar100", "cpu", 3, False, Console(), Size(60, 162, 30))
    assert (len(here.runs), here.left) == (18, {0: 6, 1: 6, 2: 6})
    for each in here.runs:
        assert student_loss(each.config.loss).settings.name == each.config.loss.name
        assert each.config.train.epochs == 30
        assert not each.config.train.capture  # on this device
    modes = {(r.config.loss.name, r.config.bias.mode) for r in here.runs}
    of_kd = {("kd", mode) for mode in ("none", "eliminate", "rectify", "correct")}
    assert modes == of_kd | {("ce", "none"), ("dkd", "none")}
    teacher, cache, full = (
        read_config(kind, str(experiment.HERE / f"{name}.yaml"), {}, [])
        for kind, name in (
            (TeacherConfig, "teacher"),
            (CacheConfig, "cache"),
            (StudentConfig, "full"),
        )
    )
    assert teacher.augment == cache.augment
    assert (cache.views, full.train.epochs, full.train.batch_size) == (162, 240, 64)


def test_what_is_carried(tmp_path: Path) -> None:
    """A finished student without its weights, no other one; the teacher with them; no cache."""
    work, file = tmp_path / "work", tmp_path / "carry.tar"
    there = {
        "size.txt": True,
        "teacher/model.safetensors": True,
        "teacher/last.pt": True,  # it is not finished
        "students/table.md": True,
        "students/KD-s0/config.yaml": False,
        "students/KD-s0/last.pt": False,
        "cache.zarr/zarr.json": False,
    }
    for name in there:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    carry.pack(work, file)
    carry.unpack(file, tmp_path / "other")
    found = {str(p.relative_to(tmp_path / "other")) for p in (tmp_path / "other").rglob("*.*")}
    assert {n for n in found if (tmp_path / "other" / n).is_file()} == {
        n for n in there if there[n]
    }
    (tmp_path / "other" / "size.txt").write_text("mine")
    carry.unpack(file, tmp_path / "other")  # something was begun there
    assert (tmp_path / "other" / "size.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_rehearsal_goes_on_elsewhere(tmp_path: Path) -> None:
    rates, tar = tmp_path / "rates.json", tmp_path / "carry.tar"
    names = dict.fromkeys(NAMES, 100.0)
    rates.write_bytes(msgspec.json.encode([book(device_name(choose_device("cpu")), names)]))

    def launch(work: str, *more: str) -> str:
        words = [
            *("--rehearse", "--device", "cpu", "--rates", str(rates), "--seeds", "1"),
            *("--work", str(tmp_path / work), "--carry", str(tar), "--minutes", "60", *more),
        ]
        found = CliRunner().invoke(run.main, words)
        assert found.exit_code == 0, found.output
        return found.output

    first = launch("one", "--size", "1,2,1")
    assert [line for line in first.splitlines() if line.startswith("== ")] == [
        *("== teacher", "== cache", "== seed 0", "== full")
    ]
    table = (tmp_path / "one" / "students" / "table.md").read_text()
    for label in ("hard labels", "KD", "DKD", "KD, eliminate", "KD, rectify", "KD, correct"):
        assert f"| {label} |" in table
    assert "== " not in launch("two")  # all of it came along
    assert (tmp_path / "two" / "students" / "table.md").read_text() == table
