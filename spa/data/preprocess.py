"""Pictures as a model's input: read, resized, cropped, normalised. Pillow does the reading and is asked for only here.

A pixel x in 0..255 becomes (scale * x - mean) / std.
"""

from __future__ import annotations

import difflib
import importlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from spa.data.samples import Array, Input, Layout, Piece, piece, reason
from spa.errors import BadFile, BadOption
from spa.storage.settings_file import read_settings

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
USUAL_SIZE = 224
RESIZES = ("shortest", "square", "stretch")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes an input.

    Attributes
    ----------
    size
        Height and width; None: what the input declares, 224 where it is free.
    resize
        "shortest": keeps proportions until the picture covers size / crop, then takes the centre; "square": the largest central
        part of the input's proportions (a square for a square input), resized; "stretch": resized as it is.
    crop
        Share of the resized picture's height and width that "shortest" keeps.
    interpolation
        Pillow's filter: nearest, bilinear, bicubic, lanczos, box or hamming.
    scale
        Multiplies the pixels 0..255 first.
    mean, std
        Per channel (one number or three, red first), subtracted and divided by after the scale.
    layout
        "nchw", "nhwc", or None: as the input's shape says.
    order
        "rgb" or "bgr".
    """

    size: tuple[int, int] | None = None
    resize: str = "shortest"
    crop: float = 0.875
    interpolation: str = "bilinear"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    layout: str | None = None
    order: str = "rgb"

    def __post_init__(self) -> None:
        for name, allowed in (("resize", RESIZES), ("interpolation", INTERPOLATIONS), ("order", ("rgb", "bgr"))):
            if getattr(self, name) not in allowed:
                raise BadOption(f"--preprocess has {name}={getattr(self, name)}, but must have one of: {', '.join(allowed)}.")
        if self.layout not in (None, "nchw", "nhwc"):
            raise BadOption(f"--preprocess has layout={self.layout}, but must have nchw or nhwc.")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise BadOption(f"--preprocess has size={self.size}, but must have a size such as 224 or 224x320 (height, width).")
        if not 0 < self.crop <= 1:
            raise BadOption(f"--preprocess has crop={self.crop}, but must have a share above 0 and up to 1.")
        if not (math.isfinite(self.scale) and self.scale):
            raise BadOption(f"--preprocess has scale={self.scale}, but must have a number such as 1/255.")
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if len(numbers) not in (1, 3) or not all(math.isfinite(n) for n in numbers) or (name == "std" and 0 in numbers):
                least = "one or three numbers that are not 0" if name == "std" else "one or three numbers"
                raise BadOption(f"--preprocess has {name}={_listed(numbers)}, but must have {least}.")

    def __str__(self) -> str:
        size = "the input's size" if self.size is None else "x".join(map(str, self.size))
        crop = f" with crop {self.crop:g}" if self.resize == "shortest" else ""
        return (
            f"{self.resize} to {size}{crop}, {self.interpolation}, pixels * {self.scale:.6g}, mean {_listed(self.mean)}, "
            f"std {_listed(self.std)}, {self.order}"
        )


def _listed(numbers: Sequence[float]) -> str:
    return "/".join(f"{n:g}" for n in numbers)


PRESETS: Mapping[str, Preprocess] = MappingProxyType(
    {
        "imagenet": Preprocess(),
        "imagenet-inception": Preprocess(mean=(0.5,), std=(0.5,)),
        "lite0": Preprocess(size=(224, 224), resize="square", crop=1.0, interpolation="bicubic", scale=1.0, mean=(127.0,), std=(128.0,)),
        "cifar10": Preprocess(
            size=(32, 32), resize="square", crop=1.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
        ),
        "raw": Preprocess(resize="stretch", crop=1.0, mean=(0.0,), std=(1.0,)),
    }
)
"""By name:

imagenet            torchvision's and timm's: shortest side to size / 0.875 (256 for 224), centre, bilinear; pixels / 255;
                    mean 0.485, 0.456, 0.406; std 0.229, 0.224, 0.225.
imagenet-inception  the same with mean 0.5 and std 0.5: -1..1.
lite0               EfficientNet-Lite0: largest central square, bicubic, 224; (x - 127) / 128.
cifar10             32; pixels / 255; mean 0.4914, 0.4822, 0.4465; std 0.2470, 0.2435, 0.2616.
raw                 stretched to the input's size; pixels / 255: 0..1.
"""


# ---------------------------------------------------------------------- what the user gives


def read_preprocess(given: str) -> tuple[Preprocess, str]:
    """From a preset's name, a YAML or TOML file, or "size=224,mean=0.5"; with the words for it. Raises BadOption or BadFile.

    Keys are the fields of `Preprocess`, and `preset` for the one to start from. Lists are parted by slashes inline.
    """
    if given in PRESETS:
        return PRESETS[given], f"{given} ({PRESETS[given]})"
    if Path(given).suffix.lower() in (".yaml", ".yml", ".toml"):
        made = _make(read_settings(Path(given), "preprocess", maps="settings to values", example="size: 224"))
        return made, f"{given} ({made})"
    if "=" not in given:
        near = difflib.get_close_matches(given, PRESETS, 1)
        raise BadOption(
            f"--preprocess {given!r} is no preset{f' (did you mean {near[0]}?)' if near else ''}: give one of {', '.join(PRESETS)}, "
            "a YAML or TOML file, or settings such as size=224,mean=0.5,std=0.5."
        )
    settings: dict[str, Any] = {}
    for part in given.split(","):
        key, sign, value = part.partition("=")
        if not sign:
            raise BadOption(f"--preprocess has {part!r}, which is not key=value; a list is parted by slashes, as in mean=0.5/0.5/0.5.")
        if key.strip() in settings:
            raise BadOption(f"--preprocess gives {key.strip()!r} twice.")
        settings[key.strip()] = value.strip()
    made = _make(settings)
    return made, str(made)


def _make(settings: Mapping[str, Any]) -> Preprocess:
    known = [f.name for f in fields(Preprocess)]
    base = settings.get("preset", "imagenet")
    if base not in PRESETS:
        raise BadOption(f"--preprocess has preset={base}, which is none of: {', '.join(PRESETS)}.")
    made: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "preset":
            continue
        if key not in known:
            raise BadOption(f"--preprocess has {key!r}, which is no setting: use {', '.join(known)} or preset.")
        try:
            made[key] = _value(key, value)
        except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
            raise BadOption(f"--preprocess has {key}={value}, which can't be read as {_FORMS[key]}.") from error
    return replace(PRESETS[base], **made)


_FORMS = {"size": "a size such as 224 or 224x320", "crop": "a number", "scale": "a number such as 1/255"}
_FORMS |= dict.fromkeys(("mean", "std"), "numbers such as 0.5/0.5/0.5")
_FORMS |= dict.fromkeys(("resize", "interpolation", "layout", "order"), "a word")


def _value(key: str, value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError
    if key == "size":
        parts = re.split("[x/]", value) if isinstance(value, str) else list(value) if isinstance(value, Sequence) else [value]
        sizes = [int(str(p)) for p in parts]
        return (sizes[0], sizes[0]) if len(sizes) == 1 else tuple(sizes)
    if key in ("mean", "std"):
        parts = value.split("/") if isinstance(value, str) else list(value) if isinstance(value, Sequence) else [value]
        return tuple(float(p) for p in parts)
    if key in ("scale", "crop"):
        top, _, bottom = str(value).partition("/")
        return float(top) / float(bottom or 1)
    if not isinstance(value, str):
        raise ValueError
    return value.lower()


# ---------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class ImageSource:
    """Picture files as samples of a model's sole input."""

    files: tuple[Path, ...]
    layout: Layout
    target: Input
    settings: Preprocess
    channels: int

    def pieces(self) -> Iterator[Piece]:
        """One picture at a time. Raises BadFile for one that can't be read."""
        for path in self.files:
            array = prepare(path, self.settings, self.channels)
            if not self.target.is_float:
                array = np.rint(array)
                if array.min() < 0 or array.max() > 255:
                    raise BadOption(
                        f"Input {self.target.name!r} takes pixels 0..255 of {self.target.dtype}: give --preprocess scale=1,mean=0,std=1."
                    )
            yield piece(f"The picture {path}", {self.target.name: array.astype(self.target.dtype)}, self.layout)


def image_source(files: Sequence[Path], layout: Layout, settings: Preprocess | None) -> ImageSource:
    """Pictures, checked against the model's input. settings: None for ImageNet's, or plain pixels where the input takes whole numbers.

    Raises BadOption if the model's inputs or the settings do not fit, or Pillow is not installed.
    """
    _pillow()
    target = layout.sole
    if target is None or len(target.sizes) != 4 or target.axis != 0 or not (target.is_float or target.dtype.kind in "ui"):
        listed = ", ".join(f"{i.name} {i}" for i in layout.inputs.values()) or "none"
        raise BadOption(f"Pictures need a model whose only input is a picture, but its inputs are {listed}: give the data as .npz.")
    chosen = settings or (PRESETS["imagenet"] if target.is_float else replace(PRESETS["imagenet"], scale=1.0, mean=(0.0,), std=(1.0,)))
    _, *rest = target.sizes
    layout_name = chosen.layout or ("nhwc" if rest[0] not in (1, 3) and rest[2] in (1, 3) else "nchw")
    channels, *space = rest if layout_name == "nchw" else [rest[2], rest[0], rest[1]]
    if channels not in (None, 1, 3):
        raise BadOption(f"Input {target.name!r} takes {target}: pictures have 1 or 3 channels (as {layout_name}); give the data as .npz.")
    height, width = (n or USUAL_SIZE for n in space)
    chosen = replace(chosen, size=chosen.size or (height, width), layout=layout_name)
    assert chosen.size is not None
    if any(n is not None and n != m for n, m in zip(space, chosen.size, strict=True)):
        raise BadOption(
            f"--preprocess gives pictures of {'x'.join(map(str, chosen.size))}, but input {target.name!r} takes {target} ({layout_name}): "
            f"set size={height}x{width}."
        )
    return ImageSource(tuple(files), layout, target, chosen, channels or 3)


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise BadOption("Pictures need the package pillow: install it with pip install 'spa-prune[images]', or give .npz.") from error


def prepare(path: Path, settings: Preprocess, channels: int = 3) -> Array:
    """A picture as float32: (channels, height, width), or channels last for the layout nhwc. Raises BadFile.

    `settings.size` must be set. Transparency is dropped; grey is repeated, colour becomes grey where one channel is asked for.
    """
    assert settings.size is not None
    image_module = _pillow()
    try:
        with image_module.open(path) as opened:
            picture = _resized(opened.convert("RGB" if channels == 3 else "L"), settings, image_module)
        pixels = np.asarray(picture, np.float32)
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them
        raise BadFile(f"The picture {path} can't be read: {reason(error)}; remove or repair it.") from error
    mean, std = np.asarray(settings.mean, np.float32), np.asarray(settings.std, np.float32)
    if channels == 1:
        pixels, mean, std = pixels[..., None], mean.mean(keepdims=True), std.mean(keepdims=True)
    values = (pixels * np.float32(settings.scale) - mean) / std
    if settings.order == "bgr":
        values = values[..., ::-1]
    return np.ascontiguousarray(values if settings.layout == "nhwc" else values.transpose(2, 0, 1))


def _resized(picture: Any, settings: Preprocess, image_module: Any) -> Any:
    assert settings.size is not None
    height, width = settings.size
    how = getattr(image_module.Resampling, settings.interpolation.upper())
    wide, high = picture.size
    if settings.resize == "square":
        across, down = (wide, max(wide * height // width, 1)) if wide * height <= high * width else (max(high * width // height, 1), high)
        left, top = (wide - across) // 2, (high - down) // 2
        picture = picture.crop((left, top, left + across, top + down))
    elif settings.resize == "shortest":
        factor = max(height / settings.crop / high, width / settings.crop / wide)
        tall, broad = max(int(high * factor + 1e-6), height), max(int(wide * factor + 1e-6), width)
        picture = picture.resize((broad, tall), how)
        left, top = round((broad - width) / 2), round((tall - height) / 2)
        return picture.crop((left, top, left + width, top + height))
    return picture.resize((width, height), how)


__all__ = ["PRESETS", "SUFFIXES", "ImageSource", "Preprocess", "image_source", "prepare", "read_preprocess"]
