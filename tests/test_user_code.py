"""Whose word is enough to import a module."""

import pytest

from stages.errors import ConfigError
from stages.user_code import check_trusted, imported, modules_in, trust, trusted, trusting


@pytest.mark.parametrize(
    ("spec", "modules"),
    [
        (None, set()),
        ("digits", set()),
        ("resnet8x4", set()),
        ("timm:resnet18", set()),
        ("folder:/a/b:c", set()),
        ("hf:cats", set()),
        ("mine:make", {"mine"}),
        ("my.own.models:net", {"my.own.models"}),
        ("v2:mine:make+cutmix", {"mine"}),
        ("pad-crop-flip|v2:mine:make+erasing", {"mine"}),
        ("v2:mine:make|v2:yours:make", {"mine", "yours"}),
    ],
)
def test_modules_in(spec: str | None, modules: set[str]) -> None:
    assert modules_in(spec) == modules


TRUSTED: list[tuple[tuple[str, ...], dict[str, str]]] = [
    ((), {"name": "digits"}),
    ((), {"policy": "pad-crop:pad=2+erasing"}),
    ((), {"name": "timm:resnet18"}),
    (("mine",), {"name": "mine:net"}),
    (("mine",), {"name": "mine.deeper:net"}),
    (("mine", "yours"), {"policy": "v2:mine:a|v2:yours:b+mixup"}),
]
NOT_TRUSTED: list[tuple[tuple[str, ...], dict[str, str], str]] = [
    ((), {"name": "theirs:net"}, "theirs"),
    ((), {"policy": "pad-crop|v2:theirs:make+cutmix"}, "theirs"),
    (("mine",), {"policy": "v2:mine:a|v2:theirs:b"}, "theirs"),
    (("mine.deeper",), {"name": "mine:net"}, "mine"),
    (("min",), {"name": "mine:net"}, "mine"),
]


def test_what_is_trusted_and_what_is_not() -> None:
    for known, names in TRUSTED:
        with trusting(*known):
            check_trusted("cache c", **names)
    for known, names, module in NOT_TRUSTED:
        told = f"cache c(.|\n)*--trust {module}\\."
        with trusting(*known), pytest.raises(ConfigError, match=told):
            check_trusted("cache c", **names)


def test_trust_ends_with_its_block() -> None:
    before = trusted()
    with trusting("one"):
        trust("two")
        assert trusted() == before | {"one", "two"}
    assert trusted() == before


@pytest.mark.parametrize("spec", ["net.py:make", "./net.py:make", "/a/net.py:make"])
def test_a_file_is_no_module(spec: str) -> None:
    with pytest.raises(ConfigError) as caught:
        imported(spec, "model", ConfigError)

    assert "net:make" in caught.value.remedy
