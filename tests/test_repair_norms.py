"""Repair: norms see what they saw, data that are noise move none, and a repair is carried over to the model that was run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from repair_cases import (
    Feeds,
    batches,
    error,
    every_row,  # noqa: F401
    gone_where,
    network,
    outputs_of,
    small_of,
    some,
    weights_of,
)

import spa
from spa.data.evidence import adapted, channel_moments, gather, stored_norms, transplanted, values
from spa.repairs.repair import Repaired, RepairOptions, repair
from spa.storage.store import to_proto


def moments_before(model: onnx.ModelProto, feeds: Sequence[Feeds]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Output of each norm -> mean and variance of what it reads in a model."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    read = {n.input[0]: n.output[0] for n in proto.graph.node if n.op_type == "BatchNormalization"}
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in read)
    found = outputs_of(proto, feeds)
    return {out: channel_moments([o[value] for o in found]) for value, out in read.items()}


def stored_moments(groups: spa.Groups, model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {}
    for node in stored_norms(groups):
        mean, variance = (values(model.graph, node.node.inputs[i].name) for i in node.signature.moments)
        found[node.node.outputs[0].name] = mean, variance
    return found


def with_own_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    for node in model.graph.node:
        if node.op_type == "Conv" and len(node.input) == 2:
            node.input.append(f"{node.input[1]}_bias")
            width = next(t.dims[0] for t in model.graph.initializer if t.name == node.input[1])
            model.graph.initializer.append(numpy_helper.from_array(np.zeros(width, np.float32), node.input[2]))
    return model


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("method", ["bias", "obspa"])
@pytest.mark.parametrize("biases", [True, False])
def test_norms_see_what_they_saw(method: str, inputs: str, biases: bool) -> None:
    """Where stored moments are those of the data in the dense network, they are those of the data in the pruned one after repair."""
    model, shape = network("residual")
    model = with_own_biases(model) if biases else model
    analysis, data = spa.analyze(model), batches(shape)
    exact = to_proto(adapted(analysis.normal.model, analysis.groups, data))
    analysis = spa.analyze(exact)
    for name, (mean, variance) in moments_before(exact, data).items():
        held = stored_moments(analysis.groups, analysis.normal.model)[name]
        np.testing.assert_allclose(held[0], mean, atol=1e-5)
        np.testing.assert_allclose(held[1], variance, rtol=1e-4)
    gone = gone_where(analysis.groups, part=0.34)
    found = repair(analysis.normal.model, analysis.groups, gone, data, RepairOptions(method=method, inputs=inputs, norms=True))
    small = to_proto(small_of(found))
    assert found.norms == 3
    seen, held = moments_before(small, data), stored_moments(spa.analyze(small).groups, spa.load(small))
    for name in seen:
        np.testing.assert_allclose(held[name][0], seen[name][0], atol=2e-4)
        np.testing.assert_allclose(held[name][1], seen[name][1], rtol=2e-3)
    if method == "bias" and inputs == "dense":  # without, scales are wrong
        off = repair(analysis.normal.model, analysis.groups, gone, data, RepairOptions(method=method, inputs=inputs, norms=False))
        assert off.norms == 0
        assert error(found, exact, data) < error(off, exact, data)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_noise_moves_no_norm_that_pruning_did_not(inputs: str) -> None:
    """Statistics of noise are far from the stored ones; only what changed from the dense to the pruned network counts."""
    model, shape = network("residual")
    analysis = spa.analyze(model)
    noise = [{"x": 5 + 3 * np.random.default_rng(i).standard_normal(shape).astype(np.float32)} for i in range(3)]
    middle = next(g for g in analysis.groups.free() if g.name == "w2:0")
    gone = np.zeros(analysis.groups.total, bool)
    gone[middle.coordinates] = some(middle.size)
    found = repair(analysis.normal.model, analysis.groups, gone, noise, RepairOptions(inputs=inputs, norms=True))
    old, new = weights_of(model), weights_of(found.model)
    for name in ("nm", "nv", "ns", "nb", "w1", "w2", "w4", "b4"):
        assert old[name].tobytes() == new[name].tobytes()
    np.testing.assert_allclose(new["om"], old["om"], atol=1e-4)  # loses channels, but those that stay are what they were
    np.testing.assert_allclose(new["ov"], old["ov"], rtol=1e-4)
    assert np.abs(new["pv"] - old["pv"]).max() > 1e-2
    assert np.abs(new["pm"] - old["pm"]).max() < 50 * old["pv"].max()


def test_a_repair_of_the_adapted_model_is_carried_over() -> None:
    model, _ = network("residual")
    analysis = spa.analyze(model)
    evidence = gather(analysis.normal.model, analysis.groups, None)
    assert evidence.noise
    assert evidence.samples == sum(len(b["x"]) for b in evidence.batches) > 0
    own, at = weights_of(analysis.normal.model), weights_of(evidence.model)
    assert {n for n in own if own[n].tobytes() != at[n].tobytes()} == {p + q for p in "nop" for q in "mv"}
    gone = gone_where(analysis.groups, part=0.34)
    found = repair(evidence.model, analysis.groups, gone, evidence.batches, RepairOptions(inputs="dense", norms=True))
    carried = transplanted(found.model, evidence.model, analysis.normal.model, found.groups)
    now, fitted = weights_of(carried), weights_of(found.model)
    for name in now:
        if name[0] not in "nop" or name[1] not in "mv":
            assert now[name].tobytes() == fitted[name].tobytes()
        elif name[1] == "m":
            np.testing.assert_allclose(now[name] - own[name], fitted[name] - at[name], atol=1e-4)
        else:
            np.testing.assert_allclose(now[name] / own[name], fitted[name] / at[name], rtol=1e-4)
    assert transplanted(found.model, analysis.normal.model, analysis.normal.model, found.groups) is found.model
    plain, _ = network("mlp")
    other = spa.analyze(plain)
    assert adapted(other.normal.model, other.groups, []) is other.normal.model


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_the_model_that_is_run_is_the_one_that_is_repaired(inputs: str) -> None:
    """Norms' moments are measured and changed in the adapted model, as if that had been traced."""
    model, _ = network("residual")
    analysis = spa.analyze(model)
    evidence = gather(analysis.normal.model, analysis.groups, None)
    found = fixed_of(evidence.model, analysis.groups, evidence.batches, inputs)
    again = spa.analyze(to_proto(evidence.model))
    expected = fixed_of(again.normal.model, again.groups, evidence.batches, inputs)
    for name, array in weights_of(expected.model).items():
        np.testing.assert_allclose(weights_of(found.model)[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def fixed_of(model: spa.storage.store.Model, groups: spa.Groups, data: Sequence[Feeds], inputs: str) -> Repaired:
    return repair(model, groups, gone_where(groups, part=0.34), data, RepairOptions(inputs=inputs, norms=True))
