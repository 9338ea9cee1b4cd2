"""What a log shows: plain lines, rates and time left, rank 0 only."""

import sys
import time
from collections.abc import Callable

import pytest

from pipeline.console import LOG_SECONDS, Console, duration, size


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def my_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    return clock


@pytest.fixture(autouse=True)
def my_plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "text", ["[red]x[/red]", "[/]", "a\nb", "x" * 500, "50% \\n", "µ → ∞", "module:cat:x"]
)
def test_words_come_out_as_they_are(capsys: pytest.CaptureFixture[str], text: str) -> None:
    Console().say(text)
    assert capsys.readouterr().out == f"{text}\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb\x00\x7f\x9b", "a\\rb\\x00\\x7f\\x9b"),
        ("abc\u202egnp.exe", "abc\\u202egnp.exe"),
        ("z\u200bw\ufeff", "z\\u200bw\\ufeff"),
        ("\udcff", "\\udcff"),
        ("naïve 猫 שלום", "naïve 猫 שלום"),
        ("KD [red][/b]", "KD [red][/b]"),
    ],
)
@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_terminal_would_obey_is_shown(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    shown: str,
    terminal: bool,
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console()
    console.say(text)
    console.table(text, (text,), [(text,)])
    out = capsys.readouterr().out
    assert out.count(shown) == 4
    assert text == shown or text not in out


def test_a_table_in_a_log_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table("a title", ("what", "n"), [("views", 25), ("a long one", "[b]")])
    assert capsys.readouterr().out.split("\n") == [
        "",
        "a title",
        "what        n",
        "----------  ---",
        "views       25",
        "a long one  [b]",
        "",
    ]


Step = tuple[float, str, int, int, str]  # seconds since the one before, task, done, of, unit
SHOWN: dict[str, tuple[list[Step], list[str]]] = {
    "rate and time left now and then": (
        [(0, "pass", 0, 6000, "samples")]
        + [(1, "pass", 50 * second, 6000, "samples") for second in range(1, 31)],
        [
            "pass: 500/6,000 samples (8%), 50.0 samples/s, 1 min 50 s left",
            "pass: 1,000/6,000 samples (17%), 50.0 samples/s, 1 min 40 s left",
            "pass: 1,500/6,000 samples (25%), 50.0 samples/s, 1 min 30 s left",
        ],
    ),
    "what was there before does not count for the rate": (
        [(0, "pass", 500, 1000, "blocks"), (10, "pass", 600, 1000, "blocks")],
        ["pass: 600/1,000 blocks (60%), 10.0 blocks/s, 40 s left"],
    ),
    "quick tasks say nothing": (
        [(0.05, f"epoch {n}/2", done, 100, "batch") for n in (1, 2) for done in range(1, 101)],
        [],
    ),
    "every task has its own clock": (
        [(0, "one", 0, 10, "row"), (100, "two", 0, 100, "rows"), (10, "two", 20, 100, "rows")],
        ["two: 20/100 rows (20%), 2.0 rows/s, 40 s left"],
    ),
}


@pytest.mark.parametrize(("steps", "shown"), SHOWN.values(), ids=SHOWN)
def test_progress_in_a_log(
    capsys: pytest.CaptureFixture[str], my_clock: Clock, steps: list[Step], shown: list[str]
) -> None:
    console = Console()
    for seconds, *told in steps:
        my_clock.now += seconds
        console.progress(*told)
    assert LOG_SECONDS == 10
    assert capsys.readouterr().out.splitlines() == shown


@pytest.mark.parametrize(("rank", "heard"), [("0", True), ("7", False)])
def test_only_rank_0_speaks(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    my_clock: Clock,
    rank: str,
    heard: bool,
) -> None:
    monkeypatch.setenv("RANK", rank)
    console = Console()
    console.say("hello")
    console.table("t", ("a",), [(1,)])
    console.progress("pass", 0, 10, "row")
    my_clock.now += 20
    console.progress("pass", 5, 10, "row")
    assert bool(capsys.readouterr().out) is heard


class Terminal:
    """A standard output that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_it_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    console = Console()
    console.progress("pass", 0, 10, "row")
    console.progress("pass", 5, 10, "row")
    console.progress("pass", 10, 10, "row")
    console.say("done")
    assert "\x1b[" in terminal.text
    assert "pass" in terminal.text
    assert terminal.text.endswith("done\n")


@pytest.mark.parametrize(
    ("written", "number", "text"),
    [
        (duration, 0.4, "0 s"),
        (duration, 59.4, "59 s"),
        (duration, 59.7, "1 min 0 s"),
        (duration, 200, "3 min 20 s"),
        (duration, 3599.7, "1 h 0 min"),
        (duration, 7500, "2 h 5 min"),
        (duration, 3600 * 1234, "1,234 h 0 min"),
        (size, 0, "0 B"),
        (size, 4200, "4.2 kB"),
        (size, 999.4, "999 B"),
        (size, 999.6, "1 kB"),
        (size, 999_600, "1 MB"),
        (size, 1_620_000_000, "1.62 GB"),
        (size, 1.234e15, "1.23 PB"),
    ],
)
def test_numbers(written: Callable[[float], str], number: float, text: str) -> None:
    assert written(number) == text
