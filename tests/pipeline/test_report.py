"""The page itself: whole, alone, escaped, the same again; and what is said where there is none."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import changed, cut
from reports import epoch, page_of, parse, write_run, write_sweep

from pipeline.cli import cli
from pipeline.report import write_report
from pipeline.report.gallery import choose_samples, load_images
from pipeline.report.measured import draw_rows
from stages.cache import LogitCache
from stages.cache_teacher import cache_teacher, prepare
from stages.data import Splits
from stages.errors import PipelineError, RunError
from stages.rectify import rectify
from stages.settings import CacheConfig, RectifyConfig

HISTORY = [epoch(0, 0.2), epoch(1, 0.4)]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Path:
    """A folder with a cache, a sweep, and runs in every state."""
    folder = tmp_path_factory.mktemp("report") / "everything"
    shutil.copytree(tiny_cache, folder / "cache.zarr")
    write_sweep(folder / "sweep")
    write_run(folder / "runs" / "done", HISTORY, cache=str(folder / "cache.zarr"))
    write_run(folder / "runs" / "teacher", HISTORY, kind="teacher")
    write_run(folder / "runs" / "begun", HISTORY[:1], finished=False, train__epochs=9)
    write_run(folder / "runs" / "waiting")
    write_run(folder / "runs" / "broken", HISTORY)
    (folder / "runs" / "broken" / "metrics.jsonl").write_text('{"epoch": 0, "lo')
    (folder / "notes").mkdir()
    (folder / "notes" / "file.txt").write_text("text")
    return folder


@pytest.fixture(scope="module")
def out(everything: Path) -> Path:
    """The page about all of it, in a folder that is made for it."""
    return write_report([str(everything)], str(everything.parent / "new" / "report.html"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one epoch: the least that a page can be about."""
    write_run(tmp_path / "run", HISTORY[:1])
    return tmp_path / "run"


def test_a_page_is_whole_and_alone(out: Path) -> None:
    assert list(out.parent.iterdir()) == [out]
    page, text = parse(out), out.read_text()
    assert not re.search(r"https?:|//[a-z]|@import|@font-face", re.sub(r"\n\s*//.*", "", text))
    for element in page.find():
        source = element.attributes.get("src", "data:")
        target = element.attributes.get("href", "#")
        assert source.startswith("data:")
        assert target.startswith("#")
    ids = [element.attributes["id"] for element in page.find() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    links = {e.attributes["href"][1:] for e in page.find() if "href" in e.attributes}
    clips = set(re.findall(r"url\(#([^)]+)\)", text))
    assert links | clips <= set(ids)


def test_figures_follow_the_colours_of_the_page(out: Path) -> None:
    figures = re.findall(r'<svg viewBox[^>]*role="img".*?</svg>', out.read_text(), re.DOTALL)
    assert len(figures) >= 8
    for svg in figures:
        colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
        assert all(c == "none" or re.fullmatch(r"var\(--[a-z0-9-]+\)", c) for c in colours), colours
        assert "font-family" not in svg
        assert "<text" in svg

    text = out.read_text()
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", text)) <= set(re.findall(r"--([\w-]+):", text))


def test_what_is_not_finished_is_listed(out: Path) -> None:
    page = parse(out)
    assert "pairwise-T4" in page.text
    (table,) = [t for t in page.find("table") if "Failed, unfinished" in t.text]
    rows = {
        row.attributes["data-run"]: [cell.text for cell in row.find("td")]
        for row in table.find("tr")
        if "data-run" in row.attributes
    }
    assert rows["everything/runs/begun"] == ["unfinished", "1 of 9 epochs are done"]
    assert rows["everything/runs/waiting"] == ["unfinished", "0 of 2 epochs are done"]
    assert rows["everything/runs/broken"][0] == "unreadable"
    assert "metrics.jsonl, line 1" in rows["everything/runs/broken"][1]
    assert rows["everything/sweep/gone-0"] == ["failed", "out of <memory>"]
    assert len(rows) == 4


def test_the_same_input_gives_the_same_bytes_also_where_a_path_is_given_twice(
    everything: Path, out: Path, tmp_path: Path
) -> None:
    paths = [str(everything), str(everything / "cache.zarr"), str(everything / "runs" / "done")]
    assert write_report(paths, str(tmp_path / "twice.html")).read_bytes() == out.read_bytes()


NASTY = ("<b>", "</script><script>alert(1)</script>", "a & b", "\"'", "$x_1$", "&lt;", "%s{0}", "ß")
OBEYED = ("\u202e", "\x1b[31m", "\u200b\u2066")
"""A right-to-left override, a terminal's colour, and what has no width."""


def test_no_name_breaks_the_page(tmp_path: Path, cache_config: CacheConfig, digits: Splits) -> None:
    names = (*NASTY[1:], *OBEYED)
    few = cut(digits, 60, 20)
    splits = Splits(*(replace(split, class_names=names) for split in (few.train, few.test)))
    config = changed(cache_config, teacher__class_order="dataset", views=1)
    cache_teacher(prepare(config, splits), tmp_path / "in" / "<i>.zarr")
    rectify(tmp_path / "in" / "<i>.zarr", RectifyConfig())
    write_run(tmp_path / "in" / "\u202e<u>&\x07", HISTORY, data__dataset="<script>:x")
    write_run(tmp_path / "in" / "other", HISTORY, data__dataset="<script>:x", loss__name="<s>")
    page = page_of(tmp_path / "in")
    assert len(page.find("script")) == 1
    assert not {"b", "i", "u", "s"} & {e.tag for e in page.find() if e.attributes == {}}
    (table,) = [t for t in page.find("table") if "Wrong rate by class" in t.text]
    shown = [row.find("th")[0].text for row in table.find("tbody")[0].find("tr")]
    assert sorted(shown) == sorted(ascii(n)[1:-1] if n in OBEYED else n for n in names)
    assert not set(page.text) & set("\u202e\x1b\u200b\u2066\x07")
    assert "\\u202e<u>&\\x07" in page.text
    assert "<s>" in page.text


def test_a_cache_that_is_not_complete(tiny_copy: Path) -> None:
    LogitCache.open(tiny_copy, writable=True).grow(5)
    page = page_of(tiny_copy)
    assert "over 2 of 5 views" in page.text
    assert page.value("rows_used") == 120
    shutil.rmtree(tiny_copy / "commits" / "logits")
    page = page_of(tiny_copy, out="none.html")
    assert "nothing is measured" in page.text


def test_a_broken_cache_is_named_or_left_out(tiny_copy: Path, tmp_path: Path) -> None:
    document = tiny_copy / "zarr.json"
    document.write_text(document.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(PipelineError, match="version 99"):
        write_report([str(tiny_copy)], str(tmp_path / "report.html"))
    write_run(tmp_path / "runs" / "a", HISTORY)
    shutil.move(tiny_copy, tmp_path / "runs" / "old.zarr")
    (row,) = page_of(tmp_path / "runs").find("tr", data_run="runs/old.zarr")
    assert "version 99" in row.text


def test_code_that_a_cache_names_is_not_run(tiny_copy: Path) -> None:
    cache = LogitCache.open(tiny_copy)
    config = {**cache.provenance["config"], "data": {"dataset": "stranger:make"}}
    cache.provenance["config"] = config
    images = load_images(cache, choose_samples(draw_rows(cache, None)), None, None)
    assert "--trust stranger" in images.note


def test_folders_of_anything_are_looked_through(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Junk, circles of links, deep YAML, and a folder that may not be read: a line, or nothing."""
    everything = tmp_path / "everything"
    shutil.copytree(run, everything / "runs" / "done")
    (everything / "notes").mkdir()
    (everything / "circle").symlink_to(everything)
    (everything / "loop").symlink_to(everything / "loop")
    (everything / "gone").symlink_to("nowhere")
    (everything / "runs" / "deep").mkdir()
    (everything / "runs" / "deep" / "config.yaml").write_text("a: " + "[" * 700 + "]" * 700)
    (everything / "notes" / "zarr.json").write_bytes(b"\xff{")
    (everything / "closed").mkdir()
    read = Path.iterdir

    def closed(path: Path) -> Iterator[Path]:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "iterdir", closed)
    page = page_of(everything)
    assert "config.yaml" in page.find("tr", data_run="everything/runs/deep")[0].text
    assert "Permission denied" in page.find("tr", data_run="everything/closed")[0].text


def test_a_report_is_replaced_and_nothing_else(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis.html"
    out.write_text("years of work")
    with pytest.raises(RunError):
        write_report([str(run)], str(out))
    assert out.read_text() == "years of work"
    write_report([str(run)], str(out), overwrite=True)
    answer = CliRunner().invoke(cli, ["report", str(run), "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    assert str(out) in answer.output.replace("\n", "")
    assert len(parse(out).find("svg", role="img")) == 2  # accuracy, wide and narrow


@pytest.mark.parametrize(
    ("paths", "out", "message"),
    [
        (["gone"], "r.html", "nothing lies at gone"),
        (["notes"], "r.html", "notes holds neither a cache nor a run"),
        (["runs/waiting"], "r.html", "nothing to report on yet"),
        (["runs/broken"], "r.html", "metrics.jsonl, line 1"),
        (["runs/done"], "notes", "notes is a folder"),
        (["runs/done"], "cache.zarr/new/r.html", "lies inside the cache"),
        (["runs/done"], "notes/file.txt/r.html", "cannot write"),
        (["http://example.org/c.zarr"], "r.html", "URLs, not http"),
        (["cache.zarr", "--dataset", "cifar11"], "r.html", "unknown dataset 'cifar11'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_is_told(
    everything: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], out: str, message: str
) -> None:
    monkeypatch.chdir(everything)
    answer = CliRunner().invoke(cli, ["report", *paths, "--out", out])
    assert isinstance(answer.exception, PipelineError)
    assert message in answer.exception.cause
    assert answer.exception.remedy or "URL" in message
    assert not Path("r.html").exists()


def test_a_sweep_without_a_finished_run(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(RunError, match="no run is finished"):
        write_report([str(tmp_path)], str(tmp_path / "r.html"))
