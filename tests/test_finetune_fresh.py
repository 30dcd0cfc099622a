"""Training that begins with fresh weights: statistics of norms, tensors that an exporter merged, optimizers and precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

import spa
from spa.data.evidence import values
from spa.graph.normalize import untied
from spa.learning.training import Samples
from spa.plans.plan import graph_sha256
from spa.statistics.torch_graph import TorchGraph

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'spa-prune[torch]')")

Batches = list[dict[str, np.ndarray]]


def fresh() -> onnx.ModelProto:
    """Two convolutions with norms whose scales, means and variances an exporter merged, and a classifier."""
    model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]> g (float[n,3,6,6] x) => (float[n,4] y) {
        again = Identity(ones)
        a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, first)
        b = BatchNormalization(a, ones, zeros, zeros, ones)
        c = Relu(b)
        d = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(c, second)
        e = BatchNormalization(d, again, zeros, zeros, ones)
        f = Relu(e)
        p = GlobalAveragePool(f)
        q = Flatten(p)
        y = Gemm<transB=1>(q, head, bias)
    }""")
    rng = np.random.default_rng(0)
    arrays = {
        "first": rng.standard_normal((16, 3, 3, 3)), "second": rng.standard_normal((16, 16, 3, 3)), "ones": np.ones(16),
        "zeros": np.zeros(16), "head": rng.standard_normal((4, 16)) / 4, "bias": np.zeros(4),
    }  # fmt: skip
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items())
    return model


def batches(count: int = 10, size: int = 40) -> Batches:
    """Pictures of four colours, on a mean far from zero."""
    rng = np.random.default_rng(1)
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])[:, :, None, None]
    labels = rng.integers(0, 4, (count, size))
    return [{"x": (rng.standard_normal((size, 3, 6, 6)) + 5 + colours[y]).astype(np.float32), "labels": y} for y in labels]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(fresh(), tmp_path / "fresh.onnx")
    return tmp_path / "fresh.onnx"


def last(path: Path, **how: Any) -> dict[str, np.ndarray]:
    """What training comes to, whether it is the best or not."""
    checkpoint = path.parent / "c.pt"
    spa.finetune(path, batches(), training=spa.Training(**how), checkpoint=checkpoint, evaluate=batches(1))
    return {n: t.float().numpy() for n, t in torch.load(checkpoint, weights_only=True)["weights"].items()}


def test_norms_come_to_store_the_statistics_of_the_data(path: Path) -> None:
    weights = last(path, epochs=8, rate=1e-12, optimizer="sgd", batch=40, decay=0.0)
    fed = {"x": np.concatenate([b["x"] for b in batches()])}
    a = TorchGraph(spa.load(path).graph).run(fed, ["a"])["a"].detach().numpy()
    assert weights["zeros/copy1"] == pytest.approx(a.mean((0, 2, 3)), rel=0.02, abs=0.2)
    assert weights["ones/copy2"] == pytest.approx(a.var((0, 2, 3)), rel=0.2)


@pytest.mark.parametrize(("how", "tracked"), [({"batch": 40}, True), ({"batch": 40, "norms": "stored"}, False), ({"batch": 8}, False),
                                              ({"batch": 8, "norms": "batch"}, True)])  # fmt: skip
def test_statistics_run_along_where_the_batch_is_large_enough(path: Path, how: dict[str, Any], tracked: bool) -> None:
    assert ("zeros/copy1" in last(path, epochs=1, **how)) is tracked


@pytest.mark.parametrize("how", [{"optimizer": "adamw", "rate": 0.01}, {"optimizer": "sgd", "rate": 0.1},
                                 {"optimizer": "sgd", "rate": 0.1, "precision": "bfloat16"}])  # fmt: skip
def test_a_fresh_network_learns(path: Path, how: dict[str, Any]) -> None:
    found = spa.finetune(path, batches(20), training=spa.Training(epochs=6, batch=40, **how))
    assert found.history[0].value < 60
    assert found.best.value > 95, found.history


def test_tensors_that_an_exporter_merged_part_in_training(path: Path) -> None:
    found = spa.finetune(path, batches(), training=spa.Training(epochs=4, batch=40, rate=0.01))
    norms = [n for n in found.model.graph.nodes if n.op == "BatchNormalization"]
    moments = [values(found.model.graph, n.inputs[3].name) for n in norms]
    assert not np.allclose(moments[0], moments[1])
    found.save(path.parent / "trained.onnx")
    onnx.checker.check_model(str(path.parent / "trained.onnx"), full_check=True)


def test_a_plan_of_the_trained_network_cuts_the_fresh_one(path: Path) -> None:
    trained = spa.finetune(path, batches(), training=spa.Training(epochs=4, batch=40, rate=0.01)).model
    spa.save(trained, path.parent / "trained.onnx")
    plan = spa.plan(path.parent / "trained.onnx", 0.5, multiple_of=1)
    with pytest.raises(spa.BadPlan, match="same graph with other weights: --other-weights"):
        spa.apply(path, plan)
    rewound = spa.apply(path, plan, other_weights=True).model
    whole = values(spa.load(path).graph, "first")
    assert np.array_equal(values(rewound.graph, "first"), whole[plan.groups["first:0"]["kept"]])
    assert graph_sha256(rewound.graph) == graph_sha256(spa.apply(path.parent / "trained.onnx", plan).model.graph)


def test_matrices_stay_tied() -> None:
    model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]> g (float[n,4] x) => (float[n,4] y) {
        a = MatMul(x, w)
        b = Add(a, v)
        c = MatMul(b, w)
        y = Add(c, v)
    }""")
    rng = np.random.default_rng(0)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n)
                                   for n, s in (("w", (4, 4)), ("v", (4,))))  # fmt: skip
    loaded = spa.load(model.SerializeToString())
    apart = untied(loaded)
    names = [[t.name for t in n.inputs] for n in apart.graph.nodes]
    assert names == [["x", "w"], ["a", "v"], ["b", "w"], ["c", "v/copy1"]]
    assert untied(apart) is apart


def test_lists_of_batches_are_all_trained_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    begin = Samples.__init__

    def counting(self: Samples, *given: Any) -> None:
        begin(self, *given)
        counted.append(len(self.rows))

    monkeypatch.setattr(Samples, "__init__", counting)
    spa.finetune(path, batches(20), training=spa.Training(epochs=1, batch=40), evaluate=batches(1))
    assert counted == [800]
