"""The calibrated temperature of a teacher, as a cache keeps it."""

from typing import Literal

import msgspec

Rows = Literal["train", "test"]
"""Which rows it was fitted on: those of the views, or of the test split."""


class Calibrated(msgspec.Struct, frozen=True):
    """Logits divided by `temperature` have the least negative log-likelihood of the labels.

    on: the rows that it was fitted on, `rows` of them. nll, nll_before: of these rows with it and
    without, in nats; ece, ece_before: their expected calibration error, in [0, 1].
    """

    temperature: float
    on: Rows
    rows: int
    nll: float
    nll_before: float
    ece: float
    ece_before: float
