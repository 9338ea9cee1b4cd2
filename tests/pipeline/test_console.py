"""What a log shows: plain lines, rates and time left, rank 0 only."""

import sys
import time

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
    "text",
    ["[red]x[/red]", "[/]", "a\nb", "x" * 500, "50% \\n", "µ → ∞", "module:cat:x"],
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


# ---- progress -------------------------------------------------------------------------------


def test_progress_says_rate_and_time_left_now_and_then(
    capsys: pytest.CaptureFixture[str], my_clock: Clock
) -> None:
    console = Console()
    console.progress("pass", 0, 6000, "samples")
    for second in range(1, 31):
        my_clock.now += 1
        console.progress("pass", second * 50, 6000, "samples")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30 / LOG_SECONDS
    assert lines[0] == "pass: 500/6,000 samples (8%), 50.0 samples/s, 1 min 50 s left"
    assert lines[-1] == "pass: 1,500/6,000 samples (25%), 50.0 samples/s, 1 min 30 s left"


def test_what_was_there_before_does_not_count_for_the_rate(
    capsys: pytest.CaptureFixture[str], my_clock: Clock
) -> None:
    console = Console()
    console.progress("pass", 500, 1000, "blocks")
    my_clock.now += 10
    console.progress("pass", 600, 1000, "blocks")
    assert "10.0 blocks/s, 40 s left" in capsys.readouterr().out


def test_quick_tasks_say_nothing(capsys: pytest.CaptureFixture[str], my_clock: Clock) -> None:
    console = Console()
    for task in ("epoch 1/2", "epoch 2/2"):
        for done in range(1, 101):
            my_clock.now += 0.05
            console.progress(task, done, 100, "batch")
    assert capsys.readouterr().out == ""


def test_every_task_has_its_own_clock(capsys: pytest.CaptureFixture[str], my_clock: Clock) -> None:
    console = Console()
    console.progress("one", 0, 10, "row")
    my_clock.now += 100
    console.progress("two", 0, 100, "rows")
    my_clock.now += 10
    console.progress("two", 20, 100, "rows")
    assert capsys.readouterr().out == "two: 20/100 rows (20%), 2.0 rows/s, 40 s left\n"


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


# ---- numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.7, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (3600 * 1234, "1,234 h 0 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (4200, "4.2 kB"),
        (999.4, "999 B"),
        (999.6, "1 kB"),
        (999_600, "1 MB"),
        (1_620_000_000, "1.62 GB"),
        (1.234e15, "1.23 PB"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text
