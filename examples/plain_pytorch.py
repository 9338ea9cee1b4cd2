"""Distillation from a cache in plain PyTorch.

pipeline demo --out demo-out
python examples/plain_pytorch.py demo-out/digits.zarr
"""

import sys

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from stages import CachedDataset, EpochSampler
from stages.inputs.models import build_model
from stages.objectives.losses import build_loss


def train(cache: str, num_epochs: int = 10, workers: int = 0) -> float:
    """Test top-1 of a student trained on the digits."""
    torch.manual_seed(0)
    dataset = CachedDataset(cache, "digits", temperature=4)
    sampler = EpochSampler(dataset, seed=0)
    loader = DataLoader(
        dataset, 64, sampler=sampler, num_workers=workers, persistent_workers=workers > 0
    )
    student = build_model("resnet8", dataset.num_classes, channels=1).module
    distil = build_loss("kd", temperature=4)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(num_epochs):
        sampler.set_epoch(epoch)  # one cached view of every sample
        student.train()
        for batch in loader:
            logits = student(batch.images)
            soft = distil(logits, batch.teacher_logits, batch.labels)
            loss = 0.1 * F.cross_entropy(logits, batch.labels) + 0.9 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
    student.eval()
    with torch.inference_mode():
        right = [(student(x).argmax(1) == y).float() for x, y in DataLoader(dataset.test, 256)]
    return float(torch.cat(right).mean())


if __name__ == "__main__":
    print(f"test top-1 {train(sys.argv[1]):.2%}")
