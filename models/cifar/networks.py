"""The reference networks for images of 32 x 32, in torch. `width` scales the channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models.extras import need

torch: Any = need("torch")
nn = torch.nn
functional = torch.nn.functional
CLASSES = 10


class Block(nn.Module):  # type: ignore[misc]
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2016), with a 1 x 1 convolution where sizes change."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Any) -> Any:
        """(n, channels, h, w) -> (n, out, h / stride, w / stride)."""
        inner = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class Bottleneck(nn.Module):  # type: ignore[misc]
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut."""

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        out = 4 * inner
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Any) -> Any:
        """(n, channels, h, w) -> (n, 4 * inner, h / stride, w / stride)."""
        return functional.relu(self.body(x) + self.shortcut(x))


def resnet(depth: int, width: float = 1.0) -> Any:
    """ResNet-20, -32, -44, -56 of CIFAR-10: three stages of 16, 32 and 64 channels."""
    blocks, channels = (depth - 2) // 6, round(16 * width)
    layers = [nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    before = channels
    for stage in range(3):
        for i in range(blocks):
            layers.append(Block(before, channels * 2**stage, 2 if stage and not i else 1))
            before = channels * 2**stage
    return _with_head(layers, before)


def deep_resnet(depth: int, width: float = 1.0) -> Any:
    """ResNet-18 and ResNet-50 with a 3 x 3 stem and no pooling, as CIFAR-10 is usually given to them."""
    counts = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    base = round(64 * width)
    layers = [nn.Conv2d(3, base, 3, 1, 1, bias=False), nn.BatchNorm2d(base), nn.ReLU()]
    before = base
    for stage, count in enumerate(counts):
        for i in range(count):
            stride, inner = (2 if stage and not i else 1), base * 2**stage
            layers.append(Block(before, inner, stride) if depth == 18 else Bottleneck(before, inner, stride))
            before = inner if depth == 18 else 4 * inner
    return _with_head(layers, before)


def vgg(depth: int, width: float = 1.0) -> Any:
    """VGG-16 and VGG-19 with BatchNorm and one linear layer."""
    repeats = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}[depth]
    layers: list[Any] = []
    before = 3
    for stage, (count, channels) in enumerate(zip(repeats, (64, 128, 256, 512, 512), strict=True)):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for _ in range(count):
            out = round(channels * width)
            layers += [nn.Conv2d(before, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            before = out
    return _with_head(layers, before)


class Inverted(nn.Module):  # type: ignore[misc]
    """MobileNetV2's block: widen, convolve each channel, narrow."""

    def __init__(self, channels: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = channels * expand
        widen = [nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()] if expand > 1 else []
        self.body = nn.Sequential(
            *widen, nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.same = stride == 1 and channels == out

    def forward(self, x: Any) -> Any:
        """(n, channels, h, w) -> (n, out, h / stride, w / stride)."""
        return x + self.body(x) if self.same else self.body(x)


def mobilenet_v2(width: float = 1.0) -> Any:
    """MobileNetV2 with strides for images of 32 x 32 (the first two are one)."""
    plan = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    before = round(32 * width)
    layers: list[Any] = [nn.Conv2d(3, before, 3, 1, 1, bias=False), nn.BatchNorm2d(before), nn.ReLU6()]
    for expand, channels, count, stride in plan:
        out = max(8, round(channels * width / 8) * 8)
        for i in range(count):
            layers.append(Inverted(before, out, stride if not i else 1, expand))
            before = out
    last = round(1280 * width)
    layers += [nn.Conv2d(before, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6()]
    return _with_head(layers, last)


def _with_head(layers: list[Any], channels: int) -> Any:
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


class Encoder(nn.Module):  # type: ignore[misc]
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Any) -> Any:
        """(n, tokens, width) -> the same."""
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.out(mixed)
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):  # type: ignore[misc]
    """A vision transformer: a stem of two convolutions, patches of 4 x 4, mean over the tokens."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 2, hidden: int = 256) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width // 2, 3, 2, 1), nn.GELU(), nn.Conv2d(width // 2, width, 3, 2, 1))
        self.position = nn.Parameter(torch.zeros(1, 64, width))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(Encoder(width, heads, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Any) -> Any:
        """(n, 3, 32, 32) -> (n, 10)."""
        x = self.stem(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


NETWORKS: dict[str, Callable[[], Any]] = {
    "resnet20": lambda: resnet(20),
    "resnet56": lambda: resnet(56),
    "resnet18": lambda: deep_resnet(18),
    "resnet50": lambda: deep_resnet(50),
    "vgg16": lambda: vgg(16),
    "vgg19": lambda: vgg(19),
    "vgg16-small": lambda: vgg(16, 0.375),
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v2-small": lambda: mobilenet_v2(0.5),
    "vit": Vit,
}
