"""`Weight`: what it selects is what numpy selects, and it reads no more than that."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from passes.weights import PIECE_BYTES, Buffer, FileSlice, MappedFile, Weight, raw_bytes, storage_bytes

ALL_TYPES = [kind for kind in TensorProto.DataType.values() if kind not in (TensorProto.UNDEFINED, TensorProto.STRING)]


def some_values(shape, data_type, seed=0):
    """Values that are distinct enough for a wrong order to show, in every type."""
    dtype = helper.tensor_dtype_to_np_dtype(data_type)
    numbers = np.random.default_rng(seed).integers(0, 2, shape)
    if dtype.itemsize * 8 == storage_bytes((8,), data_type) and dtype != bool:
        return np.frombuffer(np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
    return numbers.astype(np.float32).astype(dtype)


def bits(array):
    return array.shape, array.dtype, array.tobytes()


@pytest.mark.parametrize("data_type", ALL_TYPES, ids=TensorProto.DataType.Name)
def test_every_type_reads_selects_and_exports(data_type):
    values = some_values((5, 7, 3), data_type)
    weight = Weight(Buffer(raw_bytes(values)), values.shape, data_type)
    assert weight.nbytes == len(raw_bytes(values)) == len(numpy_helper.from_array(values).raw_data)
    assert bits(weight.load()) == bits(values)
    cut = weight.take([4, 0, 2], 0).take([6, 1], 1)
    assert bits(cut.load()) == bits(np.ascontiguousarray(values[[4, 0, 2]][:, [6, 1]]))
    proto = cut.to_tensor()
    assert proto.raw_data == b"".join(cut.pieces())
    assert proto.data_type == data_type
    assert bits(numpy_helper.to_array(proto)) == bits(cut.load())
    assert Weight.of_array(values).to_tensor() == weight.to_tensor()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_selections_compose_as_in_numpy(data):
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    weight = Weight(Buffer(values.tobytes()), shape, TensorProto.FLOAT)
    for _ in range(data.draw(st.integers(0, 4))):
        axis = data.draw(st.integers(-len(shape), len(shape) - 1))
        size = values.shape[axis]
        chosen = data.draw(st.lists(st.integers(0, size - 1), max_size=6)) if size else []
        weight, values = weight.take(chosen, axis), values.take(np.array(chosen, int), axis)
        assert weight.shape == values.shape
    assert bits(weight.load()) == bits(values)
    assert b"".join(weight.pieces()) == values.tobytes()
    assert weight.nbytes == values.nbytes


@pytest.mark.parametrize("shape", [(1, 3_000_000), (2, 3, 1_000_000), (700_000, 4), (1, 1, 900, 2_000)])
def test_pieces_stay_small_whatever_the_shape(shape):
    values = np.random.default_rng(0).random(shape, dtype=np.float32)
    weight = Weight(Buffer(values.tobytes()), shape, TensorProto.FLOAT)
    axis = int(np.argmax(shape))
    chosen = np.arange(1, shape[axis], 2)
    cut = weight.take(chosen, axis)
    pieces = [bytes(piece) for piece in cut.pieces()]
    assert b"".join(pieces) == values.take(chosen, axis).tobytes()
    assert max(map(len, pieces)) <= PIECE_BYTES
    assert max(len(piece) for piece in weight.pieces()) <= PIECE_BYTES


def test_no_selection_is_a_view_of_the_file_and_read_only(tmp_path):
    values = np.arange(4096, dtype=np.float32)
    path = tmp_path / "data"
    path.write_bytes(b"\0" * 64 + values.tobytes())
    file = MappedFile(path)
    loaded = Weight(FileSlice(file, 64, values.nbytes), values.shape, TensorProto.FLOAT).load()
    assert np.shares_memory(loaded, np.frombuffer(file.view(), np.uint8))
    assert not loaded.flags.writeable
    file.release(0, file.size)
    np.testing.assert_array_equal(loaded, values)  # a view outlives the release of its pages
    misaligned = Weight(FileSlice(file, 65, 4096), (1024,), TensorProto.FLOAT).load()
    assert misaligned.flags.aligned
    assert misaligned.tobytes() == file.view(65, 65 + 4096).tobytes()


def test_misaligned_bytes_are_selected_in_place(tmp_path):
    values = np.arange(6000, dtype=np.float64).reshape(100, 60)
    path = tmp_path / "data"
    path.write_bytes(b"x" * 3 + values.tobytes())
    weight = Weight(FileSlice(MappedFile(path), 3, values.nbytes), values.shape, TensorProto.DOUBLE)
    assert bits(weight.take([5, 1], 1).load()) == bits(np.ascontiguousarray(values[:, [5, 1]]))


@pytest.mark.parametrize(
    ("indices", "axis"), [([0], 2), ([0], -3), ([3], 0), ([-1], 0), ([0.5], 0), ([[0]], 0), ([True, False, True], 0)]
)
def test_positions_that_do_not_exist_are_refused(indices, axis):
    weight = Weight(Buffer(bytes(24)), (3, 2), TensorProto.FLOAT)
    with pytest.raises(IndexError):
        weight.take(indices, axis)


def test_selecting_everything_selects_nothing():
    weight = Weight(Buffer(bytes(24)), (3, 2), TensorProto.FLOAT)
    assert weight.take([0, 1, 2], 0) is weight
    assert weight.take([0, 2, 1], 0) is not weight


def test_strings():
    weight = Weight.of_array(np.array([["a", "bé"], ["", "d"], ["e", "f"]], dtype=object))
    assert weight.shape == (3, 2)
    assert weight.dtype == object
    assert weight.nbytes == 7
    cut = weight.take([2, 0], 0).take([1], 1)
    assert cut.load().tolist() == [["f"], ["bé"]]
    assert list(cut.to_tensor().string_data) == [b"f", "bé".encode()]
    with pytest.raises(TypeError):
        next(weight.pieces())


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()])
def test_no_elements_and_no_axes(shape):
    values = np.zeros(shape, np.float16)
    weight = Weight(Buffer(values.tobytes()), shape, TensorProto.FLOAT16)
    assert bits(weight.load()) == bits(values)
    assert b"".join(weight.pieces()) == values.tobytes()


def test_small_weights_are_whole_and_large_ones_placeholders_in_graph_surgeons_export():
    x = gs.Variable("x", np.float32, (300,))
    y, z = gs.Variable("y", np.float32, (300,)), gs.Variable("z", np.float32, (300,))
    large = Weight.of_array(np.ones(300, np.float32))
    small = Weight.of_array(np.ones(1, ml_dtypes.bfloat16))
    nodes = [
        gs.Node("Add", inputs=[x, gs.Constant("large", large)], outputs=[y]),
        gs.Node("Foo", inputs=[y, gs.Constant("small", small)], outputs=[z]),
    ]
    model = gs.export_onnx(gs.Graph(nodes, [x], [z], opset=17))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    assert tensors["large"].external_data[0].value == "spa:lazy"
    assert not tensors["large"].HasField("raw_data")
    assert tensors["small"].raw_data == np.ones(1, ml_dtypes.bfloat16).tobytes()
    np.testing.assert_array_equal(gs.Constant("large", large).values, np.ones(300, np.float32))
