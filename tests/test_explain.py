"""Explanations: paths lead through the right places, and unrelated axes do not connect."""

import networkx as nx
import numpy as np
import pydot
import pytest
from onnx import TensorProto, helper, numpy_helper

import spa
from models import weightless
from spa.errors import BadOption
from spa.graph.explain import dependency_graph, dot_text, explain, frozen_causes, path, printable_graph, site_name, sites_of

ZOO = ["resnext.dynamo", "shufflenet.script", "swin.dynamo", "llama.dynamo", "recurrent.script", "unet.script"]


def weight(name, *shape):
    return numpy_helper.from_array(np.random.default_rng(0).standard_normal(shape).astype(np.float32), name)


def model(nodes, weights, inputs, outputs):
    def infos(shapes):
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]

    graph = helper.make_graph(nodes, "g", infos(inputs), infos(outputs), weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def groups():
    """x -> Gemm one (8) -> Relu; x -> Gemm two (8); their sum -> Gemm three (6) -> Foo -> Gemm four -> y."""
    nodes = [
        helper.make_node("Gemm", ["x", "w1"], ["a"], "one", transB=1),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Gemm", ["x", "w2"], ["c"], "two", transB=1),
        helper.make_node("Add", ["b", "c"], ["d"], "add"),
        helper.make_node("Gemm", ["d", "w3"], ["e"], "three", transB=1),
        helper.make_node("Concat", ["e", "d"], ["f"], "concat", axis=1),
        helper.make_node("Gemm", ["f", "w4"], ["y"], "four", transB=1),
    ]
    made = model(nodes, [weight("w1", 8, 4), weight("w2", 8, 4), weight("w3", 6, 8), weight("w4", 3, 14)], {"x": [2, 4]}, {"y": [2, 3]})
    return spa.analyze(made).groups


def test_a_path_goes_through_the_sites_of_the_group(groups):
    found = path(groups, ("w1", 0), ("w2", 0))
    assert str(found) == "w1:0 —Gemm one (dim n)→ a:1 —Relu relu (dim a.1)→ b:1 —Add add (dim a.1)→ c:1 —Gemm two (dim n)→ w2:0"
    assert path(groups, ("w1", 0), ("w1", 0)).steps == ()


@pytest.mark.parametrize("protected", [False, True])
def test_paths_take_no_shortcut_through_other_groups(protected):
    """a0 and a8 are eight Relus apart, but two steps by way of b, which both are concatenated with."""
    nodes = [helper.make_node("Gemm", ["x", "w1"], ["a0"], "one", transB=1), helper.make_node("Gemm", ["x", "w2"], ["b"], "two", transB=1)]
    nodes += [helper.make_node("Relu", [f"a{i}"], [f"a{i + 1}"], f"relu{i}") for i in range(8)]
    for k, a in enumerate(("a0", "a8")):
        nodes += [
            helper.make_node("Concat", [a, "b"], [f"f{k}"], f"concat{k}", axis=1),
            helper.make_node("Gemm", [f"f{k}", f"v{k}"], [f"y{k}"], f"last{k}", transB=1),
        ]
    weights = [weight("w1", 8, 4), weight("w2", 6, 4), weight("v0", 3, 14), weight("v1", 3, 14)]
    outputs = {"y0": [2, 3], "y1": [2, 3], "a8": [2, 8], "b": [2, 6]}
    found = spa.analyze(model(nodes, weights, {"x": [2, 4]}, outputs), protect_outputs=protected).groups
    way = path(found, ("a0", 1), ("a8", 1))
    if protected:
        (part,) = explain(found, ("a0", 1)).parts
        assert part.reason.value == "a8"
        way = part.path
    assert [s.site for s in way.steps] == [(f"a{i}", 1) for i in range(1, 9)]


def test_what_is_not_coupled_has_no_path(groups):
    assert path(groups, ("w1", 0), ("w3", 0)) is None
    assert path(groups, ("w1", 0), ("w1", 1)) is None
    # both parts of the concatenation are on f:1, but nothing couples them
    assert path(groups, ("w3", 0), ("f", 1)) is not None
    assert path(groups, ("w1", 0), ("f", 1)) is not None
    through = {s.site for s in path(groups, ("w1", 0), ("f", 1)).steps}
    assert ("e", 1) not in through


def test_a_frozen_axis_leads_to_where_it_began(groups):
    (part,) = explain(groups, ("w1", 1)).parts
    assert part.reason.value == "x"
    assert str(part.path) == "w1:1 —Gemm one (dim k)→ x:1"
    (part,) = explain(groups, ("w4", 0)).parts
    assert part.path.steps[-1].site == ("y", 1)


def test_a_sum_axis_is_explained_by_all_its_groups(groups):
    found = explain(groups, ("w4", 1))
    assert [p.group.size for p in found.parts] == [8, 6]
    assert all(p.reason is None for p in found.parts)
    assert ("w1", 0) in found.parts[0].coupled
    assert ("w4", 1) not in found.parts[0].coupled
    assert found.length == 14
    assert found.held == 0


def test_dims_of_one_node_do_not_connect():
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], "g", transB=1)]
    found = spa.analyze(model(nodes, [weight("w", 8, 4)], {"x": [2, 4]}, {"y": [2, 8]}), protect_outputs=False).groups
    graph = dependency_graph(found)
    assert nx.has_path(graph, "w:0", "y:1")
    assert nx.has_path(graph, "w:1", "x:1")
    assert not nx.has_path(graph, "w:0", "w:1")


def test_names_with_colons_are_split_at_the_last():
    nodes = [helper.make_node("Gemm", ["x", "a::b:1"], ["h"], "g", transB=1), helper.make_node("Gemm", ["h", "w"], ["y"], "k", transB=1)]
    found = spa.analyze(model(nodes, [weight("a::b:1", 8, 4), weight("w", 3, 8)], {"x": [2, 4]}, {"y": [2, 3]})).groups
    assert sites_of(found, "a::b:1:0") == (("a::b:1", 0),)
    assert sites_of(found, "a::b:1") == (("a::b:1", 0), ("a::b:1", 1))
    assert sites_of(found, "w:-1") == (("w", 1),)


@pytest.mark.parametrize(("text", "says"), [
    ("w9:0", "no value 'w9:0'"), ("w1:2", "2 axes"), ("w1:-3", "no axis -3"), ("w1:x", "near it are: w1"), ("", "no value ''"),
])
def test_unknown_sites_are_refused(groups, text, says):
    with pytest.raises(BadOption, match=r".") as caught:
        sites_of(groups, text)
    assert says in str(caught.value)


def test_names_of_groups_are_sites(groups):
    for group in groups.groups:
        assert sites_of(groups, group.name)[0] in group.sites


@pytest.mark.parametrize("name", ZOO)
def test_everything_in_the_zoo_is_explained(name):
    groups = spa.analyze(weightless.load(f"models/zoo/{name}.onnx.xz")).groups
    frozen = [g for g in groups.groups if g.frozen is not None and g.frozen.axis is not None]
    for group in frozen[::4]:
        found = [p for p in explain(groups, group.sites[-1]).parts if p.group == group]
        assert found[0].path is not None, group
        last = found[0].path.steps[-1].site if found[0].path.steps else found[0].path.start
        assert last == (group.frozen.value, group.frozen.axis)
    for group in groups.free()[::3]:
        way = path(groups, group.sites[0], group.sites[-1])
        assert way is not None
        ends = {group.sites[0], group.sites[-1]}
        shared = [set(g.sites) for g in groups.free() if ends <= set(g.sites)]
        assert any({s.site for s in way.steps} <= sites for sites in shared)


@pytest.mark.parametrize("name", ZOO[:3])
def test_graphs_export(name, tmp_path):
    groups = spa.analyze(weightless.load(f"models/zoo/{name}.onnx.xz")).groups
    graph = dependency_graph(groups)
    nx.write_graphml(printable_graph(graph), tmp_path / "g.xml")
    again = nx.read_graphml(tmp_path / "g.xml")
    assert set(again) == set(graph)
    assert again.number_of_edges() == graph.number_of_edges()
    assert all(isinstance(v, str | int | float) for _, d in graph.nodes(data=True) for v in d.values())
    (read,) = pydot.graph_from_dot_data(dot_text(graph))
    assert len(read.get_edges()) == graph.number_of_edges()


def test_odd_names_export():
    name = 'a"\x1b[31m\\\n<b>&'
    nodes = [helper.make_node("Gemm", ["x", name], ["y"], "g", transB=1)]
    graph = dependency_graph(spa.analyze(model(nodes, [weight(name, 8, 4)], {"x": [2, 4]}, {"y": [2, 8]}), protect_outputs=False).groups)
    assert "\x1b" not in "".join(nx.generate_graphml(printable_graph(graph)))
    assert pydot.graph_from_dot_data(dot_text(graph))


def test_causes_count_each_element_once(groups):
    causes = {c.cause: c for c in frozen_causes(groups)}
    inputs = causes["is an input of the graph"]
    assert (inputs.groups, inputs.channels) == (2, 8)  # x itself is in no group, so w1:1 and w2:1 are two
    assert inputs.parameters == 8 * 4 * 2  # all of w1 and w2
    assert inputs.macs == 2 * inputs.parameters
    assert inputs.stuck == 0
    output = next(c for c in causes.values() if c.cause.startswith("is an output"))
    assert output.parameters == 3 * 14


def test_stuck_is_what_no_axis_can_remove():
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "g", transB=1)]
    groups = spa.analyze(model(nodes, [weight("w", 8, 4), weight("b", 8)], {"x": [2, 4]}, {"y": [2, 8]})).groups
    stuck = {c.cause.split(" (")[0]: c.stuck for c in frozen_causes(groups)}
    assert stuck == {"is an output of the graph": 8 * 4 + 8, "is an input of the graph": 8 * 4}


def test_site_names():
    assert site_name(("a:b", 3)) == "a:b:3"
