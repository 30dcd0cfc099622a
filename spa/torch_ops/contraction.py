"""Products of matrices: MatMul, Gemm, Einsum and what runtimes fuse from them."""

from __future__ import annotations

from spa.torch_ops.elementwise import dequantized, quantized, quantized_type
from spa.torch_ops.table import Call, Results, Tensor, op, table_of, torch

table_of({"MatMul": lambda a, b: torch.matmul(a, b), "Det": lambda x: torch.linalg.det(x)})


def product(call: Call) -> Tensor:
    """Alpha A B + beta C, each of A and B transposed where the attributes say so."""
    a, b, c = call[0], call[1], call[2]
    a = a.mT if call.attr("transA", 0) and a.dim() > 1 else a
    b = b.mT if call.attr("transB", 0) and b.dim() > 1 else b
    y = torch.matmul(a, b)
    if call.attr("alpha", 1.0) != 1.0:
        y = y * call.attr("alpha")
    if c is None:
        return y
    return y + c * call.attr("beta", 1.0) if call.attr("beta", 1.0) != 1.0 else y + c


@op("Gemm")
def gemm(call: Call) -> Results:
    """Alpha A B + beta C."""
    return product(call)


@op("FusedMatMul", "TransposeMatMul", domain="com.microsoft")
def fused_matmul(call: Call) -> Results:
    """Alpha A B, the last two axes of each transposed where the attributes say so."""
    if call.attr("transBatchA", 0) or call.attr("transBatchB", 0):
        raise call.refuse("a transposed batch")
    return product(call)


@op("Einsum")
def einsum(call: Call) -> Results:
    """As torch's."""
    return torch.einsum(call.attr("equation"), *call.inputs)


@op("MatMulInteger")
def matmul_integer(call: Call) -> Results:
    """(A - zero point) (B - zero point); each zero point may differ by row of A or column of B."""
    a, b = call[0].to(call.dtype), call[1].to(call.dtype)
    if call[2] is not None:
        a = a - (call[2].unsqueeze(-1) if call[2].dim() else call[2]).to(call.dtype)
    return torch.matmul(a, b if call[3] is None else b - call[3].to(call.dtype))


@op("QLinearMatMul")
def qlinear_matmul(call: Call) -> Results:
    """Quantised product, straight through."""
    y = torch.matmul(dequantized(call, call[0], call[1], call[2], -2), dequantized(call, call[3], call[4], call[5], -1))
    return quantized(call, y, call[6], call[7], quantized_type(call, 7), -1)
