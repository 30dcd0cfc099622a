"""Fused operators, or forms of them, that ONNX Runtime has no kernel for on the CPU: against what their documentation says, in numpy."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import signature_cases
from onnx.reference.op_run import OpRun
from signature_cases import examine, on_reference
from test_signatures_fused import i32, ms

Array = np.ndarray


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(q: Array, k: Array, v: Array, scale: float | None) -> Array:
    """(t, h, d), (s, h, d), (s, h, e) -> (t, h·e)."""
    scores = np.einsum("thd,shd->hts", q, k) * (scale or 1 / np.sqrt(q.shape[-1]))
    return np.einsum("hts,she->the", softmax(scores), v).reshape(len(q), -1)


def by_sample(q: Array, k: Array, v: Array, ends: Array, scale: float | None) -> Array:
    """Each sample's tokens attend to their own."""
    return np.concatenate([attend(q[a:b], k[a:b], v[a:b], scale) for a, b in pairwise(ends)])


def added(x: Array, bias: Array | None) -> Array:
    return x if bias is None else x + bias.reshape(x.shape[1:])


class PackedMultiHeadAttention(OpRun):
    op_domain = "com.microsoft"

    def _run(self, q, k, v, bias, offset, ends, scores=None, num_heads=None, scale=None, mask_filter_value=None):  # type: ignore[no-untyped-def]
        if q.ndim == 4:
            q, k, v = (q[:, :, i] for i in range(3))
        q, k, v = (x.reshape(len(x), num_heads, -1) for x in (q, k, v))
        widths = np.cumsum([x.shape[1] * x.shape[2] for x in (q, k)])
        parts = [None] * 3 if bias is None else np.split(bias, widths)
        q, k, v = (added(x, b) for x, b in zip((q, k, v), parts, strict=True))
        return (by_sample(q, k, v, ends, scale).astype(np.float32),)


class PackedAttention(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, w, b, offset, ends, scores=None, num_heads=None, scale=None, qkv_hidden_sizes=None):  # type: ignore[no-untyped-def]
        sizes = qkv_hidden_sizes or [w.shape[1] // 3] * 3
        q, k, v = (p.reshape(len(x), num_heads, -1) for p in np.split(x @ w + b, np.cumsum(sizes[:2]), axis=1))
        return (by_sample(q, k, v, ends, scale).astype(np.float32),)


class MultiHeadAttention(OpRun):
    op_domain = "com.microsoft"

    def _run(self, q, k=None, v=None, bias=None, num_heads=None, scale=None, mask_filter_value=None, unidirectional=None):  # type: ignore[no-untyped-def]
        if q.ndim == 5:
            q, k, v = (q[:, :, :, i] for i in range(3))
        else:
            k, v = (k[:, :, :, i] for i in range(2))
            q = q.reshape(*q.shape[:2], num_heads, -1)
        if bias is not None:
            q, k, v = (x + b.reshape(x.shape[2:]) for x, b in zip((q, k, v), np.split(bias, 3), strict=True))
        return (np.stack([attend(*sample, scale) for sample in zip(q, k, v, strict=True)]).astype(np.float32),)


class MoE(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, router, w1, b1, w2, b2, w3=None, b3=None, k=None, **attributes):  # type: ignore[no-untyped-def]
        shares, out = softmax(router), np.zeros_like(x)
        for row, share, y in zip(x, shares, out, strict=True):
            for e in np.argsort(-share)[:k]:
                gate = w1[e] @ row + (0 if b1 is None else b1[e])
                inner = gate / (1 + np.exp(-gate)) * (w3[e] @ row + (0 if b3 is None else b3[e]))
                y += share[e] * (w2[e] @ inner + (0 if b2 is None else b2[e]))
        return (out.astype(np.float32),)


OPS = [PackedMultiHeadAttention, PackedAttention, MultiHeadAttention, MoE]
_WHERE = (np.zeros((2, 4), np.int32), i32(0, 2, 6))
_FULL = [(4, 12, 8), (4, 12), (4, 8, 12), (4, 8), (4, 12, 8), (4, 12)]
CASES = [
    ms("packed multi-head", "PackedMultiHeadAttention", (6, 24), (6, 24), (6, 12), None, *_WHERE, num_heads=3),
    ms("packed multi-head, bias", "PackedMultiHeadAttention", (6, 24), (6, 24), (6, 12), (60,), *_WHERE, num_heads=3, scale=0.4),
    ms("packed multi-head, all in one", "PackedMultiHeadAttention", (6, 3, 3, 8), None, None, (72,), *_WHERE, num_heads=3),
    ms("packed attention", "PackedAttention", (6, 8), (8, 72), (72,), *_WHERE, num_heads=3),
    ms("packed attention, widths", "PackedAttention", (6, 8), (8, 60), (60,), *_WHERE, num_heads=3, qkv_hidden_sizes=[24, 24, 12]),
    ms("multi-head, all in one", "MultiHeadAttention", (2, 3, 3, 3, 8), num_heads=3),
    ms("multi-head, all in one with bias", "MultiHeadAttention", (2, 3, 3, 3, 8), None, None, (72,), num_heads=3),
    ms("multi-head, keys and values in one", "MultiHeadAttention", (2, 3, 24), (2, 5, 3, 2, 8), None, (72,), num_heads=3),
    ms("experts, gates of their own", "MoE", (6, 8), (6, 4), *_FULL, k=2, activation_type="silu"),
    ms("experts, gates without bias", "MoE", (6, 8), (6, 4), _FULL[0], None, _FULL[2], None, _FULL[4], k=1, activation_type="silu"),
]


@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_removing_equals_masking_equals_selecting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: dict[str, Any] = {"reference": partial(on_reference, new_ops=OPS)}
    monkeypatch.setattr(signature_cases, "ENGINES", engines)
    outcome = examine(next(c for c in CASES if c.name == name), engines=("reference",))
    assert not outcome.problems, "\n".join(outcome.problems[:5])
    assert outcome.groups, outcome.signature
    assert outcome.engines, outcome.skipped
