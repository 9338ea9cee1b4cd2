"""Where a setting comes from, and what a wrong one is told."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import keys_of, read_config
from stages.errors import ConfigError, PipelineError
from stages.settings import (
    DataSettings,
    ModelSettings,
    RectifyConfig,
    StudentConfig,
    TeacherConfig,
    TrainSettings,
)
from stages.train_teacher import train_teacher

NEEDED = {"data.dataset": "digits", "model.architecture": "resnet8"}


def teacher(
    tmp_path: Path, text: str | None = None, flags: dict[str, Any] | None = None, *overrides: str
) -> TeacherConfig:
    """A teacher's configuration from a file of this text, flags and --set."""
    file = None
    if text is not None:
        file = str(tmp_path / "given.yaml")
        Path(file).write_text(text)
    return read_config(TeacherConfig, file, NEEDED | (flags or {}), overrides)


# ---- what comes later wins ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "flags", "overrides", "lr"),
    [
        (None, {}, [], TrainSettings().lr),
        ("train: {lr: 0.2}", {}, [], 0.2),
        ("train: {lr: 0.2}", {"train.lr": None}, [], 0.2),
        ("train: {lr: 0.2}", {"train.lr": 0.3}, [], 0.3),
        ("train: {lr: 0.2}", {"train.lr": 0.3}, ["train.lr=0.4"], 0.4),
        ("train: {lr: 0.2}", {}, ["train.lr=0.4", "train.lr=0.5"], 0.5),
        (None, {}, ["train.lr=1e-4"], 1e-4),
        ("train: {lr: 1e-4}", {}, [], 1e-4),  # YAML 1.1 reads a string there
        ("train: {lr: .1e-3}", {}, [], 1e-4),
        ("train: {lr: 1}", {}, [], 1.0),
    ],
)
def test_what_comes_later_wins(
    tmp_path: Path, text: str | None, flags: dict[str, Any], overrides: list[str], lr: float
) -> None:
    found = teacher(tmp_path, text, flags, *overrides)
    assert found.train.lr == lr
    assert isinstance(found.train.lr, float)
    assert found.train.momentum == TrainSettings().momentum  # the section's rest stays


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.milestones=[1, 2]", "train", "milestones", (1, 2)),
        ("train.milestones=[]", "train", "milestones", ()),
        ("train.nesterov=true", "train", "nesterov", True),
        ("train.optimizer=adamw", "train", "optimizer", "adamw"),
        ("model.mean=[0.5]", "model", "mean", (0.5,)),
        ("model.mean=null", "model", "mean", None),
        ("model.init=null", "model", "init", None),
        ("model.init=123", "model", "init", "123"),  # a name, though YAML sees a number
        ("model.init=a=b.pt", "model", "init", "a=b.pt"),
        ("data.root=no", "data", "root", "no"),
        ("data.dataset=folder:/a: b", "data", "dataset", "folder:/a: b"),
    ],
)
def test_set_reaches_every_type(
    tmp_path: Path, override: str, section: str, key: str, value: object
) -> None:
    assert getattr(getattr(teacher(tmp_path, None, {}, override), section), key) == value


def test_every_key_can_be_set(tmp_path: Path) -> None:
    keys = set(keys_of(TeacherConfig))
    assert {"train.epochs", "train.batch_size", "train.lr", "seed.data", "seed.init"} <= keys
    everything = teacher(tmp_path, None, {})
    leaves = {key for key in keys if "." in key} | {"augment", "device"}
    for key in leaves:
        value: Any = everything
        for part in key.split("."):
            value = getattr(value, part)
        text = "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
        assert teacher(tmp_path, None, {}, f"{key}={text}") == everything


def test_flags_fill_sections_that_the_file_leaves_out(tmp_path: Path) -> None:
    found = teacher(tmp_path, "augment: none", {"train.epochs": 3, "seed.init": 5})
    assert (found.augment, found.train.epochs, found.seed.init, found.seed.data) == (
        "none",
        3,
        5,
        0,
    )


# ---- what is wrong --------------------------------------------------------------------------


def bomb(level: str, seed: str = "[1]") -> str:
    """YAML of a few lines whose aliases stand for 2^30 values."""
    lines = [f"a0: &a0 {seed}"]
    lines += [f"a{n}: &a{n} {level.format(f'a{n - 1}', n)}" for n in range(1, 31)]
    return "\n".join(lines)


WRONG_TEXT = {
    "unknown-key": ("train: {lrr: 1}", "unknown key 'train.lrr'; did you mean 'train.lr'?"),
    "unknown-section": ("trian: {lr: 1}", "unknown key 'trian'; did you mean 'train'?"),
    "nothing-near": ("xyzzy: 1", "unknown key 'xyzzy'"),
    "wrong-type": ("train: {epochs: many}", r"train\.epochs: .*expected 'int', got 'str'"),
    "wrong-choice": (
        "train: {optimizer: lion}",
        r"train\.optimizer: .*lion.*\(one of sgd, adam, adamw\)",
    ),
    "value-for-a-section": ("train: 5", r"train: expected 'object', got 'int'"),
    "section-for-a-value": ("train: {lr: {x: 1}}", r"unknown key 'train\.lr\.x'"),
    "own-check": ("train: {lr: -1}", r"^train\.lr must be positive, was -1"),
    "own-check-nan": ("train: {lr: .nan}", r"^train\.lr must be positive, was nan"),
    "not-yaml": ("train: [1, 2", "given.yaml is not YAML"),
    "control-character": ("train: \x07", "given.yaml is not YAML"),
    "given-twice": (
        "train: {lr: 1}\nseed: {data: 1}\ntrain: {epochs: 2}",
        r"given.yaml: 'train' in line 3 is given twice",
    ),
    "a-key-that-is-a-number": ("1: 2", "the key 1 is not a text"),
    "a-list": ("- 1\n- 2", "does not hold keys and values"),
    "a-word": ("hello", "does not hold keys and values"),
    "empty": ("", "does not hold keys and values"),
    "5000-deep": ("train: " + "[" * 5000 + "]" * 5000, "given.yaml is nested too deeply"),
    "5000-digits": (f"seed: {{data: {'9' * 5000}}}", "a value that cannot be read"),
    "no-date": ("train: {lr: 2001-13-45}", "a value that cannot be read"),
    "no-number": ("train: {lr: !!float ''}", "a value that cannot be read"),
    "a-bomb-of-lists": (bomb("[*{0}, *{0}]"), "its aliases stand for more than 100,000 values"),
    "a-bomb-of-keys": (
        bomb("{{? a{1} : 1, ? <<  : [*{0}, *{0}]}}", "{a: 1}"),
        "its aliases stand for more than 100,000 values",
    ),
    "a-circle": ("train: &a [*a]", "its aliases stand for more than 100,000 values"),
    "tabs": ("train:\n\tlr: 1", "given.yaml is not YAML"),
    "a-megabyte": ("# " + "x" * 2**20, "has more than 1,048,576 bytes"),
    "given-twice-below": ("train: {lr: 1, lr: 2}", "'lr' in line 1 is given twice"),
    "nan-in-a-list": ("model: {mean: [.nan]}", r"model\.mean must be finite, was"),
    "80-bits": (f"train: {{epochs: {10**23}}}", r"train\.epochs must be"),
    "a-long-key": ("? " + "x" * 5000 + "\n: 1", r"unknown key 'x{200}\.\.\.'"),
}
WRONG_SET = {
    "unknown-key": ("train.lrr=1", "unknown key 'train.lrr'; did you mean 'train.lr'?"),
    "unknown-top": ("agument=none", "did you mean 'augment'?"),
    "no-equals": ("train.lr", "--set train.lr has no '='"),
    "no-key": ("=1", "unknown key ''"),
    "wrong-type": ("train.epochs=many", r"train\.epochs: .*expected 'int', got 'str'"),
    "half-an-epoch": ("train.epochs=1.5", r"train\.epochs: .*expected 'int', got 'float'"),
    "wrong-choice": ("train.schedule=step", r"train\.schedule: .*one of constant, multistep"),
    "wrong-element": ("model.mean=[a]", r"model\.mean\[0\]: expected 'float', got 'str'"),
    "own-check": ("train.epochs=0", r"^train\.epochs must be positive, was 0"),
    "inside-a-value": ("train.lr.x=1", r"unknown key 'train\.lr\.x'"),
    "value-for-a-section": ("train=5", r"train: expected 'object', got 'int'"),
    "null": ("train.lr=null", r"train\.lr: expected 'float', got 'null'"),
    "5000-deep": ("train.lr=" + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "5000-digits": ("train.epochs=" + "9" * 5000, "a value that cannot be read"),
    "a-long-value": ("train.optimizer=" + "x" * 5000, r"train\.optimizer: .*x\.\.\."),
    "80-bits": (f"train.epochs={10**23}", r"train\.epochs must be"),
    "a-key-of-5000-parts": (".".join("x" * 5000) + "=1", "unknown key"),
}


def one_clear_error(error: PipelineError) -> None:
    lines = str(error).splitlines()
    assert 1 <= len(lines) <= 3
    assert "Traceback" not in str(error)
    assert len(str(error)) < 600
    assert "`" not in error.cause
    assert "$" not in error.cause


@pytest.mark.parametrize(("text", "message"), WRONG_TEXT.values(), ids=WRONG_TEXT)
def test_a_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        teacher(tmp_path, text)
    one_clear_error(told.value)


@pytest.mark.parametrize(("override", "message"), WRONG_SET.values(), ids=WRONG_SET)
def test_a_wrong_set(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        teacher(tmp_path, None, {}, override)
    one_clear_error(told.value)


@pytest.mark.parametrize("value", ["{", "[1, 2", "a: b: c", "@x", "%"])
def test_a_set_that_is_not_yaml(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"--set train\.lr=.* is not YAML: ") as told:
        teacher(tmp_path, None, {}, f"train.lr={value}")
    one_clear_error(told.value)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff\xfe\x80\x81")
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a text file") as told:
        read_config(TeacherConfig, str(tmp_path / "model.safetensors"), NEEDED, [])
    one_clear_error(told.value)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_file_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "nowhere.yaml"
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(TeacherConfig, str(path), NEEDED, [])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model.architecture": "resnet8"}, "'data.dataset' is missing"),
        ({"data.dataset": "digits"}, "'model.architecture' is missing"),
    ],
)
def test_what_is_missing_is_named_with_the_way_to_give_it(
    flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        read_config(TeacherConfig, None, flags, [])
    assert "--set" in told.value.remedy
    one_clear_error(told.value)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize(
    "key", ["loss.weight", "loss.temperature", "train.lr", "train.weight_decay", "train.gamma"]
)
def test_numbers_are_finite(key: str, value: str) -> None:
    """JSON and float() take them; a run would only tell after its first epoch."""
    flags = NEEDED | {"cache": "c.zarr"}
    with pytest.raises(ConfigError, match=rf"^{key} must be .*, was {value}$"):
        read_config(StudentConfig, None, flags, [f"{key}={value}"])


def test_a_structs_own_error_keeps_its_remedy() -> None:
    with pytest.raises(ConfigError, match="not defined for the method 'blend'") as told:
        read_config(RectifyConfig, None, {"space": "logit", "method": "blend"}, [])
    assert told.value.remedy.startswith("Use --method pairwise")


def test_a_flag_below_a_value_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'train' holds keys, not the value 5"):
        teacher(tmp_path, "train: 5", {"train.lr": 0.1})


# ---- a run's own configuration --------------------------------------------------------------


def test_a_runs_configuration_can_be_given_back(tmp_path: Path) -> None:
    config = TeacherConfig(
        data=DataSettings(dataset="digits"),
        model=ModelSettings(architecture="resnet8", mean=(0.25,), std=(0.5,)),
        augment="pad-crop:pad=1",
        train=TrainSettings(epochs=1, batch_size=500, lr=1e-4, milestones=(3, 4)),
        device="cpu",
    )
    train_teacher(config, tmp_path / "run")
    kept = tmp_path / "run" / "config.yaml"
    assert yaml.safe_load(kept.read_text())["kind"] == "teacher"
    again = read_config(TeacherConfig, str(kept), {}, [])
    assert again == config
    assert read_config(TeacherConfig, str(kept), {"train.epochs": 9}, []).train.epochs == 9
    with pytest.raises(ConfigError, match="unknown key 'augment'"):
        read_config(StudentConfig, str(kept), {"cache": "c.zarr"}, [])
