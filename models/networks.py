"""The small networks of the zoo, one per family, and what is exported of each; plain data and builders.

Builders use torchvision, timm and transformers where these have the family, and plain torch where they have not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from models.extras import need

SCRIPT, DYNAMO = "script", "dynamo"
"""PyTorch's exporters: TorchScript, and torch.export."""

TOKENS = ("input_ids", "attention_mask")
"""Inputs of the language models."""

VOCABULARY = 96
_CLASSES = 10

Axes = dict[int, str]


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network of the zoo: how to build it, its inputs, and which exports of it are in git."""

    build: Callable[[], Any]
    shape: tuple[int, ...] = (2, 3, 64, 64)  # of every input
    inputs: tuple[str, ...] = ("image",)
    dynamic: Axes = field(default_factory=dict)  # axis of every input -> name of its dim
    output: Axes = field(default_factory=dict)  # the same of the output
    exporters: tuple[str, ...] = (SCRIPT,)
    shared: bool = False  # equal parameters stay equal
    unfused: bool = False  # script: keep BatchNorm beside its convolution


def _resnet18() -> Any:
    return need("torchvision.models").resnet18(num_classes=_CLASSES)


def _shufflenet() -> Any:
    return need("torchvision.models").shufflenet_v2_x0_5(num_classes=_CLASSES)


def _squeezenet() -> Any:
    return need("torchvision.models").squeezenet1_1(num_classes=_CLASSES)


def _densenet() -> Any:
    densenet = need("torchvision.models").DenseNet
    return densenet(growth_rate=8, block_config=(2, 3, 2), num_init_features=16, bn_size=2, num_classes=_CLASSES)


def _mobilenetv3() -> Any:
    return need("timm").create_model("mobilenetv3_small_050", num_classes=_CLASSES)


def _vit() -> Any:
    return need("timm.models.vision_transformer").VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=_CLASSES
    )


def _swin() -> Any:
    return need("timm.models.swin_transformer").SwinTransformer(
        img_size=64, patch_size=4, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=_CLASSES
    )


def _convnext() -> Any:
    return need("timm").create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), num_classes=_CLASSES)


def _mixer() -> Any:
    return need("timm.models.mlp_mixer").MlpMixer(
        img_size=32, patch_size=8, num_blocks=2, embed_dim=48, num_classes=_CLASSES
    )


def _unet() -> Any:
    """Two levels down and up: GroupNorm, ConvTranspose and skip connections through Concat."""
    torch = need("torch")
    nn = torch.nn

    def double(inward: int, outward: int) -> Any:
        return nn.Sequential(
            nn.Conv2d(inward, outward, 3, padding=1), nn.GroupNorm(4, outward), nn.SiLU(),
            nn.Conv2d(outward, outward, 3, padding=1), nn.GroupNorm(4, outward), nn.SiLU(),
        )  # fmt: skip

    class UNet(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.down1, self.down2, self.middle = double(3, 16), double(16, 32), double(32, 48)
            self.pool = nn.MaxPool2d(2)
            self.grow2, self.up2 = nn.ConvTranspose2d(48, 32, 2, stride=2), double(64, 32)
            self.grow1, self.up1 = nn.ConvTranspose2d(32, 16, 2, stride=2), double(32, 16)
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, image: Any) -> Any:
            first = self.down1(image)
            second = self.down2(self.pool(first))
            deep = self.middle(self.pool(second))
            deep = self.up2(torch.cat([self.grow2(deep), second], dim=1))
            return self.head(self.up1(torch.cat([self.grow1(deep), first], dim=1)))

    return UNet()


def _resnext() -> Any:
    """Bottleneck blocks whose middle convolution has four groups."""
    nn = need("torch").nn

    class Block(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, inward: int, width: int, outward: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(inward, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, stride, 1, groups=4, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, outward, 1, bias=False), nn.BatchNorm2d(outward),
            )  # fmt: skip
            straight = stride == 1 and inward == outward
            self.skip = nn.Identity() if straight else nn.Conv2d(inward, outward, 1, stride)

        def forward(self, image: Any) -> Any:
            return nn.functional.relu(self.body(image) + self.skip(image))

    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = [Block(16, 16, 32, 1), Block(32, 16, 32, 1), Block(32, 32, 64, 2), Block(64, 32, 64, 1)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, _CLASSES))


def _recurrent() -> Any:
    """Linear -> two-way LSTM -> GRU -> the last step -> Linear."""
    nn = need("torch").nn

    class Recurrent(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(16, 24)
            self.lstm = nn.LSTM(24, 20, batch_first=True, bidirectional=True)
            self.gru = nn.GRU(40, 28, batch_first=True)
            self.head = nn.Linear(28, _CLASSES)

        def forward(self, features: Any) -> Any:
            states, _ = self.lstm(nn.functional.relu(self.embed(features)))
            states, _ = self.gru(states)
            return self.head(states[:, -1])

    return Recurrent()


def _language_model(network: Any) -> Any:
    """A causal language model without its cache: (input_ids, attention_mask) -> logits."""
    nn = need("torch").nn

    class Logits(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    return Logits()


def _gpt2() -> Any:
    transformers = need("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=48, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return _language_model(transformers.GPT2LMHeadModel(config))


def _llama() -> Any:
    """Grouped-query attention: four query heads on two key-value heads."""
    transformers = need("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=48, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return _language_model(transformers.LlamaForCausalLM(config))


_BATCH: Axes = {0: "batch"}
_IMAGE: Axes = {0: "batch", 2: "height", 3: "width"}
_SEQUENCE: Axes = {0: "batch", 1: "sequence"}
_BOTH = (SCRIPT, DYNAMO)

NETWORKS: Mapping[str, Network] = {
    "resnet18_shared": Network(build=_resnet18, exporters=_BOTH, shared=True, unfused=True),
    "shufflenet": Network(build=_shufflenet, dynamic=_BATCH, output=_BATCH, exporters=_BOTH),
    "squeezenet": Network(build=_squeezenet),
    "densenet": Network(build=_densenet, dynamic=_BATCH, output=_BATCH, unfused=True),
    "mobilenetv3": Network(build=_mobilenetv3, dynamic=_BATCH, output=_BATCH, exporters=(DYNAMO,)),
    "vit": Network(build=_vit, shape=(2, 3, 32, 32), dynamic=_BATCH, output=_BATCH, exporters=_BOTH),
    "swin": Network(build=_swin, exporters=(DYNAMO,)),
    "convnext": Network(build=_convnext, dynamic=_BATCH, output=_BATCH),
    "mixer": Network(build=_mixer, shape=(2, 3, 32, 32)),
    "unet": Network(build=_unet, dynamic=_IMAGE, output=_IMAGE, exporters=_BOTH),
    "resnext": Network(build=_resnext, dynamic=_BATCH, output=_BATCH, exporters=_BOTH),
    "recurrent": Network(
        build=_recurrent, shape=(2, 12, 16), inputs=("features",), dynamic=_SEQUENCE, output=_BATCH
    ),  # the dynamo exporter writes the sequence length into a Reshape
    "gpt2": Network(build=_gpt2, shape=(2, 12), inputs=TOKENS, dynamic=_SEQUENCE, output=_SEQUENCE),
    "llama": Network(
        build=_llama, shape=(2, 12), inputs=TOKENS, dynamic=_SEQUENCE, output=_SEQUENCE, exporters=(DYNAMO,)
    ),
}
"""Every network of the zoo by name."""
