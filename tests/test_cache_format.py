"""docs/cache-format.md held to the code: its tables, its documents, its rules, its programs.

Read from the Markdown: tables, JSON and Python that follow a comment `<!-- kind: name -->`.
"""

import hashlib
import itertools
import json
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import xarray
import zarr
from damage import edit_json, tree
from helpers import cache_of, first
from numpy.typing import NDArray

from stages.cache import LogitCache, layout
from stages.cache.encoding import ENCODINGS, EncodingAttributes, Fidelity
from stages.cache.encoding.topk import TopK
from stages.cache.identity import Identity, weights_digest
from stages.cache.metadata import RootAttributes, sealed
from stages.cache.records import seal_records, unsealed
from stages.cache.rectified import RectificationSettings
from stages.data import Splits
from stages.inputs.probes import pixel_probes
from stages.inputs.views import view_policy
from stages.objectives.rectification import replaced_logits
from stages.rectify import rectify
from stages.settings import RectifyConfig

DOCUMENT = (Path(__file__).parents[1] / "docs" / "cache-format.md").read_text()
SAMPLES, BLOCK_ROWS, VIEWS = 90, 30, 2
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
    **{"string": (str,), "integer": (int,), "integer or null": (int, type(None))},
    **{"number": (int, float), "boolean": (bool,), "object": (dict,)},
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
    splits = Splits(first(digits.train, SAMPLES), first(digits.test, 20))
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
    """Of rectified rows: tests/test_golden.py."""
    cache = LogitCache.open(stores[name])
    for view, temperature in itertools.product(range(VIEWS), (1.0, 4.0)):
        logits, labels = READER["read_view"](stores[name], view, temperature=temperature)

        expected = cache.read_view(view).rows(torch.arange(SAMPLES), temperature).numpy()
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
        assert (labels == cache.labels.numpy()).all()
    assert not re.search("(import|from) (stages|pipeline|torch)", fenced("test", "reader"))


def test_the_reader_refuses_what_is_not_there(my_copy: Path) -> None:
    def refused(error: type[Exception], words: str, *what: Any) -> None:
        with pytest.raises(error, match=words):
            READER["read_view"](my_copy, *what)

    refused(LookupError, r"\(2, 0\)", 2)
    refused(ValueError, "another temperature", 0, RECTIFIED, 1.0)
    (my_copy / "commits/rectified" / RECTIFIED / "v00000.json").unlink()
    refused(LookupError, r"\(0, 0\)", 0, RECTIFIED, 4.0)
    shard = my_copy / "logits_code/c/0/1/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(ValueError, "logits_code/c/0/1/0 is damaged", 0)
    records = my_copy / "commits/logits/v00001.json"
    whole = records.read_bytes()
    records.write_bytes(whole.replace(b'"right":', b'"Right":', 1))
    refused(ValueError, r"v00001\.json is damaged", 1)
    records.write_bytes(whole)
    for array in ("label", "dataset_index"):
        root: Any = zarr.open_group(my_copy)
        root[array][:] = root[array][:][::-1]
        refused(ValueError, f"{array} is damaged", 1)
        root[array][:] = root[array][:][::-1]
    edit_json(my_copy / "zarr.json", lambda d: d["attributes"].update(version=2))
    refused(ValueError, "version 1", 0)


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


def test_xarray(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stores["float32"].parent)
    found = program("xarray")
    targets = LogitCache.open(stores["float32"]).read_view(1, RECTIFIED)
    rows = found["in_order"].isel(view=1).values
    assert (rows == targets.rectified_rows(torch.arange(SAMPLES)).numpy()).all()
    assert (found["wrong"].values == found["better"].wrong.values).all()


PAGE = (Path(__file__).parents[1] / "docs" / "other-tools.md").read_text()
SHOWN = re.findall(r"^\| `(\w+)` \| (`.*?`) \| `(.*?)`(.*?) \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("name", "arrays", "expression", "more"), SHOWN, ids=lambda x: x[:9])
def test_what_xarray_shows(
    stores: dict[str, Path], name: str, arrays: str, expression: str, more: str
) -> None:
    assert {name for name, *_ in SHOWN} == {*ENCODINGS} - {"klt-top", "klt-anchored"}
    store = xarray.open_zarr(stores[name], consolidated=False)
    documented = {array.strip("` ") for array in arrays.split(",")}
    assert {str(array) for array in store} == documented | told_arrays(*EVERY).keys()

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


def test_the_names_that_are_ours_are_those_of_the_table() -> None:
    rectified = {row["array"] for row in table("arrays") if row["caches"] in REST}
    assert set(layout.RECTIFIED_ARRAYS) == rectified
    assert set(layout.ARRAYS) == {row["array"] for row in table("arrays")} - rectified
    assert {row["caches"] for row in table("arrays")} == {*ENCODINGS, *EVERY, *REST}


def expected_document(row: Row, found: Json) -> Json:
    """The document of an array by the table and the two that are printed; its shape, and the dtype
    where the table leaves a choice, are taken from `found`.
    """
    stored, _, transposed = row["stored"].partition(", ")
    document: Json = json.loads(fenced("json", stored))
    dtype, shape, fill = found["data_type"], found["shape"], json.loads(row["fill"])
    assert dtype in row["dtype"].split(" or ")
    chunk = shape if stored == "whole" else [1, BLOCK_ROWS, *shape[2:]]
    document |= {
        "shape": shape,
        "data_type": dtype,
        "dimension_names": row["dimensions"].split(", "),
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
    lengths = {"view": VIEWS, "sample": SAMPLES, "class": 10, "eval_sample": 20, "component": 10}
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
    groups = {stores[name] / group for group in ("commits", "rectified")}
    assert {file.parent for file in stores[name].glob("*/zarr.json")} == documented.keys() | groups
    group = stores[name] / "rectified" / RECTIFIED
    if group.exists():
        caches = ("rectified", "materialised") if name == MATERIALISED else ("rectified",)
        others = {*documented}
        documented |= {group / array: row for array, row in told_arrays(*caches).items()}
        assert {file.parent for file in group.glob("*/zarr.json")} == documented.keys() - others

    for folder, row in documented.items():
        found = read_json(folder / "zarr.json")
        assert as_text(found) == as_text(expected_document(row, found)), folder
        assert found["shape"] == [lengths[d] for d in row["dimensions"].split(", ")]


@pytest.mark.parametrize(("kind", "array"), [("whole", "dataset_index"), ("block", "label_logit")])
def test_the_printed_documents_are_real(stores: dict[str, Path], kind: str, array: str) -> None:
    folder = stores["klt"] / ("" if kind == "whole" else f"rectified/{RECTIFIED}")
    # of 300 samples in blocks of 100
    text = fenced("json", kind).replace("300", str(SAMPLES)).replace("100", str(BLOCK_ROWS))
    printed = json.loads(text)
    assert as_text(printed) == as_text(read_json(folder / array / "zarr.json"))


@pytest.mark.parametrize(
    ("classes", "index", "prediction"),
    [
        *((256, "uint8", "uint16"), (257, "uint16", "uint16")),
        *((65_536, "uint16", "uint16"), (65_537, "uint32", "uint32")),
    ],
)
def test_dtypes_that_depend_on_the_classes(classes: int, index: str, prediction: str) -> None:
    assert TopK(classes, 2).arrays()["topk_index"].dtype == index
    assert layout.base_arrays(classes)["prediction"].dtype == prediction


def test_every_object_has_a_key_of_the_tree(stores: dict[str, Path]) -> None:
    found = re.search(r"## Objects\n\n((?:    .*\n)+)", DOCUMENT)
    assert found is not None
    keys = [re.split(r"\s{2,}", line.strip())[0] for line in found[1].splitlines()]
    patterns = [pattern(key) for line in keys for key in line.split(", ")]
    used = set()
    for key in {key for store in stores.values() for key in tree(store)}:
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
        n, c, most, *documented = map(int, row.values())
        grid = layout.block_grid(n, c, most)
        last = grid.length(grid.num_blocks - 1)
        assert [grid.chunk_rows, grid.block_rows, grid.num_blocks, last] == documented


# ---- attributes ------------------------------------------------------------------------------


def flattened(identity: Json) -> Json:
    """`teacher.weights` and so on."""
    flat = {}
    for name, value in identity.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{name}.{inner}".rstrip("."): item for inner, item in parts}
    return flat


@each_store
def test_the_fields_of_the_attributes(stores: dict[str, Path], name: str) -> None:
    found = attributes(stores[name])
    assert_fields(found, fields("root"))
    assert_fields(flattened(found["identity"]), fields("identity"))
    for part in ("encoding", "provenance", "fidelity"):
        assert_fields(found[part], fields(part))
    assert found["provenance"]["config"]["block_rows"] == BLOCK_ROWS


def test_the_fields_are_those_of_the_structs() -> None:
    beside = {
        "root": (RootAttributes, {"format", "version", "digest"}),
        "encoding": (EncodingAttributes, set()),
        "fidelity": (Fidelity, set()),
        "rectification": (RectificationSettings, {"identity_digest", "statistics", "digest"}),
    }
    for name, (struct, more) in beside.items():
        # the agreement of the first five stands beside the fidelity
        own = {*struct.__struct_fields__} - ({"top5_agreement"} if name == "fidelity" else set())
        assert fields(name).keys() == own | more
    identity = {
        f"{field.name}.{inner}".rstrip(".")
        for field in msgspec.structs.fields(Identity)
        for inner in getattr(field.type, "__struct_fields__", [""])
    }
    assert fields("identity").keys() == identity


def test_the_encodings_parameters(stores: dict[str, Path]) -> None:
    found = {name: attributes(path)["encoding"]["parameters"] for name, path in stores.items()}

    assert not any(found[name] for name in ("float32", "float16", "uint8"))
    assert found["klt"].keys() == {"dtype", "step"}
    (documented,) = (row["meaning"] for row in table("encoding") if row["field"] == "parameters")
    named = set(re.findall(r"[a-z_]+", documented.partition("klt-top:")[2].partition(". klt")[0]))
    named -= {"numbers", "integers"}
    assert found["klt-top"].keys() == named
    assert found["klt-anchored"].keys() == named | {f"anchor_{name}" for name in named}
    assert found["topk"] == {"k": 4, "temperatures": [1.0, 4.0]}
    step = LogitCache.open(stores["klt"]).encoding.calibration()["klt_step"]
    assert found["klt"]["step"] == float(step.min())
    assert attributes(stores["topk"])["fidelity"]["temperatures"] == [1.0, 4.0]


def test_the_fields_of_a_rectification(stores: dict[str, Path]) -> None:
    for name in (MATERIALISED, "topk"):
        found = attributes(stores[name] / "rectified" / RECTIFIED)
        assert_fields(found, fields("rectification"))
        assert_fields(found["statistics"], fields("statistics"))
        assert found["materialised"] == (name == MATERIALISED)
        assert found["identity_digest"] == attributes(stores[name])["identity_digest"]
        assert found["statistics"]["most_confused"][0].keys() == {"label", "predicted", "count"}
    documented = {row["field"]: row["meaning"] for row in table("records")}
    file = stores["klt"] / "commits/rectified" / RECTIFIED / "v00000.json"
    record = read_json(file)["records"][0]
    assert ", ".join(RectificationSettings.__struct_fields__) == documented["settings"]
    assert record["settings"].keys() == set(RectificationSettings.__struct_fields__) - OPTIONAL
    assert all(name in documented["statistics"] for name in record["statistics"])


@each_store
def test_the_fields_of_records(stores: dict[str, Path], name: str) -> None:
    parts = {"logits": "logits", "eval": "eval", "rectified": f"rectified/{RECTIFIED}"}
    for documented, part in parts.items():
        rows = [row for row in table("records") if documented in row["parts"].split(", ")]
        expected = {row["field"]: row["type"] for row in rows}
        for file in (stores[name] / "commits" / part).glob("v*.json"):
            beside = name == "klt-anchored" and file.stem != "v00000" and part == "logits"
            records = json.loads(file.read_bytes())["records"]
            assert file.read_bytes() == sealed_text(canonical(records))
            assert [record["block"] for record in records] == list(range(len(records)))
            for record in records:
                assert (record.pop("anchor", None) is not None) == beside
                assert_fields(record, expected)
                assert_described(stores[name], record["objects"])
            others = "logits_" if name == "klt-anchored" and not beside else "anchor_"
            arrays = {n for n in by_block(stores[name], part) if not n.startswith(others)}
            assert {key.split("/c/")[0] for key in records[0]["objects"]} == arrays


def sealed_text(text: bytes) -> bytes:
    """A file of records: their text and its sha256."""
    return b'{"digest":"%s","records":%s}' % (hashlib.sha256(text).hexdigest().encode(), text)


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
        content, parts, at = (store / key).read_bytes(), described.pop("parts", []), 0
        assert described == {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        assert bool(parts) != key.startswith("eval_")
        for length, digest in parts:
            assert digest == hashlib.sha256(content[at : at + length]).hexdigest()[:16]
            at += length
        assert not parts or (at, parts[-1][0]) == (len(content), 16 * (len(parts) - 1) + 4)


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


@each_store
def test_the_digests_of_a_store(stores: dict[str, Path], name: str) -> None:
    cache, found = LogitCache.open(stores[name]), attributes(stores[name])
    for folder in (stores[name], stores[name] / "rectified" / RECTIFIED):
        if folder.exists():
            bare = attributes(folder)
            assert bare.pop("digest") == hashlib.sha256(canonical(bare)).hexdigest()
    labels = cache.labels.numpy().astype("<i4").tobytes()
    assert found["identity"]["dataset"]["labels"] == hashlib.sha256(labels).hexdigest()[:32]

    def hashed(array: str) -> bytes:
        values = np.asarray(cache.group[array][:])  # type: ignore[index]
        return f"{array}\ttorch.{values.dtype}\t{values.shape}\n".encode() + values.tobytes()

    documented = found["shared_arrays"]
    assert documented.keys() == {"dataset_index", "label", "eval_label"}
    for array, digest in documented.items():
        assert digest == hashlib.sha256(hashed(array)).hexdigest()[:32]
    about, calibration = found["encoding"], cache.encoding.calibration()
    text = about["name"] + json.dumps(about["parameters"], sort_keys=True)
    whole = text.encode() + b"".join(map(hashed, sorted(calibration)))
    assert about["digest"] == hashlib.sha256(whole).hexdigest()[:32]
    for array, values in calibration.items():
        assert np.array_equal(np.asarray(cache.group[array][:]), values.numpy())  # type: ignore[index]


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
    within = text[87:-1].removeprefix(b"[").removesuffix(b"]")
    assert text == sealed_text(b"[" + within + b"]")
    one = b'"digest":"%s",' % found["digest"].encode()
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


CASES = [
    RectifyConfig(method=method, space=space, temperature=3.0)  # type: ignore[arg-type]
    for method in ("pairwise", "swap", "blend")
    for space in ("probability-T", "probability-1", "logit")
    if (method, space) != ("blend", "logit")
]


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.method}-{c.space}")
def test_the_values_of_a_rectification(config: RectifyConfig) -> None:
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)) * 4
    predictions = logits.argmax(1)
    labels, how = (predictions + 1) % 5, (config.method, config.space, config.temperature)
    replaced: Callable[..., tuple[float, float]] = program("rectify")["replaced"]

    expected = replaced_logits(logits, labels, predictions, *how)

    documented = [
        replaced(z, int(label), int(prediction), *how)
        for z, label, prediction in zip(logits.double().numpy(), labels, predictions, strict=True)
    ]
    np.testing.assert_allclose(documented, torch.stack(expected, 1).numpy(), rtol=1e-4, atol=1e-5)


def test_what_is_materialised(stores: dict[str, Path]) -> None:
    cache = LogitCache.open(stores[MATERIALISED])
    path = f"rectified/{RECTIFIED}/log_distribution"
    rows: NDArray[np.float32] = np.asarray(cache.group[path][1], dtype=np.float32)  # type: ignore[index]
    expected = cache.distribution(1, RECTIFIED, 4.0)[cache.dataset_index].log()
    np.testing.assert_allclose(rows, expected.numpy(), rtol=2e-3, atol=2e-3)
