"""Distillation from a cache in plain PyTorch.

pipeline demo --out demo-out
python examples/plain_pytorch.py demo-out/digits.zarr
"""

import sys

import torch
import torch.nn.functional as F

from stages.cached_epochs import CachedEpochs
from stages.inputs.models import build_model
from stages.objectives.losses import build_loss


def train(cache: str, num_epochs: int = 10) -> float:
    """Test top-1 of a student trained on the digits."""
    torch.manual_seed(0)
    epochs = CachedEpochs(cache, "digits", batch_size=64, temperature=4)
    student = build_model("resnet8", epochs.num_classes, epochs.channels).module.to(epochs.device)
    distil = build_loss("kd", temperature=4)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(num_epochs):  # one epoch, one cached view of every sample
        student.train()
        for batch in epochs.epoch(epoch):
            logits = student(batch.images)
            soft = distil(logits, batch.teacher_logits, batch.labels)
            loss = 0.1 * F.cross_entropy(logits, batch.labels) + 0.9 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
    student.eval()
    with torch.inference_mode():
        right = [(student(x).argmax(1) == y).float() for x, y in epochs.test()]
    return float(torch.cat(right).mean())


if __name__ == "__main__":
    print(f"test top-1 {train(sys.argv[1]):.2%}")
