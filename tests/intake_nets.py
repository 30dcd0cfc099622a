"""Networks of torch that the tests of the intake convert; this file also stands for a user's own."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """A residual network in little."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(image)))
        return self.head((torch.relu(self.conv2(x)) + x).mean((2, 3)))


class Branch(nn.Module):
    """Which way it goes depends on what comes in, so that tracing can't be right."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(self.second(y) if y.sum() > 0 else torch.sin(y))


class Sorts(nn.Module):
    """An operator that no exporter has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x).real


def seeded() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def with_inputs() -> tuple[Net, tuple[torch.Tensor, ...]]:
    return seeded(), (torch.zeros(1, 3, 8, 8),)


def needs(width: int) -> nn.Module:
    return nn.Linear(width, width)
