"""What many views of ImageNet would take: arithmetic on what one view was measured to take."""

import torch

from benchmarks.measure import Report
from pipeline.console import Console, size
from stages.cache.encoding.floats import Float16, Float32
from stages.cache.encoding.klt import Klt
from stages.cache.encoding.topk import TopK
from stages.cache.encoding.uint8 import Uint8
from stages.cache.layout import block_grid
from stages.teacher.plan import count_files

VIEWS = 300


def show_plan(console: Console, report: Report, rows: int, classes: int, teacher: float) -> None:
    """What so many views would take: arithmetic on bytes a row and rows a second."""
    value = {figure.name: figure.value for figure in report.figures}
    blocks = block_grid(rows, classes).num_blocks
    passes = rows * VIEWS / 3600
    table = []
    for coding in (Float32(), Float16(), Uint8(), Klt(*torch.empty(3, 1)), TopK(classes)):
        name = coding.name
        if f"{name}: row" not in value:
            continue  # klt, of many classes
        row = value.get(f"{name}: row of the view", value[f"{name}: row"])
        speed = value.get(f"write {name}: speed")
        table.append(
            (
                name,
                f"{row:.1f}" + ("" if speed else " (of few rows)"),
                size(row * rows * VIEWS),
                f"{count_files(coding, VIEWS, blocks):,}",
                f"{passes / speed:.1f}" if speed else "",
            )
        )
    columns = ("encoding", "bytes a row, measured", "on disk", "objects", "hours to write")
    console.table(f"plan for {VIEWS} views of {rows:,} rows: arithmetic", columns, table)
    console.say(
        f"a teacher of {teacher:,.0f} images/s takes {passes / teacher:,.1f} hours, "
        "and blocks are written meanwhile"
    )
