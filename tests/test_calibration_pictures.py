"""Calibration data from pictures: which, how they are prepared, and one sentence for whatever is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from calibration_cases import image, read, refusal, together, vectors, without

from spa.data.calibration import calibration
from spa.data.preprocess import PRESETS, Preprocess, prepare, read_preprocess
from spa.errors import BadFile, BadOption


def picture(path: Path, height: int = 9, width: int = 12, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    pytest.importorskip("PIL.Image").fromarray(pixels).save(path)
    return pixels


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    for i, name in enumerate(("a.png", "cats/b.bmp", "cats/c.webp", "d.JPEG")):
        picture(tmp_path / name, seed=i)
    (tmp_path / "README.md").write_text("cats")
    found = calibration(tmp_path, image(), batch=3)
    assert found.samples == 4
    assert "images in" in found.name
    assert "no --preprocess given, so ImageNet's mean and std" in found.name
    assert "nchw" in found.name
    batches = read(tmp_path, image(), batch=3)
    assert [b["x"].shape for b in batches] == [(3, 3, 8, 8), (1, 3, 8, 8)]
    assert batches[0]["x"].dtype == np.float32


def test_pictures_are_chosen_evenly(tmp_path: Path) -> None:
    for i in range(10):
        picture(tmp_path / f"{i}.png", seed=i)
    everything = together(read(tmp_path, image()))
    assert np.array_equal(together(read(tmp_path, image(), samples=5)), everything[::2])


def test_presets_are_what_they_say(tmp_path: Path) -> None:
    grey = np.full((8, 8, 3), 128, np.uint8)
    pytest.importorskip("PIL.Image").fromarray(grey).save(tmp_path / "a.png")
    for name, size, expected in (
        ("imagenet", 8, (128 / 255 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]),
        ("imagenet-inception", 8, [(128 / 255 - 0.5) / 0.5] * 3),
        ("lite0", 224, [1 / 128] * 3),
        ("cifar10", 32, (128 / 255 - np.array([0.4914, 0.4822, 0.4465])) / [0.2470, 0.2435, 0.2616]),
        ("raw", 8, [128 / 255] * 3),
    ):
        (batch,) = read(tmp_path, image(f"n,3,{size},{size}"), preprocess=name)
        assert batch["x"].shape == (1, 3, size, size)
        assert np.allclose(batch["x"][0].transpose(1, 2, 0), expected, atol=1e-5), name
        assert name in calibration(tmp_path, image(f"n,3,{size},{size}"), preprocess=name).name


@pytest.mark.parametrize("height, width", [(9, 12), (300, 231), (224, 224)])
def test_lite0_is_what_the_package_does(tmp_path: Path, height: int, width: int) -> None:
    pixels = picture(tmp_path / "a.png", height, width)
    packages = pytest.importorskip("models.packages")
    assert np.array_equal(prepare(tmp_path / "a.png", PRESETS["lite0"]), packages.lite0_inputs([pixels])[0])


@pytest.mark.parametrize("height, width", [(300, 231), (231, 300), (100, 90), (256, 256)])
def test_imagenet_is_what_torchvision_does(tmp_path: Path, height: int, width: int) -> None:
    extras = pytest.importorskip("models.extras")
    try:
        transforms = extras.need("torchvision.transforms")
    except ImportError:
        pytest.skip("torchvision is not installed")
    picture(tmp_path / "a.png", height, width)
    opened = pytest.importorskip("PIL.Image").open(tmp_path / "a.png")
    made = transforms.Compose([
        transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])(opened)  # fmt: skip
    settings = read_preprocess("size=224")[0]
    assert np.allclose(prepare(tmp_path / "a.png", settings), made.numpy(), atol=1e-5)


def test_layout_order_and_channels(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 8, 8)
    raw = read(tmp_path, image(), preprocess="raw")[0]["x"]
    assert np.array_equal(read(tmp_path, image("n,8,8,3"), preprocess="raw")[0]["x"], raw.transpose(0, 2, 3, 1))
    assert np.array_equal(read(tmp_path, image(), preprocess="preset=raw,order=bgr")[0]["x"], raw[:, ::-1])
    assert read(tmp_path, image("n,1,8,8"))[0]["x"].shape == (1, 1, 8, 8)
    assert read(tmp_path, image("3,8,8"))[0]["x"].shape == (3, 8, 8)
    assert read(tmp_path, image("n,3,h,w"))[0]["x"].shape == (1, 3, 224, 224)
    assert read(tmp_path, image("n,3,h,w"), preprocess="size=6x5")[0]["x"].shape == (1, 3, 6, 5)
    assert read(tmp_path, image(kind="float16"))[0]["x"].dtype == np.float16


def test_bytes_stay_pixels(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a.png", 8, 8)
    model = image("n,8,8,3", "uint8")
    assert "pixels as they are" in calibration(tmp_path, model).name
    (batch,) = read(tmp_path, model, preprocess="preset=raw,scale=1")
    assert np.array_equal(batch["x"][0], pixels)
    assert "takes pixels 0..255 of uint8" in refusal(BadOption, tmp_path, model, preprocess="imagenet")


def test_preprocess_from_files_and_settings(tmp_path: Path) -> None:
    wanted = Preprocess((20, 30), "stretch", 1.0, "bicubic", 1 / 255, (0.1, 0.2, 0.3), (0.5,), "nhwc", "bgr")
    inline = "size=20x30,resize=stretch,crop=1,interpolation=bicubic,scale=1/255,mean=0.1/0.2/0.3,std=0.5,layout=nhwc,order=bgr"
    assert read_preprocess(inline)[0] == wanted
    (tmp_path / "a.yaml").write_text(
        "size: [20, 30]\nresize: stretch\ncrop: 1\ninterpolation: bicubic\nscale: 1/255\nmean: [0.1, 0.2, 0.3]\n"
        "std: 0.5\nlayout: NHWC\norder: BGR\n"
    )
    assert read_preprocess(str(tmp_path / "a.yaml"))[0] == wanted
    (tmp_path / "a.toml").write_text('preset = "lite0"\nsize = 240\n')
    assert read_preprocess(str(tmp_path / "a.toml"))[0] == Preprocess((240, 240), "square", 1.0, "bicubic", 1.0, (127.0,), (128.0,))


@pytest.mark.parametrize("given, words", [
    ("imagnet", "did you mean imagenet?"), ("size=big", "a size such as 224"), ("size=0", "size"), ("std=0", "not 0"),
    ("mean=1/2", "one or three"), ("colour=red", "no setting"),
    ("size=224,8", "key=value"), ("crop=2", "crop=2"), ("order=gbr", "rgb, bgr"), ("layout=chw", "nchw or nhwc"),
    ("preset=no", "none of"), ("size=1,size=2", "twice"), ("scale=1/0", "1/255"), ("resize=fit", "shortest, square, stretch"),
])  # fmt: skip
def test_preprocess_that_means_nothing(given: str, words: str) -> None:
    with pytest.raises(BadOption) as caught:
        read_preprocess(given)
    assert words in str(caught.value)
    assert str(caught.value).startswith("--preprocess")


def test_preprocess_files_that_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="can't be read"):
        read_preprocess(str(tmp_path / "no.yaml"))
    (tmp_path / "a.toml").write_text("a: 1")
    with pytest.raises(BadOption, match="neither YAML nor TOML"):
        read_preprocess(str(tmp_path / "a.toml"))
    (tmp_path / "a.yaml").write_text("- 1")
    with pytest.raises(BadOption, match="must map"):
        read_preprocess(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("size: true")
    with pytest.raises(BadOption, match="size=True"):
        read_preprocess(str(tmp_path / "a.yaml"))


def test_pictures_that_do_not_fit(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    text = refusal(BadOption, tmp_path, image(), preprocess="lite0")
    assert "224x224" in text
    assert "(?, 3, 8, 8)" in text
    assert "size=8x8" in text
    assert "inputs are x (?, 4)" in refusal(BadOption, tmp_path, vectors())
    assert "1 or 3 channels" in refusal(BadOption, tmp_path, image("n,7,8,8"))


def test_pictures_that_are_none(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "a.png").write_bytes(b"no picture")
    text = refusal(BadFile, tmp_path, image())
    assert "a.png can't be read" in text
    picture(tmp_path / "a.png", 60, 60)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    assert "a.png can't be read" in refusal(BadFile, tmp_path / "a.png", image())


def test_pictures_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").touch()
    without(monkeypatch, "PIL")
    text = refusal(BadOption, tmp_path, image())
    assert "pillow" in text
    assert "spa-prune[images]" in text
