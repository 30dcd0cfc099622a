"""Reading: damaged and random bytes make nothing but a clear sentence; details of the wire format."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from store_cases import rich_model, small_model

from spa import errors
from spa.errors import SpaError
from spa.storage import store, wire


def fuzzed_model():
    """Small, but with each kind of thing that the reader looks into."""
    model = rich_model()
    keep = [t for t in model.graph.initializer if "4096" not in t.name]
    dropped = {t.name for t in model.graph.initializer} - {t.name for t in keep}
    inputs = [name for name in model.graph.node[0].input if name not in dropped]
    model.graph.node[0].input[:] = inputs
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(keep)
    return model.SerializeToString()


FUZZED = fuzzed_model()


def survives(content):
    try:
        loaded = store.load(content)
        store.to_bytes(loaded)
    except SpaError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("content", [small_model().SerializeToString(), FUZZED], ids=["small", "rich"])
def test_truncated_anywhere(content):
    for stop in range(0, len(content), max(1, len(content) // 400)):
        survives(content[:stop])


@settings(max_examples=1500, deadline=2000, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, len(FUZZED) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_bytes_flipped(flips):
    content = bytearray(FUZZED)
    for position, byte in flips:
        content[position] = byte
    survives(bytes(content))


@settings(max_examples=300, deadline=2000)
@given(st.binary(max_size=200))
def test_random_bytes(content):
    survives(content)


def test_wire_numbers():
    for number in (0, 1, 127, 128, 300, 2**31, 2**63):
        assert wire.read_varint(wire.varint(number), 0, 20) == (number, len(wire.varint(number)))
    for broken in (b"\x80", b"\xff" * 11):
        with pytest.raises(wire.WireError):
            wire.read_varint(broken, 0, len(broken))
    for broken in (b"\x00\x00", b"\x0b", b"\x0a\x05a", b"\x0d\x00", b"\x0a\xff\xff\xff\xff\x0f"):
        with pytest.raises(wire.WireError):
            list(wire.fields(broken, 0, len(broken)))


def test_error_family():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SpaError)]
    assert len(kinds) == 8
    assert {kind.__name__ for kind in kinds if kind.exit_code == 1} == {"NothingToPrune", "CheckFailed"}
    assert all(kind.__doc__ for kind in kinds)


def test_references_as_long_as_their_placeholders(tmp_path):
    """A reference to the data file that happens to be as long as the placeholder must still replace it."""
    names = [f"w{i}" for i in range(200)]
    weights = [numpy_helper.from_array(np.full((300 + 7 * i,), i, np.float32), n) for i, n in enumerate(names)]
    nodes = [helper.make_node("Identity", [n], [f"y{i}"]) for i, n in enumerate(names)]
    outputs = [helper.make_tensor_value_info(f"y{i}", 1, None) for i in range(200)]
    model = helper.make_model(helper.make_graph(nodes, "g", [], outputs, weights))
    for length in range(1, 60):
        path = tmp_path / f"{'m' * length}.onnx"
        store.save(store.load(model), path, external=True)
        graph = onnx.load(path, load_external_data=False).graph
        assert {i.external_data[0].value for i in graph.initializer} == {f"{path.name}.data"}
    found = {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    assert all(np.array_equal(found[w.name], numpy_helper.to_array(w)) for w in weights)
