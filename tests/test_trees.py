"""Arrays of other frameworks, cut by a plan: the same numbers as in the pruned file, in the framework's own layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from intake_cases import ROOT, needed, saved
from test_acting import NORM, W1, W2, apart, folded

import spa
from models.intake import flax_nets
from models.intake import weights as drawn
from spa.errors import BadOption
from spa.proof.check import run


def numbers(layout: str = "torch") -> dict[str, Any]:
    """The arrays of `test_acting`'s network, as torch or Keras stores them."""
    last = layout == "keras"
    norm = dict(zip(("gamma", "beta", "mean", "var"), NORM.values(), strict=True))
    moved = [w.transpose(2, 3, 1, 0) if last else w for w in (W1, W2)]
    tree = {"a": {"kernel": moved[0]}, "n": norm, "b": {"kernel": moved[1]}}
    return {k: {n: np.asarray(a, np.float32) for n, a in part.items()} for k, part in tree.items()}


@pytest.mark.parametrize("layout", ["torch", "keras"])
@pytest.mark.parametrize("make", [apart, folded])
def test_a_nested_dict(make: Any, layout: str) -> None:
    """The norm may be multiplied into the file's weights: the tree's stays as it is, but for what goes."""
    plan = spa.plan(make(), 0.5, multiple_of=1)
    tree = numbers(layout)
    small = spa.apply_to_arrays(tree, plan, make())
    keep = next(iter(plan.groups.values()))["kept"]
    assert list(small) == ["a", "n", "b"]
    for part in ("gamma", "beta", "mean", "var"):
        np.testing.assert_array_equal(small["n"][part], tree["n"][part][keep])
    first, second = ((..., keep), (slice(None), slice(None), keep)) if layout == "keras" else ((keep,), (slice(None), keep))
    np.testing.assert_array_equal(small["a"]["kernel"], tree["a"]["kernel"][first])
    np.testing.assert_array_equal(small["b"]["kernel"], tree["b"]["kernel"][second])
    assert len(tree["n"]["gamma"]) == len(NORM["s"])  # what was given is left alone


@pytest.mark.parametrize("make", [apart, folded])
def test_a_list_as_keras_gives_it(make: Any) -> None:
    plan = spa.plan(make(), 0.5, multiple_of=1)
    given = [a for part in numbers("keras").values() for a in part.values()]
    small = spa.apply_to_arrays(given, plan, make())
    assert [a.shape for a in small] == [(3, 3, 3, 4), (4,), (4,), (4,), (4,), (1, 1, 4, 4)]


def test_vectors_that_are_alike_go_with_their_layers() -> None:
    """Two zero biases of one length behind square matrices: which positions go is told by what reads them."""
    from test_trace import net

    rng = np.random.default_rng(0)
    w = {n: rng.normal(size=s).astype(np.float32) for n, s in {"w1": (4, 8), "w2": (8, 8), "w3": (8, 3)}.items()}
    zeros = {n: np.zeros(8, np.float32) for n in ("b1", "b2")}
    body = "a = MatMul(x, w1) c = Add(a, b1) d = Relu(c) e = MatMul(d, w2) f = Add(e, b2) g = Relu(f) y = MatMul(g, w3)"
    model = net("float[n,4] x -> float[n,3] y", body, **w, **zeros)
    plan = spa.plan(model, ratios={"w1:1": 0.5, "w2:1": 0.25}, ratio=0.5, multiple_of=1)
    tree = [[w["w1"], zeros["b1"]], [w["w2"], zeros["b2"]], [w["w3"]]]
    small = spa.apply_to_arrays(tree, plan, model)
    assert [[a.shape for a in layer] for layer in small] == [[(4, 4), (4,)], [(4, 6), (6,)], [(6, 3)]]


def test_weights_of_the_pruned_file_are_taken_over() -> None:
    x = np.random.default_rng(2).normal(size=(32, 3, 6, 6)).astype(np.float32)
    result = spa.prune(apart(), 0.5, multiple_of=1, calibration=[{"x": x}], repair="obspa")
    tree = numbers("keras")
    with pytest.raises(BadOption, match="weights that none of the arrays takes over"):
        spa.apply_to_arrays(tree, result.plan, apart(), pruned=result.model)


def test_what_is_not_in_the_file() -> None:
    tree = {**numbers(), "other": {"kernel": np.random.default_rng(3).normal(size=(8, 8)).astype(np.float32)}}
    with pytest.raises(BadOption, match="what these arrays lose: other/kernel"):
        spa.apply_to_arrays(tree, spa.plan(apart(), 0.5, multiple_of=1), apart())


def converted(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> spa.Converted:
    needed("jax", "flax")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return spa.convert(saved("jax", name, folder), framework="jax", inputs={"x": drawn.shape(name, last=True)})


@pytest.mark.parametrize("name", ["resnet", "mlp"])
def test_flax_runs_on_the_smaller_arrays(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linen = pytest.importorskip("flax.linen", reason="flax is not installed (pip install 'spa-prune[jax]')")
    made = converted(name, tmp_path, monkeypatch)
    result = spa.prune(made.model, 0.5, multiple_of=1)
    weights = {"resnet": drawn.resnet, "mlp": drawn.mlp}[name]()
    module, variables = {"resnet": flax_nets.resnet, "mlp": flax_nets.mlp}[name](weights)
    small = spa.apply_to_arrays(variables, result.plan, made.model)
    widths = dict(_widths(small["params"]))
    x = np.random.default_rng(0).normal(size=drawn.shape(name, last=True)).astype(np.float32)

    def narrow(next_one: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if isinstance(layer, linen.Conv | linen.Dense) and context.method_name == "__call__":
            object.__setattr__(layer, "features", widths["/".join(layer.path)])
        return next_one(*args, **kwargs)

    with linen.intercept_methods(narrow):
        found = module.apply(small, x)
    wanted = next(iter(run(result.model, {"x": x}).values()))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def _widths(tree: Any, path: str = "") -> Any:
    for key, value in tree.items():
        if key == "kernel":
            yield path, value.shape[-1]
        elif isinstance(value, dict):
            yield from _widths(value, f"{path}/{key}".lstrip("/"))


@pytest.mark.parametrize("name", ["resnet", "mlp"])
def test_a_smaller_keras_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras is not installed (pip install keras)")
    to_onnx = pytest.importorskip("jax2onnx", reason="jax2onnx is not installed (pip install 'spa-prune[jax]')").to_onnx
    from models.intake import keras_nets

    weights = {"resnet": drawn.resnet, "mlp": drawn.mlp}[name]()
    model = {"resnet": keras_nets.resnet, "mlp": keras_nets.mlp}[name](weights)
    shape = ("batch", *drawn.shape(name, last=True)[1:])
    proto = to_onnx(lambda x: model(x, training=False), [shape], opset=18, input_names=["x"])
    result = spa.prune(proto, 0.5, multiple_of=1)
    small = spa.apply_to_keras(model, result.plan, proto)
    x = np.random.default_rng(0).normal(size=drawn.shape(name, last=True)).astype(np.float32)
    np.testing.assert_allclose(small(x), next(iter(run(result.model, {"x": x}).values())), rtol=1e-4, atol=1e-4)
    assert small.count_params() < 0.6 * model.count_params()
    small.save(tmp_path / "small.keras")
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "small.keras")(x), small(x), rtol=1e-5, atol=1e-6)
    wrong = spa.plan(proto, 0.25, multiple_of=1)
    pruned = spa.apply(proto, wrong, check=False).model
    with pytest.raises(spa.CheckFailed, match="differs by"):
        spa.frameworks.keras_model._compare(small, spa.analyze(proto), pruned, 1e-4)
