"""One self-contained page about caches and the students that were trained from them."""

from pipeline.report.page import write_report

__all__ = ["write_report"]
