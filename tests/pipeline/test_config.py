"""Where a setting comes from, what is declared about it, and what a wrong one is told."""

import operator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from click.testing import CliRunner

from pipeline.cli import cli
from pipeline.config import flat, read_config
from stages.errors import ConfigError, PipelineError, RunError
from stages.schema import Settings, settings_of
from stages.settings import CONFIGS, StudentConfig, TeacherConfig, TrainSettings
from stages.training.run_folder import check_same

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


@pytest.mark.parametrize(
    ("text", "flags", "overrides", "lr"),
    [
        (None, {}, [], TrainSettings().lr),
        ("train: {lr: 0.2}", {}, [], 0.2),
        ("train: {lr: 0.2}", {"train.lr": 0.3}, [], 0.3),
        ("train: {lr: 0.2}", {"train.lr": 0.3}, ["train.lr=0.4"], 0.4),
        ("train: {lr: 0.2}", {}, ["train.lr=0.4", "train.lr=0.5"], 0.5),
        (None, {}, ["train.lr=1e-4"], 1e-4),
        ("train: {lr: 1e-4}", {}, [], 1e-4),  # YAML 1.1 reads a string there
        ("train: {lr: 1}", {}, [], 1.0),
        ("train:\nmodel: {init: null}", {}, [], TrainSettings().lr),
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
    ("override", "value"),
    [
        ("train.milestones=[1, 2]", (1, 2)),
        ("train.nesterov=true", True),
        ("train.optimizer=adamw", "adamw"),
        ("model.mean=[0.5]", (0.5,)),
        ("model.mean=null", None),
        ("model.init=123", "123"),  # a name, though YAML sees a number
        ("model.init=a=b.pt", "a=b.pt"),
        ("data.dataset=folder:/a: b", "folder:/a: b"),
    ],
)
def test_set_reaches_every_type(tmp_path: Path, override: str, value: object) -> None:
    key = override.partition("=")[0]
    assert operator.attrgetter(key)(teacher(tmp_path, None, {}, override)) == value


@pytest.mark.parametrize("command", CONFIGS)
def test_config_prints_what_a_command_takes_back(tmp_path: Path, command: str) -> None:
    """Every key, with its default; what is required has no value, and may be given beside."""
    kind, settings = CONFIGS[command], settings_of(CONFIGS[command])
    text = CliRunner().invoke(cli, ["config", command]).output
    assert all(len(line) <= 100 for line in text.splitlines())
    (tmp_path / "c.yaml").write_text(text)
    assert set(flat(yaml.safe_load(text))) == set(settings)
    needed: dict[str, Any] = {key: "x" for key, s in settings.items() if s.required}
    if needed:
        with pytest.raises(ConfigError, match="is missing"):
            read_config(kind, str(tmp_path / "c.yaml"), {}, [])
    needed |= {"views": 3} if "views" in needed else {}
    found = read_config(kind, str(tmp_path / "c.yaml"), needed, [])
    assert found == read_config(kind, None, needed, [])
    for setting in settings.values():
        assert setting.text
        assert " ".join(setting.text.split()) in " ".join(text.replace("# ", "").split())
        assert all(choice in text for choice in setting.choices)


@pytest.mark.parametrize("kind", CONFIGS.values())
def test_every_number_is_held_within_its_bounds(kind: type[Settings]) -> None:
    needed = {"data.dataset": "d", "model.architecture": "m", "cache": "c", "views": 3}
    needed = {key: value for key, value in needed.items() if key in settings_of(kind)}
    for key, setting in settings_of(kind).items():
        outside = {
            "above": lambda bound: bound,
            "below": lambda bound: bound,
            "least": lambda bound: bound - 1,
            "most": lambda bound: bound + 1,
        }
        for name, bound in setting.bounds.items():
            with pytest.raises(ConfigError, match=key):
                read_config(kind, None, needed | {key: outside[name](bound)}, [])
            if name in ("least", "most"):
                read_config(kind, None, needed | {key: bound}, [])


def test_a_run_from_before_a_setting_goes_on() -> None:
    now = msgspec.to_builtins(read_config(StudentConfig, None, NEEDED | {"cache": "c.zarr"}, []))
    before = now | {"loss": {k: v for k, v in now["loss"].items() if k != "parameters"}}
    check_same(Path("run"), now, before)
    other = now | {"loss": now["loss"] | {"alpha": 2.0}}
    with pytest.raises(RunError, match=r"loss\.alpha"):
        check_same(Path("run"), other, before)


def bomb(level: str, seed: str = "[1]") -> str:
    """YAML of a few lines whose aliases stand for 2^30 values."""
    lines = [f"a0: &a0 {seed}"]
    lines += [f"a{n}: &a{n} {level.format(f'a{n - 1}', n)}" for n in range(1, 31)]
    return "\n".join(lines)


WRONG_TEXT = {
    "unknown-key": ("train: {lrr: 1}", r"'train\.lrr'.*'train\.lr'"),
    "nothing-near": ("xyzzy: 1", "'xyzzy'"),
    "wrong-type": ("train: {epochs: many}", r"train\.epochs: .*'int'"),
    "wrong-choice": ("train: {optimizer: lion}", r"train\.optimizer: .*lion.*sgd, adam, adamw"),
    "value-for-a-section": ("train: 5", "train: "),
    "section-for-a-value": ("train: {lr: {x: 1}}", r"'train\.lr\.x'"),
    "own-check": ("train: {lr: -1}", r"^train\.lr .*-1"),
    "not-yaml": ("train: [1, 2", "given.yaml"),
    "control-character": ("train: \x07", "given.yaml"),
    "given-twice": (
        "train: {lr: 1}\nseed: {data: 1}\ntrain: {epochs: 2}",
        "given.yaml: 'train' in line 3",
    ),
    "a-key-that-is-a-number": ("1: 2", "key 1"),
    "a-list": ("- 1\n- 2", "given.yaml"),
    "700-deep": ("train: " + "[" * 700 + "]" * 700, "given.yaml"),
    "5000-digits": (f"seed: {{data: {'9' * 5000}}}", "given.yaml"),
    "no-date": ("train: {lr: 2001-13-45}", "given.yaml"),
    "no-number": ("train: {lr: !!float ''}", "given.yaml"),
    "a-bomb-of-lists": (bomb("[*{0}, *{0}]"), "100,000"),
    "a-bomb-of-keys": (bomb("{{? a{1} : 1, ? <<  : [*{0}, *{0}]}}", "{a: 1}"), "100,000"),
    "a-circle": ("train: &a [*a]", "100,000"),
    "a-megabyte": ("# " + "x" * 2**20, "1,048,576"),
    "given-twice-below": ("train: {lr: 1, lr: 2}", "'lr' in line 1"),
    "nan-in-a-list": ("model: {mean: [.nan]}", r"model\.mean"),
    "80-bits": (f"train: {{epochs: {10**23}}}", r"train\.epochs"),
    "a-long-key": ("? " + "x" * 5000 + "\n: 1", r"'x{200}\.\.\.'"),
}
WRONG_SET = {
    "unknown-key": ("train.lrr=1", r"'train\.lrr'.*'train\.lr'"),
    "no-equals": ("train.lr", r"--set train\.lr"),
    "no-key": ("=1", "key ''"),
    "wrong-type": ("train.epochs=many", r"train\.epochs: .*'int'"),
    "wrong-choice": ("train.schedule=step", r"train\.schedule: .*multistep"),
    "wrong-element": ("model.mean=[a]", r"model\.mean\[0\]: .*'float'"),
    "own-check": ("train.epochs=0", r"^train\.epochs .*0"),
    "inside-a-value": ("train.lr.x=1", r"'train\.lr\.x'"),
    "null": ("train.lr=null", r"train\.lr: .*'null'"),
    "5000-digits": ("train.epochs=" + "9" * 5000, r"train\.epochs"),
    "a-long-value": ("train.optimizer=" + "x" * 5000, r"train\.optimizer: .*x\.\.\."),
    "a-key-of-5000-parts": (".".join("x" * 5000) + "=1", "key"),
    **{f"no-yaml-{n}": (f"train.lr={v}", r"--set train\.lr=")
       for n, v in enumerate(["{", "a: b: c", "@x"])},
    **{f"{value}-{key}": (f"{key}={value}", rf"^{key} .*{value}$")
       for key in ("train.lr", "train.gamma")
       for value in ("-inf", "nan")},
}  # fmt: skip


def one_clear_error(error: PipelineError) -> None:
    lines = str(error).splitlines()
    assert 1 <= len(lines) <= 3
    assert "Traceback" not in str(error)
    assert len(str(error)) < 600
    assert "`" not in error.cause
    assert "$" not in error.cause


@pytest.mark.parametrize(
    ("text", "override", "named"),
    [
        *(pytest.param(text, None, named, id=id) for id, (text, named) in WRONG_TEXT.items()),
        *(pytest.param(None, s, named, id=f"set-{id}") for id, (s, named) in WRONG_SET.items()),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, text: str | None, override: str | None, named: str
) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        teacher(tmp_path, text, {}, *filter(None, [override]))
    one_clear_error(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"\xff\xfe\x80\x81")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "weights"):
        with pytest.raises(ConfigError, match=str(path)) as caught:
            read_config(TeacherConfig, str(path), NEEDED, [])
        one_clear_error(caught.value)


def test_a_flag_below_a_value_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'train'.* 5"):
        teacher(tmp_path, "train: 5", {"train.lr": 0.1})
