"""Recurrent layers and attention."""

from __future__ import annotations

from typing import Any

from spa.torch_ops.table import Call, Results, Tensor, op, torch
from spa.torch_ops.window import activation

# ------------------------------------------------------------------ recurrent layers: x (t, n, c), W (d, gates h, c)


def _lstm(cell: _Cell, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Gates i, o, f, c; peepholes p (3 h,) in the order i, o, f."""
    i, o, f, g = cell.clipped(x + h @ cell.R.mT + cell.bias_r).chunk(4, -1)
    pi, po, pf = cell.P.chunk(3) if cell.P is not None else (0.0, 0.0, 0.0)
    act, squash, out = cell.functions
    c = act(f + pf * c) * c + act(i + pi * c) * squash(g)
    return act(o + po * c) * out(c), c


def _gru(cell: _Cell, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Gates z, r, h."""
    act, squash = cell.functions[:2]
    xz, xr, xh = x.chunk(3, -1)
    (rz, rr, rh), (bz, br, bh) = cell.R.chunk(3), cell.bias_r.chunk(3)
    z, r = act(cell.clipped(xz + h @ rz.mT + bz)), act(cell.clipped(xr + h @ rr.mT + br))
    inner = r * (h @ rh.mT + bh) if cell.call.attr("linear_before_reset", 0) else (r * h) @ rh.mT + bh
    return (1 - z) * squash(cell.clipped(xh + inner)) + z * h, c


def _rnn(cell: _Cell, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return cell.functions[0](cell.clipped(x + h @ cell.R.mT + cell.bias_r)), c


class _Cell:
    """One direction of a recurrent layer."""

    def __init__(self, call: Call, d: int, gates: int, defaults: list[str], step: Any) -> None:
        self.call, self.step = call, step
        self.W, self.R = call[1][d], call[2][d]
        bias = call[3][d] if call[3] is not None else self.W.new_zeros(2 * self.W.shape[0])
        self.bias_w, self.bias_r = bias.chunk(2)
        self.P = call[7][d] if call[7] is not None else None
        names = list(call.attr("activations") or defaults * call[1].shape[0])
        count = len(defaults)
        if call.attr("activation_alpha") or call.attr("activation_beta"):
            raise call.refuse("settings of its activations")
        self.functions = [activation(call, n) for n in names[d * count : (d + 1) * count]]

    def clipped(self, x: Tensor) -> Tensor:
        edge = self.call.attr("clip")
        return x if edge is None else x.clamp(-edge, edge)

    def run(self, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(t, n, h) outputs, and the last states; past its length a sample's state stays and its output is zero."""
        given = torch.nn.functional.linear(x, self.W, self.bias_w)
        outputs = []
        for t in range(x.shape[0]):
            new_h, new_c = self.step(self, given[t], h, c)
            if lengths is None:
                h, c = new_h, new_c
                outputs.append(h)
            else:
                there = (lengths > t).unsqueeze(-1)
                h, c = torch.where(there, new_h, h), torch.where(there, new_c, c)
                outputs.append(torch.where(there, new_h, torch.zeros_like(new_h)))
        return torch.stack(outputs), h, c


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The steps of each sample in reverse, within its length."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(x.shape[0]).unsqueeze(1)
    order = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x[order, torch.arange(x.shape[1])]


def _layer(call: Call, gates: int, defaults: list[str], step: Any) -> Results:
    last = bool(call.attr("layout", 0))
    if call.attr("input_forget", 0):
        raise call.refuse("coupled gates")
    x = call[0].transpose(0, 1) if last else call[0]
    lengths = None if call[4] is None else call[4].to(torch.int64)
    direction, hidden = call.attr("direction", "forward"), call[2].shape[-1]
    zeros = x.new_zeros((call[1].shape[0], x.shape[1], hidden))
    states = [zeros if s is None else s.transpose(0, 1) if last else s for s in (call[5], call[6])]
    found = []
    for d in range(call[1].shape[0]):
        back = direction == "reverse" or d == 1
        y, h, c = _Cell(call, d, gates, defaults, step).run(_reversed(x, lengths) if back else x, states[0][d], states[1][d], lengths)
        found.append((_reversed(y, lengths) if back else y, h, c))
    y = torch.stack([f[0] for f in found], 1)  # (t, d, n, h)
    h, c = (torch.stack([f[k] for f in found]) for k in (1, 2))
    if last:
        y, h, c = y.permute(2, 0, 1, 3), h.transpose(0, 1), c.transpose(0, 1)
    return (y, h, c)[: len(call.node.outputs)]


@op("LSTM")
def lstm(call: Call) -> Results:
    """Long short-term memory."""
    return _layer(call, 4, ["Sigmoid", "Tanh", "Tanh"], _lstm)


@op("GRU")
def gru(call: Call) -> Results:
    """Gated recurrent units."""
    return _layer(call, 3, ["Sigmoid", "Tanh"], _gru)


@op("RNN")
def rnn(call: Call) -> Results:
    """A plain recurrent layer."""
    return _layer(call, 1, ["Tanh"], _rnn)


# ------------------------------------------------------------------ attention: q, k, v (n, heads, t, width)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(n, t, heads width) -> (n, heads, t, width)."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


@op("Attention")
def attention(call: Call) -> Results:
    """softmax(scale q kᵀ + mask) v, keys and values of groups of heads shared; softcap is c tanh(x / c)."""
    q, k, v, mask, past_k, past_v, lengths = (call[i] for i in range(7))
    flat = q.dim() == 3
    if flat:
        heads = call.attr("kv_num_heads")
        q, k, v = _heads(q, call.attr("q_num_heads")), _heads(k, heads), _heads(v, heads)
    past = 0
    if past_k is not None:
        past = past_k.shape[2]
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    share = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(share, 1) if share > 1 else t for t in (k, v))
    scale = call.attr("scale") or q.shape[-1] ** -0.5
    raw = q @ keys.mT * scale
    cap = call.attr("softcap", 0.0)
    capped = cap * torch.tanh(raw / cap) if cap else raw
    masked = capped + _bias(call, raw, mask, past, lengths)
    weights = torch.softmax(masked, -1)
    weights = torch.where(torch.isneginf(masked).all(-1, keepdim=True), torch.zeros_like(weights), weights)
    stages = [raw, capped, masked, weights]
    y = weights @ values
    return (_merged(y) if flat else y, k, v, stages[call.attr("qk_matmul_output_mode", 0)])[: len(call.node.outputs)]


def _bias(call: Call, scores: Tensor, mask: Tensor | None, past: int, lengths: Tensor | None) -> Tensor:
    """(n, heads, t, s) what is added to the scores: zero, the mask, minus infinity where nothing may be seen."""
    t, s = scores.shape[-2:]
    nothing = scores.new_full((), -float("inf"))
    bias = scores.new_zeros((1, 1, t, s))
    if mask is not None:
        given = torch.where(mask, bias.new_zeros(()), nothing) if mask.dtype == torch.bool else mask
        bias = bias + torch.nn.functional.pad(given, [0, s - mask.shape[-1]], value=-float("inf"))
    length = None if lengths is None else lengths.reshape(-1, 1, 1, 1)
    places = torch.arange(s)
    now = torch.arange(t).unsqueeze(1) + (past if length is None else length - t)  # where each query stands among the keys
    seen = torch.ones((1, 1, t, s), dtype=torch.bool) if length is None else places < length
    left, right = call.attr("left_window_size", -1), call.attr("right_window_size", -1)
    if call.attr("is_causal", 0):
        seen = seen & (places <= now)
    if left >= 0:
        seen = seen & (places >= now - left)
    if right >= 0:
        seen = seen & (places <= now + right)
    return torch.where(seen, bias, nothing)


@op("RotaryEmbedding")
def rotary_embedding(call: Call) -> Results:
    """Rotates pairs of positions of the width: (cos x1 - sin x2, sin x1 + cos x2); pairs are halves, or neighbours."""
    x, cos, sin, ids = call[0], call[1], call[2], call[3]
    flat = x.dim() == 3
    if flat:
        x = _heads(x, call.attr("num_heads"))
    if ids is not None:
        cos, sin = cos[ids.to(torch.int64)], sin[ids.to(torch.int64)]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (n, 1, t, width / 2)
    width = call.attr("rotary_embedding_dim", 0) or x.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    near = bool(call.attr("interleaved", 0))
    one, two = (turned[..., 0::2], turned[..., 1::2]) if near else turned.chunk(2, -1)
    cos, sin = cos[..., : width // 2], sin[..., : width // 2]
    real, imaginary = cos * one - sin * two, sin * one + cos * two
    both = torch.stack([real, imaginary], -1).flatten(-2) if near else torch.cat([real, imaginary], -1)
    y = torch.cat([both, rest], -1)
    return _merged(y) if flat else y
