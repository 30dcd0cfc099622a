"""Criteria of gradients against differences and closed forms in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
from criteria_cases import CASES, Array, every_row, mlp, scored  # noqa: F401
from repair_cases import weights_of

# ------------------------------------------------------------------------------------------------ gradients, by differences

def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def forward(name: str, w: dict[str, Array], x: Array) -> tuple[Array, Array]:
    """What the readers read, and the first output."""
    if name == "mlp":
        r = np.maximum(x @ w["w1"] + w["b1"], 0)
        return r, r @ w["w2"]
    q, k, v = ((x @ w[n]).reshape(len(x), 5, 4, 3).transpose(0, 2, 1, 3) for n in ("wq", "wk", "wv"))
    h = (softmax(q @ k.transpose(0, 1, 3, 2)) @ v).transpose(0, 2, 1, 3).reshape(len(x), 5, 12)
    return h, h @ w["wo"]


class Differences:
    """Gradients of the mean cross-entropy with the network's own predictions, by central differences in float64."""

    def __init__(self, name: str, temperature: float = 1.0) -> None:
        case = CASES[name]()
        self.name, self.temperature = name, temperature
        self.x = np.concatenate([f["x"] for f in case.feeds((4, 4))]).astype(np.float64)
        self.w = {n: v.astype(np.float64) for n, v in weights_of(case.model).items() if v.dtype == np.float32}
        self.target = forward(name, self.w, self.x)[1].argmax(-1)

    def loss(self, w: dict[str, Array], samples: slice = slice(None)) -> float:
        p = softmax(forward(self.name, w, self.x[samples])[1] / self.temperature)
        return float(-np.log(np.take_along_axis(p, self.target[samples][..., None], -1)).mean())

    def gradient(self, w: dict[str, Array] | None = None, samples: slice = slice(None)) -> dict[str, Array]:
        w = {n: v.copy() for n, v in (self.w if w is None else w).items()}
        found = {n: np.zeros_like(v) for n, v in w.items()}
        for n, v in w.items():
            for i in np.ndindex(v.shape):
                old, sides = v[i], []
                for side in (1e-4, -1e-4):
                    v[i] = old + side
                    sides.append(self.loss(w, samples))
                v[i] = old
                found[n][i] = (sides[0] - sides[1]) / 2e-4
        return found

    def curved(self) -> dict[str, Array]:
        """Hg."""
        g = self.gradient()
        step = 1e-3 / max(np.abs(v).max() for v in g.values())
        up, down = (self.gradient({n: v + s * g[n] for n, v in self.w.items()}) for s in (step, -step))
        return {n: (up[n] - down[n]) / (2 * step) for n in g}

    def sums(self, elements: dict[str, Array]) -> list[Array]:
        """Of each matrix of the group, per channel."""
        if self.name == "mlp":
            return [elements["w1"].sum(0), elements["w2"].sum(1)]
        return [*(elements[n].reshape(6, 4, 3).sum((0, 2)) for n in ("wq", "wk", "wv")), elements["wo"].reshape(4, -1).sum(1)]


def by_gradient(criterion: str, name: str) -> Array:
    d = Differences(name, 200.0 if criterion == "grasp" else 1.0)
    if criterion == "fisher":
        squares: dict[str, Array] = {n: np.zeros_like(v) for n, v in d.w.items()}
        for i in range(8):
            squares = {n: squares[n] + g**2 / 8 for n, g in d.gradient(samples=slice(i, i + 1)).items()}
        return sum(d.sums({n: d.w[n] ** 2 * s for n, s in squares.items()}))
    if criterion in ("grasp", "crop"):
        products = {n: d.w[n] * h for n, h in d.curved().items()}
        return sum(d.sums(products if criterion == "grasp" else {n: np.abs(p) for n, p in products.items()}))
    products = {n: d.w[n] * g for n, g in d.gradient().items()}
    if criterion == "taylor-sum":
        return sum(np.abs(s) for s in d.sums(products))
    found = sum(d.sums({n: np.abs(p) for n, p in products.items()}))
    return found / found.sum() if criterion == "snip" else found


@pytest.mark.parametrize("name", ["mlp", "heads"])
@pytest.mark.parametrize("criterion", ["taylor", "taylor-sum", "snip", "fisher", "grasp", "crop"])
def test_of_gradients(criterion: str, name: str) -> None:
    pytest.importorskip("torch")
    case = CASES[name]()
    found, expected = scored(case, criterion, case.feeds((4, 4))), by_gradient(criterion, name)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())


def test_what_grasp_keeps_carries_the_gradient_flow() -> None:
    """Channels of a lower score weaken ‖g‖² less (or strengthen it more) when they fade."""
    pytest.importorskip("torch")
    case, d = CASES["mlp"](), Differences("mlp", 200.0)
    flow = sum((g**2).sum() for g in d.gradient().values())
    lost = []
    for c in range(10):
        w = {n: v.copy() for n, v in d.w.items()}
        w["w1"][:, c] *= 1 - 1e-3
        w["w2"][c] *= 1 - 1e-3
        lost.append(flow - sum((g**2).sum() for g in d.gradient(w).values()))
    found = scored(case, "grasp", case.feeds((4, 4)))
    assert (found < 0).any()
    assert (found > 0).any()
    np.testing.assert_allclose(found / np.abs(found).max(), lost / np.abs(lost).max(), atol=0.01)


def test_synflow_by_paths() -> None:
    """All is positive, so that R is a sum over paths; a channel's columns in and its rows out hold the same flow but for biases."""
    pytest.importorskip("torch")
    case = CASES["mlp"]()
    w = {n: np.abs(v.astype(np.float64)) for n, v in weights_of(case.model).items()}
    into, out2, out3 = w["w1"].sum(0), w["w2"].sum(1), w["w3"].sum(1)
    expected = into * (out2 + out3) + (into + w["b1"]) * out2 + (into + w["b1"]) * out3
    found = scored(case, "synflow")
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(scored(case, "synflow", [{"x": -7 * case.feeds()[0]["x"][:1]}]), expected, rtol=1e-5)


def test_entropy_taylor() -> None:
    pytest.importorskip("torch")
    for name, readers in (("mlp", 2), ("heads", 1)):
        case, d = CASES[name](), Differences(name)
        r, z = forward(name, d.w, d.x)
        p = softmax(z)
        entropy = -(p * np.log(p)).sum(-1, keepdims=True)
        slope = -p * (np.log(p) + entropy) / (1 if name == "mlp" else 5)  # ∂L/∂z, the mean over a sample's places
        terms = r * (slope @ d.w["w2" if name == "mlp" else "wo"].T)
        if name == "heads":
            terms = terms.reshape(8, 5, 4, 3)
        found = scored(case, "entropy-taylor", case.feeds((4, 4)))
        expected = np.abs(terms).mean(0) if name == "mlp" else np.abs(terms.sum(1)).mean(0).sum(-1)
        np.testing.assert_allclose(found, readers * expected, rtol=1e-4, atol=1e-6)
