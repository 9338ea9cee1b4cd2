"""What commands are given on the command line alone; `stages.settings` has what YAML holds as well.

Declared in the same way, see `stages.schema`. Imports no torch.
"""

# fmt: off

from typing import Annotated, Literal

from stages.schema import Settings, about
from stages.settings import MOST_IN_A_BATCH, MOST_WORKERS, Cache, Device, Download, Root, Scheduler

OtherDataset = Annotated[str | None, about(
    "Where the images are, if they have moved.", "--dataset", takes="dataset", group="data")]
OtherRoot = Annotated[Root, about("Where torchvision's datasets lie, if they have moved.")]


class RunPlace(Settings, frozen=True):
    """Where a training run goes."""

    out: Annotated[str, about("The run directory.", "--out", takes="folder")]
    resume: Annotated[bool, about("Go on with the run that is there.", "--resume")] = False
    overwrite: Annotated[bool, about("Replace the run that is there.", "--overwrite")] = False


class CachePlace(Settings, frozen=True):
    """Where a cache goes, and what is done before it is begun."""

    out: Annotated[str, about("The cache, for example cache.zarr.", "--out", takes="folder")]
    dry_run: Annotated[bool, about(
        "Only say how large and how long it would be.", "--dry-run")] = False
    check: Annotated[str, about(
        "Images of each split to decode before the pass: a number, all or none.",
        "--check")] = "512"


class CacheAt(Settings, frozen=True):
    """A cache that is there."""

    cache: Cache


class CalibrateSettings(Settings, frozen=True):
    """Which cache is calibrated, and on which rows."""

    cache: Cache
    on: Annotated[Literal["train", "test"], about(
        "The rows of the views, or those of the test split, for a teacher that was trained on the "
        "training images: students that use it have then seen test labels.", "--on")] = "train"


class CheckDataSettings(Settings, frozen=True):
    """What check-data looks at."""

    dataset: Annotated[str, about("What --dataset takes.", argument=True, takes="dataset")]
    root: Root = None
    workers: Annotated[int | None, about(
        "Threads; one a core if left out.", "--workers", least=0, most=MOST_WORKERS)] = None
    check: Annotated[str, about("How many images of each split, or all.", "--check")] = "all"
    test: Annotated[str | None, about(
        "As cache-teacher takes it: 'none', a folder, or a share.",
        "--test", metavar="none|DIR|SHARE")] = None
    skip_out: Annotated[str | None, about(
        "Write what is broken there, for --skip.",
        "--skip-out", metavar="FILE", takes="file")] = None


class EvaluateSettings(Settings, frozen=True):
    """What evaluate measures, and with what it compares."""

    run: Annotated[str, about("The run directory.", argument=True, takes="folder")]
    dataset: Annotated[OtherDataset, about("The run's own if left out.")] = None
    root: OtherRoot = None
    download: Download = False
    skip: Annotated[str | None, about(
        "Test images to leave out; else the run's own list.",
        "--skip", metavar="FILE", takes="file", group="data")] = None
    batch_size: Annotated[int | None, about(
        "The run's own, or 256 if that is more, if left out.",
        "--batch-size", above=0, most=MOST_IN_A_BATCH)] = None
    caches: Annotated[tuple[str, ...], about(
        "Compare with its teacher; a student's own cache if left out. May be repeated: the "
        "teachers are averaged.", "--cache", metavar="CACHE", takes="folder")] = ()
    device: Device = "auto"
    out: Annotated[str | None, about(
        "Write everything there as well.", "--out", metavar="FILE.json", takes="file")] = None


class VerifySettings(Settings, frozen=True):
    """What verify looks at beside the bytes of a cache."""

    cache: Cache
    live: Annotated[int | None, about(
        "Run the teacher on so many random rows as well.", "--live", above=0, most=10**9)] = None
    pixels: Annotated[bool, about("Compare with the dataset's pixels as well.", "--pixels")] = False
    repair: Annotated[bool, about("Compute again what is damaged.", "--repair")] = False
    dataset: OtherDataset = None
    root: OtherRoot = None
    weights: Annotated[str | None, about(
        "The teacher's, if they have moved.", "--weights", takes="weights", group="data")] = None
    device: Device = "auto"


class ReportSettings(Settings, frozen=True):
    """What is reported on, and where the page goes."""

    paths: Annotated[tuple[str, ...], about(
        "Caches, runs, sweeps, or folders of those.",
        argument=True, takes="folder", metavar="PATH...")]
    out: Annotated[str, about("The page.", "--out", takes="file")] = "report.html"
    overwrite: Annotated[bool, about("Replace a file that is no report.", "--overwrite")] = False
    dataset: OtherDataset = None
    root: OtherRoot = None


class SweepSettings(Settings, frozen=True):
    """How a sweep file is run."""

    file: Annotated[str, about(
        "The sweep file.", argument=True, takes="file", metavar="SWEEP.yaml")]
    out: Annotated[str | None, about(
        "The sweep's folder; else the file's `out`, else runs/<its name>.",
        "--out", takes="folder")] = None
    dry_run: Annotated[bool, about("Only check, and show what would be done.", "--dry-run")] = False
    workers: Annotated[int | None, about(
        "Processes; on each GPU where there are several.",
        "--workers", above=0, most=MOST_WORKERS)] = None
    scheduler: Scheduler = None


class DemoSettings(Settings, frozen=True):
    """The demo's size and place."""

    out: Annotated[str, about("Where everything goes.", "--out", takes="folder")] = "demo-out"
    overwrite: Annotated[bool, about("Replace an earlier demo.", "--overwrite")] = False
    seeds: Annotated[int, about("Students of each kind.", "--seeds", above=0, most=1000)] = 3
