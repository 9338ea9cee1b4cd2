"""What stage two counts: wrong rows per view, rows repaired, the pairs of classes most confused."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.cache.records import Record

_PAIRS_AT_ONCE = 2**20
"""Of confused classes, before equal ones are counted together."""


class Tally:
    """Statistics over blocks, counted up view by view."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._rows: Counter[int] = Counter()
        self._wrong: Counter[int] = Counter()
        self._repaired = self._trusted = 0
        self._pairs = np.empty((2, 0), dtype=np.int64)  # label * C + predicted, and how often
        self._to_merge: list[NDArray[np.int64]] = []
        self._waiting = 0

    def add(self, records: Mapping[int, Record]) -> None:
        """The records of one view's blocks."""
        for _, record in sorted(records.items()):
            block = record["statistics"]
            self._rows[record["view"]] += block["rows"]
            self._wrong[record["view"]] += block["wrong"]
            self._repaired += block["label_is_argmax"]
            self._trusted += block.get("trusted", 0)
            label, predicted, count = np.array(block["confused"], np.int64).reshape(-1, 3).T
            self._to_merge.append(np.stack([label * self._num_classes + predicted, count]))
            self._waiting += len(label)
        if self._waiting > _PAIRS_AT_ONCE:
            self._merge()

    def _merge(self) -> None:
        """Every pair once, in the order in which they were first seen."""
        pairs, counts = np.concatenate([self._pairs, *self._to_merge], axis=1)
        unique, first, which = np.unique(pairs, return_index=True, return_inverse=True)
        counted = np.zeros_like(unique)
        np.add.at(counted, which, counts)
        order = first.argsort()
        self._pairs = np.stack([unique, counted])[:, order]
        self._to_merge, self._waiting = [], 0

    def summary(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Accuracy per view, share repaired of what was rectified, the 20 most confused pairs (the
        first seen first).
        """
        self._merge()
        total = sum(self._wrong.values())
        rectified = total - self._trusted
        most = (-self._pairs[1]).argsort(kind="stable")[:20]
        return {
            "wrong_rows": total,
            "wrong_rate": total / sum(self._rows.values()),
            "top1_per_view": [1 - self._wrong[v] / self._rows[v] for v in sorted(self._rows)],
            "label_is_argmax": self._repaired / rectified if rectified else 1.0,
            **({"trusted_rows": self._trusted} if self._trusted else {}),
            "most_confused": [
                {
                    "label": class_names[pair // self._num_classes],
                    "predicted": class_names[pair % self._num_classes],
                    "count": count,
                }
                for pair, count in self._pairs[:, most].T.tolist()
            ],
        }
