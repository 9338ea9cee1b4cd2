"""Which augmented view of a sample: a pure function of (seed, view, sample).

`policy.py` says what a policy is; `crops.py` has the bases, `augment.py` and `erasing.py` what goes
on top of them (`layers.py`), `mixers.py` mixup and cutmix, `mixing.py` who is mixed with whom,
`pairs.py` weak and strong views, `transforms.py` torchvision's own transforms, `spec.py` the names.
"""

from stages.inputs.views.augment import RandAugment, TrivialAugment
from stages.inputs.views.crops import (
    Boxes,
    PadCrop,
    PadCropFlip,
    Plain,
    ResizedCropFlip,
    render,
)
from stages.inputs.views.erasing import Erasing
from stages.inputs.views.layers import Composed, Layer
from stages.inputs.views.mixers import Cutmix, Mixer, Mixup
from stages.inputs.views.mixing import Mixed, check_unmixed, mixes
from stages.inputs.views.pairs import Paired
from stages.inputs.views.policy import Shown, ViewPolicy, check_view
from stages.inputs.views.spec import POLICIES, known_policy, view_policy
from stages.inputs.views.transforms import Transform

__all__ = [
    "POLICIES",
    "Boxes",
    "Composed",
    "Cutmix",
    "Erasing",
    "Layer",
    "Mixed",
    "Mixer",
    "Mixup",
    "PadCrop",
    "PadCropFlip",
    "Paired",
    "Plain",
    "RandAugment",
    "ResizedCropFlip",
    "Shown",
    "Transform",
    "TrivialAugment",
    "ViewPolicy",
    "check_unmixed",
    "check_view",
    "known_policy",
    "mixes",
    "render",
    "view_policy",
]
