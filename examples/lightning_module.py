"""Distillation from a cache in Lightning, on one device or several.

pip install lightning
python examples/lightning_module.py demo-out/digits.zarr      # one process
python examples/lightning_module.py demo-out/digits.zarr 2    # two, each with its own samples
"""

import sys

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from stages import CachedDataset, EpochSampler
from stages.cached_dataset import CachedBatch
from stages.inputs.models import build_model
from stages.objectives.losses import build_loss


class Student(lightning.LightningModule):
    """A resnet8 that learns from the cache."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.distil = build_loss("kd", temperature=4)
        self.net = build_model("resnet8", num_classes, channels=1).module

    def training_step(self, batch: CachedBatch, _: int) -> Tensor:
        logits = self.net(batch.images)
        soft = self.distil(logits, batch.teacher_logits, batch.labels)
        return 0.1 * F.cross_entropy(logits, batch.labels) + 0.9 * soft

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, labels = batch
        top1 = (self.net(images).argmax(1) == labels).float().mean()
        self.log("test_top1", top1, batch_size=len(labels), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def train(cache: str, num_epochs: int = 10, devices: int = 1) -> float:
    """Test top-1 of a student trained on the digits."""
    lightning.seed_everything(0)
    dataset = CachedDataset(cache, "digits", temperature=4)
    trainer = lightning.Trainer(
        max_epochs=num_epochs,
        accelerator="cpu",
        devices=devices,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(
        Student(dataset.num_classes),
        # Lightning calls the sampler's set_epoch, and leaves the sampler in its place
        DataLoader(dataset, 64 // devices, sampler=EpochSampler(dataset, seed=0)),
        DataLoader(dataset.test, 256),
    )
    return float(trainer.callback_metrics["test_top1"])


if __name__ == "__main__":
    devices = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    print(f"test top-1 {train(sys.argv[1], devices=devices):.2%}")
