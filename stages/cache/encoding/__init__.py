"""Logits <-> stored arrays: one frozen class an encoding.

| name    | for                                                                    |
|---------|------------------------------------------------------------------------|
| float32 | exactness; the default up to 10 classes                                |
| float16 | exactness enough for anything, 2 bytes a logit                         |
| uint8   | one byte a logit, simple                                               |
| klt     | whole rows in under half a byte a logit; the default above 10 classes  |
| topk    | thousands of classes: the largest logits and the weight of the rest    |
"""

from stages.cache.encoding.base import Encoding, check_offset, check_temperature
from stages.cache.encoding.choose import (
    ENCODINGS,
    FIT_ROWS,
    Measured,
    check_encoding,
    fit_encoding,
    is_encoding,
    measure_all,
)
from stages.cache.encoding.fidelity import (
    Fidelity,
    checked_rows,
    combined,
    compare,
    mean_kl,
    measure,
    row_kl,
    rows_of_a_view,
)
from stages.cache.encoding.floats import Float16, Float32
from stages.cache.encoding.klt import DEFAULT_MAX_KL, Klt, fit_klt
from stages.cache.encoding.restore import EncodingAttributes, encoding_attributes, restored
from stages.cache.encoding.topk import TopK
from stages.cache.encoding.uint8 import Uint8

__all__ = [
    "DEFAULT_MAX_KL",
    "ENCODINGS",
    "FIT_ROWS",
    "Encoding",
    "EncodingAttributes",
    "Fidelity",
    "Float16",
    "Float32",
    "Klt",
    "Measured",
    "TopK",
    "Uint8",
    "check_encoding",
    "check_offset",
    "check_temperature",
    "checked_rows",
    "combined",
    "compare",
    "encoding_attributes",
    "fit_encoding",
    "fit_klt",
    "is_encoding",
    "mean_kl",
    "measure",
    "measure_all",
    "restored",
    "row_kl",
    "rows_of_a_view",
]
