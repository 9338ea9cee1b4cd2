"""Which augmented view of a sample: a pure function of (seed, view, sample).

`policy.py` says what a policy is, `named.py` how its stages are registered by name; `crops.py` has
the bases, `boxes.py` cuts out what they draw, `augment.py` and `erasing.py` have what goes on top
of them (`layers.py`), `mixers.py` mixup and cutmix, `mixing.py` which samples are mixed, `pairs.py`
weak and strong views, `transforms.py` torchvision's own transforms, `spec.py` specifications and
identities.
"""

from stages.inputs.views.augment import RandAugment, TrivialAugment
from stages.inputs.views.boxes import Boxes
from stages.inputs.views.crops import PadCrop, PadCropFlip, Plain, ResizedCropFlip
from stages.inputs.views.erasing import Erasing
from stages.inputs.views.layers import ON_TOP, Composed, Layer
from stages.inputs.views.mixers import Cutmix, Mixup
from stages.inputs.views.mixing import Mixed, Mixer, check_unmixed, mixes
from stages.inputs.views.named import BASES
from stages.inputs.views.pairs import Paired
from stages.inputs.views.policy import Shown, ViewPolicy, check_view
from stages.inputs.views.spec import known_policy, view_policy
from stages.inputs.views.transforms import Transform, reseeds
from stages.registry import import_all

__all__ = [
    "BASES",
    "ON_TOP",
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
    "reseeds",
    "view_policy",
]

import_all(__name__)
