"""The table against onnx's own operator cases: removing before = masking = selecting after, on two engines."""

from __future__ import annotations

from functools import cache

import onnx
import pytest
from signature_cases import Case, Outcome, by_operator, examine, onnx_cases, unusable

NEWEST = 28
"""Default opset that the table was written for; what came later is unknown to it, which freezes."""

FAMILIES = by_operator([c for c in onnx_cases() if all(o.version <= NEWEST for o in c.model.opset_import if o.domain == "")])

SKIPPED = {
    "an input holds strings": """
        ai_onnx_ml_label_encoder_string_int ai_onnx_ml_label_encoder_string_int_no_default ai_onnx_ml_label_encoder_tensor_mapping
        ai_onnx_ml_label_encoder_tensor_value_only_mapping equal_string equal_string_broadcast regex_full_match_basic
        regex_full_match_email_domain regex_full_match_empty string_concat string_concat_broadcasting string_concat_empty_string
        string_concat_utf8 string_concat_zero_dimensional string_split_basic string_split_consecutive_delimiters
        string_split_empty_string_delimiter string_split_empty_tensor string_split_maxsplit string_split_no_delimiter
        strnormalizer_export_monday_casesensintive_lower strnormalizer_export_monday_casesensintive_nochangecase
        strnormalizer_export_monday_casesensintive_upper strnormalizer_export_monday_empty_output
        strnormalizer_export_monday_insensintive_upper_twodim strnormalizer_nostopwords_nochangecase""",
    "an input is a sequence or optional": """
        identity_opt identity_sequence loop13_seq loop16_seq_none optional_get_element_optional_sequence
        optional_get_element_optional_tensor optional_get_element_sequence optional_has_element_empty_optional_input
        optional_has_element_optional_input optional_has_element_tensor_input sequence_insert_at_back sequence_insert_at_front
        sequence_map_add_1_sequence_1_tensor sequence_map_add_1_sequence_1_tensor_expanded sequence_map_add_2_sequences
        sequence_map_add_2_sequences_expanded sequence_map_extract_shapes sequence_map_extract_shapes_expanded
        sequence_map_identity_1_sequence sequence_map_identity_1_sequence_1_tensor sequence_map_identity_1_sequence_1_tensor_expanded
        sequence_map_identity_1_sequence_expanded sequence_map_identity_2_sequences sequence_map_identity_2_sequences_expanded""",
    "an output is a sequence or optional": """
        if_opt if_seq split_to_sequence_1 split_to_sequence_2 split_to_sequence_nokeepdims""",
}
"""Cases that can't be run with initializers for inputs, and why; by name without "test_"."""

SHRINKS = """
    Abs:1 Acos:2 Acosh:2 Add:8 And:8 ArgMax:16 ArgMin:16 Asin:2 Asinh:2 Atan:2 Atanh:2 Attention:92 AveragePool:9 BatchNormalization:2
    Bernoulli:3 Binarizer:1 BitCast:9 BitShift:28 BitwiseAnd:4 BitwiseNot:3 BitwiseOr:4 BitwiseXor:4 Cast:116
    CausalConvWithState:12 CastLike:56
    Ceil:2 Celu:3
    Clip:12 Col2Im:1 Compress:4 Concat:12 Constant:1 ConstantOfShape:2 ConvTranspose:10 Cos:2 Cosh:2 CumProd:4 CumSum:4 DepthToSpace:2
    DequantizeLinear:14 Div:10 Dropout:12 Einsum:8 Elu:3 Equal:8 Erf:1 Exp:2 Expand:2 Flatten:9 Floor:2 GRU:6 Gather:4 GatherElements:3
    GatherND:2 Gelu:4 Gemm:11 GlobalAveragePool:2 GlobalMaxPool:2 Greater:8 GreaterOrEqual:8 GroupNormalization:2 HardSigmoid:3
    HardSwish:1 Hardmax:7 Identity:3 InstanceNormalization:2 IsInf:4 IsNaN:2 LRN:2 LSTM:6 LayerNormalization:19 LeakyRelu:3 Less:8
    LessOrEqual:8 Log:2 LogSoftmax:7 LpNormalization:6 LpPool:7 MatMul:7 Max:14 MaxPool:7 Mean:3 MeanVarianceNormalization:1 Min:14
    Mish:1 Mod:19 Mul:9 Neg:2 Not:3 Or:8 PRelu:2 Pad:6 Pow:12 QuantizeLinear:13 RMSNormalization:19 RNN:6 Reciprocal:2 ReduceL1:9
    ReduceL2:9 ReduceLogSum:5 ReduceLogSumExp:9 ReduceMax:11 ReduceMean:8 ReduceMin:10 ReduceProd:9 ReduceSum:12 ReduceSumSquare:9
    Relu:1 Reshape:7 RotaryEmbedding:8 Round:1 Scatter:1 ScatterElements:1 ScatterND:5 Selu:3 Shrink:2 Sigmoid:2 Sign:1 Sin:2
    Sinh:2 Slice:7 Softmax:7 Softplus:2 Softsign:2 SpaceToDepth:3 Split:14 Sqrt:2 Squeeze:2 Sub:9 Sum:3 SwiGLU:3 Swish:1 Tan:2
    Tanh:2 TensorScatter:3 ThresholdedRelu:3 Tile:2 TopK:5 Transpose:7 Trilu:7 Unsqueeze:7 Where:2 Xor:8 attention*:93 bernoulli*:3
    causal*:13 celu*:3 center*:6 clip*:10 depthtospace*:2 dynamicquantizelinear*:3 elu*:3 flexattention*:11 gelu*:4 greater*:8 group*:2
    hardsigmoid*:3 hardswish*:1 layer*:38 leakyrelu*:3 less*:8 linear*:14 logsoftmax*:14 mish*:1 mvn*:2 nllloss*:9 prelu*:2 reduce*:41
    relu*:1 rms*:19 rotary*:8 selu*:3 shrink*:2 softmax*:14 softplus*:2 softsign*:2 spacetodepth*:4 swiglu*:3 swish*:1
    thresholdedrelu*:3"""
"""Operators with the number of cases in which something can be removed; * = several nodes, the operator expanded."""

NEVER = {
    "its positions or sizes depend on data": """AffineGrid BlackmanWindow CenterCropPad DFT Det EyeLike HammingWindow HannWindow
        ImageDecoder MelWeightMatrix NonMaxSuppression NonZero OneHot Range RegexFullMatch STFT StringConcat StringNormalizer
        StringSplit TfIdfVectorizer Unique affine* blackmanwindow* hammingwindow* hannwindow* range*""",
    "the size that they read is the output of the graph": "Shape Size",
    "it has a body": "FlexAttention If Loop Scan SequenceMap sequence*",
    "sequences or optional values": "OptionalGetElement OptionalHasElement SequenceInsert SplitToSequence",
    "zero points": "ConvInteger DynamicQuantizeLinear MatMulInteger QLinearConv QLinearMatMul",
    "training": "Adagrad Adam Momentum NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss sce*",
    "classical machine learning": "ArrayFeatureExtractor LabelEncoder TreeEnsemble",
    "its indices count through all channels": "MaxUnpool",
    "its state is carried from step to step": "LinearAttention",
    "its cases have one channel; see test_signatures_more": """Conv DeformConv GridSample Resize ReverseSequence
        RoiAlign Upsample""",
}
"""Operators of which no case can lose anything, and why."""


@cache
def outcomes(family: str) -> dict[tuple[str, bool], Outcome]:
    """Each case with all inputs as initializers (True), and with integers as graph inputs (False) where there are any."""
    found = {}
    for case in FAMILIES[family]:
        found[case.name, True] = examine(case)
        if not unusable(case) and any(a.dtype.kind in "iub" for a in case.inputs if hasattr(a, "dtype")):
            found[case.name, False] = examine(case, whole_numbers=False)
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_removing_equals_masking_equals_selecting(family: str) -> None:
    problems = [p for outcome in outcomes(family).values() for p in outcome.problems]
    assert not problems, "\n".join(problems[:20])
    check_that_nothing_was_passed_over(family)


def check_that_nothing_was_passed_over(family: str) -> None:
    listed = {f"test_{name}": why for why, names in SKIPPED.items() for name in names.split()}
    cases = [c.name for c in FAMILIES[family]]
    skipped = {name: o.skipped for (name, whole), o in outcomes(family).items() if whole and o.skipped}
    assert skipped == {n: why for n, why in listed.items() if n in cases}
    shrunk = sum(o.groups > 0 for (name, whole), o in outcomes(family).items() if whole and not o.skipped)
    family = family.replace(" expanded", "*")
    floors = dict(item.split(":") for item in SHRINKS.split())
    never = {op for ops in NEVER.values() for op in ops.split()}
    assert (family in floors) != (family in never), f"{family} is new: enter it into SHRINKS ({shrunk} cases) or NEVER"
    assert shrunk >= int(floors.get(family, 0)), "an axis that could lose positions no longer can"
    assert family in floors or not shrunk, f"{family} can lose positions now: enter it into SHRINKS ({shrunk} cases)"


def test_a_wrong_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: a softmax whose axis is said to be MAP must fail."""
    from spa.signatures.table import _TABLE, make

    monkeypatch.setitem(_TABLE, ("", "Softmax"), lambda node: make(node, "*a -> *a"))
    case: Case = next(c for c in onnx_cases() if c.name == "test_softmax_axis_1")
    assert examine(case).problems


def test_both_engines_run() -> None:
    engines = [o.engines for o in outcomes("Gemm").values() if o.groups]
    assert engines
    assert all(e == ["onnxruntime", "reference"] for e in engines), onnx.__version__
