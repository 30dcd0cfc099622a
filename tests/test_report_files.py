"""Report files: the same figures in all three kinds, names as text and not markup, nothing from elsewhere, whole or not there."""

import dataclasses
import json
import os
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_cli import convnet, refused, run

import spa
from spa.plans.plan import mask_of
from spa.repairs.repair import LayerRepair, Repaired
from spa.reporting import check_report, report_data
from spa.reporting.files import WRITERS
from spa.reporting.folding import MOST, Block, _joined, folded, scopes
from spa.reporting.html import as_html
from spa.reporting.layout import GAP, arrange
from spa.reporting.markdown import as_json, as_markdown, code, prose
from spa.reporting.picture import picture
from spa.tables.report import amount
from spa.timing.bench import Lap, Race

EVIL = [
    "<script>alert(1)</script>", "</script><script>alert(2)</script>", "\"><img src=x onerror=alert(3)>", "' onmouseover='alert(4)", "<!--",
    "a\x00b\x1b[31m\n\x07", "tick`|`` tick", "{{ 7 * 7 }}{% raw %}", "\u202eünïcode 名前 \ud7ff", "&lt;b&gt;]]>",
]  # fmt: skip


def renamed(model, names):
    """The same model under other names: nodes and values get them in turn."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    new = {}

    def name(old):
        return new.setdefault(old, f"{names[len(new) % len(names)]}{len(new)}") if old else old

    for node in model.graph.node:
        node.name = name(f"node {node.name}")
        node.input[:] = [name(v) for v in node.input]
        node.output[:] = [name(v) for v in node.output]
    for given in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        given.name = name(given.name)
    return model


def chain(length, *, scope="layers.{}/"):
    """Linear layers in a row, each with a Relu; their names tell of blocks of four."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for i in range(length):
        place = scope.format(i // 4)
        weights.append(numpy_helper.from_array(rng.standard_normal((16, 16)).astype(np.float32) / 4, f"w{i}"))
        nodes += [helper.make_node("MatMul", [value, f"w{i}"], [f"a{i}"], f"{place}fc{i}"),
                  helper.make_node("Relu", [f"a{i}"], [f"b{i}"], f"{place}relu{i}")]
        value = f"b{i}"
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 16]) for n in ("x", value))
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, texts, and the contents of scripts."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.scripts = [], [], []
        self.open = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.texts).append(data)


@pytest.fixture(scope="module")
def result():
    return spa.prune(convnet(), 0.5)


LAPS = Lap("before", 0.0123, 0.011, 0.014, 1.0), Lap("after", 0.00456, 0.0041, 0.0052, 0.371, 0.36, 0.39, "faster")
RACE = Race(LAPS, 20, 1, "cpu", "9.9")


def full(result):
    """A result with everything that a report can tell of."""
    layers = (LayerRepair("fc<1>", 16, 32, 0.5, 0.125), LayerRepair("conv2", 8, 16, 0.25, 0.0625))
    groups = result.analysis.groups
    gone = mask_of(result.plan, groups)
    mended = Repaired(result.analysis.normal.model, groups, gone, layers, {"lstm|1": "its weights are recurrent"}, 3, thin=("conv2",))
    noted = dataclasses.replace(result.plan, notes={"w3:0": "keeps 33 of 64 so that widths are multiples of 11"})
    return dataclasses.replace(result, repaired=mended, plan=noted)


# ---------------------------------------------------------------------- what is in it


def test_the_same_figures_in_all_kinds(result, tmp_path):
    rich = full(result)
    for suffix in ("html", "md", "json"):
        spa.write_report(rich, tmp_path / f"r.{suffix}", timing=RACE, quality={"top-1 accuracy": (91.25, 86.5)}, sizes=(50_500, 14_210))
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["before"]["macs"] == result.before.macs
    assert data["after"]["macs"] == result.after.macs
    assert data["after"]["parameters"] == result.after.parameters
    assert data["proof"]["largest_difference"] == result.check.worst
    assert data["latency"][0]["laps"][1]["median_seconds"] == 0.00456
    assert data["quality"] == {"top-1 accuracy": {"before": 91.25, "after": 86.5}}
    assert {g["name"]: (g["size"], g["kept"]) for g in data["groups"] if g["kept"] < g["size"]} == {"w1:0": (32, 16), "w3:0": (64, 32)}
    assert data["asked"]["model_sha256"] == result.plan.model_sha256
    page = Page((tmp_path / "r.html").read_text())
    text = " ".join(" ".join(page.texts).split())
    words = (tmp_path / "r.md").read_text()
    figures = [
        amount(result.before.macs), amount(result.after.macs), amount(result.before.parameters), amount(result.after.parameters),
        amount(result.after.peak_bytes, "B"), "14.21 kB", f"{result.check.worst:.1e}", "12.3 ms", "4.56 ms", "37.1 %", "36.0 – 39.0 %",
        "91.25", "86.5", "0.125", "0.0625", "its weights are recurrent", "keeps 33 of 64", "is an input of the graph", "32→16",
        result.plan.model_sha256, spa.__version__, onnx.__version__,
    ]
    for figure in figures:
        assert figure in text, figure
        assert figure in words, figure


def test_macs_and_parameters_of_nodes_add_up(result):
    data = report_data(result)
    nodes = data["network"]["nodes"]
    assert sum(n["macs_before"] for n in nodes) == result.before.macs
    assert sum(n["macs_after"] for n in nodes) == result.after.macs
    assert sum(n["parameters_after"] for n in nodes) == result.after.parameters
    assert all(g["macs"] <= result.before.macs and g["parameters"] <= result.before.parameters for g in data["groups"])


def test_macs_are_of_one_sample_where_the_batch_is_free():
    free = spa.prune(convnet(shape=("n", 3, 8, 8)), check=False)
    data = report_data(free)
    assert sum(n["macs_before"] for n in data["network"]["nodes"]) == free.before.macs
    assert max(g["macs"] for g in data["groups"]) <= free.before.macs
    assert data["network"]["values"]["x"]["free"] == [0]


def test_nodes_say_what_became_of_them(result):
    states = {n["name"]: n["status"] for n in report_data(result)["network"]["nodes"]}
    assert states["conv1"] == states["fc2"] == states["relu"] == "pruned"
    kept = spa.prune(convnet(), exclude=["w3:0"], check=False)
    states = {n["name"]: n["status"] for n in report_data(kept)["network"]["nodes"]}
    assert states["fc2"] == "whole"
    model = convnet()
    model.graph.node.insert(1, helper.make_node("Strange", ["a"], ["a2"], "strange", domain="my.domain"))
    model.graph.node[2].input[0] = "a2"
    model.opset_import.append(helper.make_opsetid("my.domain", 1))
    model.graph.value_info.append(helper.make_tensor_value_info("a2", TensorProto.FLOAT, [1, 32, 8, 8]))
    cut = spa.prune(model, check=False)
    nodes = {n["name"]: n for n in report_data(cut)["network"]["nodes"]}
    assert nodes["conv1"]["status"] == "frozen"
    assert nodes["strange"]["status"] == "frozen"
    assert nodes["strange"]["begins"] == ["w1:0", "w2:0"]
    assert "without a signature" in nodes["strange"]["reasons"][0]


def test_without_proof_times_repair_and_quality():
    bare = report_data(spa.prune(convnet(), check=False))
    page = Page(as_html(bare))
    assert "Not proven" in " ".join(page.texts)
    ids = {a["id"] for _, a in page.elements if "id" in a}
    assert {"groups", "network", "stays", "proof", "asked"} <= ids
    assert not {"latency", "quality", "repair"} & ids
    text = as_markdown(bare)
    assert "## Groups" in text
    assert "## Latency" not in text
    assert json.loads(as_json(bare))["repair"] is None


def test_nothing_that_json_lacks(result):
    odd = dataclasses.replace(RACE, laps=(RACE.laps[0], dataclasses.replace(RACE.laps[1], ratio_low=float("nan"), load=float("inf"))))
    data = report_data(full(result), timing=[odd, RACE], quality={"loss": (1.0, float("inf"))})
    assert len(json.loads(as_json(data))["latency"]) == 2
    assert "9.9" in as_markdown(data)
    as_html(data)


def test_options_are_told_and_given_ones_marked(result):
    data = report_data(result, options={"ratio": None, "seed": 7, "exclude": ["<b>"], "loss": None}, given=["exclude"])
    assert data["asked"]["options"]["ratio"] == 0.5  # what leaving it out meant
    page = Page(as_html(data))
    marked = [i for i, (tag, a) in enumerate(page.elements) if tag == "div" and a.get("class") == "given"]
    assert len(marked) == 1
    assert any("<b>" in t for t in page.texts)


# ---------------------------------------------------------------------- names


@pytest.fixture(scope="module")
def evil():
    return report_data(spa.prune(renamed(convnet(), EVIL), 0.5), quality=dict.fromkeys(EVIL, (1, 2)), options=dict.fromkeys(EVIL, EVIL))


def test_names_are_never_elements(evil, result):
    page, plain = Page(as_html(evil)), Page(as_html(report_data(result)))
    assert sum(tag == "script" for tag, _ in page.elements) == 2  # the data and the page's own
    assert not any(tag == "img" for tag, _ in page.elements)
    known = {name for _, attributes in plain.elements for name in attributes} | {"data-all", "hidden"}
    assert {name for _, attributes in page.elements for name in attributes} <= known
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    shown = " ".join(page.texts)
    assert "<script>alert(1)</script>" in shown
    assert "{{ 7 * 7 }}" in shown
    assert "名前" in shown


def test_no_control_characters_and_whole_data(evil):
    text = as_html(evil)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e\ud800-\udfff]", text)
    scripts = Page(text).scripts
    data = next(s for s in scripts if s.startswith('{"frames"'))
    assert "<" not in data
    assert "&" not in data
    names = [node[1] for node in json.loads(data)["nodes"]]
    assert any("<script>alert(1)</script>" in n for n in names)


def test_json_keeps_exact_names(evil):
    names = {n["name"] for n in json.loads(as_json(evil))["network"]["nodes"]}
    assert any(n.startswith("a\x00b\x1b[31m\n\x07") for n in names)
    assert as_json(evil).isascii()


def test_markdown_has_no_markup_from_names(evil):
    text = as_markdown(evil)
    for line in text.splitlines():
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line)
        assert "<" not in outside, line
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    for rows in tables:
        assert len({len(re.findall(r"(?<!\\)\|", r)) for r in rows}) == 1, rows
    assert code("a`b") == "``a`b``"
    assert code("`") == "`` ` ``"
    assert prose("<b>*x*") == r"&lt;b&gt;\*x\*"


# ---------------------------------------------------------------------- one file


def test_nothing_is_loaded_from_elsewhere(evil, result):
    for data in (evil, report_data(full(result), timing=RACE, quality={"a": (1, 2)})):
        text = as_html(data)
        page = Page(text)
        for tag, attributes in page.elements:
            for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                target = attributes.get(name, "#")
                assert target.startswith("#") or target == "data:,", (tag, attributes)
            assert tag not in ("iframe", "object", "embed", "base", "form")
        own = "".join(page.scripts)
        assert not re.search(r"@import|url\(\s*['\"]?(?!#)|fetch\(|XMLHttpRequest|import\(|innerHTML|insertAdjacentHTML|eval\(", own)
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in text


@pytest.mark.parametrize("write", [as_html, as_markdown, as_json])
def test_the_same_bytes_again(write):
    texts = {write(report_data(spa.prune(convnet(), 0.5, seed=1))) for _ in range(2)}
    assert len(texts) == 1


def test_reports_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(convnet(), "m.onnx")
    done = run("prune", "m.onnx", "-o", "s.onnx", "--report", "r.html", "--no-bench", "--multiple-of", "1")
    assert done.exit_code == 0, done.output
    assert "r.html" in done.stdout
    page = Page((tmp_path / "r.html").read_text())
    assert any("m.onnx" in t for t in page.texts)
    assert run("apply", "m.onnx", "s.plan.json", "-o", "t.onnx", "--report", "R.JSON").exit_code == 0
    data = json.loads((tmp_path / "R.JSON").read_text())
    assert data["after"]["file_bytes"] == (tmp_path / "t.onnx").stat().st_size
    assert data["asked"]["given"] == ["model", "output", "plan_file"]
    assert data["asked"]["model"] == "m.onnx"


def test_other_suffixes_are_refused_before_anything(tmp_path, monkeypatch, result):
    monkeypatch.chdir(tmp_path)
    onnx.save(convnet(), "m.onnx")
    monkeypatch.setattr(spa.api, "analyze", None)  # nothing is computed
    for name in ("r.pdf", "report", "r.html.gz"):
        refused(tmp_path, "prune", "m.onnx", "-o", "s.onnx", "--report", name, says=".html, .md or .json")
    with pytest.raises(spa.BadOption, match=r"\.html, \.md or \.json"):
        spa.write_report(result, tmp_path / "r.txt")
    assert set(WRITERS) == {".html", ".htm", ".md", ".json"}
    assert check_report("a.HTML").name == "a.HTML"


def test_unwritable_targets_leave_nothing(tmp_path, monkeypatch, result):
    monkeypatch.chdir(tmp_path)
    onnx.save(convnet(), "m.onnx")
    (tmp_path / "folder.html").mkdir()
    refused(tmp_path, "prune", "m.onnx", "-o", "s.onnx", "--report", "gone/r.html", says="no folder")
    refused(tmp_path, "prune", "m.onnx", "-o", "s.onnx", "--report", "folder.html", says="is a folder")
    refused(tmp_path, "prune", "m.onnx", "-o", "s.json", "--report", "s.json", says="same file")
    with pytest.raises(spa.BadFile, match="no folder"):
        spa.write_report(result, tmp_path / "gone" / "r.html")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(spa.BadFile, match="No space left"):
        spa.write_report(result, tmp_path / "r.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.html", "m.onnx"]


# ---------------------------------------------------------------------- the picture


def test_short_networks_are_drawn_whole():
    nodes = report_data(spa.prune(chain(MOST // 2), check=False))["network"]
    drawn = picture(nodes)
    assert drawn.blocks == 0
    assert sum(i.kind == "node" for i in drawn.frames[0].items) == MOST


@pytest.mark.parametrize("scope", ["layers.{}/", ""])
def test_long_networks_fold_into_blocks(scope):
    network = report_data(spa.prune(chain(200, scope=scope), check=False))["network"]
    drawn = picture(network)
    top = drawn.frames[0].items
    assert len(top) < MOST
    assert drawn.blocks > 1
    seen = [i.node for frame in drawn.frames for i in frame.items if i.kind == "node"]
    assert sorted(seen) == list(range(400))  # every node once, wherever
    if scope:
        assert "layers.7" in {i.lines[0] for i in top}
    text = as_html(report_data(spa.prune(chain(200, scope=scope), check=False)))
    page = Page(text)
    assert sum(a.get("class", "").startswith("item block") for _, a in page.elements) == drawn.blocks
    assert sum("data-node" in a for _, a in page.elements) == 400


def test_blocks_inside_are_fed_and_feed():
    drawn = picture(report_data(spa.prune(chain(100), check=False))["network"])
    block = next(i for i in drawn.frames[0].items if i.kind == "block" and i.lines[0] == "layers.3")
    inside = drawn.frames[block.inside]
    assert [i.lines[0] for i in inside.items if i.kind == "end"] == ["from Relu", "to MatMul"]
    assert len(inside.links) == len(inside.items) - 1  # a chain


def test_scopes():
    def node(name, weight=None):
        return {"name": name, "weights": [{"name": weight}] if weight else []}

    nodes = [node("/a/a.0/Conv"), node("Conv_3", "b.1.conv.weight"), node("Relu_4"), node("/Add")]
    assert scopes(nodes) == [("a", "a.0"), ("b", "1", "conv"), ("b", "1", "conv"), ()]
    assert folded(nodes) == (0, 1, 2, 3)


def test_joined_names_say_nothing_twice():
    assert [_joined(*n) for n in (("layer1", "layer1.0"), ("stages.0.blocks", "blocks.1"), ("stem", "conv"), ("1", "1x1"))] == [
        "layer1.0", "stages.0.blocks.1", "stem.conv", "1.1x1"]  # fmt: skip


def test_names_of_endless_depth_fold_too():
    deep = "/a" * 5000
    nodes = [{"name": f"{deep}/n{i}", "weights": [], "inputs": [], "outputs": []} for i in range(200)]
    assert sum(p.size if isinstance(p, Block) else 1 for p in folded(nodes)) == 200


def test_blocks_never_lead_in_a_circle():
    """Names that come back after others make blocks of their own."""
    nodes = [{"name": f"/{'ab'[i // 10 % 2]}/n{i}", "weights": [], "inputs": [f"v{i - 1}"], "outputs": [f"v{i}"]} for i in range(400)]
    parts = folded(nodes)
    spans = [(p.start, p.stop) if isinstance(p, Block) else (p, p + 1) for p in parts]
    assert spans[0][0] == 0
    assert spans[-1][1] == 400
    assert all(a[1] == b[0] for a, b in pairwise(spans))


def test_layouts_keep_boxes_apart_and_columns_straight():
    rng = np.random.default_rng(0)
    wires = [(i, sorted({i + 1, *(int(n) for n in rng.integers(i + 1, min(i + 30, 300), rng.integers(0, 3)))})) for i in range(298)]
    widths = [float(w) for w in rng.integers(60, 200, 300)]
    found = arrange(widths, wires)
    sizes = [*widths, *[12.0] * (len(found.x) - 300)]
    for row in found.rows:
        for left, right in pairwise(row):
            assert found.x[right] - found.x[left] >= (sizes[left] + sizes[right]) / 2 + GAP - 0.2
    place = {box: r for r, row in enumerate(found.rows) for box in row}
    assert all(place[b] == place[a] + 1 for a, b in found.links)
    assert sorted(place) == list(range(len(found.x)))
    assert arrange(widths, wires) == found
    straight = arrange([80.0] * 4, [(0, [1, 3]), (1, [2]), (2, [3])])  # a residual connection
    assert len({straight.x[i] for i in range(4)}) == 1
    assert arrange([], []).rows == ()


@pytest.mark.engines
def test_a_browser_shows_it_without_complaint(tmp_path, result):
    screenshot = pytest.importorskip("tools.screenshot")
    program = screenshot.browser()
    if program is None:
        pytest.skip("there is no Chromium here")
    spa.write_report(full(result), tmp_path / "small.html", timing=RACE, quality={"accuracy": (91, 86)})
    spa.write_report(spa.prune(chain(200), check=False), tmp_path / "long.html")
    (tmp_path / "evil.html").write_text(as_html(report_data(spa.prune(renamed(convnet(), EVIL), check=False))), encoding="utf-8")
    with screenshot.page(program) as shown:
        for name in ("small", "long", "evil"):
            shown.requests.clear()
            shown.show(tmp_path / f"{name}.html")
            nodes = shown.run("document.querySelectorAll('.item.node').length")
            assert nodes >= 9
            shown.run("document.querySelector('.item.node').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
            assert shown.run("document.querySelector('.panel h3').textContent")
            assert all(r.startswith(("file:", "data:")) for r in shown.requests), shown.requests
        shown.show(tmp_path / "long.html")
        height = "document.querySelector('svg.net').viewBox.baseVal.height"
        closed = shown.run(height)
        shown.run("document.querySelector('[data-do=unfold]').click()")
        assert shown.run("document.querySelectorAll('.inside[hidden]').length") == 0
        assert shown.run(height) > 3 * closed
        shown.run("document.querySelector('[data-do=fold]').click()")
        assert shown.run(height) == closed
        shown.run("document.querySelector('th[aria-sort] button').click()")
        assert shown.run("document.querySelector('th[aria-sort=ascending]') !== null")
        assert shown.complaints == []
