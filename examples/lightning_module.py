"""Distillation from a cache in Lightning: the epochs are the training dataloaders.

pip install lightning
python examples/lightning_module.py demo-out/digits.zarr
"""

import sys

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.cached_epochs import Batches, CachedBatch, CachedEpochs
from stages.inputs.models import build_model
from stages.objectives.losses import build_loss


class Student(lightning.LightningModule):
    """A resnet8 that learns from the cache."""

    def __init__(self, epochs: CachedEpochs) -> None:
        super().__init__()
        self.epochs = epochs
        self.distil = build_loss("kd", temperature=4)
        self.net = build_model("resnet8", epochs.num_classes, epochs.channels).module

    def train_dataloader(self) -> Batches[CachedBatch]:
        return self.epochs.epoch(self.current_epoch)

    def training_step(self, batch: CachedBatch, _: int) -> Tensor:
        logits = self.net(batch.images)
        soft = self.distil(logits, batch.teacher_logits, batch.labels)
        return 0.1 * F.cross_entropy(logits, batch.labels) + 0.9 * soft

    def val_dataloader(self) -> Batches[tuple[Tensor, Tensor]]:
        return self.epochs.test()

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, labels = batch
        top1 = (self.net(images).argmax(1) == labels).float().mean()
        self.log("test_top1", top1, batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def train(cache: str, num_epochs: int = 10) -> float:
    """Test top-1 of a student trained on the digits."""
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_epochs=num_epochs,
        reload_dataloaders_every_n_epochs=1,  # another view every epoch
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    trainer.fit(Student(CachedEpochs(cache, "digits", batch_size=64, device="cpu")))
    return float(trainer.callback_metrics["test_top1"])


if __name__ == "__main__":
    print(f"test top-1 {train(sys.argv[1]):.2%}")
