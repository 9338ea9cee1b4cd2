"""Distillation from a cache with timm: its model, optimiser, schedule and averaged weights.

pip install 'teacher-cache[timm]'
python examples/timm_loop.py demo-out/digits.zarr
"""

import sys

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy
from torch.utils.data import DataLoader

from stages import CachedDataset, EpochSampler
from stages.objectives.losses import build_loss


def train(cache: str, num_epochs: int = 10, name: str = "resnet10t") -> float:
    """Test top-1 of a student trained on the digits."""
    torch.manual_seed(0)
    dataset = CachedDataset(cache, "digits", temperature=4)
    dataset.transform = dataset.normalise(channels=3)
    sampler = EpochSampler(dataset, seed=0)
    loader = DataLoader(dataset, 64, sampler=sampler)
    model = timm.create_model(name, num_classes=dataset.num_classes)
    distil = build_loss("kd", temperature=4)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.02, weight_decay=5e-4)
    schedule, num_epochs = create_scheduler_v2(optimizer, "cosine", num_epochs)
    averaged = ModelEmaV3(model, decay=0.9)
    for epoch in range(num_epochs):
        sampler.set_epoch(epoch)
        model.train()
        losses = AverageMeter()
        for batch in loader:
            logits = model(batch.images)
            soft = distil(logits, batch.teacher_logits, batch.labels)
            loss = 0.1 * F.cross_entropy(logits, batch.labels) + 0.9 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            averaged.update(model)
            losses.update(loss.item(), len(logits))
        schedule.step(epoch + 1)
        print(f"epoch {epoch + 1}: loss {losses.avg:.4f}")
    top1 = AverageMeter()
    with torch.inference_mode():
        for images, labels in DataLoader(dataset.test, 256):
            (percent,) = accuracy(averaged.module.eval()(images), labels)
            top1.update(percent.item() / 100, len(labels))
    return float(top1.avg)


if __name__ == "__main__":
    print(f"test top-1 {train(sys.argv[1]):.2%}")
