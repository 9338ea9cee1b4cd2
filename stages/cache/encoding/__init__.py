"""Logits <-> stored arrays: one frozen class an encoding, registered by its own file.

| name         | for                                                                     |
|--------------|-------------------------------------------------------------------------|
| float32      | exactness; the default up to 10 classes                                 |
| float16      | exactness enough for anything, 2 bytes a logit                          |
| uint8        | one byte a logit, simple                                                |
| klt          | whole rows in under half a byte a logit                                 |
| klt-top      | whole rows, coarse but for the leading classes; the default above 10    |
| klt-anchored | the same of many views: what the first does not say of the others       |
| topk         | the largest logits and the weight of the rest                           |
"""

from stages.cache.encoding.base import (
    DEFAULT_BUDGET,
    ENCODINGS,
    Budget,
    Encoding,
    check_offset,
    check_temperature,
)
from stages.cache.encoding.choose import (
    FIT_ROWS,
    EncodingAttributes,
    Measured,
    check_encoding,
    encoding_attributes,
    fit_encoding,
    fit_rows,
    is_encoding,
    measure_all,
    restored,
    row_bytes_on_disk,
    views_to_fit,
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
from stages.registry import import_all

import_all(__name__)

__all__ = [
    "DEFAULT_BUDGET",
    "ENCODINGS",
    "FIT_ROWS",
    "Budget",
    "Encoding",
    "EncodingAttributes",
    "Fidelity",
    "Measured",
    "check_encoding",
    "check_offset",
    "check_temperature",
    "checked_rows",
    "combined",
    "compare",
    "encoding_attributes",
    "fit_encoding",
    "fit_rows",
    "is_encoding",
    "mean_kl",
    "measure",
    "measure_all",
    "restored",
    "row_bytes_on_disk",
    "row_kl",
    "rows_of_a_view",
    "views_to_fit",
]
