"""``python -m models.llama -o FOLDER``: a Llama of any size with random weights, as exporters write it.

    input_ids, attention_mask[, past_key_values.N.key, .value] -> logits[, present.N.key, .value]

The graph is that of PyTorch's exporter: decomposed RMSNorm, rotary embedding from positions, grouped-query attention by Expand, a causal
mask made of comparisons, SwiGLU, weights as (in, out) matrices. With ``fused``: the contrib operators of ONNX Runtime, as its model builder
for text generation uses them. Small sizes give networks that run; at full size weights stream to ``model.onnx.data`` in constant memory.

The weights are drawn once, as a block of a prime number of normal values, and every matrix repeats that block from a place of its own,
scaled by one over the root of its rows. Channels differ from each other, and writing is as fast as the disk.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from models.llama_parts import Builder, LlamaConfig, RandomWeight

_PAGE = 4096
_INLINE = 1024  # bytes; smaller tensors stay in the model file
_CONTRIB = "com.microsoft"
_NO_ATTENTION = -1e4  # far below any logit, within float16


def llama_graph(config: LlamaConfig | None = None, *, seed: int = 0) -> ModelProto:
    """A small Llama as one ModelProto, weights and all; for what passes 2 GB there is :func:`write_llama`.

    The same configuration and seed give the same bytes, and the weights that :func:`write_llama` writes.
    """
    chosen = config or LlamaConfig()
    built = _built(chosen)
    tensors = list(built.constants.values())
    for weight in built.weights:
        tensors.append(_proto(weight, chosen, raw_data=b"".join(piece.tobytes() for piece in weight.pieces(chosen, seed))))
    return _model(built, tensors)


def write_llama(config: LlamaConfig, folder: Path, *, seed: int = 0) -> Path:
    """Writes ``model.onnx`` and ``model.onnx.data``, in the memory of a block of weights; gives the path of the former.

    Raises OSError; what was written until then stays.
    """
    built = _built(config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = list(built.constants.values())
    with open(folder / "model.onnx.data", "wb") as file:
        for weight in built.weights:
            nbytes = weight.count * (2 if config.float16 else 4)
            if nbytes <= _INLINE:
                tensors.append(_proto(weight, config, raw_data=b"".join(piece.tobytes() for piece in weight.pieces(config, seed))))
                continue
            file.seek(-file.tell() % _PAGE, 1)
            proto = _proto(weight, config, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", "model.onnx.data"), ("offset", str(file.tell())), ("length", str(nbytes))):
                proto.external_data.add(key=key, value=value)
            tensors.append(proto)
            for piece in weight.pieces(config, seed):
                file.write(piece.data)
    path = folder / "model.onnx"
    path.write_bytes(_model(built, tensors).SerializeToString(deterministic=True))
    return path


def parameters(config: LlamaConfig) -> int:
    """Number of weights."""
    return sum(weight.count for weight in _built(config).weights)


def _proto(weight: RandomWeight, config: LlamaConfig, **fields: Any) -> TensorProto:
    return TensorProto(name=weight.name, dims=weight.shape, data_type=config.type, **fields)


def _model(built: Builder, tensors: Sequence[TensorProto]) -> ModelProto:
    graph = helper.make_graph(built.nodes, "llama", built.inputs, built.outputs, tensors)
    domains = [helper.make_opsetid("", 20)] + ([helper.make_opsetid(_CONTRIB, 1)] if built.config.fused else [])
    return helper.make_model(graph, opset_imports=domains, ir_version=9, producer_name="models.llama")


# ---------------------------------------------------------------------- the graph


def _built(config: LlamaConfig) -> Builder:
    b = Builder(config)
    b.inputs += [b.tensor("input_ids", TensorProto.INT64, ["batch", "sequence"])]
    b.inputs += [b.tensor("attention_mask", TensorProto.INT64, ["batch", "total_sequence" if _cached(config) else "sequence"])]
    b.weight("model.embed_tokens.weight", config.vocab, config.hidden, fan=1)
    stream = b.node("Gather", ["model.embed_tokens.weight", "input_ids"], "embed_tokens")
    around = _fused_lengths(b) if config.fused else _positions(b)
    b.outputs.append(b.tensor("logits", config.type, ["batch", "sequence", config.vocab]))
    previous = ""
    for layer in range(config.layers):
        stream, previous = _layer(b, f"model.layers.{layer}", layer, stream, previous, around)
    normed, _ = _norm(b, "model.norm", stream, previous)
    b.node("MatMul", [normed, b.weight("lm_head.weight", config.hidden, config.vocab, fan=config.hidden)], "lm_head", outputs=["logits"])
    return b


def _cached(config: LlamaConfig) -> bool:
    return config.cache or config.fused


def _layer(b: Builder, at: str, number: int, stream: str, previous: str, around: dict[str, str]) -> tuple[str, str]:
    """(residual stream, what is still to be added to it): the fused norms add, the others find all added."""
    normed, stream = _norm(b, f"{at}.input_layernorm", stream, previous)
    attended = (_fused_attention if b.config.fused else _attention)(b, at, number, normed, around)
    if not b.config.fused:
        stream, attended = b.node("Add", [stream, attended], f"{at}.add_attention"), ""
    normed, stream = _norm(b, f"{at}.post_attention_layernorm", stream, attended)
    gate = _linear(b, f"{at}.mlp.gate_proj", normed, b.config.hidden, b.config.mlp)
    up = _linear(b, f"{at}.mlp.up_proj", normed, b.config.hidden, b.config.mlp)
    activated = b.node("Mul", [gate, b.node("Sigmoid", [gate], f"{at}.mlp.sigmoid")], f"{at}.mlp.silu")
    product = b.node("Mul", [activated, up], f"{at}.mlp.mul")
    down = _linear(b, f"{at}.mlp.down_proj", product, b.config.mlp, b.config.hidden)
    if b.config.fused:
        return stream, down
    return b.node("Add", [stream, down], f"{at}.add_mlp"), ""


def _linear(b: Builder, name: str, value: str, rows: int, columns: int) -> str:
    return b.node("MatMul", [value, b.weight(f"{name}.weight", rows, columns, fan=rows)], name)


def _norm(b: Builder, name: str, stream: str, added: str) -> tuple[str, str]:
    """(normed, residual stream)."""
    scale = b.weight(f"{name}.weight", b.config.hidden, fan=100, mean=1)
    if b.config.fused:
        if not added:
            return b.node("SimplifiedLayerNormalization", [stream, scale], name, axis=-1, epsilon=1e-5, stash_type=1), stream
        outputs = [f"{name}_output", "", "", f"{name}_stream"]
        normed = b.node("SkipSimplifiedLayerNormalization", [stream, added, scale], name, outputs=outputs, domain=_CONTRIB, epsilon=1e-5)
        return normed, outputs[3]
    single = int(TensorProto.FLOAT)
    wide = b.node("Cast", [stream], f"{name}.wide", to=single) if b.config.float16 else stream
    square = b.node("Pow", [wide, b.scalar(2.0, single)], f"{name}.pow")
    mean = b.node("ReduceMean", [square, b.ints(-1)], f"{name}.mean", keepdims=1)
    root = b.node("Sqrt", [b.node("Add", [mean, b.scalar(1e-5, single)], f"{name}.add")], f"{name}.sqrt")
    normed = b.node("Mul", [wide, b.node("Reciprocal", [root], f"{name}.rsqrt")], f"{name}.normed")
    if b.config.float16:
        normed = b.node("Cast", [normed], f"{name}.narrow", to=b.config.type)
    return b.node("Mul", [scale, normed], name), stream


# ---------------------------------------------------------------------- attention, decomposed


def _positions(b: Builder) -> dict[str, str]:
    """What all layers share: sizes, cosines and sines (1, 1, sequence, width), the additive mask (batch, 1, sequence, total)."""
    config, single = b.config, int(TensorProto.FLOAT)
    batch, sequence = b.size("input_ids", 0, "batch"), b.size("input_ids", 1, "sequence")
    past = _cache_inputs(b)
    total = b.node("Add", [past, sequence], "total") if past else sequence
    first = b.node("Squeeze", [past], "first") if past else b.scalar(0, TensorProto.INT64)
    last, one = b.node("Squeeze", [total], "last"), b.scalar(1, TensorProto.INT64)
    rows = b.node("Range", [first, last, one], "rows")
    columns = b.node("Range", [b.scalar(0, TensorProto.INT64), last, one], "columns") if past else rows
    causal = b.node("LessOrEqual", [columns, b.node("Unsqueeze", [rows, b.ints(1)], "rows_upright")], "causal")
    seen = b.node("Unsqueeze", [b.node("Cast", ["attention_mask"], "mask_bool", to=TensorProto.BOOL), b.ints(1, 2)], "seen")
    allowed = b.node("And", [causal, seen], "allowed")
    mask = b.node("Where", [allowed, b.scalar(0.0), b.scalar(_NO_ATTENTION)], "mask")
    frequencies = 500000.0 ** -(np.arange(0, config.width, 2, dtype=np.float64) / config.width)
    angles = b.node(
        "Mul",
        [b.node("Unsqueeze", [b.node("Cast", [rows], "rows_float", to=single), b.ints(0, 1, 3)], "places"),
         b.table("rotary.inv_freq", frequencies.astype(np.float32).reshape(1, 1, 1, -1))],
        "angles",
    )  # fmt: skip
    both = b.node("Concat", [angles, angles], "angles_twice", axis=-1)
    found = {"batch": batch, "sequence": sequence, "total": total, "mask": mask}
    for name, op in (("cos", "Cos"), ("sin", "Sin")):
        found[name] = b.node(op, [both], name)
        if config.float16:
            found[name] = b.node("Cast", [found[name]], f"{name}_narrow", to=config.type)
    return found


def _cache_inputs(b: Builder) -> str:
    """Declares past keys and values; gives their length (1,), '' without a cache."""
    if not _cached(b.config):
        return ""
    for layer in range(b.config.layers):
        for part in ("key", "value"):
            shape = ("batch", b.config.kv_heads, "past_sequence", b.config.width)
            b.inputs.append(b.tensor(f"past_key_values.{layer}.{part}", b.config.type, shape))
    return "" if b.config.fused else b.size("past_key_values.0.key", 2, "past")


def _present(b: Builder, number: int, part: str) -> str:
    name = f"present.{number}.{part}"
    b.outputs.append(b.tensor(name, b.config.type, ["batch", b.config.kv_heads, "total_sequence", b.config.width]))
    return name


def _attention(b: Builder, at: str, number: int, normed: str, around: dict[str, str]) -> str:
    config, at = b.config, f"{at}.self_attn"
    query = _rotated(b, f"{at}.q", _heads(b, f"{at}.q_proj", normed, config.heads, around), around)
    key = _rotated(b, f"{at}.k", _heads(b, f"{at}.k_proj", normed, config.kv_heads, around), around)
    value = _heads(b, f"{at}.v_proj", normed, config.kv_heads, around)
    if config.cache:
        key = b.node("Concat", [f"past_key_values.{number}.key", key], f"{at}.k.cat", outputs=[_present(b, number, "key")], axis=2)
        value = b.node("Concat", [f"past_key_values.{number}.value", value], f"{at}.v.cat", outputs=[_present(b, number, "value")], axis=2)
    key, value = _repeated(b, f"{at}.k", key, around), _repeated(b, f"{at}.v", value, around)
    scores = b.node("MatMul", [query, b.node("Transpose", [key], f"{at}.k.transpose", perm=[0, 1, 3, 2])], f"{at}.scores")
    scaled = b.node("Mul", [scores, b.scalar(1 / math.sqrt(config.width))], f"{at}.scaled")
    weights = b.node("Softmax", [b.node("Add", [scaled, around["mask"]], f"{at}.masked")], f"{at}.softmax", axis=-1)
    mixed = b.node("Transpose", [b.node("MatMul", [weights, value], f"{at}.mixed")], f"{at}.transpose", perm=[0, 2, 1, 3])
    target = b.node("Concat", [around["batch"], around["sequence"], b.ints(-1)], f"{at}.shape", axis=0)
    joined = b.node("Reshape", [mixed, target], f"{at}.reshape")
    return _linear(b, f"{at}.o_proj", joined, config.heads * config.width, config.hidden)


def _heads(b: Builder, name: str, normed: str, heads: int, around: dict[str, str]) -> str:
    """(batch, heads, sequence, width)."""
    flat = _linear(b, name, normed, b.config.hidden, heads * b.config.width)
    target = b.node("Concat", [around["batch"], around["sequence"], b.ints(-1), b.ints(b.config.width)], f"{name}.shape", axis=0)
    return b.node("Transpose", [b.node("Reshape", [flat, target], f"{name}.reshape")], f"{name}.transpose", perm=[0, 2, 1, 3])


def _rotated(b: Builder, name: str, value: str, around: dict[str, str]) -> str:
    half = b.config.width // 2
    left = b.node("Slice", [value, b.ints(0), b.ints(half), b.ints(3), b.ints(1)], f"{name}.left")
    right = b.node("Slice", [value, b.ints(half), b.ints(2**63 - 1), b.ints(3), b.ints(1)], f"{name}.right")
    turned = b.node("Concat", [b.node("Neg", [right], f"{name}.neg"), left], f"{name}.turned", axis=-1)
    straight = b.node("Mul", [value, around["cos"]], f"{name}.straight")
    return b.node("Add", [straight, b.node("Mul", [turned, around["sin"]], f"{name}.across")], f"{name}.rotated")


def _repeated(b: Builder, name: str, value: str, around: dict[str, str]) -> str:
    """Each key-value head as often as query heads share it."""
    config = b.config
    shared = config.heads // config.kv_heads
    if shared == 1:
        return value
    between = b.node("Unsqueeze", [value, b.ints(2)], f"{name}.unsqueeze")
    sizes = [around["batch"], b.ints(config.kv_heads), b.ints(shared), around["total"], b.ints(config.width)]
    spread = b.node("Expand", [between, b.node("Concat", sizes, f"{name}.expand_shape", axis=0)], f"{name}.expand")
    joined = [around["batch"], b.ints(config.heads), around["total"], b.ints(config.width)]
    target = b.node("Concat", joined, f"{name}.repeat_shape", axis=0)
    return b.node("Reshape", [spread, target], f"{name}.repeat")


# ---------------------------------------------------------------------- attention, fused


def _fused_lengths(b: Builder) -> dict[str, str]:
    """Lengths for GroupQueryAttention, and rotary tables (context, width / 2)."""
    config, whole = b.config, int(TensorProto.INT32)
    _cache_inputs(b)
    count = b.node("ReduceSum", ["attention_mask", b.ints(1)], "mask_sum", keepdims=0)
    lengths = b.node("Cast", [b.node("Sub", [count, b.ints(1)], "mask_last")], "seqlens_k", to=whole)
    total = b.node("Cast", [b.node("Squeeze", [b.size("attention_mask", 1, "mask_length")], "mask_total")], "total_length", to=whole)
    frequencies = 500000.0 ** -(np.arange(0, config.width, 2, dtype=np.float64) / config.width)
    angles = np.outer(np.arange(config.context), frequencies)
    dtype = helper.tensor_dtype_to_np_dtype(config.type)
    tables = {n: b.table(f"{n}_cache", f(angles).astype(dtype)) for n, f in (("cos", np.cos), ("sin", np.sin))}
    return {"lengths": lengths, "total": total, **tables}


def _fused_attention(b: Builder, at: str, number: int, normed: str, around: dict[str, str]) -> str:
    config, at = b.config, f"{at}.self_attn"
    query = _linear(b, f"{at}.q_proj", normed, config.hidden, config.heads * config.width)
    key = _linear(b, f"{at}.k_proj", normed, config.hidden, config.kv_heads * config.width)
    value = _linear(b, f"{at}.v_proj", normed, config.hidden, config.kv_heads * config.width)
    past = [f"past_key_values.{number}.{part}" for part in ("key", "value")]
    outputs = [f"{at}_output", _present(b, number, "key"), _present(b, number, "value")]
    inputs = [query, key, value, *past, around["lengths"], around["total"], around["cos"], around["sin"]]
    mixed = b.node(
        "GroupQueryAttention", inputs, at, outputs=outputs, domain=_CONTRIB, num_heads=config.heads, kv_num_heads=config.kv_heads,
        do_rotary=1, rotary_interleaved=0, scale=1 / math.sqrt(config.width),
    )  # fmt: skip
    return _linear(b, f"{at}.o_proj", mixed, config.heads * config.width, config.hidden)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a network; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m models.llama", description="Write a Llama with random weights, in constant memory.")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    for name in ("layers", "hidden", "heads", "kv_heads", "mlp", "vocab"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(LlamaConfig, name))
    parser.add_argument("--head", type=int, help="width of a head; by default hidden / heads")
    for name in ("cache", "float16", "fused"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args(arguments))
    folder, seed = given.pop("output"), given.pop("seed")
    try:
        config = LlamaConfig(**given)
        path = write_llama(config, folder, seed=seed)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    size = sum(p.stat().st_size for p in (path, path.with_name(f"{path.name}.data")))
    print(f"{path}: {parameters(config):,} parameters, {size:,} bytes, onnx {onnx.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
