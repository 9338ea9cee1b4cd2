"""Real rows of 1,000 classes: what EfficientNet-Lite0 says of CIFAR-100's test images, enlarged.

    python results/cifar100/lite0_rows.py --images cifar100/test --out logits-lite0.npz
    python results/cifar100/encoding_rows.py --rows logits-lite0.npz --out encoding_rows_1000

The network and its weights come from packages, see examples/efficientnet_lite0.py. Images of 32
pixels that are enlarged are not what it was trained on: it is less confident than on photographs.
FILE gets `logits` float16 (1, N, 1000), `labels` (N,), which are the network's own answers, as
CIFAR's classes are not among its own; `features` float16 (N, 1280), what its head reads, and `head`
float16 (1000, 1280), the weights of that.
"""

import sys
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

EXAMPLES = Path(__file__).parents[2] / "examples"
BATCH = 32


def batch_of(paths: list[Path], side: int) -> Tensor:
    """float32 (n, 3, side, side): as the network takes them."""
    pixels = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in paths]
    images = torch.stack(pixels).permute(0, 3, 1, 2)
    larger = tv.resize(images, [side, side], tv.InterpolationMode.BICUBIC, antialias=True)
    return (larger.float() - 127) / 128


@click.command()
@click.option("--images", required=True, help="A folder with the images of each class in one.")
@click.option("--out", required=True, help="The npz file.")
@click.option("--count", default=6000, show_default=True, help="Of the images, drawn at random.")
@click.option("--side", default=96, show_default=True, help="Pixels that they are enlarged to.")
def main(images: str, out: str, count: int, side: int) -> None:
    """Compute and write the rows."""
    sys.path.insert(0, str(EXAMPLES))
    import efficientnet_lite0

    torch.set_num_threads(1)
    paths = sorted(path for path in Path(images).rglob("*") if path.is_file())
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))[:count]
    network = efficientnet_lite0.teacher().eval().to(memory_format=torch.channels_last)
    (head,) = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    features: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, given: features.append(given[0].half()))
    logits = []
    with torch.inference_mode():
        for some in order.split(BATCH):
            pixels = batch_of([paths[i] for i in some.tolist()], side)
            logits.append(network(pixels.contiguous(memory_format=torch.channels_last)))
            print(f"\r{len(logits) * BATCH} of {count}", end="", flush=True)
    rows = torch.cat(logits)
    np.savez(
        out,
        logits=rows.half()[None].numpy(),
        labels=rows.argmax(1).numpy().astype(np.uint16),
        features=torch.cat(features).numpy(),
        head=head.weight.detach().half().numpy(),
    )


if __name__ == "__main__":
    main()
