"""Quantisation, what is read as data, and operators with a signature that only freezes (with the true cause)."""

from __future__ import annotations

from spa.signatures.elementwise import alias, spread
from spa.signatures.table import (
    FIXED,
    MAP,
    Dim,
    NodeView,
    One,
    Operand,
    Product,
    Refusal,
    Signature,
    axis_of,
    make,
    signature,
)


@signature("QuantizeLinear", "DequantizeLinear")
def quantize(node: NodeView) -> Signature | Refusal:
    """Scale and zero point: one for all, one a position of an axis, or one a block of it."""
    shape = node.inputs[0]
    scale = node.inputs[1]
    if shape is None or scale is None:
        return Refusal("its shape is unknown")
    names = [f"a.{i}" for i in range(len(shape))]
    terms: Operand = tuple(map(Dim, names))
    axis = min(axis_of(node, 1, len(shape)), len(shape) - 1) if shape else 0
    block = int(node.attrs.get("block_size", 0))
    if block and len(scale) == len(shape):
        if shape[axis] % block:
            return Refusal("its last block is not full")
        parts = Product((Dim("q"), Dim("block")))
        terms = tuple(parts if i == axis else Dim(n) for i, n in enumerate(names))
        blocks = tuple(Dim("q" if i == axis else n) for i, n in enumerate(names))
        return Signature((terms, blocks, blocks), (terms,), {"block": FIXED}, {"block": "shares one scale"}, {"q": scale[axis]})

    def small(own: tuple[int, ...] | None) -> Operand:  # scale and zero point need not have one shape where both are for all
        if own is not None and len(own) == 1:
            return (One(),) if own[0] == 1 and shape[axis] != 1 else (Dim(names[axis]),)
        return spread(own, shape) if own else None

    zero = small(node.inputs[2]) if len(node.inputs) > 2 and node.present[2] else None
    return Signature((terms, small(scale), zero), (terms,))


@signature("RoiAlign", "MaxRoiPool")
def roi(node: NodeView) -> Signature | Refusal:
    """Each channel alone."""
    return make(node, "n c h w, r z, - -> r c p q", n=FIXED, h=FIXED, w=FIXED, r=FIXED, z=FIXED, p=FIXED, q=FIXED)


@signature("GridSample")
def grid_sample(node: NodeView) -> Signature | Refusal:
    """Each channel alone."""
    return make(node, "n c *s, n *t z -> n c *t", s=FIXED, t=FIXED, z=FIXED)


@signature("MaxUnpool")
def max_unpool(node: NodeView) -> Signature | Refusal:
    """Indices count through all channels."""
    return Refusal("its indices count through all channels")


@signature("Scaler", "Imputer", "Normalizer", domain="ai.onnx.ml")
def features(node: NodeView) -> Signature | Refusal:
    """Attributes hold one number a feature."""
    return make(node, "b f -> b f", f=FIXED, causes={"f": "its attributes hold one number a feature"})


CAUSES = {
    "its positions or sizes depend on data": """NonZero OneHot NonMaxSuppression Range EyeLike RandomNormal RandomUniform
        Multinomial Det Unique StringNormalizer TfIdfVectorizer AffineGrid BlackmanWindow HannWindow HammingWindow
        MelWeightMatrix DFT STFT CenterCropPad ImageDecoder StringConcat StringSplit RegexFullMatch""",
    "its body is a graph of its own, which is not pruned": "If Loop Scan SequenceMap",
    "it handles sequences or optional values": """SequenceConstruct SequenceAt SequenceInsert SequenceErase SequenceEmpty
        SequenceLength ConcatFromSequence SplitToSequence Optional OptionalGetElement OptionalHasElement""",
    "its terms have zero points that a removed channel would change": """QLinearConv QLinearMatMul ConvInteger
        MatMulInteger DynamicQuantizeLinear""",
    "its state is carried from step to step": "LinearAttention",
    "it is a loss": "SoftmaxCrossEntropyLoss NegativeLogLikelihoodLoss",
}
MICROSOFT = """MatMulBnb4 QAttention QLinearAdd QLinearMul QLinearConv QLinearGlobalAveragePool
QLinearSigmoid QLinearLeakyRelu QLinearConcat QLinearAveragePool QLinearSoftmax QGemm NhwcFusedConv
DynamicQuantizeMatMul MatMulIntegerToFloat SkipGroupNorm GroupNorm NhwcConv NhwcMaxPool
SparseAttention LinearAttention CausalConvWithState
BifurcationDetector BeamSearch GreedySearch Sampling NGramRepeatBlock Irfft Rfft DynamicQuantizeLSTM
QOrderedMatMul RelativePositionBias GatedRelativePositionBias""".split()
LEARNED = """LinearClassifier LinearRegressor TreeEnsembleClassifier TreeEnsembleRegressor TreeEnsemble SVMClassifier
SVMRegressor LabelEncoder OneHotEncoder ZipMap ArrayFeatureExtractor FeatureVectorizer CategoryMapper CastMap
DictVectorizer""".split()


def _frozen(cause: str, domain: str, ops: list[str]) -> None:
    signature(*ops, domain=domain)(lambda node: Refusal(cause))


for _cause, _ops in CAUSES.items():
    _frozen(_cause, "", _ops.split())
_frozen("this fused operator has no signature yet", "com.microsoft", MICROSOFT)
_frozen("its body is a graph of its own, which is not pruned", "ai.onnx.preview", ["FlexAttention"])
_frozen("it is a step of training", "ai.onnx.preview.training", ["Adagrad", "Adam", "Gradient", "Momentum"])
_frozen("it is an operator of classical machine learning, whose attributes hold the parameters", "ai.onnx.ml", LEARNED)

for _op in ["Gelu", "FastGelu", "QuickGelu", "Trilu", "Inverse"]:
    if _op == "Trilu":
        alias("com.microsoft", _op, "Trilu")
signature("Gelu", "QuickGelu", domain="com.microsoft", pattern="*a -> *a", a=MAP)


@signature("BiasGelu", "FastGelu", "BiasAdd", domain="com.microsoft")
def biased(node: NodeView) -> Signature | Refusal:
    """A bias spread over the last axis, then an element-wise function."""
    shape = node.inputs[0]
    if shape is None:
        return Refusal("its shape is unknown")
    whole = spread(shape, shape)
    return Signature(tuple(spread(s, shape) if s is not None else None for s in node.inputs), (whole,))
