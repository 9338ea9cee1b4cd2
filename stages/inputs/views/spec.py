"""Policies by their specification, `base:key=value+layer+mixer` or `WEAK|STRONG`, and by identity.

resized-crop-flip+rand-augment:m=7+erasing+mixup:alpha=0.8
pad-crop-flip|pad-crop-flip+trivial-augment
v2:mymodule:make_transform+cutmix
"""

import difflib
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from stages.errors import ViewError
from stages.inputs.views.crops import Plain
from stages.inputs.views.layers import ON_TOP
from stages.inputs.views.named import BASES, Parameters, Stage
from stages.inputs.views.pairs import Paired
from stages.inputs.views.policy import ViewPolicy

_SIDES = ("weak", "strong")


def view_policy(spec: str, seed: int = 0, plain: Plain | None = None) -> ViewPolicy:
    """The policy that a specification describes; see docs/views.md.

    Parameters
    ----------
    spec : str
        For example `pad-crop:pad=2` or `pad-crop-flip+trivial-augment+mixup:alpha=0.4`.
    seed : int
        Of all draws.
    plain : Plain, optional
        What a `none` without parameters stands for; the image as it is if None.

    Returns
    -------
    ViewPolicy
        `apply(images, samples, view)` takes uint8 (B, C, H, W) and int64 (B,), the positions in the
        dataset, and returns view `view` of each, uint8 (B, C, H, W).

    Raises
    ------
    ViewError
        For an unknown name or parameter, suggesting the nearest, and for parts that do not go
        together.
    """
    sides = [[_parsed(part) for part in side.split("+")] for side in spec.split("|")]
    if not all(map(_is_orderly, sides)):
        raise ViewError(
            f"'{spec}' is not a composition: a base comes first, then at most one each of "
            f"{_on_top()}, in this order",
            "For example resized-crop-flip+rand-augment:m=7+erasing+mixup:alpha=0.8.",
        )
    if len(sides) > len(_SIDES):
        raise ViewError(f"'{spec}' has {len(sides)} sides", "Give POLICY or WEAK|STRONG.")
    if plain is not None:
        for side in sides:
            if side[0] == ("none", {}):
                side[0] = ("none", plain.parameters)
    return _built(sides, seed)


def known_policy(
    name: str, parameters: Mapping[str, int | float | str], version: int, seed: int
) -> ViewPolicy:
    """The policy that an identity describes. Raises ViewError if this program draws otherwise."""
    try:
        policy = _built(_sides(name, parameters), seed)
    except (KeyError, TypeError, _NotOursError):
        raise ViewError(
            f"this program has no view policy '{name}' with {dict(parameters)}",
            "Install the version of teacher-cache that made the cache.",
        ) from None
    if policy.version != version:
        raise ViewError(
            f"view policy '{name}' is version {policy.version} here, {version} in the cache",
            "Install the version of teacher-cache that made the cache.",
        )
    return policy


# ---- from text ------------------------------------------------------------------------------


def _parsed(text: str) -> Stage:
    """`name:key=value,...` -> the name and its parameters, of the types they have."""
    kind = text.partition(":")[0]
    found = _base(kind) or ON_TOP.get(kind)
    if found is None:
        raise _unknown(kind)
    return found.parse(text)


def _base(kind: str) -> type[Any] | None:
    return BASES.get(kind) or BASES.get(f"{kind}:")


def _unknown(name: str) -> ViewError:
    near = difflib.get_close_matches(name, [*BASES, *ON_TOP], n=1)
    bases = (f"{base}module:callable" if base.endswith(":") else base for base in sorted(BASES))
    return ViewError(
        f"unknown view policy '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""),
        f"Known policies: {', '.join(bases)}; on top of one, in this order: {_on_top()}.",
    )


def _on_top() -> str:
    """In their order; those of one place with `or`."""
    stages = sorted(ON_TOP.values(), key=lambda stage: (stage.place, stage.name))
    places = groupby(stages, key=lambda stage: stage.place)
    return ", ".join(" or ".join(stage.name for stage in some) for _, some in places)


# ---- from an identity -----------------------------------------------------------------------


class _NotOursError(Exception):
    """An identity that does not read as a policy of this program."""


def _sides(name: str, parameters: Mapping[str, Any]) -> list[list[Stage]]:
    """As `_parsed`, from a name and flat parameters: `pad`, `mixup.alpha`, `weak.mixup.alpha`."""
    names, left = name.split("|"), dict(parameters)
    prefixes = [""] if len(names) == 1 else [f"{side}." for side in _SIDES]
    if len(names) > len(prefixes):
        raise _NotOursError
    sides = []
    for side, prefix in zip(names, prefixes, strict=True):
        first, *on_top = side.split("+")
        parts = [(first, _taken(left, prefix))]
        parts += [(part, _taken(left, f"{prefix}{part}.")) for part in on_top]
        sides.append(parts)
    if left or not all(map(_is_orderly, sides)):
        raise _NotOursError
    return sides


def _taken(parameters: dict[str, Any], prefix: str) -> Parameters:
    """Those with this prefix and no further one, removed from the others."""
    keys = [k for k in parameters if k.startswith(prefix) and "." not in k[len(prefix) :]]
    return {key[len(prefix) :]: parameters.pop(key) for key in keys}


# ---- building -------------------------------------------------------------------------------


def _is_orderly(stages: list[Stage]) -> bool:
    """Whether a base comes first, and what is on top of it in the order of their places."""
    (first, _), *on_top = stages
    places = [ON_TOP[name].place if name in ON_TOP else -1 for name, _ in on_top]
    return first not in ON_TOP and -1 not in places and places == sorted(set(places))


def _built(sides: list[list[Stage]], seed: int) -> ViewPolicy:
    policies = [_composed(side, seed) for side in sides]
    return policies[0] if len(policies) == 1 else Paired(*policies)


def _composed(stages: list[Stage], seed: int) -> ViewPolicy:
    """Raises KeyError or TypeError for a stage or a parameter that there is not."""
    (first, parameters), *on_top = stages
    made = _base(first.partition(":")[0])
    if made is None:
        raise KeyError(first)
    policy: ViewPolicy = made.make(first, **parameters, seed=seed)
    for name, own in on_top:
        policy = ON_TOP[name].make(name, **own).on(policy)
    return policy
