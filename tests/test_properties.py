"""Random networks, random plans: removing is masking, the result is a valid model, and the same seed gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper, shape_inference

import spa
from spa.api import prove
from spa.budgets.costs import CostModel
from spa.plans.rewrite import rewrite
from spa.storage.store import load, to_bytes, to_proto, with_graph

Shape = tuple[int, ...]
Step = tuple[int, int, int]
BATCH = 2


class Network:
    """A graph under construction. Images are (n, c, h, w), tokens (n, t, c); a step takes any value made so far."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self.values: list[tuple[str, Shape]] = []
        self.read: set[str] = set()
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def weight(self, *shape: int, positive: bool = False) -> str:
        fan = max(int(np.prod(shape[1:])), 1)
        array = self.rng.uniform(0.5, 1.5, shape) if positive else self.rng.standard_normal(shape) / np.sqrt(fan)
        return self.constant(array.astype(np.float32))

    def constant(self, array: Any) -> str:
        name = self.name()
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def sizes(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def node(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        self.read |= set(inputs)
        return names[0] if outputs == 1 else ",".join(names)

    def add(self, name: str, *shape: int) -> None:
        self.values.append((name, shape))

    def pick(self, rank: int, number: int) -> tuple[str, Shape]:
        fitting = [v for v in self.values if len(v[1]) == rank]
        return fitting[-1 - number % min(len(fitting), 3)]

    def model(self) -> ModelProto:
        """Every value that nobody reads goes through Flatten and Gemm; their sum is the output."""
        total = ""
        for name, shape in self.values:
            if name in self.read:
                continue
            flat = self.node("Flatten", name, axis=1)
            out = self.node("Gemm", flat, self.weight(5, int(np.prod(shape[1:]))), self.weight(5), transB=1)
            total = self.node("Add", total, out) if total else out
        self.nodes[-1].output[0] = "y"
        graph = helper.make_graph(
            self.nodes, "random", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [BATCH, 3, 8, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [BATCH, 5])], self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


Layer = Callable[[Network, str, Shape, int], None]


def conv(net: Network, x: str, s: Shape, k: int) -> None:
    out = (4, 6, 8, 12)[k % 4]
    net.add(net.node("Conv", x, net.weight(out, s[1], 3, 3), net.weight(out), pads=[1] * 4), BATCH, out, *s[2:])


def pointwise_without_bias(net: Network, x: str, s: Shape, k: int) -> None:
    out = (6, 8, 12)[k % 3]
    net.add(net.node("Conv", x, net.weight(out, s[1], 1, 1)), BATCH, out, *s[2:])


def grouped(net: Network, x: str, s: Shape, k: int) -> None:
    group = [g for g in (2, 3, 4, s[1]) if s[1] % g == 0][-1 - k % 2] if s[1] % 2 == 0 else 1
    out = group * (1 + k % 3)
    net.add(net.node("Conv", x, net.weight(out, s[1] // group, 3, 3), net.weight(out), pads=[1] * 4, group=group), BATCH, out, *s[2:])


def transposed(net: Network, x: str, s: Shape, k: int) -> None:
    net.add(net.node("ConvTranspose", x, net.weight(s[1], 6, 3, 3), net.weight(6), pads=[1] * 4), BATCH, 6, *s[2:])


def batch_norm(net: Network, x: str, s: Shape, k: int) -> None:
    c = s[1]
    net.add(net.node("BatchNormalization", x, net.weight(c), net.weight(c), net.weight(c), net.weight(c, positive=True)), *s)


def group_norm(net: Network, x: str, s: Shape, k: int) -> None:
    groups = 2 if s[1] % 2 == 0 else 1
    net.add(net.node("GroupNormalization", x, net.weight(s[1]), net.weight(s[1]), num_groups=groups), *s)


def instance_norm(net: Network, x: str, s: Shape, k: int) -> None:
    net.add(net.node("InstanceNormalization", x, net.weight(s[1]), net.weight(s[1])), *s)


def local_response(net: Network, x: str, s: Shape, k: int) -> None:
    net.add(net.node("LRN", x, size=3), *s)


def activation(net: Network, x: str, s: Shape, k: int) -> None:
    net.add(net.node(("Relu", "Sigmoid", "HardSwish", "Exp", "Tanh", "Softplus")[k % 6], net.node("Tanh", x)), *s)


def slopes(net: Network, x: str, s: Shape, k: int) -> None:
    net.add(net.node("PRelu", x, net.weight(s[1], *[1] * (len(s) - 2))), *s)


def residual(net: Network, x: str, s: Shape, k: int) -> None:
    partners = [n for n, other in net.values if other == s]
    net.add(net.node("Add", x, partners[k % len(partners)]), *s)


def product(net: Network, x: str, s: Shape, k: int) -> None:
    partners = [n for n, other in net.values if other == s]
    net.add(net.node("Mul", x, net.node("Sigmoid", partners[k % len(partners)])), *s)


def gate(net: Network, x: str, s: Shape, k: int) -> None:
    squeezed = net.node("GlobalAveragePool", x) if k % 2 else net.node("ReduceMean", x, net.sizes(2, 3))
    hidden = net.node("Relu", net.node("Conv", squeezed, net.weight(4, s[1], 1, 1)))
    net.add(net.node("Mul", x, net.node("Sigmoid", net.node("Conv", hidden, net.weight(s[1], 4, 1, 1)))), *s)


def concat(net: Network, x: str, s: Shape, k: int) -> None:
    partners = [(n, o) for n, o in net.values if len(o) == 4 and o[2:] == s[2:] and o[1] + s[1] <= 24]
    if partners:
        other, shape = partners[k % len(partners)]
        net.add(net.node("Concat", x, other, axis=1), BATCH, s[1] + shape[1], *s[2:])


def split(net: Network, x: str, s: Shape, k: int) -> None:
    first = max(s[1] // (2 + k % 3), 1)
    if first < s[1]:
        one, two = net.node("Split", x, net.sizes(first, s[1] - first), outputs=2, axis=1).split(",")
        net.add(one, BATCH, first, *s[2:])
        net.add(two, BATCH, s[1] - first, *s[2:])


def chunk(net: Network, x: str, s: Shape, k: int) -> None:
    if s[1] % 2 == 0:
        one, two = net.node("Split", x, outputs=2, axis=1, num_outputs=2).split(",")
        net.add(net.node("Mul", one, net.node("Sigmoid", two)), BATCH, s[1] // 2, *s[2:])


def cut(net: Network, x: str, s: Shape, k: int) -> None:
    start, end = k % 2, s[1] - (k // 2) % 3
    if end - start > 1:
        stop = end if k % 5 else (end - s[1] or 2**31)
        net.add(net.node("Slice", x, net.sizes(start), net.sizes(stop), net.sizes(1)), BATCH, end - start, *s[2:])


def every_second(net: Network, x: str, s: Shape, k: int) -> None:
    if s[1] % 2 == 0 and s[1] > 2:
        net.add(net.node("Slice", x, net.sizes(k % 2), net.sizes(2**31), net.sizes(1), net.sizes(2)), BATCH, s[1] // 2, *s[2:])


def gather(net: Network, x: str, s: Shape, k: int) -> None:
    order = np.random.default_rng(k).permutation(s[1])[: max(s[1] - k % 2, 1)]
    net.add(net.node("Gather", x, net.constant(order.astype(np.int64)), axis=1), BATCH, len(order), *s[2:])


def shuffle(net: Network, x: str, s: Shape, k: int) -> None:
    groups = 3 if s[1] % 3 == 0 and k % 2 else 2
    if s[1] % groups == 0:
        apart = net.node("Reshape", x, net.sizes(0 if k % 3 else BATCH, groups, s[1] // groups, *s[2:]))
        swapped = net.node("Transpose", apart, perm=[0, 2, 1, 3, 4])
        net.add(net.node("Reshape", swapped, net.sizes(BATCH, -1 if k % 5 else s[1], *s[2:])), *s)


def pool(net: Network, x: str, s: Shape, k: int) -> None:
    if s[2] % 2 == 0:
        op = ("MaxPool", "AveragePool")[k % 2]
        net.add(net.node(op, x, kernel_shape=[2, 2], strides=[2, 2]), *s[:2], s[2] // 2, s[3] // 2)


def resize(net: Network, x: str, s: Shape, k: int) -> None:
    if s[2] <= 4:
        if k % 2:
            out = net.node("Resize", x, "", net.constant(np.array([1, 1, 2, 2], np.float32)))
        else:
            out = net.node("Resize", x, "", "", net.sizes(BATCH, s[1], s[2] * 2, s[3] * 2), mode="linear")
        net.add(out, *s[:2], s[2] * 2, s[3] * 2)


def space_to_depth(net: Network, x: str, s: Shape, k: int) -> None:
    if s[2] % 2 == 0 and s[1] <= 6:
        net.add(net.node("SpaceToDepth", x, blocksize=2), BATCH, s[1] * 4, s[2] // 2, s[3] // 2)


def depth_to_space(net: Network, x: str, s: Shape, k: int) -> None:
    if s[1] % 4 == 0 and s[2] <= 4:
        net.add(net.node("DepthToSpace", x, blocksize=2, mode=("DCR", "CRD")[k % 2]), BATCH, s[1] // 4, s[2] * 2, s[3] * 2)


def pad_channels(net: Network, x: str, s: Shape, k: int) -> None:
    net.add(net.node("Pad", x, net.sizes(0, 1, 0, 0, 0, k % 3, 0, 0)), BATCH, s[1] + 1 + k % 3, *s[2:])


def channel_softmax(net: Network, x: str, s: Shape, k: int) -> None:
    net.add(net.node(("Softmax", "LogSoftmax")[k % 2], x, axis=1), *s)


def to_tokens(net: Network, x: str, s: Shape, k: int) -> None:
    if k % 2:
        flat = net.node("Reshape", x, net.sizes(0, 0, -1))
        net.add(net.node("Transpose", flat, perm=[0, 2, 1]), BATCH, s[2] * s[3], s[1])
    else:
        last = net.node("Transpose", x, perm=[0, 2, 3, 1])
        net.add(net.node("Reshape", last, net.sizes(BATCH, s[2] * s[3], s[1])), BATCH, s[2] * s[3], s[1])


def linear(net: Network, x: str, s: Shape, k: int) -> None:
    out = (6, 8, 12)[k % 3]
    if k % 4 == 0:
        net.add(net.node("Einsum", x, net.weight(out, s[2]), equation="btc,oc->bto"), *s[:2], out)
    else:
        net.add(net.node("Add", net.node("MatMul", x, net.weight(s[2], out)), net.weight(out)), *s[:2], out)


def layer_norm(net: Network, x: str, s: Shape, k: int) -> None:
    if k % 2:
        net.add(net.node("LayerNormalization", x, net.weight(s[2]), net.weight(s[2])), *s)
        return
    centred = net.node("Sub", x, net.node("ReduceMean", x, net.sizes(-1)))
    variance = net.node("ReduceMean", net.node("Mul", centred, centred), net.sizes(-1))
    root = net.node("Sqrt", net.node("Add", variance, net.constant(np.float32(1e-3))))
    net.add(net.node("Mul", net.node("Div", centred, root), net.weight(s[2])), *s)


def attention(net: Network, x: str, s: Shape, k: int) -> None:
    heads, depth = (2, 3)[k % 2], 4
    packed = net.node("MatMul", x, net.weight(s[2], 3 * heads * depth))
    if k % 3:
        parts = net.node("Split", packed, outputs=3, axis=2, num_outputs=3).split(",")
        q, key, value = (net.node("Transpose", net.node("Reshape", p, net.sizes(0, 0, heads, -1)), perm=[0, 2, 1, 3]) for p in parts)
    else:
        whole = net.node("Transpose", net.node("Reshape", packed, net.sizes(0, -1, 3, heads, depth)), perm=[2, 0, 3, 1, 4])
        q, key, value = (net.node("Gather", whole, net.constant(np.int64(i)), axis=0) for i in range(3))
    scores = net.node("MatMul", q, net.node("Transpose", key, perm=[0, 1, 3, 2]))
    mixed = net.node("MatMul", net.node("Softmax", net.node("Mul", scores, net.constant(np.float32(0.5))), axis=-1), value)
    joined = net.node("Reshape", net.node("Transpose", mixed, perm=[0, 2, 1, 3]), net.sizes(0, 0, heads * depth))
    net.add(net.node("MatMul", joined, net.weight(heads * depth, s[2])), *s)


def gated_mlp(net: Network, x: str, s: Shape, k: int) -> None:
    up, side = (net.node("MatMul", x, net.weight(s[2], 10)) for _ in range(2))
    net.add(net.node("MatMul", net.node("Mul", net.node("Gelu", up), side), net.weight(10, s[2])), *s)


def halves(net: Network, x: str, s: Shape, k: int) -> None:
    """Rotates the halves of the last axis, as rotary embeddings do."""
    if s[2] % 2 == 0:
        half = s[2] // 2
        low = net.node("Slice", x, net.sizes(0), net.sizes(half), net.sizes(-1))
        high = net.node("Slice", x, net.sizes(half), net.sizes(2**31), net.sizes(-1))
        turned = net.node("Concat", net.node("Neg", high), low, axis=-1)
        net.add(net.node("Add", net.node("Mul", x, net.weight(s[2])), net.node("Mul", turned, net.weight(s[2]))), *s)


def mix_tokens(net: Network, x: str, s: Shape, k: int) -> None:
    across = net.node("Transpose", x, perm=[0, 2, 1])
    mixed = net.node("MatMul", net.node("Relu", net.node("MatMul", across, net.weight(s[1], 6))), net.weight(6, s[1]))
    net.add(net.node("Transpose", mixed, perm=[0, 2, 1]), *s)


def norms(net: Network, x: str, s: Shape, k: int) -> None:
    op = ("ReduceL2", "ReduceSum", "ReduceMax", "ReduceSumSquare")[k % 4]
    net.add(net.node("Mul", x, net.node("Sigmoid", net.node(op, x, net.sizes(-1)))), *s)


def to_image(net: Network, x: str, s: Shape, k: int) -> None:
    side = int(np.sqrt(s[1]))
    net.add(net.node("Reshape", net.node("Transpose", x, perm=[0, 2, 1]), net.sizes(BATCH, s[2], side, side)), BATCH, s[2], side, side)


IMAGE: list[Layer] = [
    conv, pointwise_without_bias, grouped, transposed, batch_norm, group_norm, instance_norm, local_response, activation, slopes, residual,
    product, gate, concat, split, chunk, cut, every_second, gather, shuffle, pool, resize, space_to_depth, depth_to_space, pad_channels,
    channel_softmax, to_tokens,
]
TOKENS: list[Layer] = [
    linear, layer_norm, attention, gated_mlp, halves, mix_tokens, norms, activation, residual, product, to_image,
]
STEPS = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 2), st.integers(0, 59)), min_size=1, max_size=10)


def network(steps: list[Step], seed: int) -> ModelProto:
    """A network from numbers: which layer, on which of the latest values, in which variant."""
    net = Network(seed)
    conv(net, "x", (BATCH, 3, 8, 8), seed)
    for choice, which, variant in steps:
        tokens = [v for v in net.values if len(v[1]) == 3]
        rank = 3 if tokens and choice % 2 else 4
        name, shape = net.pick(rank, which)
        layers = TOKENS if rank == 3 else IMAGE
        layers[choice // 2 % len(layers)](net, name, shape, variant)
    return net.model()


def check_valid(model: ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert [d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim] == [BATCH, 5]


def check_random_mask(steps: list[Step], seed: int) -> bool:
    """Any mask over free groups, all factors of products at once; not only what a plan would choose. False if all is frozen."""
    analysis = spa.analyze(network(steps, seed))
    rng = np.random.default_rng(seed)
    gone = np.zeros(analysis.groups.total, bool)
    free = analysis.groups.free()
    for i, group in enumerate(free):
        if rng.random() < 0.7 or i == len(free) - 1:
            count = rng.integers(1, group.size)
            gone[group.start + rng.choice(group.size, count, replace=False)] = True
    small = with_graph(analysis.normal.model, rewrite(analysis.normal.model.graph, analysis.groups, gone, analysis.normal.copies))
    proof = prove(analysis.normal.model, analysis.groups, gone, small, seed=seed)
    assert proof.passed, proof.differences
    check_costs(analysis.groups, gone)
    check_valid(to_proto(small))
    return bool(free)


def check_costs(groups: spa.Groups, gone: np.ndarray) -> None:
    """Costs as polynomials of widths say what a count of the removal says."""
    widths = np.array([np.count_nonzero(~gone[g.coordinates]) for g in groups.groups], np.float64)
    model = CostModel(groups)
    if not model.exact:  # slices of flattened axes: some coordinates occur more often than others
        return
    found = {kind: float(v[0]) for kind, v in model.costs(widths[None]).items()}
    counted = spa.count(groups, gone)
    assert found["macs"] == counted.macs
    assert found["params"] == counted.parameters
    assert abs(found["size"] - counted.weight_bytes) < 1
    assert abs(found["memory"] - counted.peak_bytes) <= 1


def check_plan(steps: list[Step], seed: int, ratio: float, scope: str) -> bool:
    """What a user gets, twice over. False if there was nothing to prune."""
    model = network(steps, seed)
    try:
        results = [spa.prune(load(model), ratio, criterion="random", scope=scope, multiple_of=1, seed=seed) for _ in range(2)]
    except spa.NothingToPrune:
        return False
    one, two = results
    assert one.check is not None
    assert one.check.passed
    assert to_bytes(one.model) == to_bytes(two.model)
    assert one.plan.to_json() == two.plan.to_json()
    assert one.after.parameters < one.before.parameters
    check_valid(one.to_proto())
    return True


FEW = settings(max_examples=120, deadline=None, derandomize=True)
MANY = settings(max_examples=1500, deadline=None)
RATIOS = st.sampled_from((0.2, 0.5, 0.75))
SCOPES = st.sampled_from(("local", "global", "isomorphic"))


@FEW
@given(STEPS, st.integers(0, 1000))
def test_removing_is_masking_for_any_mask(steps: list[Step], seed: int) -> None:
    assume(check_random_mask(steps, seed))


@FEW
@given(STEPS, st.integers(0, 1000), RATIOS, SCOPES)
def test_plans_hold_and_repeat(steps: list[Step], seed: int, ratio: float, scope: str) -> None:
    assume(check_plan(steps, seed, ratio, scope))


@pytest.mark.parametrize("number", range(len(IMAGE)))
def test_every_layer_of_images(number: int) -> None:
    """Each layer between two convolutions, in several variants."""
    pruned = [check_random_mask([(2 * number, 0, variant), (0, 0, variant)], variant) for variant in range(6)]
    assert any(pruned)


@pytest.mark.parametrize("number", range(len(TOKENS)))
def test_every_layer_of_tokens(number: int) -> None:
    """Each layer behind a linear one."""
    start = [(2 * (len(IMAGE) - 1), 0, 0), (1, 0, 1)]
    pruned = [check_random_mask([*start, (2 * number + 1, 0, variant), (1, 0, 1)], variant) for variant in range(6)]
    assert any(pruned)


def test_factors_of_equal_size_are_two_groups() -> None:
    """Four channels in two normalisation groups: (g c) with g = c = 2 must not become one group of four."""
    steps = [(0, 0, 0), (0, 0, 0), (2 * IMAGE.index(group_norm), 0, 0)]
    groups = spa.analyze(network(steps, 0)).groups
    of = np.concatenate([[-1], groups.of_coordinate()])
    for rows in groups.labels.values():
        there = np.sort(of[rows], axis=1)
        assert not ((there[:, 1:] == there[:, :-1]) & (there[:, 1:] >= 0)).any()


@pytest.mark.slow
@MANY
@given(STEPS, st.integers(0, 10**6))
def test_removing_is_masking_for_any_mask_at_length(steps: list[Step], seed: int) -> None:
    assume(check_random_mask(steps, seed))


@pytest.mark.slow
@MANY
@given(STEPS, st.integers(0, 10**6), RATIOS, SCOPES)
def test_plans_hold_and_repeat_at_length(steps: list[Step], seed: int, ratio: float, scope: str) -> None:
    assume(check_plan(steps, seed, ratio, scope))
