"""A transformer before and after ONNX Runtime's optimisers: the same groups, the same plan, the same result."""

from __future__ import annotations

import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import spa
from spa.storage.store import to_proto

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

NAMES = ["input_ids", "attention_mask", "token_type_ids"]
HEADS, WIDTH = 4, 64


def encoder() -> Any:
    """Two layers of a text encoder, in the form whose parts the optimisers know."""

    class Attention(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def heads(self, x: Any) -> Any:
            return x.view(x.size(0), x.size(1), HEADS, -1).permute(0, 2, 1, 3)

        def forward(self, x: Any, mask: Any) -> Any:
            q, k, v = (self.heads(p(x)) for p in (self.query, self.key, self.value))
            shares = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1)) + mask, -1)
            together = torch.matmul(shares, v).permute(0, 2, 1, 3).contiguous()
            return self.out(together.view(together.size(0), together.size(1), -1))

    class Layer(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.norms = Attention(), torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(2))
            self.up, self.down = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(2 * WIDTH, WIDTH)

        def forward(self, x: Any, mask: Any) -> Any:
            x = self.norms[0](self.attention(x, mask) + x)
            return self.norms[1](self.down(torch.nn.functional.gelu(self.up(x))) + x)

    class Encoder(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.tables = torch.nn.ModuleList(torch.nn.Embedding(n, WIDTH) for n in (100, 2, 32))
            self.norm, self.head = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, 3)
            self.layers = torch.nn.ModuleList(Layer() for _ in range(2))
            self.register_buffer("places", torch.arange(32)[None])

        def forward(self, ids: Any, mask: Any, segments: Any) -> Any:
            mask = (1.0 - mask[:, None, None, :].float()) * -10000.0
            words, kinds, places = self.tables
            x = self.norm(words(ids) + kinds(segments) + places(self.places[:, : ids.size(1)]))
            for layer in self.layers:
                x = layer(x, mask)
            return self.head(x[:, 0])

    torch.manual_seed(0)
    return Encoder().eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("optimised") / "exported.onnx"
    ids = torch.randint(0, 90, (2, 10))
    held = io.BytesIO()
    torch.onnx.export(encoder(), (ids, torch.ones_like(ids), torch.zeros_like(ids)), held, input_names=NAMES, output_names=["y"],
                      dynamo=False, opset_version=14, dynamic_axes={n: {0: "batch", 1: "length"} for n in NAMES})  # fmt: skip
    path.write_bytes(held.getvalue())
    return path


def fused(path: Path, multi_head: bool) -> Path:
    """After the transformer optimiser, with the projections in the attention or beside it."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.use_multi_head_attention = multi_head
    made = path.with_name(f"fused{multi_head}.onnx")
    optimize_model(str(path), model_type="bert", num_heads=HEADS, hidden_size=WIDTH, opt_level=0,
                   optimization_options=options).save_model_to_file(str(made))  # fmt: skip
    return made


def extended(path: Path) -> Path:
    """After the optimisation of a session, level "extended"."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_name("extended.onnx"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return path.with_name("extended.onnx")


WAYS = {
    "attention": (lambda path: fused(path, False), {"Attention", "EmbedLayerNormalization", "SkipLayerNormalization", "BiasGelu"}),
    "multi-head": (lambda path: fused(path, True), {"MultiHeadAttention", "EmbedLayerNormalization", "SkipLayerNormalization"}),
    "session": (extended, {"FusedMatMul", "LayerNormalization", "BiasGelu"}),
}


def summary(result: spa.Result) -> tuple[Counter[Any], Counter[Any]]:
    """Free groups as (kind, size, parameters of a coordinate), and what a plan keeps of each as (kind, which)."""
    groups = result.analysis.groups
    free = Counter((g.kind, g.size, round(g.parameters)) for g in groups.free())
    kept = Counter((groups.by_name[n].kind, tuple(v["kept"])) for n, v in result.plan.groups.items())
    return free, kept


def outputs(model: onnx.ModelProto) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(0, 90, (2, 7))
    feeds = dict(zip(NAMES, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))
    kinds = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}
    return np.asarray(session.run(None, {i.name: feeds[i.name].astype(kinds[i.type]) for i in session.get_inputs()})[0])


@pytest.mark.parametrize("way", WAYS)
def test_the_optimised_graph_prunes_as_the_exported_one(exported: Path, way: str) -> None:
    make, operators = WAYS[way]
    path = make(exported)
    assert operators <= {n.op_type for n in onnx.load(path).graph.node}
    before, after = spa.prune(exported, 0.5, multiple_of=1), spa.prune(path, 0.5, multiple_of=1)
    assert summary(after) == summary(before)
    assert {kind for kind, _, _ in summary(after)[0]} == {"head", "qk", "vo", "neuron", "residual"}
    assert after.after.macs == before.after.macs
    expected, found = outputs(to_proto(before.model)), outputs(to_proto(after.model))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
