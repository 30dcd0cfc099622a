"""Vocabularies: ids that go with their rows and columns, equal to masking; tied tables, other readers of ids, maps, and what is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import spa
from spa import cli
from spa.errors import BadFile, BadOption, NothingToPrune
from spa.graph.analysis import analyze
from spa.layers.depth import Depth
from spa.proof.check import run
from spa.vocabularies.vocabulary_choice import choose_ids, plan_vocabulary, read_keep
from spa.vocabularies.vocabulary_prune import prune_vocabulary, remapped

IDS, WIDTH, LENGTH = 40, 8, 5


@pytest.fixture(autouse=True)
def _no_table_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shared constants get copies of their own, so that nothing of them is tied."""
    monkeypatch.setattr(sys.modules["spa.graph.normalize"], "SHARED", 64)  # `spa.normalize` is the function


def language_model(*, tied: bool = True, reads_ids: bool = False, second: bool = False, blocks: int = 0, seed: int = 0) -> onnx.ModelProto:
    """Ids -> table (-> + a second table of the same ids) (-> residual MLPs) -> hidden layer -> logits, by the table where tied."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    held = [weight("table", IDS, WIDTH), weight("up", WIDTH, 16), weight("down", 16, WIDTH)]
    nodes = [helper.make_node("Gather", ["table", "ids"], ["looked"], "lookup")]
    last = "looked"
    if second:
        held.append(weight("other", IDS, WIDTH))
        nodes += [helper.make_node("Gather", ["other", "ids"], ["also"]), helper.make_node("Add", ["looked", "also"], ["both"])]
        last = "both"
    for k in range(blocks):
        held += [weight(f"in{k}", WIDTH, 12), weight(f"out{k}", 12, WIDTH)]
        nodes += [helper.make_node("MatMul", [last, f"in{k}"], [f"wide{k}"]), helper.make_node("Relu", [f"wide{k}"], [f"positive{k}"]),
                  helper.make_node("MatMul", [f"positive{k}", f"out{k}"], [f"branch{k}"], f"layer{k}"),
                  helper.make_node("Add", [last, f"branch{k}"], [f"sum{k}"])]  # fmt: skip
        last = f"sum{k}"
    nodes += [
        helper.make_node("MatMul", [last, "up"], ["wide"]), helper.make_node("Relu", ["wide"], ["positive"]),
        helper.make_node("MatMul", ["positive", "down"], ["hidden"]),
    ]  # fmt: skip
    if reads_ids:
        held.append(numpy_helper.from_array(np.array(3, np.int64), "pad"))
        nodes += [
            helper.make_node("Equal", ["ids", "pad"], ["is_pad"], "compare"), helper.make_node("Cast", ["is_pad"], ["mask"], to=1),
            helper.make_node("ReduceSum", ["mask"], ["pads"], keepdims=0), helper.make_node("Mul", ["hidden", "pads"], ["masked"]),
        ]  # fmt: skip
    if tied:
        nodes.append(helper.make_node("Transpose", ["table"], ["head"], perm=[1, 0]))
    else:
        held.append(weight("head", WIDTH, IDS))
    nodes.append(helper.make_node("MatMul", ["masked" if reads_ids else "hidden", "head"], ["logits"]))
    graph = helper.make_graph(
        nodes, "language", [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", LENGTH])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", LENGTH, IDS])], held,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def constant(model: spa.Model | onnx.ModelProto, name: str) -> np.ndarray:
    proto = model if isinstance(model, onnx.ModelProto) else spa.storage.store.to_proto(model)
    return numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name))


KEPT = np.array([0, 3, 4, 9, 17, 18, 30, 39])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("place", ["file", "graph"])
def test_kept_ids_give_what_they_gave(tied: bool, place: str) -> None:
    model = language_model(tied=tied)
    result = prune_vocabulary(model, KEPT, place=place)
    assert result.check is not None
    assert result.check.passed
    assert result.ids is not None
    assert result.ids.outputs == {"logits": 2}
    assert np.array_equal(constant(result.model, "table"), constant(model, "table")[KEPT])
    if not tied:
        assert np.array_equal(constant(result.model, "head"), constant(model, "head")[:, KEPT])
    old = np.array([[3, 39, 0, 17, 17]])
    fed = old if place == "graph" else np.array([[1, 7, 0, 4, 4]])
    dense = run(spa.load(model), {"ids": old})["logits"]
    assert np.allclose(run(result.model, {"ids": fed})["logits"], dense[..., KEPT], atol=1e-5)


@pytest.mark.parametrize("place", ["file", "graph"])
def test_layers_go_first(place: str) -> None:
    model = language_model(blocks=3)
    batches = [{"ids": np.random.default_rng(1).integers(0, IDS, (4, LENGTH))}]
    result = prune_vocabulary(model, KEPT, place=place, ratio=0.5, drop_layers=Depth(1, "finercut"), calibration=batches)
    (gone,) = result.plan.options["depth"]["order"]
    assert gone in {"layer0", "layer1", "layer2"}
    alone = spa.prune(model, drop_layers=Depth(1, "finercut"), calibration=batches)
    assert alone.plan.options["depth"]["order"] == [gone]
    again = spa.apply(model, result.plan)  # layers, channels and ids by one plan
    assert constant(result.model, "table").shape == (len(KEPT), WIDTH // 2)
    assert spa.storage.store.to_proto(again.model).SerializeToString() == spa.storage.store.to_proto(result.model).SerializeToString()
    by_turns = prune_vocabulary(alone.to_proto(), KEPT, place=place, ratio=0.5, calibration=batches)
    fed = {"ids": batches[0]["ids"] if place == "graph" else batches[0]["ids"] % len(KEPT)}
    assert np.allclose(run(by_turns.model, fed)["logits"], run(result.model, fed)["logits"], atol=1e-5)
    assert result.check is not None
    assert result.check.passed


def test_ids_that_are_gone_become_the_unknown_one(tmp_path: Path) -> None:
    file = tokenizer(tmp_path, "WordPiece")
    result = prune_vocabulary(language_model(), KEPT, place="graph", tokenizer=file)
    assert result.ids is not None
    unknown = json.loads(file.read_text())["model"]["vocab"]["[UNK]"]
    gone = next(i for i in range(IDS) if i not in result.ids.kept)
    same = [run(result.model, {"ids": np.full((1, LENGTH), i)})["logits"] for i in (gone, unknown)]
    assert np.array_equal(*same)


def test_one_side_alone() -> None:
    model = language_model(tied=False)
    rows = prune_vocabulary(model, KEPT, sides="input")
    assert constant(rows.model, "table").shape == (len(KEPT), WIDTH)
    assert constant(rows.model, "head").shape == (WIDTH, IDS)
    columns = prune_vocabulary(model, KEPT, sides="output")
    assert constant(columns.model, "table").shape == (IDS, WIDTH)
    assert constant(columns.model, "head").shape == (WIDTH, len(KEPT))
    assert columns.ids is not None
    assert columns.ids.fed == ()


@pytest.mark.parametrize("side", ["input", "output"])
def test_one_side_of_a_tied_table_is_refused(side: str) -> None:
    with pytest.raises(BadOption, match=r"table is both .*\(tied\).*--vocab-side both"):
        prune_vocabulary(language_model(), KEPT, sides=side)


def test_tables_of_the_same_ids_lose_the_same_rows() -> None:
    model = language_model(tied=False, second=True)
    result = prune_vocabulary(model, KEPT)
    for name in ("table", "other"):
        assert np.array_equal(constant(result.model, name), constant(model, name)[KEPT])


def test_ids_that_are_compared_stay_outside() -> None:
    model = language_model(reads_ids=True)
    with pytest.raises(BadOption, match="also read by Equal compare.*--vocab-map graph"):
        prune_vocabulary(model, KEPT)
    result = prune_vocabulary(model, KEPT, place="graph")
    assert result.check is not None
    assert result.check.passed


def test_no_ids_no_vocabulary() -> None:
    model = language_model()
    del model.graph.node[0]
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("looked", TensorProto.FLOAT, ["batch", LENGTH, WIDTH]))
    with pytest.raises(BadOption, match="no vocabulary"):
        prune_vocabulary(model, 0.5)


def test_nothing_is_promised_unless_asked_for() -> None:
    plain = analyze(language_model())
    table = next(g for g in plain.groups.groups if g.name == "table:0")
    assert table.frozen is not None
    assert "chosen by data" in str(table.frozen)
    assert "vocabulary" not in plain.settings


def test_most_frequent_ids_stay_and_special_ones() -> None:
    batch = {"ids": np.array([[5, 5, 5, 7, 7], [8, 5, 7, 5, 5]])}
    assert kept(language_model(), 3, calibration=[batch]) == [5, 7, 8]
    assert kept(language_model(), 5, calibration=[batch], special=[38]) == [0, 5, 7, 8, 38]  # equals: the lower id
    assert kept(language_model(), "used", calibration=[batch], special=[38]) == [5, 7, 8, 38]


def test_largest_rows_stay_without_data() -> None:
    model = language_model()
    norms = np.linalg.norm(constant(model, "table"), axis=1)
    assert kept(model, 0.25) == sorted(np.argsort(-norms)[:10].tolist())


def kept(model: onnx.ModelProto, keep: Any, **more: Any) -> list[int]:
    result = prune_vocabulary(model, keep, **more)
    assert result.ids is not None
    return result.ids.kept.tolist()


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ("0", "share of the ids"),
        (1.5, "share of the ids"),
        ([40], "id 40"),
        ([], "no ids"),
        ("used", "--calibration"),
        ("no.txt", "neither"),
    ],
)
def test_wishes_that_mean_nothing(keep: Any, words: str) -> None:
    with pytest.raises((BadOption, BadFile), match=words):
        prune_vocabulary(language_model(), keep)


def test_all_ids_kept_is_nothing_to_prune() -> None:
    with pytest.raises(NothingToPrune, match="all 40 ids"):
        prune_vocabulary(language_model(), 40)


def test_files_of_ids(tmp_path: Path) -> None:
    for name, text in {"a.txt": "1 2\n5", "a.json": "[1, 2, 5]", "b.json": '{"a": 1, "b": 2, "c": 5}'}.items():
        (tmp_path / name).write_text(text)
        assert read_keep(str(tmp_path / name)).ids == (1, 2, 5)
    np.save(tmp_path / "a.npy", np.array([1, 2, 5]))
    assert read_keep(str(tmp_path / "a.npy")).ids == (1, 2, 5)
    (tmp_path / "bad.txt").write_text("one two")
    with pytest.raises(BadFile, match="can't be read as ids"):
        read_keep(str(tmp_path / "bad.txt"))


def test_feeds_of_a_user_may_not_hold_ids_that_go() -> None:
    analysis = analyze(language_model(), vocabulary={})
    ids = choose_ids(analysis.groups, read_keep([1, 2, 3]))
    with pytest.raises(BadOption, match="id 9 in input 'ids'"):
        spa.apply(analysis, plan_vocabulary(analysis, ids), feeds={"ids": np.full((1, LENGTH), 9)})


def test_other_groups_shrink_as_well() -> None:
    result = prune_vocabulary(language_model(), KEPT, ratio=0.5)
    assert constant(result.model, "up").shape[1] == 8
    assert constant(result.model, "table").shape[0] == len(KEPT)
    assert result.check is not None
    assert result.check.passed


def test_configurations_follow() -> None:
    ids = prune_vocabulary(language_model(), KEPT).ids
    assert ids is not None
    old = {"vocab_size": IDS, "eos_token_id": [3, 39], "bos_token_id": 0, "pad_token_id": None, "sep_token_id": 2, "hidden_size": 8}
    new = {**old, "vocab_size": 8, "eos_token_id": [1, 7], "bos_token_id": 0, "sep_token_id": None}
    assert remapped(old, ids) == new


# ---------------------------------------------------------------------- the command line


def tokenizer(folder: Path, kind: str) -> Path:
    """A tokenizer of forty ids that knows a few words."""
    words = ["[UNK]", "[CLS]", "hello", "##lo", "he", "##ll", "##o", "world"]
    vocab = {**{w: i for i, w in enumerate(words)}, **{f"w{i}": i for i in range(len(words), IDS)}}
    post = {"type": "BertProcessing", "sep": ["[CLS]", 1], "cls": ["[CLS]", 1]}
    data = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "added_tokens": [{"id": 1, "content": "[CLS]", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                          "special": True}],
        "post_processor": post, "decoder": None,
        "model": {"type": kind, "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": vocab},
    }  # fmt: skip
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(data))
    return path


def prune(*words: Any) -> Any:
    return CliRunner().invoke(cli.app, ["prune", *map(str, words), "--no-bench"])


def test_files_beside_the_model(tmp_path: Path) -> None:
    onnx.save(language_model(), tmp_path / "model.onnx")
    onnx.save(language_model(blocks=2), tmp_path / "deep.onnx")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": IDS, "eos_token_id": 33}))
    file = tokenizer(tmp_path, "WordPiece")
    done = prune(tmp_path / "model.onnx", "--vocab", "0.25", "--tokenizer", file, "-o", tmp_path / "small.onnx")
    assert done.exit_code == 0, done.output
    assert "10 of 40 ids stay" in done.output
    found = json.loads((tmp_path / "small.vocab.json").read_text())
    old = found["old_of_new"]
    assert {0, 1, 33} <= set(old)  # unknown, added, and what the configuration names
    assert found["new_of_old"] == {str(o): n for n, o in enumerate(old)}
    assert json.loads((tmp_path / "small.config.json").read_text()) == {"vocab_size": 10, "eos_token_id": old.index(33)}
    small = json.loads((tmp_path / "small.tokenizer.json").read_text())
    assert sorted(small["model"]["vocab"].values()) == list(range(10))
    assert small["post_processor"]["sep"] == ["[CLS]", old.index(1)]
    files = [str(tmp_path / name) for name in ("model.onnx", "small.plan.json", "again.onnx")]
    both = prune(tmp_path / "deep.onnx", "--vocab", "0.25", "--drop-layers", 1, "--layers", "random", "-o", tmp_path / "both.onnx")
    assert both.exit_code == 0, both.output
    assert "10 of 40 ids stay" in both.output
    assert len(json.loads((tmp_path / "both.plan.json").read_text())["options"]["depth"]["dropped"]) == 1
    again = CliRunner().invoke(cli.app, ["apply", files[0], files[1], "-o", files[2]])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "small.onnx").read_bytes()
    assert (tmp_path / "again.vocab.json").read_bytes() == (tmp_path / "small.vocab.json").read_bytes()


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    model, out = tmp_path / "model.onnx", tmp_path / "small.onnx"
    onnx.save(language_model(), model)
    file = tokenizer(tmp_path, "WordPiece")
    data = json.loads(file.read_text())
    data["model"]["vocab"]["more"] = IDS
    other = tmp_path / "other.json"
    other.write_text(json.dumps(data))
    for words, said in (
        (("--vocab", "0.5", "--tokenizer", other), "does not match: it has 41 ids"),
        (("--vocab", "0.5", "--vocab-side", "input"), "(tied)"),
        (("--vocab", "0.5", "--target", "macs=0.5"), "prune the vocabulary first"),
        (("--vocab-map", "graph"), "say what it keeps with --vocab"),
        (("--vocab", "0.5", "--vocab-input", "nothing"), "looks up no table"),
        (("--vocab", "1", "--tokenizer", file), "are 2: ask for more"),
    ):
        done = prune(model, *words, "-o", out)
        assert done.exit_code == 2, done.output
        assert said in " ".join(done.output.split()), done.output
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "other.json", "tokenizer.json"]
