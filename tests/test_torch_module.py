"""A plan carried back to the torch module that was exported: the smaller module gives what the pruned file gives."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spa
from spa.frameworks.arrays import layout, locate

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'spa-prune[torch]')")
nn = torch.nn


def perceptron() -> Any:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.GELU(), nn.Linear(32, 4))


def convolutions() -> Any:
    """Folded norms, groups, a depthwise layer, a group norm, and a flattened end."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, groups=4), nn.GroupNorm(4, 32),
        nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.BatchNorm2d(32), nn.ReLU(), nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Flatten(),
        nn.Linear(16 * 64, 5),
    )  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm, self.last = nn.Linear(6, 12), nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Any) -> Any:
        return self.last(self.lstm(torch.relu(self.first(x)))[0][:, -1])


class Attention(nn.Module):
    """Heads that the module counts itself, a token that is added to a position, tied weights."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, width // heads, (width // heads) ** -0.5
        self.token, self.place = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 6, width))
        self.inside, self.qkv, self.out = nn.Linear(8, width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, 8, bias=False)
        self.read.weight = nn.Parameter(self.inside.weight.detach().T.clone())

    def forward(self, x: Any) -> Any:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.inside(x)], 1) + self.place
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.read(x + self.out(y.transpose(1, 2).reshape(n, t, -1)))


CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "perceptron": (perceptron, (16, 8)), "convolutions": (convolutions, (8, 3, 8, 8)), "recurrent": (Recurrent, (2, 7, 6)),
    "attention": (Attention, (2, 5, 8)),
}  # fmt: skip


def exported(name: str, folder: Path, *, dynamo: bool = False) -> tuple[Any, Path, np.ndarray]:
    """A module with weights that all differ, its export, and an input."""
    torch.manual_seed(0)
    build, shape = CASES[name]
    module = build().eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (part.bias, part.running_mean):
                nn.init.normal_(tensor)
    x = torch.randn(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), folder / "m.onnx", dynamo=dynamo, input_names=["x"], verbose=False)
    return module, folder / "m.onnx", x.numpy()


def given(module: Any, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(module.eval()(torch.as_tensor(x)))


@pytest.mark.parametrize("repair", ["none", "obspa"])
@pytest.mark.parametrize("name", CASES)
def test_the_smaller_module_gives_what_the_file_gives(name: str, repair: str, tmp_path: Path) -> None:
    module, path, x = exported(name, tmp_path)
    units = {"units": ("head", "residual")} if name == "attention" else {}
    if units and repair != "none":
        pytest.skip("the bias of a fused projection is one of several that look alike")
    result = spa.prune(path, 0.5, calibration=[{"x": x}], repair=repair, multiple_of=1, **units)
    result.save(tmp_path / "small.onnx")
    small = spa.apply_to_torch(module, result.plan, path, pruned=tmp_path / "small.onnx" if repair != "none" else None)
    expected = spa.proof.check.run(result.model, {"x": x})
    np.testing.assert_allclose(given(small, x), next(iter(expected.values())), rtol=1e-3, atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in module.parameters())
    assert type(small) is type(module)
    small.train()(torch.as_tensor(x)).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_modules_are_left_alone_unless_asked_for(tmp_path: Path) -> None:
    module, path, x = exported("perceptron", tmp_path)
    before = given(module, x)
    plan = spa.plan(path, 0.5)
    small = spa.apply_to_torch(module, plan, path)
    assert np.array_equal(given(module, x), before)
    assert (small[0].out_features, small[2].in_features, small[2].weight.shape[1]) == (16, 16, 16)
    assert spa.apply_to_torch(module, plan, path, inplace=True) is module
    assert module[0].out_features == 16


def test_sizes_that_layers_keep(tmp_path: Path) -> None:
    module, path, _ = exported("convolutions", tmp_path)
    small = spa.apply_to_torch(module, spa.plan(path, 0.5, multiple_of=1), path)
    for part in small:
        if isinstance(part, nn.Conv2d):
            assert part.weight.shape == (part.out_channels, part.in_channels // part.groups, *part.kernel_size)
    assert small[1].num_features == small[0].out_channels == 8
    assert small[6].groups == small[6].in_channels


def test_another_module_is_refused(tmp_path: Path) -> None:
    module, path, _ = exported("perceptron", tmp_path)
    plan = spa.plan(path, 0.5)
    nn.init.normal_(module[2].weight)
    with pytest.raises(spa.BadOption, match=r"does not hold these parameters of the module.* 2\.weight\. Is it an export"):
        spa.apply_to_torch(module, plan, path, check=False)
    with pytest.raises(spa.CheckFailed, match="differs by"):
        spa.apply_to_torch(module, plan, path)


def test_what_code_computes_from_a_size_is_found_by_the_check(tmp_path: Path) -> None:
    module, path, _ = exported("attention", tmp_path)
    plan = spa.plan(path, 0.5, units=("head",))
    module.forward = lambda x: Attention.forward(module, x) * module.num_heads
    with pytest.raises(spa.CheckFailed, match="Does its code compute something from a size that shrank"):
        spa.apply_to_torch(module, plan, path)


def test_arrays_are_told_by_what_they_hold() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 3, 2)), rng.standard_normal((4, 3, 2))
    tensors = {"x.b": b.transpose(2, 0, 1).copy(), "y": a.reshape(4, 1, 3, 2), "z.bias": np.zeros(4), "u.bias": np.zeros(4)}
    found = locate({"a": a, "b": b, "z.bias": np.zeros(4), "v": np.zeros(4)}, tensors)
    assert (found["a"].tensor, found["a"].axes) == ("y", (0, 2, 3))
    assert (found["b"].tensor, found["b"].axes) == ("x.b", (1, 2, 0))
    assert found["z.bias"].tensor == "z.bias"
    assert "v" not in found  # one of two that hold the same, and no name tells which
    assert layout(a, b) is None


def test_gates_in_another_order_are_an_arrangement() -> None:
    rng = np.random.default_rng(0)
    gates = rng.standard_normal((8, 3)).astype(np.float32)
    there = np.concatenate([gates[4:], gates[:4]])[None]
    found = locate({"w": gates}, {"W": there})["w"]
    keeps = found.keeps((8, 3), {"W": {"1": [0, 5], "2": [2]}})
    assert keeps is not None
    assert [k.tolist() for k in keeps] == [[0, 2, 3, 5, 6, 7], [0, 1]]
    small = np.delete(np.delete(there, [0, 5], 1), 2, 2)
    assert np.array_equal(found.values(small, (8, 3), keeps, {"W": {"1": [0, 5], "2": [2]}}), gates[np.ix_(*keeps)])
    assert found.keeps((8, 3), {"W": {"1": [0], "2": [2]}}) is not None


class Scaled(Attention):
    """Attention that works out its scale from the width of a head when it runs, in one of the ways in which code does."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.scale = way, 0.0

    def forward(self, x: Any) -> Any:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.inside(x)], 1) + self.place
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.way == "sdpa":
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            scale = q.shape[-1] ** -0.5 if self.way == "shape" else 1 / self.head_dim**0.5
            y = (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v
        return self.read(x + self.out(y.transpose(1, 2).reshape(n, t, -1)))


def scaled(way: str, folder: Path) -> tuple[Any, Path, np.ndarray]:
    torch.manual_seed(0)
    module, x = Scaled(way).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        module.qkv.weight *= 4  # so that scores differ enough to tell
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), folder / "m.onnx", dynamo=False, input_names=["x"], verbose=False)
    return module, folder / "m.onnx", x.numpy()


@pytest.mark.parametrize(("way", "by"), [("sdpa", 0.5**0.5), ("shape", 0.5**0.5), ("attribute", 1.0)])
def test_queries_make_up_for_a_scale_that_follows_the_width(way: str, by: float, tmp_path: Path) -> None:
    """A stored width that could be something else too stays as it was, and with it the scale: then nothing is made up for."""
    module, path, x = scaled(way, tmp_path)
    result = spa.prune(path, 0.5, units=("head-width",), multiple_of=1)
    small = spa.apply_to_torch(module, result.plan, path)
    expected = next(iter(spa.proof.check.run(result.model, {"x": x}).values()))
    np.testing.assert_allclose(given(small, x), expected, rtol=1e-3, atol=1e-4)
    rows = cut_rows(module, result.plan)
    np.testing.assert_allclose(small.qkv.weight.detach()[:16], rows[:16] * by, rtol=1e-5)
    np.testing.assert_allclose(small.qkv.weight.detach()[16:], rows[16:], rtol=1e-5)


def cut_rows(module: Any, plan: spa.Plan) -> np.ndarray:
    """(48, 32) the rows of the fused projection that a plan leaves: the same positions of four heads, three times."""
    (kept,) = (entry["kept"] for entry in plan.groups.values())
    return np.asarray(module.qkv.weight.detach().numpy().reshape(3, 4, 8, 32)[:, :, kept].reshape(-1, 32))


def test_the_scale_is_told_where_that_does_not_help(tmp_path: Path) -> None:
    module, path, _ = scaled("sdpa", tmp_path)
    plan = spa.plan(path, 0.5, units=("head-width",), multiple_of=1)
    rows = cut_rows(module, plan)
    module.forward = lambda x: Scaled.forward(module, x) * module.num_heads
    with pytest.raises(spa.CheckFailed, match=r"heads of 8 positions have 4 now, their scale was 0\.3535534"):
        spa.apply_to_torch(module, plan, path, inplace=True)
    np.testing.assert_allclose(module.qkv.weight.detach(), rows, rtol=1e-6)  # tried, and taken back
