"""Settings that several commands share: types, bounds, and the sections of a configuration."""

# fmt: off

from typing import Annotated, ClassVar, Literal

import msgspec

from stages.errors import ConfigError
from stages.schema import Settings, about

MOST_IN_A_BATCH, LARGEST_SIDE, MOST_WORKERS = 2**20, 2**14, 1024
"""Samples, pixels and processes: more are a slip of the finger, and would fail much later."""
TEMPERATURES = {"least": 1e-2, "most": 1e4}
"""Of a loss or a rectification: beyond, softmax in float32 is one class, or all alike."""
SEEDS = {"least": -(2**63), "most": 2**63 - 1}
MAX_BLOCK_ROWS = 65_536
"""Of a cache: the most rows of a view that are written and committed at once."""

Dtype = Literal["float32", "bfloat16", "float16"]
Decoder = Literal["nvjpeg"]
Feeding = Literal["auto", "memory", "stream"]
Outputs = Literal["logits", "probabilities"]
Method = Literal["pairwise", "swap", "blend"]
Space = Literal["probability-T", "probability-1", "logit"]
BiasMode = Literal["none", "eliminate", "rectify", "correct"]
Schedule = Literal["cosine", "linear", "ramp", "constant"]
Reduction = Literal["subset", "batch"]

# ---- settings that several structs have -----------------------------------------------------

Augment = Annotated[str, about(
    "Views: BASE, then layers after '+': pad-crop:pad=2+rand-augment:n=2,m=9, resized-crop-"
    "flip+erasing:p=0.25+mixup:alpha=0.8. v2:module:callable is a base of your own. WEAK|STRONG "
    "caches both in turn.", "--augment", metavar="POLICY", takes="policy", group="data")]
Device = Annotated[str, about(
    "cpu, cuda, cuda:N, or auto: a GPU where there is one.",
    "--device", takes="device", decides="weights")]
Precision = Annotated[Dtype, about(
    "Of the forward pass: float32, or autocast; weights stay float32.", "--dtype")]
BatchSize = Annotated[int, about(
    "Images in a batch.", "--batch-size", above=0, most=MOST_IN_A_BATCH)]
ChannelsLast = Annotated[bool, about(
    "Channels last in memory: faster convolutions.", decides="weights")]
ImageSize = Annotated[int | None, about(
    "Side of this model's input, if not data's.", above=0, most=LARGEST_SIDE)]
Mean = Annotated[tuple[float, ...] | None, about(
    "Normalisation, a number a channel; the weights' or the dataset's own if left out.", "--mean")]
Std = Annotated[tuple[float, ...] | None, about("As --mean.", "--std")]
Root = Annotated[str | None, about(
    "Where torchvision's datasets lie.", "--root", takes="folder", group="data")]
Download = Annotated[bool, about(
    "Let torchvision download what is missing.", "--download", group="data")]
FirstViews = Annotated[int | None, about(
    "Only the first so many views; all if left out.", "--views", group="data")]
Scheduler = Annotated[str | None, about(
    "Address of a Dask cluster; this machine if left out.", "--scheduler")]
Cache = Annotated[str, about("The cache.", argument=True, takes="folder", decides="contents")]


# ---- sections -------------------------------------------------------------------------------


class DataSettings(Settings, frozen=True):
    """Where images come from and how they are fed. See `stages.inputs.datasets`."""

    section: ClassVar[str] = "data"

    dataset: Annotated[str, about(
        "A name, folder:DIR, hf:DIR, wds:PATTERN or module:callable.",
        "--dataset", takes="dataset", decides="contents")]
    root: Annotated[Root, about("", decides="place")] = None
    download: Annotated[Download, about("", decides="nothing")] = False
    rescan: Annotated[bool, about(
        "List folders of images again: after files were overwritten in place.",
        "--rescan", decides="nothing")] = False
    skip: Annotated[str | None, about(
        "Images to leave out, one a line, as `pipeline check-data` writes them; beside those that "
        "a cache leaves out.", "--skip", metavar="FILE", takes="file")] = None
    test: Annotated[str | None, about(
        "What is tested on, if not the dataset's own test split: 'none', a folder DIR of "
        "DIR/CLASS/IMAGE, a pattern of wds: shards, or a share of the training images, such as "
        "0.1.",
        "--test", metavar="none|DIR|SHARE", decides="result")] = None
    eval_dataset: Annotated[str | None, about(
        "A dataset whose test split is tested on instead.",
        "--eval-dataset", takes="dataset")] = None
    no_labels: Annotated[bool, about(
        "Use the training images without labels, whatever folders they lie in.",
        "--no-labels")] = False
    exif: Annotated[bool, about(
        "Turn images as their EXIF orientation says; it is ignored otherwise.", "--exif")] = False
    jpeg_side: Annotated[int | None, about(
        "Decode JPEGs at 1/2, 1/4 or 1/8 of their size as long as both sides keep this many "
        "pixels: sooner, and other pixels.", "--jpeg-side", above=0, most=LARGEST_SIDE)] = None
    decoder: Annotated[Decoder | None, about(
        "Decode JPEGs on a GPU, by nvJPEG: other pixels than those of Pillow, which decodes "
        "otherwise.", "--decoder")] = None
    feeding: Annotated[Feeding, about(
        "Whether images are held in memory, or decoded when shown.", decides="nothing")] = "auto"
    image_size: Annotated[int | None, about(
        "Side of the model's input in pixels; the images' own if left out.",
        "--image-size", above=0, most=LARGEST_SIDE)] = None
    resize: Annotated[int | None, about(
        "For the clean view: resize the shorter side to this, then crop the centre.",
        "--resize", above=0, most=LARGEST_SIDE)] = None
    workers: Annotated[int, about(
        "Processes that decode images too large for memory.",
        "--workers", least=0, most=MOST_WORKERS, decides="nothing")] = 2
    val_fraction: Annotated[float, about(
        "Share of training samples held out to choose the model.",
        "--val-fraction", least=0, below=1)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test is not None and self.eval_dataset is not None:
            raise ConfigError(
                "--test and --eval-dataset both say what is tested on", "Give one of them."
            )
        if self.decoder is not None and (self.exif or self.jpeg_side is not None):
            option = "--exif" if self.exif else "--jpeg-side"
            raise ConfigError(
                f"--decoder {self.decoder} decodes JPEGs whole and as they lie there, "
                f"without {option}",
                f"Leave {option} or --decoder out.",
            )


class ModelSettings(Settings, frozen=True):
    """A model that is trained. See `stages.inputs.models`."""

    section: ClassVar[str] = "model"

    architecture: Annotated[str, about(
        "A CIFAR-family name, a torchvision name, timm:NAME or module:callable.",
        "--model", takes="model")]
    mean: Mean = None
    std: Std = None
    image_size: ImageSize = None
    init: Annotated[str | None, about(
        "Weights to start from: a run, FILE, FILE#KEY or 'pretrained'.",
        "--init", takes="weights", decides="contents")] = None


class TeacherSettings(Settings, frozen=True):
    """The model that is cached. See `stages.inputs.checkpoints` and `model_outputs`."""

    section: ClassVar[str] = "teacher"

    weights: Annotated[str | None, about(
        "A run directory, .safetensors, a checkpoint (FILE#KEY for one of several sets of "
        "weights), or 'pretrained'.", "--weights", takes="weights")] = None
    architecture: Annotated[str | None, about(
        "The model's name; may be left out where --weights is a run directory. A module:callable "
        "may bring its own weights; hf-model:DIR, clip:MODEL/WEIGHTS, torchscript:FILE, "
        "export:FILE and hub:REPO:NAME do.", "--teacher", takes="model")] = None
    mean: Mean = None
    std: Std = None
    image_size: ImageSize = None
    outputs: Annotated[Outputs, about(
        "What the teacher returns; of probabilities the log is taken.", "--outputs")] = "logits"
    class_order: Annotated[str | None, about(
        "Where the teacher's classes are in another order: 'teacher' follows the names that its "
        "run keeps, FILE has the names of its outputs, one a line, and 'dataset' ignores them.",
        "--class-order", metavar="ORDER")] = None
    classes: Annotated[str | None, about(
        "Which outputs each class of the dataset is, where the teacher has others: 'auto' finds "
        "them by name or WordNet id, FILE is YAML as `cat: 281` or `cat: [281, 282]`.",
        "--classes", metavar="MAP")] = None
    prompts: Annotated[str | None, about(
        "For clip:MODEL/WEIGHTS: prompt templates, a line each, or YAML with `templates` and "
        "`classes`.", "--prompts", metavar="FILE", takes="file")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes is not None and self.class_order is not None:
            raise ConfigError(
                "--classes and --class-order both say which outputs the classes are",
                "Give --classes alone: it follows any order.",
            )


class TrainSettings(Settings, frozen=True):
    """How a model is optimised. Defaults: a short recipe for small images."""

    section: ClassVar[str] = "train"

    epochs: Annotated[int, about(
        "Passes over the training images.", "--epochs", above=0, most=10**6, shared=True)] = 30
    batch_size: Annotated[BatchSize, about("", shared=True)] = 128
    optimizer: Annotated[Literal["sgd", "adam", "adamw"], about("The optimiser.")] = "sgd"
    lr: Annotated[float, about("Peak learning rate.", "--lr", above=0)] = 0.1
    momentum: Annotated[float, about("Of sgd; Adam keeps its own.", least=0, most=1)] = 0.9
    nesterov: Annotated[bool, about("Nesterov's momentum, with sgd.")] = False
    weight_decay: Annotated[float, about("Of every weight, biases too.", least=0)] = 5e-4
    schedule: Annotated[Literal["constant", "multistep", "cosine", "onecycle"], about(
        "Of the learning rate.")] = "cosine"
    milestones: Annotated[tuple[int, ...], about(
        "Of multistep: epochs after which the rate is multiplied by gamma.")] = (150, 180, 210)
    gamma: Annotated[float, about("Of multistep.", least=0)] = 0.1
    warmup: Annotated[float, about(
        "Of onecycle: share of steps that climb.", least=0, most=1)] = 0.3
    dtype: Precision = "float32"
    tf32: Annotated[bool | None, about(
        "Let a GPU round the factors of float32 products to TF32, 10 bits: faster.")] = None
    channels_last: ChannelsLast = True
    deterministic: Annotated[bool, about(
        "Only algorithms that give the same bits again.",
        "--deterministic", decides="weights", shared=True)] = False
    compile: Annotated[bool, about(
        "Compile forward pass and loss: faster steps of small models, after a minute. Weights "
        "differ in their last bits.", "--compile/--no-compile", decides="nothing")] = False
    capture: Annotated[bool, about(
        "Record a step as one CUDA graph and replay it: faster steps of small models on a GPU. "
        "Weights differ in their last bits.",
        "--capture/--no-capture", decides="nothing", shared=True)] = False
    views_per_decode: Annotated[int | None, about(
        "Show so many views of an image each time it is decoded, for large images: as many images "
        "an epoch, of fewer samples. One if left out.",
        "--views-per-decode", above=0, most=10**6, shared=True)] = None
    views_in_one_batch: Annotated[bool, about(
        "Show the views of an image in one batch, and not in batches that follow one another.",
        "--views-in-one-batch", shared=True)] = False
    checkpoint_seconds: Annotated[float, about(
        "last.pt is replaced after an epoch once it is so old, and at the end: what a kill can lose"
        " beside the epoch at hand. 0: after every epoch.", least=0, decides="nothing")] = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.optimizer == "sgd" and self.momentum == 0:
            raise ConfigError("train.nesterov needs a train.momentum above 0")
        if self.views_per_decode == 1:  # one setting, whether it is given or left out
            msgspec.structs.force_setattr(self, "views_per_decode", None)
        if self.views_in_one_batch and self.views_per_decode is None:
            raise ConfigError(
                "train.views_in_one_batch is about several views of an image",
                "Give --views-per-decode 2 or more as well.",
            )


class SeedSettings(Settings, frozen=True):
    """What a run draws at random."""

    section: ClassVar[str] = "seed"

    data: Annotated[int, about(
        "Order of views and samples.", "--seed", decides="weights", shared=True, **SEEDS)] = 0
    init: Annotated[int, about(
        "The model's first weights.", "--seed", decides="weights", **SEEDS)] = 0
