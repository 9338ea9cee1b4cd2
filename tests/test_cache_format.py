"""docs/cache-format.md held to the code: its tables, its documents, its rules, its programs.

Read from the Markdown: tables, JSON and Python that follow a comment `<!-- kind: name -->`.
"""

import hashlib
import itertools
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import xarray
import zarr
from helpers import cache_of, first
from numpy.typing import NDArray

from stages.cache import LogitCache, layout
from stages.cache.encoding import ENCODINGS, EncodingAttributes, Fidelity
from stages.cache.encoding.topk import TopK
from stages.cache.identity import Identity, weights_digest
from stages.cache.metadata import RootAttributes, all_arrays, sealed
from stages.cache.records import seal_records, unsealed
from stages.cache.rectified import RectificationSettings
from stages.data import Splits
from stages.inputs.probes import pixel_probes
from stages.inputs.views import view_policy
from stages.objectives.rectification import replaced_logits
from stages.rectify import rectify
from stages.settings import RectifyConfig

DOCUMENT = (Path(__file__).parents[1] / "docs" / "cache-format.md").read_text()
SAMPLES, BLOCK_ROWS, VIEWS = 300, 100, 2
SPECS = {
    "float32": "float32",
    "float16": "float16",
    "uint8": "uint8",
    "klt": "klt",
    "klt-top": "klt:top=3",
    "klt-anchored": "klt-anchored:top=3",
    "topk": "topk:k=4,temperatures=1/4",
    "topk-whole": "topk:k=10,temperatures=2",
}
KINDS = ("wide", "pair", "three", "five")
MATERIALISED = "klt"
RECTIFIED = "pairwise-T4"

Json = dict[str, Any]
Row = dict[str, str]


def fenced(kind: str, name: str) -> str:
    """The block of code that follows a comment."""
    found = re.search(rf"<!-- {kind}: {name} -->\n```\w+\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None, f"no {kind} '{name}' in the document"
    return found[1]


def table(name: str) -> list[Row]:
    """The rows of a table, by its column names; backticks are left out."""
    found = re.search(rf"<!-- table: {name} -->\n((?:\|.*\n)+)", DOCUMENT)
    assert found is not None, f"no table '{name}' in the document"
    cells = [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        for line in found[1].splitlines()
    ]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def fields(name: str) -> dict[str, str]:
    """Field -> type, of a table of fields."""
    return {field: row["type"] for row in table(name) for field in row["field"].split(", ")}


def program(name: str) -> dict[str, Any]:
    """What a block of Python defines."""
    names: dict[str, Any] = {}
    exec(compile(fenced("test", name), f"cache-format.md: {name}", "exec"), names)
    return names


READER = program("reader")
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "integer or null": (int, type(None)),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
}


def is_of_type(value: Any, documented: str) -> bool:
    """Whether a JSON value is what a table says, such as `array of 2 integers`."""
    if array := re.fullmatch(r"array of (?:(\d+) )?(.*?)s", documented):
        assert isinstance(value, list)
        assert array[1] is None or len(value) == int(array[1])
        return all(is_of_type(item, array[2]) for item in value)
    return isinstance(value, TYPES[documented]) and isinstance(value, bool) == (
        documented == "boolean"
    )


OPTIONAL = {
    *("skipped", "teacher.outputs", "teacher.class_order", "teacher.pooled_outputs"),
    *("teacher.folds", "dataset.exif", "dataset.jpeg_side", "dataset.tested_share"),
    *("dataset.decoder",),
    *("trusted_above", "trusted_rows", "calibrated", "anchor"),
}
"""Left out where nothing is out of the ordinary: tests/test_skipping.py, tests/test_folds.py,
tests/test_suspects.py, tests/test_teacher_checks.py and tests/test_calibrate.py have caches with
them.
"""


def assert_fields(found: Json, documented: dict[str, str]) -> None:
    assert found.keys() == documented.keys() - OPTIONAL
    for field, value in found.items():
        assert is_of_type(value, documented[field]), (field, value)


@pytest.fixture(scope="module")
def stores(
    tmp_path_factory: pytest.TempPathFactory, teacher_run: Path, digits: Splits
) -> dict[str, Path]:
    """A finished cache of every encoding with a rectification. Read only."""
    splits = Splits(first(digits.train, SAMPLES), first(digits.test, 60))
    made = {}
    for name, spec in SPECS.items():
        path = tmp_path_factory.mktemp(name) / "digits.zarr"
        made[name] = cache_of(teacher_run, path, splits, encoding=spec, block_rows=BLOCK_ROWS)
        if name != "topk-whole":
            rectify(made[name], RectifyConfig(materialise=name == MATERIALISED))
    return made


@pytest.fixture
def my_copy(stores: dict[str, Path], tmp_path: Path) -> Path:
    """A klt cache of one's own."""
    return Path(shutil.copytree(stores["klt"], tmp_path / "digits.zarr"))


def read_json(path: Path) -> Json:
    found: Json = json.loads(path.read_text())
    return found


def attributes(path: Path) -> Json:
    found: Json = read_json(path / "zarr.json")["attributes"]
    return found


REST = ("rectified", "materialised")
EVERY = ("all", "labelled", "tested")
"""A cache of images with labels and a test split has all of these."""
each_store = pytest.mark.parametrize("name", SPECS)


# ---- the reader ------------------------------------------------------------------------------


@each_store
def test_the_reader_reads_what_the_cache_reads(stores: dict[str, Path], name: str) -> None:
    cache = LogitCache.open(stores[name])
    samples = torch.arange(SAMPLES)
    for view, temperature in itertools.product(range(VIEWS), (1.0, 4.0)):
        logits, labels = READER["read_view"](stores[name], view, temperature=temperature)

        expected = cache.read_view(view).rows(samples, temperature).numpy()
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
        assert (labels == cache.labels.numpy()).all()


@pytest.mark.parametrize("name", [name for name in SPECS if name != "topk-whole"])
def test_the_reader_rectifies(stores: dict[str, Path], name: str) -> None:
    targets = LogitCache.open(stores[name]).read_view(1, RECTIFIED)

    logits, labels = READER["read_view"](stores[name], 1, RECTIFIED, 4.0)

    expected = targets.rectified_rows(torch.arange(SAMPLES), 4.0).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    wrong = targets.wrong(torch.arange(SAMPLES)).numpy()
    assert wrong.any()
    assert (logits.argmax(1) == labels)[wrong].mean() > 0.5


def test_the_reader_refuses_what_is_not_there(my_copy: Path) -> None:
    read = READER["read_view"]
    with pytest.raises(LookupError, match=r"\(2, 0\)"):
        read(my_copy, 2)
    with pytest.raises(ValueError, match="another temperature"):
        read(my_copy, 0, RECTIFIED, 1.0)
    (my_copy / "commits/rectified" / RECTIFIED / "v00000.json").unlink()
    with pytest.raises(LookupError, match=r"\(0, 0\)"):
        read(my_copy, 0, RECTIFIED, 4.0)
    shard = my_copy / "logits_code/c/0/1/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="logits_code/c/0/1/0 is damaged"):
        read(my_copy, 0)
    records = my_copy / "commits/logits/v00001.json"
    records.write_bytes(records.read_bytes().replace(b'"right":', b'"Right":', 1))
    with pytest.raises(ValueError, match=r"v00001\.json is damaged"):
        read(my_copy, 1)
    document = read_json(my_copy / "zarr.json")
    document["attributes"]["version"] = 2
    (my_copy / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="not a teacher-logit cache of version 1"):
        read(my_copy, 0)


def test_the_reader_knows_blocks_that_are_not_compacted(my_copy: Path) -> None:
    whole, _ = READER["read_view"](my_copy, 1)
    file = my_copy / "commits/logits/v00001.json"
    blocks = my_copy / "commits/logits/v00001"
    blocks.mkdir()
    for record in unsealed(file.read_bytes()):
        (blocks / f"b{record['block']:05d}.json").write_bytes(seal_records([record]))
    assert (READER["read_view"](my_copy, 1)[0] == whole).all()  # both, as a kill may leave it
    file.unlink()
    assert (READER["read_view"](my_copy, 1)[0] == whole).all()
    assert LogitCache.open(my_copy).complete_views == [0, 1]
    (blocks / "b00002.json").unlink()
    with pytest.raises(LookupError, match=r"\(1, 2\)"):
        READER["read_view"](my_copy, 1)


def test_the_reader_is_short_and_imports_nothing_of_ours() -> None:
    text = fenced("test", "reader")

    assert len([line for line in text.splitlines() if line.strip()]) <= 102
    assert not re.search("(import|from) (stages|pipeline|torch)", text)


def test_xarray(stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(stores["float32"], tmp_path / "digits.zarr")
    monkeypatch.chdir(tmp_path)

    found = program("xarray")

    targets = LogitCache.open(stores["float32"]).read_view(1, RECTIFIED)
    rows = found["in_order"].isel(view=1).values
    assert (rows == targets.rectified_rows(torch.arange(SAMPLES)).numpy()).all()
    assert (found["wrong"].values == found["better"].wrong.values).all()


PAGE = (Path(__file__).parents[1] / "docs" / "other-tools.md").read_text()
SHOWN = re.findall(r"^\| `(\w+)` \| (`.*?`) \| `(.*?)`(.*?) \|$", PAGE, re.MULTILINE)


def test_what_xarray_shows_of_every_encoding_is_told() -> None:
    assert {name for name, *_ in SHOWN} == {*ENCODINGS} - {
        "klt-top",
        "klt-anchored",
    }  # which take a program
    assert "`klt-top`" in PAGE
    assert "`klt-anchored`" in PAGE


@pytest.mark.parametrize(("name", "arrays", "expression", "more"), SHOWN, ids=lambda x: x[:9])
def test_what_xarray_shows(
    stores: dict[str, Path], name: str, arrays: str, expression: str, more: str
) -> None:
    store = xarray.open_zarr(stores[name], consolidated=False)
    documented = {array.strip("` ") for array in arrays.split(",")}
    always = {array for array, row in told_arrays(*EVERY).items() if row}
    assert {str(array) for array in store} == documented | always
    assert store.attrs["encoding"]["name"] == name

    logits = eval(expression, {"store": store})

    cache = LogitCache.open(stores[name])
    for view in range(VIEWS):
        rows = cache.read_view(view).rows(cache.dataset_index)
        if more:  # of topk: some classes
            rows = rows.gather(1, torch.from_numpy(store.topk_index[view].values.astype("int64")))
            assert (logits[view].max("k") == 0).all()
        else:
            assert logits.dims == ("view", "sample", "class")
        np.testing.assert_allclose(logits[view].values, rows.numpy(), rtol=1e-5, atol=1e-5)


# ---- arrays ----------------------------------------------------------------------------------


def told_arrays(*caches: str) -> dict[str, Row]:
    return {row["array"]: row for row in table("arrays") if row["caches"] in caches}


def assert_specs(documented: dict[str, Row], specs: dict[str, layout.ArraySpec]) -> None:
    assert documented.keys() == specs.keys()
    for name, spec in specs.items():
        row = documented[name]
        stored = "block" if spec.by_block else "whole"
        assert row["dimensions"] == ", ".join(spec.dimensions)
        assert spec.dtype in row["dtype"].split(" or ")
        assert row["stored"] == stored + (", transposed" if spec.stored_order else "")


@each_store
def test_the_table_names_the_arrays_of_every_encoding(stores: dict[str, Path], name: str) -> None:
    coding = LogitCache.open(stores[name]).encoding
    documented = told_arrays(*EVERY, coding.name)

    assert_specs(documented, all_arrays(10, coding))
    documents = {file.parent.name for file in stores[name].glob("*/zarr.json")}
    assert documents == {*documented, "commits", "rectified"}


def test_the_names_that_are_ours_are_those_of_the_table() -> None:
    rectified = {row["array"] for row in table("arrays") if row["caches"] in REST}
    assert set(layout.RECTIFIED_ARRAYS) == rectified
    assert set(layout.ARRAYS) == {row["array"] for row in table("arrays")} - rectified


def test_the_table_has_every_encoding_and_the_rectifications() -> None:
    others = {*EVERY, "rectified", "materialised"}
    assert {row["caches"] for row in table("arrays")} == {*ENCODINGS, *others}
    assert_specs(told_arrays("rectified"), layout.rectified_arrays(False))
    assert_specs(told_arrays("rectified", "materialised"), layout.rectified_arrays(True))


def expected_document(row: Row, found: Json) -> Json:
    """The document of an array by the table and the two that are printed; its shape, and the dtype
    where the table leaves a choice, are taken from `found`.
    """
    stored, _, transposed = row["stored"].partition(", ")
    document: Json = json.loads(fenced("json", stored))
    names = row["dimensions"].split(", ")
    dtype = found["data_type"]
    assert dtype in row["dtype"].split(" or ")
    shape = found["shape"]
    chunk = shape if stored == "whole" else [1, BLOCK_ROWS, *shape[2:]]
    fill = json.loads(row["fill"])
    document |= {
        "shape": shape,
        "data_type": dtype,
        "dimension_names": names,
        "fill_value": float(fill) if dtype.startswith("float") else fill,
    }
    document["chunk_grid"]["configuration"]["chunk_shape"] = chunk
    codecs = document["codecs"]
    if stored == "block":
        codecs[0]["configuration"]["chunk_shape"] = chunk
        codecs = codecs[0]["configuration"]["codecs"]
    if dtype in ("bool", "int8", "uint8"):
        codecs[0].pop("configuration")
    if transposed:
        printed = re.search(r"\*Block, transposed\* has `(.*?)` before", DOCUMENT)
        assert printed is not None
        codecs.insert(0, json.loads(printed[1]))
    return document


def as_text(document: Json) -> str:
    """With 0 and 0.0 and false apart."""
    return json.dumps(document, sort_keys=True)


@each_store
def test_the_documents_of_arrays_are_as_told(stores: dict[str, Path], name: str) -> None:
    lengths = {"view": VIEWS, "sample": SAMPLES, "class": 10, "eval_sample": 60, "component": 10}
    parameters = attributes(stores[name])["encoding"]["parameters"]
    if name.startswith("topk"):
        lengths |= {"k": parameters["k"], "temperature": len(parameters["temperatures"])}
    for of in {"klt-top": [""], "klt-anchored": ["", "anchor_"]}.get(name, []):
        kinds = {f"{of}{kind}": parameters[f"{of}{kind}"] for kind in KINDS}
        components = sum(n * count for n, count in zip((1, 2, 3, 5), kinds.values(), strict=True))
        lengths |= kinds | {f"{of}wide": kinds[f"{of}wide"] + 1, f"{of}component": components}
        lengths[f"{of}top_pair"] = (parameters[f"{of}top"] + 1) // 2
    encoding = LogitCache.open(stores[name]).encoding.name
    documented = {stores[name] / array: row for array, row in told_arrays(*EVERY, encoding).items()}
    group = stores[name] / "rectified" / RECTIFIED
    if group.exists():
        caches = ("rectified", "materialised") if name == MATERIALISED else ("rectified",)
        documented |= {group / array: row for array, row in told_arrays(*caches).items()}
        assert {file.parent for file in group.glob("*/zarr.json")} <= documented.keys()

    for folder, row in documented.items():
        found = read_json(folder / "zarr.json")
        assert as_text(found) == as_text(expected_document(row, found)), folder
        assert found["shape"] == [lengths[d] for d in row["dimensions"].split(", ")]


@pytest.mark.parametrize(("kind", "array"), [("whole", "dataset_index"), ("block", "label_logit")])
def test_the_printed_documents_are_real(stores: dict[str, Path], kind: str, array: str) -> None:
    folder = stores["klt"] / ("" if kind == "whole" else f"rectified/{RECTIFIED}")

    printed = json.loads(fenced("json", kind))

    assert as_text(printed) == as_text(read_json(folder / array / "zarr.json"))


@pytest.mark.parametrize(
    ("classes", "index", "prediction"),
    [
        (256, "uint8", "uint16"),
        (257, "uint16", "uint16"),
        (65_536, "uint16", "uint16"),
        (65_537, "uint32", "uint32"),
    ],
)
def test_dtypes_that_depend_on_the_classes(classes: int, index: str, prediction: str) -> None:
    assert TopK(classes, 2).arrays()["topk_index"].dtype == index
    assert layout.base_arrays(classes)["prediction"].dtype == prediction


def test_every_object_has_a_key_of_the_tree(stores: dict[str, Path]) -> None:
    tree = re.search(r"## Objects\n\n((?:    .*\n)+)", DOCUMENT)
    assert tree is not None
    keys = [re.split(r"\s{2,}", line.strip())[0] for line in tree[1].splitlines()]
    patterns = [pattern(key) for line in keys for key in line.split(", ")]
    used = set()
    for store in stores.values():
        for file in store.rglob("*"):
            if file.is_file():
                key = str(file.relative_to(store))
                matching = [p for p in patterns if re.fullmatch(p, key)]
                assert matching, key
                used.update(matching)

    assert set(patterns) - used == {pattern("commits/<part>/v00003/b00000.json")}


def pattern(key: str) -> str:
    """A key of the tree, as a regular expression."""
    meant = {
        re.escape("<array>"): r"[a-z_]+",
        re.escape("<view>"): r"\d+",
        re.escape("<block>"): r"\d+",
        re.escape("[/0]"): r"(/0)?",
        re.escape("<name>"): r"[A-Za-z0-9][\w.+-]*",
        re.escape("<part>"): r"(logits|eval|rectified/[^/]+)",
        re.escape("/..."): r"/(zarr\.json|c/.+)",
        "v00003": r"v\d{5,}",
        "b00000": r"b\d{5,}",
    }
    text = re.escape(key)
    for documented, expression in meant.items():
        text = text.replace(documented, expression)
    return text


# ---- the grid of blocks ----------------------------------------------------------------------


def test_the_grid_is_that_of_the_layout() -> None:
    documented = program("grid")["block_grid"]
    rows, classes = (1, 7, 300, 8193, 50_000, 131_071, 1_281_167), (2, 10, 1000, 21_841)
    for n, c, most in itertools.product(rows, classes, (1, 100, 9000, 65_536)):
        grid = layout.block_grid(n, c, most)
        assert documented(n, c, most) == (grid.chunk_rows, grid.block_rows), (n, c, most)


def test_the_table_of_grids() -> None:
    for row in table("grid"):
        n, c, most, chunk_rows, block_rows, blocks, last = map(int, row.values())
        grid = layout.block_grid(n, c, most)
        assert (grid.chunk_rows, grid.block_rows, grid.num_blocks) == (
            chunk_rows,
            block_rows,
            blocks,
        )
        assert grid.length(blocks - 1) == last


# ---- attributes ------------------------------------------------------------------------------


def flattened(identity: Json) -> Json:
    """`teacher.weights` and so on."""
    flat = {}
    for name, value in identity.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": item for inner, item in value.items()}
        else:
            flat[name] = value
    return flat


@each_store
def test_the_fields_of_the_attributes(stores: dict[str, Path], name: str) -> None:
    found = attributes(stores[name])

    assert_fields(found, fields("root"))
    assert_fields(flattened(found["identity"]), fields("identity"))
    assert_fields(found["encoding"], fields("encoding"))
    assert_fields(found["provenance"], fields("provenance"))
    assert_fields(found["fidelity"], fields("fidelity"))
    assert found["provenance"]["config"]["block_rows"] == BLOCK_ROWS


def test_the_fields_are_those_of_the_structs() -> None:
    def of(struct: Any) -> set[str]:
        return set(struct.__struct_fields__)

    beside = {"format", "version", "digest"}
    assert fields("root").keys() == of(RootAttributes) | beside
    assert fields("encoding").keys() == of(EncodingAttributes)
    assert fields("fidelity").keys() == of(Fidelity) - {"top5_agreement"}  # stands beside it
    beside = {"identity_digest", "statistics", "digest"}
    assert fields("rectification").keys() == of(RectificationSettings) | beside
    identity = {
        f"{field.name}.{inner}" if of_struct else field.name
        for field in msgspec.structs.fields(Identity)
        for of_struct in [hasattr(field.type, "__struct_fields__")]
        for inner in (field.type.__struct_fields__ if of_struct else [""])
    }
    assert fields("identity").keys() == identity


def test_the_encodings_parameters(stores: dict[str, Path]) -> None:
    found = {name: attributes(path)["encoding"] for name, path in stores.items()}

    assert all(not found[name]["parameters"] for name in ("float32", "float16", "uint8"))
    assert found["klt"]["parameters"].keys() == {"dtype", "step"}
    refined = LogitCache.open(stores["klt-top"])
    assert found["klt-top"]["parameters"] == refined.encoding.parameters
    (documented,) = (row["meaning"] for row in table("encoding") if row["field"] == "parameters")
    named = set(re.findall(r"[a-z_]+", documented.partition("klt-top:")[2].partition(". klt")[0]))
    named -= {"numbers", "integers"}
    assert found["klt-top"]["parameters"].keys() == named
    both = named | {f"anchor_{name}" for name in named}
    assert found["klt-anchored"]["parameters"].keys() == both
    assert found["topk"]["parameters"] == {"k": 4, "temperatures": [1.0, 4.0]}
    step = LogitCache.open(stores["klt"]).encoding.calibration()["klt_step"]
    assert found["klt"]["parameters"]["step"] == float(step.min())
    assert attributes(stores["topk"])["fidelity"]["temperatures"] == [1.0, 4.0]


def test_the_fields_of_a_rectification(stores: dict[str, Path]) -> None:
    for name in (MATERIALISED, "topk"):
        found = attributes(stores[name] / "rectified" / RECTIFIED)
        assert_fields(found, fields("rectification"))
        assert_fields(found["statistics"], fields("statistics"))
        assert found["materialised"] == (name == MATERIALISED)
        assert found["identity_digest"] == attributes(stores[name])["identity_digest"]
        assert found["statistics"]["most_confused"][0].keys() == {"label", "predicted", "count"}


@each_store
def test_the_fields_of_records(stores: dict[str, Path], name: str) -> None:
    parts = {"logits": "logits", "eval": "eval", "rectified": f"rectified/{RECTIFIED}"}
    for documented, part in parts.items():
        expected = {
            row["field"]: row["type"]
            for row in table("records")
            if documented in row["parts"].split(", ")
        }
        for file in (stores[name] / "commits" / part).glob("v*.json"):
            beside = name == "klt-anchored" and file.stem != "v00000" and part == "logits"
            content = file.read_bytes()
            records = json.loads(content)["records"]
            assert hashlib.sha256(content[87:-1]).hexdigest() == json.loads(content)["digest"]
            assert content == b'{"digest":"%s","records":%s}' % (content[11:75], content[87:-1])
            assert content[87:-1] == canonical(records)
            assert [record["block"] for record in records] == list(range(len(records)))
            for record in records:
                assert ("anchor" in record) == beside
                assert_fields({f: x for f, x in record.items() if f != "anchor"}, expected)
                assert_described(stores[name], record["objects"])
            keys = [key.split("/c/") for key in records[0]["objects"]]
            others = "logits_" if name == "klt-anchored" and not beside else "anchor_"
            arrays = {n for n in by_block(stores[name], part) if not n.startswith(others)}
            assert {array for array, _ in keys} == arrays


def by_block(store: Path, part: str) -> set[str]:
    """The arrays whose objects a record of a part names."""
    if part == "eval":
        return {"eval_logits", "eval_prediction"}
    folder, caches = "", [*EVERY, attributes(store)["encoding"]["name"]]
    if part != "logits":
        found = attributes(store / part)
        folder, caches = f"{part}/", ["rectified", *["materialised"] * found["materialised"]]
    rows = told_arrays(*caches)
    return {f"{folder}{name}" for name, row in rows.items() if row["stored"].startswith("block")}


def assert_described(store: Path, objects: dict[str, Json]) -> None:
    for key, described in objects.items():
        content = (store / key).read_bytes()
        parts = described.pop("parts", [])
        assert described == {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        assert bool(parts) != key.startswith("eval_")
        at = 0
        for length, digest in parts:
            assert digest == hashlib.sha256(content[at : at + length]).hexdigest()[:16]
            at += length
        if parts:
            assert (at, parts[-1][0]) == (len(content), 16 * (len(parts) - 1) + 4)


def test_the_fields_within_a_rectified_blocks_record(stores: dict[str, Path]) -> None:
    documented = {row["field"]: row["meaning"] for row in table("records")}
    file = stores["klt"] / "commits/rectified" / RECTIFIED / "v00000.json"
    record = read_json(file)["records"][0]

    assert ", ".join(RectificationSettings.__struct_fields__) == documented["settings"]
    assert record["settings"].keys() == set(RectificationSettings.__struct_fields__) - OPTIONAL
    assert all(name in documented["statistics"] for name in record["statistics"])


def test_a_reader_ignores_fields_that_it_does_not_know(my_copy: Path) -> None:
    document = read_json(my_copy / "zarr.json")
    document["attributes"] = sealed({**document["attributes"], "note": "hello"})
    (my_copy / "zarr.json").write_text(json.dumps(document))
    file = my_copy / "commits/logits/v00000.json"
    file.write_bytes(seal_records([r | {"note": "hello"} for r in unsealed(file.read_bytes())]))

    assert LogitCache.open(my_copy).read_view(0, RECTIFIED) is not None


# ---- digests ---------------------------------------------------------------------------------


def canonical(value: Any) -> bytes:
    """As the attributes' digest spells JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def test_the_identity_of_the_example() -> None:
    identity = msgspec.json.decode(fenced("json", "identity"), type=Identity)
    line = fenced("text", "canonical").replace("\n", "").encode()

    assert line == msgspec.json.encode(identity, order="sorted")
    assert hashlib.sha256(line).hexdigest() == identity.digest()
    assert fenced("text", "digest").strip() == identity.digest()


@pytest.mark.parametrize(
    ("value", "spelt"),
    [
        pytest.param(1.0, "1.0", id="whole"),
        pytest.param(1e-5, "0.00001", id="small"),
        pytest.param(1e-6, "1e-6", id="smaller"),
        pytest.param(1e15, "1000000000000000.0", id="large"),
        pytest.param(1e16, "1e16", id="larger"),
        pytest.param('"\\\n\x01\x7fé😀/', '"\\"\\\\\\n\\u0001\x7fé😀/"', id="characters"),
    ],
)
def test_how_an_identity_is_spelt(value: float | str, spelt: str) -> None:
    assert msgspec.json.encode(value, order="sorted").decode() == spelt


@pytest.mark.parametrize(
    ("value", "spelt"),
    [
        pytest.param(1e-4, "0.0001", id="small"),
        pytest.param(1e-5, "1e-05", id="smaller"),
        pytest.param(1e16, "1e+16", id="larger"),
        pytest.param('"\\\n\x7fé😀/', '"\\"\\\\\\n\\u007f\\u00e9\\ud83d\\ude00/"', id="characters"),
    ],
)
def test_how_attributes_are_spelt(value: float | str, spelt: str) -> None:
    text = canonical({"value": value})

    assert text.decode() == f'{{"value":{spelt}}}'
    assert sealed({"value": value})["digest"] == hashlib.sha256(text).hexdigest()


@each_store
def test_the_digests_of_a_store(stores: dict[str, Path], name: str) -> None:
    cache, found = LogitCache.open(stores[name]), attributes(stores[name])

    bare = {key: value for key, value in found.items() if key != "digest"}
    assert found["digest"] == hashlib.sha256(canonical(bare)).hexdigest()
    group = stores[name] / "rectified" / RECTIFIED
    if group.exists():
        whole = attributes(group)
        digest = whole.pop("digest")
        assert digest == hashlib.sha256(canonical(whole)).hexdigest()
    labels = cache.labels.numpy().astype("<i4").tobytes()
    assert found["identity"]["dataset"]["labels"] == hashlib.sha256(labels).hexdigest()[:32]

    about = found["encoding"]
    hashed = about["name"] + json.dumps(about["parameters"], sort_keys=True)
    digest_of = hashlib.sha256(hashed.encode())
    for array, values in sorted(cache.encoding.calibration().items()):
        stored = np.asarray(cache.group[array][:])  # type: ignore[index]
        assert np.array_equal(stored, values.numpy())
        digest_of.update(f"{array}\ttorch.{stored.dtype}\t{stored.shape}\n".encode())
        digest_of.update(stored.tobytes())
    assert about["digest"] == digest_of.hexdigest()[:32]


@each_store
def test_the_digests_of_arrays(stores: dict[str, Path], name: str) -> None:
    documented = attributes(stores[name])["shared_arrays"]
    assert documented.keys() == {"dataset_index", "label", "eval_label"}
    for array, digest in documented.items():
        values = np.asarray(LogitCache.open(stores[name]).group[array][:])  # type: ignore[index]
        line = f"{array}\ttorch.{values.dtype}\t{values.shape}\n".encode()
        assert digest == hashlib.sha256(line + values.tobytes()).hexdigest()[:32]


@pytest.mark.parametrize("array", ["label", "dataset_index"])
def test_the_reader_refuses_arrays_of_another_cache(my_copy: Path, array: str) -> None:
    root: Any = zarr.open_group(my_copy)
    root[array][:] = root[array][:][::-1]
    with pytest.raises(ValueError, match=f"{array} is damaged"):
        READER["read_view"](my_copy, 0)


def test_what_is_hashed_of_an_encoding_is_printed() -> None:
    for text, coding in (
        ("float32{}", ENCODINGS["float32"]()),
        ('topk{"k": 10, "temperatures": [1.0, 2.0, 4.0]}', TopK(1000)),
    ):
        assert f"`{text}`" in DOCUMENT
        assert coding.digest() == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_the_copy_holds_the_text_that_was_hashed(stores: dict[str, Path]) -> None:
    text = (stores["klt"] / "commits/attributes.json").read_bytes()
    found = attributes(stores["klt"])

    assert json.loads(text)["records"] == [found]
    assert hashlib.sha256(text[87:-1]).hexdigest() == json.loads(text)["digest"]
    one = b'"digest":"%s",' % found["digest"].encode()
    within = text[87:-1].removeprefix(b"[").removesuffix(b"]")
    assert within.startswith(b"{" + one)
    assert hashlib.sha256(within.replace(one, b"", 1)).hexdigest() == found["digest"]


def test_the_digest_of_weights() -> None:
    weight, steps = torch.arange(6.0).view(2, 3), torch.tensor(7)
    hashed = hashlib.sha256(b"a.weight\ttorch.float32\t(2, 3)\n" + weight.numpy().tobytes())
    hashed.update(b"b.steps\ttorch.int64\t()\n" + (7).to_bytes(8, "little"))

    digest = weights_digest({"b.steps": steps, "a.weight": weight})

    assert digest == hashed.hexdigest()[:32]


# ---- pixels and rectified values -------------------------------------------------------------


@pytest.mark.parametrize("spec", ["pad-crop:pad=2", "pad-crop:pad=2+erasing"])
def test_the_probed_pairs(stores: dict[str, Path], digits: Splits, spec: str) -> None:
    train, policy = first(digits.train, SAMPLES), view_policy(spec)
    assert train.images is not None

    pairs = program("probes")["probed_pairs"](SAMPLES, policy.count)

    documented = [
        zlib.crc32(policy.apply(train.images[[sample]], torch.tensor([sample]), view).numpy())
        for view, sample in pairs
    ]
    assert documented == pixel_probes(train, policy, None)
    if policy.count is not None:
        assert documented == attributes(stores["klt"])["pixel_probes"]


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("none", 1),
        ("pad-crop:pad=2", 25),
        ("pad-crop-flip:pad=2", 50),
        ("pad-crop:pad=2|pad-crop-flip:pad=2", 100),
        ("resized-crop-flip", None),
        ("pad-crop+erasing", None),
        ("none+mixup", None),
        ("pad-crop|pad-crop+erasing", None),
    ],
)
def test_how_many_views_there_are(spec: str, count: int | None) -> None:
    assert view_policy(spec).count == count


def cases() -> Iterator[RectifyConfig]:
    for method, space in itertools.product(
        ("pairwise", "swap", "blend"), ("probability-T", "probability-1", "logit")
    ):
        if (method, space) != ("blend", "logit"):
            yield RectifyConfig(method=method, space=space, temperature=3.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [*cases()], ids=lambda c: f"{c.method}-{c.space}")
def test_the_values_of_a_rectification(config: RectifyConfig) -> None:
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)) * 4
    predictions = logits.argmax(1)
    labels = (predictions + 1) % 5
    replaced: Callable[..., tuple[float, float]] = program("rectify")["replaced"]

    expected = replaced_logits(
        logits, labels, predictions, config.method, config.space, config.temperature
    )

    documented = [
        replaced(z, label, prediction, config.method, config.space, config.temperature)
        for z, label, prediction in zip(
            logits.double().numpy(), labels.tolist(), predictions.tolist(), strict=True
        )
    ]
    np.testing.assert_allclose(documented, torch.stack(expected, 1).numpy(), rtol=1e-4, atol=1e-5)


def test_the_test_split_is_rows_minus_their_maximum(stores: dict[str, Path]) -> None:
    found = {name: np.asarray(LogitCache.open(stores["klt"]).group[name][:])  # type: ignore[index]
             for name in ("eval_logits", "eval_prediction", "eval_label")}  # fmt: skip

    assert (found["eval_logits"].max(1) == 0).all()
    assert (found["eval_logits"].argmax(1) == found["eval_prediction"]).all()
    right = float((found["eval_prediction"] == found["eval_label"]).mean())
    assert LogitCache.open(stores["klt"]).eval_top1() == right


def test_where_the_offset_of_a_row_is(stores: dict[str, Path]) -> None:
    basis = LogitCache.open(stores["klt"]).encoding.calibration()["klt_basis"]
    assert float(basis[:-1].sum(1).abs().max()) < 1e-5
    np.testing.assert_allclose(basis[-1], 10**-0.5, rtol=1e-6)
    assert (READER["read_view"](stores["topk"], 0)[0].max(1) == 0).all()


def test_what_is_materialised(stores: dict[str, Path]) -> None:
    cache = LogitCache.open(stores[MATERIALISED])
    path = f"rectified/{RECTIFIED}/log_distribution"
    rows: NDArray[np.float32] = np.asarray(cache.group[path][1], dtype=np.float32)  # type: ignore[index]

    expected = cache.distribution(1, RECTIFIED, 4.0)[cache.dataset_index].log()

    np.testing.assert_allclose(rows, expected.numpy(), rtol=2e-3, atol=2e-3)


def test_topk_holds_the_weight_of_the_rest(stores: dict[str, Path]) -> None:
    """`ln Z` by the document, of kept logits and tail, against the exact rows."""
    exact = LogitCache.open(stores["float32"]).read_view(0).rows(torch.arange(SAMPLES)).double()
    cache = LogitCache.open(stores["topk"])
    in_order = cache.row_of
    arrays = {
        n: torch.tensor(np.asarray(cache.group[n][0]))[in_order]  # type: ignore[index]
        for n in ("topk_value", "topk_tail")
    }
    for t, temperature in enumerate((1.0, 4.0)):
        kept = torch.logsumexp(arrays["topk_value"].double() / temperature, 1)
        total = torch.logaddexp(kept, arrays["topk_tail"][:, t].double())
        whole = torch.logsumexp((exact - exact.amax(1, keepdim=True)) / temperature, 1)
        assert torch.allclose(total, whole, atol=2e-2)


def test_the_document_names_no_path_of_a_machine() -> None:
    assert not re.search(r"/(home|work|tmp|Users)/", DOCUMENT)
    assert (
        max(len(line) for line in DOCUMENT.splitlines() if line[:1] not in ("|", "{", '"')) <= 100
    )


def test_the_readme_links_to_it() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert "(docs/cache-format.md)" in readme
