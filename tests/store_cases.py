"""Models of every kind of storage, for the tests of reading and writing."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

RNG = np.random.default_rng(0)
FLOAT = TensorProto.FLOAT


def value(name, shape=("n", 64), kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(nodes, tensors=(), *, inputs=None, outputs=None, opset=17, **rest):
    graph = helper.make_graph(nodes, "g", inputs or [value("x")], outputs or [value("y")], list(tensors))
    opsets = rest.pop("opset_imports", [helper.make_opsetid("", opset)])
    return helper.make_model(graph, **{"opset_imports": opsets, "ir_version": 10, **rest})


def small_model():
    weight = RNG.random((64, 64), dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Add", ["h", "b"], ["y"], name="second"),
    ]
    return model_of(nodes, [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(weight[0], "b")])


def tensor_types():
    """Tensors of all kinds of storage, each above and below the size from which data is lifted out."""
    tensors = []
    for count in (8, 4096):
        numbers = RNG.integers(0, 2, count)
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.bool_, ml_dtypes.int4, np.int64, np.complex64):
            tensors.append(numpy_helper.from_array(numbers.astype(dtype), f"raw_{np.dtype(dtype).name}_{count}"))
        for kind in (
            FLOAT,
            TensorProto.FLOAT16,
            TensorProto.BFLOAT16,
            TensorProto.BOOL,
            TensorProto.INT4,
            TensorProto.UINT8,
            TensorProto.INT64,
            TensorProto.DOUBLE,
            TensorProto.UINT64,
            TensorProto.COMPLEX64,
            TensorProto.FLOAT8E4M3FNUZ,
        ):
            name = f"typed_{TensorProto.DataType.Name(kind)}_{count}"
            tensors.append(helper.make_tensor(name, kind, [count // 4, 4], numbers.tolist()))
        tensors.append(
            helper.make_tensor(f"text_{count}", TensorProto.STRING, [count], [f"é{i}" for i in range(count)])
        )
    tensors.append(numpy_helper.from_array(np.zeros((0, 3), np.float32), "empty"))
    tensors.append(helper.make_tensor("empty_typed", FLOAT, [4, 0], []))
    tensors.append(numpy_helper.from_array(np.float32(3), "scalar"))
    return tensors


def rich_model():
    """Everything that is to survive a round trip."""
    tensors = tensor_types()
    nodes = [
        helper.make_node(
            "Foo", ["x", *(t.name for t in tensors)], ["f"], name="foo", domain="custom", doc_string="doc"
        ),
        helper.make_node("Constant", [], ["big"], value=numpy_helper.from_array(np.arange(1000, dtype=np.float32))),
        helper.make_node("Constant", [], ["few"], value_ints=[1, 2]),
        helper.make_node("Bar", ["f", "", "big"], ["", "bar"], "bar", domain="custom", a=1.5, b="text", c=["s", "t"]),
        helper.make_node("If", ["cond"], ["y"], name="if"),
        helper.make_node("Sink", ["few", "outer"], ["s"], domain="custom"),
    ]
    nodes[3].attribute.add(name="none", type=onnx.AttributeProto.FLOATS)
    nodes[3].attribute.add(name="nothing", type=onnx.AttributeProto.STRINGS)
    nodes[0].metadata_props.add(key="scope", value="a.b")
    for branch, factor in (("then_branch", 1), ("else_branch", 2)):
        inner = numpy_helper.from_array(np.full(600, factor, np.float32), f"inner{factor}")
        body = [helper.make_node("Add", ["outer", inner.name], [f"o{factor}"], doc_string="in the branch")]
        graph = helper.make_graph(body, branch, [], [value(f"o{factor}", [600])], [inner])
        nodes[4].attribute.append(helper.make_attribute(branch, graph))
    tensors.append(numpy_helper.from_array(np.arange(600, dtype=np.float32), "outer"))
    tensors.append(numpy_helper.from_array(np.arange(700, dtype=np.float32), "constant_output"))
    tensors[0].doc_string = "a tensor"
    tensors[0].metadata_props.add(key="k", value="v")
    model = model_of(
        nodes,
        tensors,
        inputs=[value("x"), value("cond", [], TensorProto.BOOL)],
        outputs=[value("y", [600]), value("s", None), value("constant_output", [700])],
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("custom", 3)],
        producer_name="p",
        producer_version="1",
        model_version=4,
        doc_string="model doc",
        domain="d",
    )
    model.graph.doc_string = "graph doc"
    model.graph.value_info.append(value("bar", ["n", 3], TensorProto.BFLOAT16))
    model.graph.value_info.append(helper.make_tensor_sequence_value_info("f", FLOAT, ["n"]))
    model.graph.input[0].doc_string = "the input"
    model.graph.input[0].type.tensor_type.shape.dim[0].denotation = "BATCH"
    model.graph.metadata_props.add(key="g", value="h")
    model.graph.quantization_annotation.add(tensor_name="big").quant_parameter_tensor_names.add(key="S", value="scalar")
    helper.set_model_props(model, {"names": "{0: 'cat'}"})
    return model


def write(model, path, **options):
    """As onnx.save, which turns the model that it is given into one with external data."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(copy, path, **options)
