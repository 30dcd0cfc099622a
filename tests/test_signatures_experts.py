"""Weights in blocks of few bits, mixtures of experts and fused embeddings, as ONNX Runtime's kernels on the CPU take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from signature_cases import Case, examine
from test_signatures_fused import ms, width_of
from test_signatures_more import F, index
from test_trace import net

import spa


def byte(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape).astype(np.uint8)


def bits(name: str, n: int, k: int, *rest: Any, width: int = 4, block: int = 16, flat: bool = False, **settings: Any) -> Case:
    count = -(-k // block)
    scales = (n * count,) if flat else (n, count)
    return ms(name, "MatMulNBits", (2, 3, k), byte(n, count, block * width // 8), scales, *rest, K=k, N=n, bits=width, block_size=block,
              **settings)


BLOCKS = [
    *(bits(f"{width} bits", 10, 96, width=width) for width in (2, 4, 8)),
    bits("scales in a row", 10, 96, flat=True),
    bits("zero points, two a byte", 10, 64, byte(10, 2)),
    bits("zero points, two a byte in a row", 10, 64, byte(20), flat=True),
    bits("zero points, one left over", 10, 48, byte(10, 2)),
    bits("zero points of 8 bits", 10, 48, byte(10, 3), width=8),
    bits("zero points of 2 bits", 10, 128, byte(10, 2), width=2),
    bits("zero points that are floats", 10, 48, (10, 3)),
    bits("a bias", 10, 48, None, None, (10,)),
    bits("an order", 10, 48, None, np.repeat(np.arange(3, dtype=np.int32), 16)),
    bits("a last block that is not full", 10, 40),
    bits("integer sums", 10, 96, accuracy_level=4, block=32),
    ms("quantised table", "GatherBlockQuantized", byte(10, 32), index(2, 2, below=10), (10, 4), bits=4, block_size=16),
    ms("quantised table, zero points", "GatherBlockQuantized", byte(10, 32), index(2, 2, below=10), (10, 4), byte(10, 2), bits=4,
       block_size=16),
    ms("quantised table, 8 bits", "GatherBlockQuantized", byte(10, 64), index(2, 2, below=10), (10, 4), byte(10, 4), bits=8, block_size=16,
       gather_axis=0, quantize_axis=1),
]
_IDS = index(2, 3, below=6).astype(np.int32)


def embedding(name: str, *inputs: Any, outputs: int) -> Case:
    """Words, places and maybe segments of width 8; the second output holds whole numbers."""
    found = ms(name, "EmbedLayerNormalization", *inputs, outputs=outputs)
    found.model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.INT32
    return found


EMBEDDINGS = [
    embedding("embedding", _IDS, _IDS % 2, (10, 8), (6, 8), (2, 8), (8,), (8,), outputs=3),
    embedding("embedding, mask", _IDS, None, (10, 8), (6, 8), None, (8,), (8,), np.ones((2, 3), np.int32), outputs=2),
    embedding("embedding, positions", _IDS, None, (10, 8), (6, 8), None, (8,), (8,), None, _IDS % 5, outputs=2),
]


def experts(name: str, *, rows: int = 12, neurons: int = 12, k: int = 2, data: tuple[int, ...] = (6, 8), bias: bool = True,
            older: bool = False, **settings: Any) -> Case:
    """Four experts from 8 channels to 8."""
    one, two = ((4, 8, rows), (4, neurons, 8)) if older else ((4, rows, 8), (4, 8, neurons))
    return ms(name, "MoE", data, (6, 4), one, (4, rows) if bias else None, two, (4, 8) if bias else None, k=k,
              **{"activation_type": "silu", **settings})


def quantised(name: str, *, width: int = 4, neurons: int = 16, channels: int = 32, fused: bool = False, block: int = 0,
              zeros: bool = False, **settings: Any) -> Case:
    """Four experts with weights of `width` bits."""
    rows, pack = neurons * (2 if fused else 1), 8 // width
    count = (channels // block, neurons // block) if block else (0, 0)
    points: list[Any] = [None] * 3
    if zeros:
        points[0] = byte(4, rows, -(-count[0] // pack)) if block else byte(4, rows // pack)
        points[1] = byte(4, channels, -(-count[1] // pack)) if block else byte(4, channels // pack)
    scale = np.float32(0.05)
    first, second = (4, rows, count[0]) if block else (4, rows), (4, channels, count[1]) if block else (4, channels)
    extra = {"block_size": block} if block else {}
    activation = {"activation_type": "swiglu", "swiglu_fusion": 1} if fused else {"activation_type": "silu"}
    return ms(name, "QMoE", (6, channels), (6, 4), byte(4, rows, channels // pack), np.full(first, scale), (4, rows),
              byte(4, channels, neurons // pack), np.full(second, scale), (4, channels), None, None, None, *points,
              k=2, expert_weight_bits=width, **extra, **activation, **settings)


EXPERTS = [
    experts("experts"),
    experts("experts, samples", data=(2, 3, 8), bias=False, k=1),
    experts("experts, weights that sum to one", normalize_routing_weights=1, activation_type="relu"),
    experts("experts, sparse mixer", use_sparse_mixer=1, activation_type="gelu"),
    experts("experts, gates beside", rows=24, activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.702, activation_beta=1.0),
    experts("experts, older order", older=True),
    *(quantised(f"experts, {width} bits{', gates beside' if fused else ''}", width=width, fused=bool(fused))
      for width in (4, 8) for fused in (0, 1)),
    quantised("experts, zero points", zeros=True),
    quantised("experts, zero points and gates", zeros=True, fused=True),
    quantised("experts, zero points of 8 bits", zeros=True, fused=True, width=8),
    quantised("experts, blocks", block=16, neurons=48, channels=64, fused=True),
    quantised("experts, blocks with zero points", block=16, neurons=64, channels=64, fused=True, zeros=True),
    quantised("experts, blocks of 8 bits", block=16, neurons=48, channels=48, width=8, zeros=True),
]
CASES = BLOCKS + EMBEDDINGS + EXPERTS


@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_removing_equals_masking_equals_selecting(name: str) -> None:
    mine = next(c for c in CASES if c.name == name)
    outcome = examine(mine)
    assert not outcome.problems, "\n".join(outcome.problems[:5])
    assert outcome.groups, outcome.signature
    assert outcome.engines, outcome.skipped


def sizes(model: onnx.ModelProto) -> dict[str, int]:
    return {g.kind: g.size for g in spa.analyze(model).groups.free()}


def test_an_mlp_of_few_bits() -> None:
    """Neurons go in the blocks of the second weight, and the proof holds where the kernel computes with whole numbers."""
    body = """h = com.microsoft.MatMulNBits<K=32, N=128, bits=4, block_size=32, accuracy_level=4>(x, w1, s1) r = Relu(h)
      y = com.microsoft.MatMulNBits<K=128, N=32, bits=4, block_size=32, accuracy_level=4>(r, w2, s2, z2)"""
    model = net("float[n,32] x -> float[n,32] y", body, w1=byte(128, 1, 16), s1=np.full((128, 1), 0.02, F), w2=byte(32, 4, 16),
                s2=np.full((32, 4), 0.02, F), z2=byte(32, 2))  # fmt: skip
    assert sizes(model) == {"neuron": 2}  # two blocks, whose zero points share a byte, each
    result = spa.prune(model, 0.5, multiple_of=1)
    nodes = [n for n in result.model.graph.nodes if n.op == "MatMulNBits"]
    assert [(n.attrs["K"], n.attrs["N"]) for n in nodes] == [(32, 64), (64, 32)]
    assert [tuple(t.shape) for t in nodes[1].inputs[1:]] == [(32, 2, 16), (32, 2), (32, 1)]


def router(k: int = 2) -> onnx.ModelProto:
    body = f'p = MatMul(x, wr) m = com.microsoft.MoE<k={k}, activation_type="silu">(x, p, w1, , w2) y = Add(m, x)'
    return net("float[n,8] x -> float[n,8] y", body, wr=(8, 6), w1=(6, 12, 8), w2=(6, 8, 12))


def test_experts_and_their_neurons() -> None:
    assert sizes(router()) == {"expert": 6, "expert-neuron": 12}
    result = spa.prune(router(), 0.5, multiple_of=1, include=[width_of(router(), 6)])
    shapes = {t.name: tuple(t.shape) for n in result.model.graph.nodes for t in n.inputs if t.name in ("wr", "w1", "w2")}
    assert shapes == {"wr": (8, 3), "w1": (3, 12, 8), "w2": (3, 8, 12)}


def test_as_many_experts_stay_as_each_token_asks_for() -> None:
    result = spa.prune(router(k=4), 0.5, multiple_of=1, include=[width_of(router(), 6)])
    assert [len(g["kept"]) for g in result.plan.groups.values()] == [4]


def test_the_rows_of_a_fused_embedding_are_ids() -> None:
    """Drawn inputs stay inside the tables, and the width goes."""
    body = """e, n = com.microsoft.EmbedLayerNormalization(ids, , words, places, , g, b) y = MatMul(e, w)"""
    model = net("int32[n,3] ids -> float[n,3,4] y", body, words=(5, 16), places=(4, 16), g=(16,), b=(16,), w=(16, 4))
    assert list(sizes(model).values()) == [16]
    assert spa.prune(model, 0.5).check is not None
