"""Every object of a cache and of a run, every harm, every reader: nothing is silently wrong."""

from collections import Counter

import pytest
from fault_matrix import HARMS, OF_A_CACHE, OF_A_RUN, Cell, Matrix, cells, make_world

from stages.cache_teacher import CacheJob

READERS = [*(("cache", reader) for reader in OF_A_CACHE), *(("run", reader) for reader in OF_A_RUN)]
FINE = ("detected", "harmless", "mended", "no change")


@pytest.fixture(scope="module")
def matrix(small_job: CacheJob, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(make_world(small_job, tmp_path_factory.mktemp("matrix")))


def sample(matrix: Matrix) -> list[Cell]:
    """Every object once, and in it every harm and every reader in turn."""
    objects = sorted({(cell.what, cell.key) for cell in cells(matrix.world)})
    chosen = []
    for number, (what, key) in enumerate(objects):
        readers = [*OF_A_CACHE] if what == "cache" else [*OF_A_RUN]
        harm = list(HARMS)[number % len(HARMS)]
        reader = readers[(number + number // len(HARMS)) % len(readers)]
        chosen.append(Cell(what, key, harm, reader))
    return chosen


def check(matrix: Matrix, chosen: list[Cell]) -> Counter[str]:
    outcomes = {cell: matrix.outcome(cell) for cell in chosen}
    wrong = {cell: outcome for cell, outcome in outcomes.items() if outcome not in FINE}
    assert wrong == {}
    return Counter(outcomes.values())


def test_a_cell_of_every_reader(matrix: Matrix) -> None:
    """And in it every harm in turn."""
    chosen = []
    for number, (what, reader) in enumerate(READERS):
        keys = sorted({c.key for c in cells(matrix.world) if (c.what, c.reader) == (what, reader)})
        harm = list(HARMS)[number % len(HARMS)]
        chosen.append(Cell(what, keys[7 * number % len(keys)], harm, reader))
    assert check(matrix, chosen)["detected"] > len(chosen) / 3


@pytest.mark.slow
def test_a_cell_of_every_object_harm_and_reader(matrix: Matrix) -> None:
    chosen = sample(matrix)
    assert {cell.harm for cell in chosen} == {*HARMS}
    assert {cell.reader for cell in chosen} == {*OF_A_CACHE, *OF_A_RUN}
    assert check(matrix, chosen)["detected"] > len(chosen) / 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_cell_of_every_object_of_views_that_depend_on_the_first(
    small_job: CacheJob, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("anchored")
    world = make_world(small_job, home, "klt-anchored:step=0.4,top=3", 3)
    own = ("anchor_", "logits_", "klt_", "prediction/", "commits/logits/")
    keys = [key for key in sorted(world.trees["cache"]) if key.startswith(own)]
    readers, harms = ("read_view", "verify", "repair", "rectify"), list(HARMS)
    chosen = [
        Cell("cache", key, harms[n % len(harms)], readers[(n + n // len(harms)) % len(readers)])
        for n, key in enumerate(keys)
    ]
    assert {"anchor_code", "logits_code", "klt_predictor"} < {c.key.split("/")[0] for c in chosen}

    assert check(Matrix(world), chosen)["detected"] > len(chosen) / 3


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("what", "reader"), READERS)
def test_every_cell(matrix: Matrix, what: str, reader: str) -> None:
    chosen = [c for c in cells(matrix.world) if (c.what, c.reader) == (what, reader)]
    figures = check(matrix, chosen)
    assert figures["detected"]
    print(f"{what}, {reader}: {len(chosen)} cells, {dict(figures)}")  # shown by -s
