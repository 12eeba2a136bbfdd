"""Products of prompts and of steps of many rows with quantized matrices.

Each is quantized rows (`row_quant`) times a matrix as it is stored: `tiled_gemm`, or torch's own
8-bit product where that is faster. What neither takes is dequantized and multiplied by torch:
kinds that pre-quantized checkpoints have, models in float32, GPUs without the instructions, and
int4 weights of so many rows that reading them back costs little beside the product. A batch with
memory to spare has dequantized them before (`keep_dense`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwencli.engine.kernels.add_norm import AddNorm
from qwencli.engine.kernels.dequantize import dequantize, is_kept_dense
from qwencli.engine.kernels.launches import gpu_of
from qwencli.engine.kernels.row_quant import QuantizedRows, RowFormat, quantize_rows
from qwencli.engine.kernels.swiglu import swiglu
from qwencli.engine.kernels.tiled_gemm import TiledGemm
from qwencli.engine.kernels.tiles import (
    MOST_INT4_ROWS,
    MOST_INT4_ROWS_BESIDE_DENSE,
    product_tiles,
    scaled_mm_is_faster,
)
from qwencli.engine.ops.decoder_ops import Layer, Matrix, Products, RMSNorm, dense, head_logits
from qwencli.engine.quant.quantized_tensor import QuantizedTensor, Scheme

Tensor = torch.Tensor
FORMATS = {
    Scheme.FP8: RowFormat.FP8,
    Scheme.INT8: RowFormat.INT8,
    Scheme.INT4: RowFormat.FLOAT16,
}
# Columns enough for an instruction, and no more than a step of `tiled_gemm` has.
INT4_GROUPS = (32, 64, 128)
# Of both sides of a matrix that torch multiplies in fp8.
ALIGNED = 16


@dataclass(frozen=True)
class Capability:
    """What products of many rows ask of a device.

    Args:
        fp8: whether it multiplies fp8. on_gpu: not in the interpreter.
    """

    num_processors: int
    fp8: bool
    on_gpu: bool

    @classmethod
    def of(cls, device: torch.device) -> Capability:
        gpu = gpu_of(device)
        if gpu is None:  # Triton's interpreter
            return cls(num_processors=2, fp8=True, on_gpu=False)
        return cls(gpu.num_processors, gpu.fp8, on_gpu=True)


class ManyRows:
    """`Products` that multiply quantized matrices as they are stored.

    Results are those of `decoder_ops` but for the rounding of activations.
    """

    def __init__(self, device: torch.device) -> None:
        self._capability = Capability.of(device)
        self._gemm = TiledGemm.on(device)
        self._add_norm = AddNorm()

    def products(self) -> Products:
        return Products(
            norm_qkv=self.norm_qkv,
            o_residual=self.o_residual,
            norm_gate_up=self.norm_gate_up,
            down_residual=self.down_residual,
            norm_head=self.norm_head,
            norm_beta_decay=self.norm_beta_decay,
            normed=self.normed,
        )

    def normed(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """norm(x), in one kernel whatever type its weight has; torch's own takes twice as long for
        the rows of a step."""
        if not self._capability.on_gpu:
            return norm(x)
        return self._add_norm(x.contiguous(), None, norm.weight, None, norm.eps)

    def norm_beta_decay(self, hidden: Tensor, layer: Layer) -> Tensor:
        assert layer.beta_decay is not None, "a layer with a gated delta net"
        return torch.mm(self.normed(hidden, layer.attn_norm), layer.beta_decay)

    def norm_qkv(self, hidden: Tensor, layer: Layer) -> Tensor:
        return self.product(hidden, layer.qkv, norm=layer.attn_norm, bias=layer.qkv_bias)

    def o_residual(self, attended: Tensor, layer: Layer, hidden: Tensor) -> Tensor:
        return self.product(attended, layer.o, bias=layer.o_bias, onto=hidden)

    def norm_gate_up(self, hidden: Tensor, layer: Layer) -> Tensor:
        """As it is multiplied, [N, 2 I]: `down_residual` applies SwiGLU with its rounding."""
        return self.product(hidden, layer.gate_up, norm=layer.mlp_norm)

    def down_residual(self, activated: Tensor, layer: Layer, hidden: Tensor) -> Tensor:
        return self.product(activated, layer.down, onto=hidden, gated=True)

    def norm_head(self, hidden: Tensor, norm: RMSNorm, head: Matrix) -> Tensor:
        kept = isinstance(head, QuantizedTensor) and is_kept_dense(head)
        if self._format(head, hidden) is None and not kept:
            return head_logits(self.normed(hidden, norm), head, dequantize)
        return self.product(hidden, head, norm=norm)

    def _format(self, matrix: Matrix, x: Tensor) -> RowFormat | None:
        """How rows of `x` are quantized for a product with `matrix`; None = the matrix is read
        back."""
        if isinstance(matrix, Tensor) or x.dtype is torch.float32:
            return None
        if matrix.g_idx_sort_indices is not None or matrix.codebook is not None:
            return None
        if matrix.scheme is Scheme.INT4:
            most = MOST_INT4_ROWS_BESIDE_DENSE if is_kept_dense(matrix) else MOST_INT4_ROWS
            few = len(x) <= most and matrix.group in INT4_GROUPS
            return RowFormat.FLOAT16 if few else None
        lacks = matrix.scheme is Scheme.FP8 and not self._capability.fp8
        if not matrix.scaled_by_row or lacks:
            return None
        return FORMATS.get(matrix.scheme)

    def product(
        self,
        x: Tensor,
        matrix: Matrix,
        norm: RMSNorm | None = None,
        bias: Tensor | None = None,
        onto: Tensor | None = None,
        gated: bool = False,
    ) -> Tensor:
        """matrix norm(x) + bias, new, or added to `onto`; with `gated` of SwiGLU of x."""
        row_format = self._format(matrix, x)
        if row_format is None:
            if norm is not None:
                x = self.normed(x, norm)
            return _dequantized_product(swiglu(x) if gated else x, matrix, bias, onto)
        assert isinstance(matrix, QuantizedTensor), "others have no format"
        rows = quantize_rows(x, row_format, norm, gated)
        if row_format is RowFormat.FP8 and self._by_torch(rows, matrix, x):
            y = scaled_mm(rows, matrix)
            if bias is not None:
                y += bias
            return y if onto is None else onto.add_(y)
        y = x.new_empty(len(x), matrix.rows) if onto is None else onto
        tiles = product_tiles(
            row_format.name,
            matrix.rows,
            matrix.columns,
            len(x),
            self._capability.num_processors,
        )
        self._gemm(rows, matrix, y, tiles, bias, add=onto is not None)
        return y

    def _by_torch(self, rows: QuantizedRows, matrix: QuantizedTensor, x: Tensor) -> bool:
        aligned = matrix.rows % ALIGNED == 0 and matrix.columns % ALIGNED == 0
        takes = (
            self._capability.on_gpu
            and x.dtype is torch.bfloat16
            and matrix.scale.dtype is torch.float32
        )
        return aligned and takes and scaled_mm_is_faster(matrix.rows, len(rows))


def scaled_mm(x: QuantizedRows, matrix: QuantizedTensor) -> Tensor:
    return torch._scaled_mm(
        x.values,
        matrix.data.t(),
        scale_a=x.scale[:, None],
        scale_b=matrix.scale[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _dequantized_product(
    x: Tensor, matrix: Matrix, bias: Tensor | None, onto: Tensor | None
) -> Tensor:
    weight = dense(matrix, x, dequantize)
    if onto is not None:
        onto.addmm_(x, weight)
        return onto if bias is None else onto.add_(bias)
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
