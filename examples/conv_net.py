"""A small residual network with BatchNorm, SGD with momentum. Try:

autoaccum tune examples/conv_net.py:make_job --target-batch 120 --memory-limit 520MiB --device cpu
"""

import torch
from torch import nn
from torch.nn import functional as F

import autoaccum


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm_first, self.norm_second = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.norm_first(self.first(images)))
        return F.relu(images + self.norm_second(self.second(inner)))


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def make_job(channels: int = 16, blocks: int = 3, side: int = 48, samples: int = 600) -> autoaccum.Job:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        *(Residual(channels) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    images, labels = torch.randn(samples, 3, side, side), torch.randint(0, 10, (samples,))
    data = torch.utils.data.TensorDataset(images, labels)
    return autoaccum.Job(model, optimizer, loss, (images[:8], labels[:8]), data=data)


if __name__ == "__main__":
    job = make_job()
    print(autoaccum.tune(job, target_batch=120, memory_limit="520MiB").explain())
