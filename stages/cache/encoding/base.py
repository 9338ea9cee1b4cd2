"""What every encoding has."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from stages.cache.layout import ArraySpec
from stages.errors import CacheError, ConfigError

A_ROW = ("view", "sample")
ALONG_CLASSES = (*A_ROW, "class")
Budget = Mapping[float, float]
"""The mean KL that an encoding may have, in nats, at each of some temperatures."""
DEFAULT_BUDGET: Budget = {1.0: 3e-2, 4.0: 8e-3}
"""What `klt-top`, the default above 10 classes, aims at where nothing is asked for.

A student at T = 4 loses what the KL at T = 4 says, not what that at T = 1 says.
"""
PLAIN_BUDGET: Budget = {1.0: 5e-3}
"""What `klt` without `top` aims at where nothing is asked for."""


ENCODINGS: dict[str, type["Encoding"]] = {}
"""Every encoding by its name on the command line."""
Class = TypeVar("Class", bound=type["Encoding"])


def encoding(name: str) -> Callable[[Class], Class]:
    """Register a class as the encoding of this name."""

    def register(made: Class) -> Class:
        made.name = name
        ENCODINGS[name] = made
        return made

    return register


class Encoding(ABC):
    """How rows of logits are stored. Rows are independent of each other, and a constant added to a
    row does not change the distribution that comes back.

    `encode` gives the arrays that `arrays` names; `decode` is the way back, on whatever device the
    arrays and the encoding are. What an encoding was fitted to is its calibration: a few arrays
    that are written once, before the first block.
    """

    name: ClassVar[str] = "auto"
    default_up_to: ClassVar[float] = 0
    """Classes up to which `auto` takes it, where no KL is asked for; of several the smallest."""
    otherwise: ClassVar[str | None] = None
    """The encoding that `auto` takes where it would take this one, and no step holds its budget."""
    of_anchor: ClassVar[Mapping[str, str]] = {}
    """Where rows of all other views are coded beside those of the first, the anchor: what `decode`
    takes of the anchor's arrays as well, name there -> name here. Empty where views do not depend
    on each other.
    """
    takes: ClassVar[Mapping[str, Callable[[str], Any]]] = {}
    """What can be set after a colon (`topk:k=20`), and how each is read. Raises ValueError."""

    # ---- making one -------------------------------------------------------------------------

    @classmethod
    def parse(cls, text: str) -> dict[str, Any]:
        """`k=20,temperatures=1/2/4` as arguments of `fit`. Raises ConfigError."""
        given: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            key, _, value = part.partition("=")
            try:
                given[key] = cls.takes[key](value)
            except (KeyError, ValueError):
                raise ConfigError(
                    f"'{part}' is not a parameter of the encoding {cls.name}",
                    f"It takes {', '.join(cls.takes) or 'none'}.",
                ) from None
        return given

    @classmethod
    def stored_name(cls, given: Mapping[str, Any]) -> str:
        """The name in a store of what `fit` makes with these parameters."""
        return cls.name

    @classmethod
    def fit(cls, logits: Tensor, budget: Budget | None = None, **given: Any) -> "Encoding":
        """The encoding for rows like these.

        logits: float32 (n, C), a fair draw of rows. budget: mean KL to the exact rows at some
        temperatures; its own default if None. given: as `parse` gives it; with an anchor `second`
        too, float32 (n, C): the same samples in the second view. Raises CacheError if there is
        none.
        """
        return cls()

    @classmethod
    def restore(
        cls, parameters: Mapping[str, Any], num_classes: int, read: Callable[[str], Tensor]
    ) -> "Encoding":
        """The encoding of a store that exists. read: name of a calibration array -> values.

        Raises an exception of any kind if parameters or calibration are not those of an encoding.
        """
        return cls()

    # ---- what it is -------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, Any]:
        """Plain JSON values that, with the calibration, make the encoding again."""
        return {}

    @property
    def shown(self) -> dict[str, Any]:
        """The parameters that say something to a person."""
        return self.parameters

    @property
    def sizes(self) -> dict[str, int]:
        """The dimensions of its arrays beside view, sample and class."""
        return {}

    @abstractmethod
    def arrays(self) -> dict[str, ArraySpec]:
        """The arrays that are written block by block, of all views or of those that their specs
        name. `prediction`, which every cache has, is among them where `decode` needs it.
        """

    def calibration_arrays(self) -> dict[str, ArraySpec]:
        """The arrays that are written once."""
        return {}

    def calibration(self) -> dict[str, Tensor]:
        """Their values."""
        return {}

    # ---- encoding and decoding --------------------------------------------------------------

    @abstractmethod
    def encode(
        self, logits: Tensor, labels: Tensor | None = None, predictions: Tensor | None = None
    ) -> dict[str, Tensor]:
        """float32 (n, C) -> arrays, each (n, ...).

        labels: int64 (n,), for encodings that keep part of a row and always the label's logit.
        predictions: int64 (n,), as they are stored; the argmax of each row if None. Raises
        CacheError where a row cannot be represented.
        """

    def encode_beside(
        self,
        anchor: Mapping[str, Tensor],
        logits: Tensor,
        labels: Tensor | None = None,
        predictions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As `encode`, of rows of another view than the first; `decode` takes what it gives.

        anchor: what `as_anchor` makes of the first view of the same samples; it is among what is
        returned. Without an anchor nothing else than `encode`.
        """
        return self.encode(logits, labels, predictions)

    def as_anchor(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What other views need of the first one's arrays; empty without an anchor."""
        return {name: arrays[stored] for name, stored in self.of_anchor.items()}

    @abstractmethod
    def decode(self, arrays: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
        """Arrays -> float32 (n, C).

        temperature: where only a part of the row is kept, the one at which the probability of all
        the rest together is right. Raises CacheError for one that the arrays do not hold.
        """

    def holds(self, temperature: float) -> bool:
        """Whether rows can be decoded for this temperature."""
        return True

    @property
    def keeps_offset(self) -> bool:
        """Whether decoded rows have the teacher's own offset. Softmax ignores it, so encodings that
        leave it out are smaller.
        """
        return True

    @property
    def keeps_all(self) -> bool:
        """Whether the arrays hold every logit of a row."""
        return True

    def kept(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The classes whose logits the arrays hold, int64 (n, k), where not `keeps_all`."""
        raise NotImplementedError(self.name)

    def saturated(self, arrays: Mapping[str, Tensor]) -> int:
        """How many rows have a code at the end of its range."""
        return 0

    def to(self, device: torch.device) -> "Encoding":
        """The same encoding with its calibration on a device."""
        return self

    def digest(self) -> str:
        """sha256 (hex, 32 digits) of name, parameters and calibration."""
        digest = hashlib.sha256(self.name.encode())
        digest.update(json.dumps(self.parameters, sort_keys=True).encode())
        for name, values in sorted(self.calibration().items()):
            digest.update(f"{name}\t{values.dtype}\t{tuple(values.shape)}\n".encode())
            digest.update(values.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]


def check_range(logits: Tensor, largest: float, name: str) -> None:
    """Raise CacheError unless every logit is finite and at most `largest` in magnitude."""
    if not logits.numel():
        return
    peak = float(torch.stack(logits.aminmax()).abs().max())  # NaN where any is
    if not peak <= largest:
        raise CacheError(
            f"a teacher logit of {peak:.3g} does not fit in {name}",
            "Use --encoding float32." if peak < float("inf") else "Check the teacher.",
        )


def check_span(logits: Tensor, largest: float, name: str) -> None:
    """As `check_range`, of the distances to the largest logit of the row."""
    if not logits.numel():
        return
    check_range(logits, torch.finfo(torch.float32).max, name)
    smallest, highest = logits.aminmax(dim=1)
    span = float((highest.double() - smallest.double()).max())
    if not span <= largest:
        raise CacheError(
            f"a row of teacher logits that spans {span:.3g} does not fit in {name}",
            "Use --encoding float32.",
        )


def check_offset(coding: Encoding, reader: str) -> None:
    """Raise CacheError unless rows come back with the offset that something needs.

    reader: what needs it, as an error begins with it.
    """
    if not coding.keeps_offset:
        raise CacheError(
            f"{reader} reads logits themselves, not their softmax; the encoding {coding.name} "
            "keeps rows without their common offset",
            "Cache with --encoding float32, float16, uint8 or klt.",
        )


def check_temperature(coding: Encoding, temperature: float) -> None:
    """Raise CacheError unless rows can be decoded for this temperature."""
    if not coding.holds(temperature):
        known = ", ".join(f"{t:g}" for t in coding.parameters["temperatures"])
        raise CacheError(
            f"this cache keeps part of each row, and the weight of the rest at T = {known}, not at "
            f"{temperature:g}",
            "Use one of these temperatures, or cache with another --encoding "
            "(topk:temperatures=...).",
        )
