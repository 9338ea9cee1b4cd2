"""Policies by their specification, `base:key=value+layer+mixer` or `WEAK|STRONG`, and by identity.

resized-crop-flip+rand-augment:m=7+erasing+mixup:alpha=0.8
pad-crop-flip|pad-crop-flip+trivial-augment
v2:mymodule:make_transform+cutmix
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from stages.errors import ViewError
from stages.inputs.views.augment import RandAugment, TrivialAugment
from stages.inputs.views.crops import CropPolicy, PadCrop, PadCropFlip, Plain, ResizedCropFlip
from stages.inputs.views.erasing import Erasing
from stages.inputs.views.layers import Composed
from stages.inputs.views.mixers import MIXERS
from stages.inputs.views.mixing import Mixed
from stages.inputs.views.pairs import Paired
from stages.inputs.views.policy import Parameters, ViewPolicy, parameters_of
from stages.inputs.views.transforms import TORCHVISION, Transform

POLICIES: Mapping[str, Callable[..., CropPolicy]] = {
    p.name: p for p in (PadCropFlip, PadCrop, ResizedCropFlip, Plain)
}
LAYERS: Mapping[str, Callable[..., Any]] = {
    layer.name: layer for layer in (TrivialAugment, RandAugment, Erasing)
}
_TRANSFORM = "v2:module:callable"
_ORDER = [*LAYERS, *MIXERS]
_SIDES = ("weak", "strong")

Part = tuple[str, Parameters]
"""One stage of a composition: its name, `v2:module:callable` for a transform; its parameters."""


def view_policy(spec: str, seed: int = 0, plain: Plain | None = None) -> ViewPolicy:
    """The policy that a specification describes, for example `pad-crop:pad=2` or
    `pad-crop-flip+trivial-augment+mixup:alpha=0.4`; see docs/views.md.

    plain: what a `none` without parameters stands for, None for the image as it is.
    Raises ViewError for an unknown name or parameter, suggesting the nearest, and for stages that
    do not go together.
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


def _parsed(part: str) -> Part:
    """`name:key=value,...` -> the name and its parameters, of the types they have."""
    name, _, arguments = part.partition(":")
    if name == "v2":
        return part, {}
    make = POLICIES.get(name) or LAYERS.get(name) or MIXERS.get(name)
    if make is None:
        raise _unknown(name)
    known, parameters = parameters_of(make()), Parameters()
    for argument in filter(None, arguments.split(",")):
        key, _, value = argument.partition("=")
        try:
            parameters[key] = type(known[key])(value)
        except (KeyError, ValueError):
            raise ViewError(
                f"'{argument}' is not a parameter of view policy '{name}'",
                f"It takes {', '.join(f'{k}={v}' for k, v in known.items()) or 'none'}.",
            ) from None
    return name, parameters


def _unknown(name: str) -> ViewError:
    near = difflib.get_close_matches(name, [*POLICIES, *_ORDER], n=1)
    return ViewError(
        f"unknown view policy '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""),
        f"Known policies: {', '.join([*POLICIES, _TRANSFORM])}; "
        f"on top of one, in this order: {_on_top()}.",
    )


def _on_top() -> str:
    return f"{', '.join(LAYERS)}, {' or '.join(MIXERS)}"


# ---- from an identity -----------------------------------------------------------------------


class _NotOursError(Exception):
    """An identity that does not read as a policy of this program."""


def _sides(name: str, parameters: Mapping[str, Any]) -> list[list[Part]]:
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


def _is_orderly(parts: list[Part]) -> bool:
    """Whether a base comes first, then layers in their order, then at most one mixer."""
    (first, _), *on_top = parts
    ranks = [min(_ORDER.index(name), len(LAYERS)) if name in _ORDER else -1 for name, _ in on_top]
    return first not in _ORDER and -1 not in ranks and ranks == sorted(set(ranks))


def _built(sides: list[list[Part]], seed: int) -> ViewPolicy:
    policies = [_composed(side, seed) for side in sides]
    return policies[0] if len(policies) == 1 else Paired(*policies)


def _composed(parts: list[Part], seed: int) -> ViewPolicy:
    (first, parameters), *on_top = parts
    policy = _base(first, parameters, seed)
    if layers := tuple(LAYERS[name](**own) for name, own in on_top if name in LAYERS):
        policy = Composed(policy, layers)
    mixer = next((MIXERS[name](**own) for name, own in on_top if name in MIXERS), None)
    return policy if mixer is None else Mixed(policy, mixer)


def _base(name: str, parameters: Parameters, seed: int) -> ViewPolicy:
    kind, _, target = name.partition(":")
    if kind == "v2":
        return Transform(target, str(parameters.get("torchvision", TORCHVISION)), seed)
    return POLICIES[name](**parameters, seed=seed)
