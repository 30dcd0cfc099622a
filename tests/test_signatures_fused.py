"""Attention and rotation in one operator, as onnx and ONNX Runtime have them, in all forms that the CPU's kernels take."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from signature_cases import Case, examine, trace_case, with_initializers
from test_signatures_more import MICROSOFT, F, case, index, ints
from test_trace import net

import spa
from spa.plans.rewrite import rewrite
from spa.storage.store import load


def i32(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def ms(name: str, op: str, *inputs: Any, **settings: Any) -> Case:
    return case(name, op, *inputs, domain=MICROSOFT, **settings)


_TABLES = ((7, 4), (7, 4))
STANDARD = [
    case("attention", "Attention", (2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6)),
    case("attention, flat", "Attention", (2, 3, 24), (2, 5, 24), (2, 5, 12), q_num_heads=4, kv_num_heads=4),
    case("attention, shared heads", "Attention", (2, 3, 48), (2, 5, 16), (2, 5, 12), q_num_heads=6, kv_num_heads=2),
    case("attention, one head for all", "Attention", (2, 4, 3, 8), (2, 1, 5, 8), (2, 1, 5, 6)),
    case("attention, scale and cap", "Attention", (2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6), scale=0.3, softcap=2.0, is_causal=1),
    case("attention, mask of rank 2", "Attention", (2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6), (3, 5)),
    case("attention, mask of rank 3", "Attention", (2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6), (4, 3, 5)),
    case("attention, mask a head", "Attention", (2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6), (1, 4, 3, 5)),
    case("attention, mask a sample", "Attention", (2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6), (2, 1, 3, 5)),
    case("attention, past", "Attention", (2, 3, 24), (2, 5, 12), (2, 5, 12), None, (2, 2, 4, 6), (2, 2, 4, 6), outputs=4,
         q_num_heads=4, kv_num_heads=2, qk_matmul_output_mode=1),
    case("attention, lengths", "Attention", (2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6), None, None, None, ints(4, 5), opset=24),
    case("attention, past of other width", "Attention", (2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6), (3, 9), (2, 2, 4, 8), (2, 2, 4, 6),
         outputs=3),
    *(case(f"attention, scores {mode}", "Attention", (2, 3, 32), (2, 5, 16), (2, 5, 12), None, None, None, outputs=4, q_num_heads=4,
           kv_num_heads=2, qk_matmul_output_mode=mode) for mode in (0, 2, 3)),
    case("attention, mask of truths", "Attention", (2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6), np.tri(3, 5, 2) > 0),
    case("attention, window", "Attention", (2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6), opset=25, left_window_size=2),
]
_TIME = index(2, 4, below=7)
ROTARY = [
    case("rotary", "RotaryEmbedding", (2, 3, 4, 8), *_TABLES, _TIME),
    case("rotary, flat", "RotaryEmbedding", (2, 4, 24), *_TABLES, _TIME, num_heads=3),
    case("rotary, flat and interleaved", "RotaryEmbedding", (2, 4, 24), (2, 4, 4), (2, 4, 4), num_heads=3, interleaved=1),
    case("rotary, part", "RotaryEmbedding", (2, 3, 4, 8), (2, 4, 2), (2, 4, 2), rotary_embedding_dim=4),
    case("rotary, part and interleaved", "RotaryEmbedding", (2, 4, 24), (7, 2), (7, 2), _TIME, num_heads=3, rotary_embedding_dim=4,
         interleaved=1),
    ms("microsoft rotary", "RotaryEmbedding", (2, 3, 4, 8), _TIME, *_TABLES),
    ms("microsoft rotary, flat", "RotaryEmbedding", (2, 4, 24), _TIME, *_TABLES),
    ms("microsoft rotary, flat with heads", "RotaryEmbedding", (2, 4, 24), _TIME, *_TABLES, num_heads=3, interleaved=1),
    ms("microsoft rotary, first position", "RotaryEmbedding", (2, 3, 4, 8), ints(2), *_TABLES),
    ms("microsoft rotary, part", "RotaryEmbedding", (2, 3, 4, 8), _TIME, (7, 2), (7, 2), num_heads=3, rotary_embedding_dim=4),
    ms("microsoft rotary, part of flat", "RotaryEmbedding", (2, 4, 24), _TIME, (7, 2), (7, 2), num_heads=3, rotary_embedding_dim=4,
       interleaved=1),
]
_QKV = ((2, 3, 24), (2, 5, 24), (2, 5, 24))
_SELF = ((2, 3, 24),) * 3
_PAST = ((2, 3, 4, 8),) * 2
MULTI = [
    ms("multi-head", "MultiHeadAttention", (2, 3, 24), (2, 5, 24), (2, 5, 12), num_heads=3),
    ms("multi-head, scaled", "MultiHeadAttention", (2, 3, 24), (2, 5, 24), (2, 5, 12), num_heads=3, scale=0.5),
    ms("multi-head, bias", "MultiHeadAttention", (2, 3, 24), (2, 5, 24), (2, 5, 12), (60,), num_heads=3),
    ms("multi-head, keys by heads", "MultiHeadAttention", (2, 3, 24), (2, 3, 5, 8), (2, 3, 5, 8), num_heads=3),
    ms("multi-head, keys by heads and bias", "MultiHeadAttention", (2, 3, 24), (2, 3, 5, 8), (2, 3, 5, 8), (72,), num_heads=3),
    ms("multi-head, lengths", "MultiHeadAttention", *_QKV, None, i32(3, 5), num_heads=3),
    ms("multi-head, lengths and starts", "MultiHeadAttention", *_QKV, None, i32(3, 5, 0, 3, 6, 0, 5, 10), num_heads=3),
    ms("multi-head, padding", "MultiHeadAttention", *_QKV, None, i32([1, 1, 1, 1, 0], [1, 1, 1, 0, 0]), num_heads=3),
    ms("multi-head, padding a query", "MultiHeadAttention", *_QKV, None, np.tri(3, 5, 2).astype(np.int32)[None].repeat(2, 0), num_heads=3),
    *(ms(f"multi-head, scores + {s}", "MultiHeadAttention", *_QKV, None, None, s, num_heads=3)
      for s in ((2, 3, 3, 5), (1, 3, 3, 5), (2, 1, 3, 5), (1, 1, 3, 5))),
    ms("multi-head, past", "MultiHeadAttention", *_SELF, None, None, None, *_PAST, outputs=3, num_heads=3),
    ms("multi-head, past and bias", "MultiHeadAttention", *_SELF, (72,), None, (1, 3, 3, 7), *_PAST, outputs=3, num_heads=3,
       unidirectional=1),
    ms("multi-head, present of other width", "MultiHeadAttention", (2, 3, 24), (2, 3, 24), (2, 3, 12), outputs=3, num_heads=3),
    ms("multi-head, buffer", "MultiHeadAttention", *[(2, 1, 24)] * 3, None, None, None, *[(2, 3, 9, 8)] * 2, i32(4), outputs=3,
       num_heads=3),
]
_X = ((2, 4, 8), (8, 72), (72,))
PROJECTED = [
    ms("projected", "Attention", (2, 3, 8), (8, 36), (36,), num_heads=3),
    ms("projected, no bias", "Attention", (2, 3, 8), (8, 36), num_heads=3),
    ms("projected, widths", "Attention", (2, 4, 8), (8, 60), (60,), num_heads=3, qkv_hidden_sizes=[24, 24, 12]),
    ms("projected, padding", "Attention", (2, 3, 8), (8, 36), (36,), i32([1, 1, 0], [1, 1, 1]), num_heads=3),
    ms("projected, lengths", "Attention", *_X, i32(3, 4), num_heads=3),
    ms("projected, lengths and starts", "Attention", *_X, i32(3, 4, 0, 1), num_heads=3, scale=0.3),
    ms("projected, padding a query", "Attention", *_X, np.tri(4, dtype=np.int32)[None].repeat(2, 0), num_heads=3),
    *(ms(f"projected, scores + {s}", "Attention", *_X, None, None, s, num_heads=3) for s in ((2, 3, 4, 4), (1, 3, 4, 4), (1, 1, 4, 4))),
    ms("projected, present", "Attention", *_X, outputs=2, num_heads=3, unidirectional=1),
    ms("projected, present and widths", "Attention", *_X, outputs=2, num_heads=3, qkv_hidden_sizes=[24, 24, 24]),
    ms("projected, past", "Attention", *_X, None, (2, 2, 3, 5, 8), outputs=2, num_heads=3, unidirectional=1),
]
_ONE = ((2, 1, 24),) * 3
_ROOM = ((2, 3, 9, 8),) * 2
DECODER = [
    ms("decoder", "DecoderMaskedMultiHeadAttention", *_ONE, None, None, *_ROOM, i32(4), outputs=3, num_heads=3,
       past_present_share_buffer=1),
    ms("decoder, bias", "DecoderMaskedMultiHeadAttention", *_ONE, i32([0, 1, 1, 1, 1], [1, 1, 1, 1, 1]), (1, 3, 1, 5), *_ROOM, i32(4), None,
       None, (72,), outputs=3, num_heads=3, past_present_share_buffer=1),
    ms("decoder, keys of an encoder", "DecoderMaskedMultiHeadAttention", (2, 1, 24), (2, 3, 5, 8), (2, 3, 5, 8), num_heads=3),
]


def gqa(name: str, width: int, *rest: Any, new: int = 3, past: int = 0, packed: bool = False, batch: int = 2, room: int = 0, heads: int = 6,
        **settings: Any) -> Case:
    """Query, keys and values of `width` a head, 6 heads over 2; `rest` are the inputs from the tables of rotation on."""
    shared = 2
    data = [(batch, new, (heads + 2 * shared) * width), None, None] if packed else [
        (batch, new, heads * width), (batch, new, shared * width), (batch, new, shared * width)]
    cache = [(batch, shared, room or past, width)] * 2 if past else [None, None]
    total = past + new
    lengths = i32(*[total - 1] * batch), np.array(total, np.int32)
    found = ms(name, "GroupQueryAttention", *data, *settings.pop("cache", cache), *lengths, *rest,
              **{"num_heads": heads, "kv_num_heads": shared, "outputs": 3, **settings})
    found.model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT  # whatever its cache is of
    return found


_COS = ((16, 8), (16, 8))
SHARED = [
    gqa("shared heads", 8),
    gqa("shared heads, wide", 24),
    gqa("shared heads, no cache", 16, outputs=1),
    gqa("shared heads, packed", 16, packed=True),
    gqa("shared heads, one key for all", 16, heads=2),
    gqa("shared heads, past", 16, past=4, new=1),
    gqa("shared heads, past and several new", 16, past=4, batch=1),
    gqa("shared heads, buffer", 16, past=4, new=1, room=10),
    gqa("shared heads, turned", 32, (16, 16), (16, 16), do_rotary=1),
    gqa("shared heads, turned and packed", 32, (16, 16), (16, 16), packed=True, past=4, new=1, do_rotary=1, rotary_interleaved=1),
    gqa("shared heads, part turned", 48, *_COS, do_rotary=1),
    gqa("shared heads, positions", 32, (16, 16), (16, 16), index(2, 3, below=16), do_rotary=1),
    gqa("shared heads, window and cap", 16, local_window_size=2, softcap=2.0, scale=0.3),
    gqa("shared heads, everything at once", 16, None, None, None, (2, 6, 3, 3), (6,), causal=0),
    gqa("shared heads, scores + one", 16, None, None, None, (1, 1, 3, 3)),
    gqa("shared heads, sink", 16, None, None, None, None, (6,), smooth_softmax=1),
    gqa("shared heads, scores", 16, outputs=4, qk_output=1),
    gqa("shared heads, quantised cache", 16, *[None] * 5, (1,), (1,), past=4, new=1, k_quant_type="PER_TENSOR", v_quant_type="PER_TENSOR",
        kv_cache_bit_width=8, cache=[np.zeros((2, 2, 4, 16), np.int8)] * 2, kind=3),
    gqa("shared heads, cache quantised by channel", 16, *[None] * 5, np.full(32, 0.1, F), np.full(32, 0.1, F), past=4, new=1,
        k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL", kv_cache_bit_width=8, cache=[np.ones((2, 2, 4, 16), np.int8)] * 2, kind=3),
]
CASES = STANDARD + ROTARY + MULTI + PROJECTED + DECODER + SHARED


@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_removing_equals_masking_equals_selecting(name: str) -> None:
    mine = next(c for c in CASES if c.name == name)
    for whole in (True, False) if any(i.dtype.kind in "ib" for i in mine.inputs) else (True,):
        outcome = examine(mine, whole_numbers=whole)
        assert not outcome.problems, "\n".join(outcome.problems[:5])
        assert outcome.groups, outcome.signature
        assert outcome.engines, outcome.skipped


def free_sizes(mine: Case) -> dict[str, int]:
    """Free dims that weights would hang on: name -> size, of a case whose operands are all initializers."""
    _, groups = trace_case(load(with_initializers(mine)[0]))
    return {g.name: g.size for g in groups.groups if g.frozen is None or g.frozen.cause.startswith("has no weights")}


def test_widths_that_differ_are_written() -> None:
    """Once heads keep fewer positions of the value than of the key, the kernel must be told."""
    mine = ms("projected", "Attention", (2, 4, 8), (8, 72), (72,), num_heads=3)
    model, groups = trace_case(load(with_initializers(mine)[0]))
    gone = np.zeros(groups.total, bool)
    width = groups.by_name["x1:1#3"]  # heads, width of query and key, width of the value
    gone[width.start : width.start + 3] = True
    node = rewrite(model.graph, groups, gone).nodes[0]
    assert node.attrs["qkv_hidden_sizes"] == [24, 24, 15]
    assert "scale" in node.attrs


def test_one_cache_keeps_keys_and_values_of_one_width() -> None:
    apart = free_sizes(ms("a", "Attention", (2, 4, 8), (8, 72), (72,), num_heads=3))
    tied = free_sizes(ms("b", "Attention", (2, 4, 8), (8, 72), (72,), num_heads=3, outputs=2))
    assert sorted(apart.values()) == [2, 3, 8, 8, 8]
    assert sorted(tied.values()) == [2, 3, 8, 8]


LAYER = """q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
  a, pk, pv = com.microsoft.GroupQueryAttention<num_heads=8, kv_num_heads=4>(q, k, v, "", "", last, total) y = MatMul(a, wo)"""


def layer(**changed: Any) -> onnx.ModelProto:
    """Eight heads of 24 that share four keys, from 20 channels to 20."""
    weights = {"wq": (20, 192), "wk": (20, 96), "wv": (20, 96), "wo": (192, 20)}
    body = LAYER.replace('"", "",', ", ,")
    return net("float[2,5,20] x -> float[2,5,20] y", body, last=i32(4, 4), total=np.array(5, np.int32), **weights, **changed)


def width_of(model: onnx.ModelProto, size: int) -> str:
    """Name of the free group of this size."""
    return next(g.name for g in spa.analyze(model).groups.free() if g.size == size)


def test_a_head_width_is_one_that_the_kernel_takes() -> None:
    result = spa.prune(layer(), 0.5, multiple_of=1, include=[width_of(layer(), 24)])
    assert [(g["size"], len(g["kept"])) for g in result.plan.groups.values()] == [(24, 16)]
    assert result.check is not None


def test_groups_of_heads_go_with_their_keys() -> None:
    result = spa.prune(layer(), 0.5, multiple_of=1, include=[width_of(layer(), 4)])
    attrs = next(n for n in result.model.graph.nodes if n.op == "GroupQueryAttention").attrs
    assert (attrs["num_heads"], attrs["kv_num_heads"]) == (4, 2)
    assert result.after.parameters == result.before.parameters // 2


def test_a_plan_with_another_head_width_is_refused() -> None:
    made = spa.plan(layer(), 0.5, multiple_of=1, include=[width_of(layer(), 24)])
    fields = json.loads(made.to_json())
    for entry in fields["groups"].values():
        entry["kept"] = list(range(20))
    with pytest.raises(spa.errors.BadPlan, match="20 of 24 positions of 'd', where a multiple of 8 is needed: the kernel of GroupQuery"):
        spa.apply(layer(), fields)


def test_heads_that_do_not_share_evenly_stay() -> None:
    mine = gqa("uneven", 16, heads=6)
    attribute = next(a for a in mine.model.graph.node[0].attribute if a.name == "kv_num_heads")
    attribute.i = 4
    assert "no multiple of the heads of its keys" in examine(mine, engines=()).signature


CACHED = """e = Gather(table, ids) axis = Constant<value_ints=[1]>() all64 = ReduceSum<keepdims=0>(mask, axis) last64 = Sub(all64, axis)
  last = Cast<to=6>(last64) sizes = Shape(mask) one = Constant<value_int=1>() total64 = Gather<axis=0>(sizes, one)
  total = Cast<to=6>(total64)
  n1 = SimplifiedLayerNormalization<axis=-1>(e, g1) q = MatMul(n1, wq) k = MatMul(n1, wk) v = MatMul(n1, wv)
  a, present_k, present_v = com.microsoft.GroupQueryAttention<num_heads=8, kv_num_heads=4, do_rotary=1>(
    q, k, v, past_k, past_v, last, total, cos, sin)
  o = MatMul(a, wo) n2, , , r = com.microsoft.SkipSimplifiedLayerNormalization(e, o, g2)
  u = MatMul(n2, w1) z = com.microsoft.QuickGelu<alpha=1.0>(u) d = MatMul(z, w2)
  n3 = com.microsoft.SkipSimplifiedLayerNormalization(r, d, g3) logits = MatMul(n3, wh)"""
PAST = "float[batch,4,past,32]"


@pytest.mark.parametrize(("kind", "size", "cache"), [("key-value", 4, (2, 32)), ("query", 2, (4, 32)), ("head-width", 16, (4, 16)),
                                                     ("residual", 64, (4, 32)), ("neuron", 128, (4, 32))])
def test_a_decoder_as_it_is_deployed(kind: str, size: int, cache: tuple[int, int]) -> None:
    """Rotation and cache inside the attention, lengths from the mask: every unit goes, and past and present shrink alike."""
    values = f"int64[batch,new] ids, int64[batch,total] mask, {PAST} past_k, {PAST} past_v -> float[batch,new,50] logits, "
    values += "float[batch,4,total,32] present_k, float[batch,4,total,32] present_v"
    ones = np.ones(64, F)
    model = net(values, CACHED, table=(50, 64), g1=ones, g2=ones, g3=ones, wq=(64, 256), wk=(64, 128), wv=(64, 128), wo=(256, 64),
                cos=(64, 16), sin=(64, 16), w1=(64, 128), w2=(128, 64), wh=(64, 50))  # fmt: skip
    groups = spa.analyze(model).groups
    name = next(g.name for g in groups.free() if (g.kind, g.size) == (kind, size))
    result = spa.prune(model, 0.5, multiple_of=1, include=[f"/^{name}$/"])
    assert result.check is not None
    assert len(result.plan.groups[name]["kept"]) == size // 2
    held = [t for t in (*result.model.graph.inputs, *result.model.graph.outputs) if "_" in t.name]
    assert [(t.shape[1], t.shape[3]) for t in held] == [cache] * 4
