"""`DecoderOps` of a decode step as five Triton kernels a layer.

A step has up to `MAX_BATCH_ROWS` rows: several tokens of one sequence, one token each of several
sequences, or both, if they are equally long; each weight is read once for all of them. Attention
over pages, and the end of a step, are kernels of any number of rows. Each kernel is held
to `REFERENCE_OPS` by a parity test. Results go to buffers that all layers share, so a step
allocates nothing. Where the GPU can launch a kernel before the one in front has
ended (compute capability 9.0 and later), every kernel here is launched so, and waits before it
reads what others wrote.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from qwencli.engine.cache.kv_cache import QuantizedKVCache, StaticKVCache
from qwencli.engine.cache.paged_kv import (
    PAGE_SIZE,
    DecodePages,
    PagedKVCache,
    QuantizedPagedKVCache,
)
from qwencli.engine.kernels.activation_buffers import (
    BLOCK_WORDS,
    ActivationBuffers,
    ActivationConsumer,
    activation_bits,
    word_format,
)
from qwencli.engine.kernels.activation_quant import ActivationFormat
from qwencli.engine.kernels.add_norm import AddNorm
from qwencli.engine.kernels.chunked_delta import ChunkedDelta
from qwencli.engine.kernels.decode_attention import decode_attention_kernel
from qwencli.engine.kernels.dequantize import dequantize
from qwencli.engine.kernels.flash_attention import flash_attention_for
from qwencli.engine.kernels.gated_delta import DeltaStep, adopt_accepted, runs_in_registers
from qwencli.engine.kernels.gemv import gemv_kernel
from qwencli.engine.kernels.gemv_quantized import gemv_quantized_kernel
from qwencli.engine.kernels.greedy_step import (
    LIKELIEST_BLOCK,
    LIKELIEST_WARPS,
    MOST_PARTS,
    NOTHING_CHOSEN,
    finish_token_kernel,
    likeliest_kernel,
    verify_drafts_kernel,
)
from qwencli.engine.kernels.launches import gpu_of
from qwencli.engine.kernels.many_rows import ManyRows
from qwencli.engine.kernels.moe import ExpertKernels
from qwencli.engine.kernels.qk_norm_rope import QkNormRope, QkNormRopeStore
from qwencli.engine.kernels.skinny_gemm import Epilogue, SkinnyGemm
from qwencli.engine.kernels.swiglu import swiglu
from qwencli.engine.kernels.tiles import (
    AttentionTiles,
    GemvTiles,
    MatrixKind,
    Storage,
    attention_tiles,
    default_tiles,
)
from qwencli.engine.ops.decoder_ops import (
    REFERENCE_OPS,
    DecoderOps,
    Drafts,
    Layer,
    Matrix,
    RMSNorm,
    SamplingBuffers,
    Step,
    dense,
    mix_delta,
)
from qwencli.engine.ops.gated_delta import delta_prefill
from qwencli.engine.ops.next_tokens import RowBuffers
from qwencli.engine.quant.quantized_tensor import LARGEST, QuantizedTensor, Scheme
from qwencli.engine.spec_decode.ngram import LONGEST_NGRAM, MAX_VERIFY_TOKENS
from qwencli.models.shapes import TextShape

Tensor = torch.Tensor
TileChoice = Callable[[MatrixKind], GemvTiles]
# How attention of so many rows that share a pool of pages is cut up.
RowTileChoice = Callable[[int], AttentionTiles]

SMALLEST_HEAD_DIM = 32  # half a head is an operand of a matrix unit
MAX_BATCH_ROWS = MAX_VERIFY_TOKENS


@dataclass(frozen=True)
class Launch:
    """What every launch on one device shares.

    Args:
        dependent: whether a kernel can be launched before the one in front has ended.
        fp8: whether instructions convert e4m3. on_gpu: not in the interpreter.
    """

    num_processors: int
    dependent: bool
    fp8: bool
    on_gpu: bool

    @classmethod
    def on(cls, device: torch.device) -> Launch:
        gpu = gpu_of(device)
        if gpu is None:  # Triton's interpreter
            return cls(num_processors=2, dependent=False, fp8=False, on_gpu=False)
        return cls(gpu.num_processors, gpu.dependent, gpu.fp8, on_gpu=True)

    def options(self, num_warps: int) -> dict[str, Any]:
        dependent = {"launch_pdl": True} if self.dependent else {}
        return {"PDL": self.dependent, "num_warps": num_warps, **dependent}


@dataclass(frozen=True)
class _Parts:
    """What programs leave of parts of sequences for the last of them, see
    `decode_attention_kernel`."""

    sums: Tensor
    row_max: Tensor
    row_sum: Tensor
    semaphore: Tensor


class FusedOps:
    """The kernels' buffers and launches.

    Args:
        angles: [positions, 2, D], `Rope.rows`.
        tiles_of: how each kind of matrix is cut up.
    """

    def __init__(
        self,
        shape: TextShape,
        angles: Tensor,
        dtype: torch.dtype,
        device: torch.device,
        tiles_of: TileChoice = default_tiles,
    ) -> None:
        def buffer(*size: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(size, dtype=of, device=device)

        kv_heads, dim, delta = shape.num_kv_heads, shape.head_dim, shape.delta
        self._launch = Launch.on(device)
        self._angles = angles
        self._tiles_of = tiles_of
        queries = 2 * shape.q_size if shape.gated_attention else shape.q_size
        widths = [queries + 2 * shape.kv_size]
        if delta is not None:
            widths += [delta.conv_dim + delta.value_dim, 2 * delta.num_v_heads]
        # What projections make, by how wide it is.
        self._projected = {width: buffer(MAX_BATCH_ROWS, width) for width in widths}
        self._attended = buffer(MAX_BATCH_ROWS, shape.q_size)
        self._activated = buffer(MAX_BATCH_ROWS, shape.intermediate_size)
        self._logits = buffer(MAX_BATCH_ROWS, shape.vocab_size, of=torch.float32)
        self._best = torch.full((MAX_BATCH_ROWS,), NOTHING_CHOSEN, dtype=torch.int64, device=device)
        self._heads = triton.next_power_of_2(shape.group_size)
        self._exact = dtype == torch.float32
        processors = self._launch.num_processors
        self._tiles = attention_tiles(kv_heads, processors, self._exact, 1, dim)
        self._dim = dim
        parts = MAX_BATCH_ROWS * kv_heads * self._tiles.splits * self._heads
        self._parts = self._make_parts(MAX_BATCH_ROWS * kv_heads, parts, device)
        # Of more rows, when they are first asked for; graphs have their addresses.
        self._more_parts: dict[tuple[int, int], _Parts] = {}
        self._more_best: dict[int, Tensor] = {}
        # As if nothing had been seen.
        self._no_penalty = torch.ones(1, device=device)
        self.row_tiles_of: RowTileChoice = functools.cache(
            lambda rows: attention_tiles(kv_heads, processors, self._exact, rows, dim)
        )
        # tl.dot would round float32 operands to TF32 otherwise.
        self._precision = "ieee" if self._exact else "tf32"
        longest = max(shape.hidden_size, shape.q_size, shape.intermediate_size)
        if delta is not None:
            longest = max(longest, delta.value_dim)
        self._delta = DeltaStep(self._launch.options)
        self._states_in_registers = delta is None or runs_in_registers(
            delta.k_head_dim, delta.v_head_dim
        )
        self._activations = ActivationBuffers(longest, dtype, device, self._launch.options)
        self._experts = ExpertKernels(MAX_BATCH_ROWS, device, self._launch.options, self._precision)
        # The interpreter takes seconds for what a prompt multiplies.
        multiplies = self._launch.on_gpu and not self._exact
        self._many_rows = ManyRows(device).products() if multiplies else None
        flash = functools.partial(flash_attention_for, device, dtype)
        self._attend_prompts = flash(dim, causal=True)
        self._attend_segments = functools.partial(flash, causal=False)
        self._delta_prefill = ChunkedDelta() if multiplies else delta_prefill
        self._skinny_gemm = SkinnyGemm(
            self._best, longest, tiles_of, self._launch.options, self._precision
        )

    def ops(self, own_attention: bool) -> DecoderOps:
        """All kernels, or all but attention, which then stays with the step's own."""
        fused = DecoderOps(
            norm_qkv=self.norm_qkv,
            o_residual=self.o_residual,
            norm_gate_up=self.norm_gate_up,
            down_residual=self.down_residual,
            norm_head=self.norm_head,
            experts_residual=self._experts.few,
            many_experts=self._experts.many,
            lm_head_argmax=self.lm_head_argmax,
            lm_head_verify=self.lm_head_verify,
            lm_head_rows=self.lm_head_rows,
            choose_likeliest=self.choose_likeliest,
            advance_rows=self.advance_rows,
            verify_rows=self.verify_rows,
            activation_bits=activation_bits,
            dequantize=dequantize,
            qk_norm_rope_store=QkNormRopeStore(),
            apply_rope=QkNormRope(),
            add_norm=AddNorm(),
            swiglu=swiglu,
            norm_beta_decay=self.norm_beta_decay,
            mix_delta=self.mix_delta,
            many_rows=self._many_rows,
            normed=REFERENCE_OPS.normed if self._many_rows is None else self._many_rows.normed,
            max_batch_rows=MAX_BATCH_ROWS,
        )
        if self._states_in_registers:
            fused = replace(fused, adopt_accepted=adopt_accepted)
        if not own_attention:
            return fused
        return replace(
            fused,
            attend=self.attend,
            kv_len_on_device=True,
            attend_rows=self.attend_rows,
            attend_prompts=self._attend_prompts,
            attend_segments=self._attend_segments,
        )

    def projected(self, matrix: Matrix, hidden: Tensor) -> Tensor:
        """Where the product of a projection with so many hidden states goes."""
        width = matrix.shape[1] if isinstance(matrix, torch.Tensor) else matrix.rows
        return self._projected[width][: len(hidden)]

    def norm_qkv(self, hidden: Tensor, layer: Layer) -> Tensor:
        qkv = self.projected(layer.qkv, hidden)
        self._gemv(hidden, ActivationConsumer(layer.attn_norm, layer.qkv), qkv, bias=layer.qkv_bias)
        return qkv

    def norm_beta_decay(self, hidden: Tensor, layer: Layer) -> Tensor:
        assert layer.beta_decay is not None, "a layer with a gated delta net"
        made = self.projected(layer.beta_decay, hidden)
        self._gemv(hidden, ActivationConsumer(layer.attn_norm, layer.beta_decay), made)
        return made

    def mix_delta(self, projected: Tensor, beta_decay: Tensor, layer: Layer, step: Step) -> Tensor:
        """States of other sizes than the kernels have registers for by operators."""
        if not self._states_in_registers:
            return mix_delta(projected, beta_decay, layer, step)
        own = self._delta.decode, self._delta_prefill, self._delta.verify
        return mix_delta(projected, beta_decay, layer, step, *own)

    def attend(self, qkv: Tensor, layer: Layer, step: Step) -> Tensor:
        return self._attend(qkv, layer, step, self._tiles)

    def attend_rows(self, qkv: Tensor, layer: Layer, step: Step) -> Tensor:
        """`attend` over a pool of pages; any number of rows."""
        return self._attend(qkv, layer, step, self.row_tiles_of(step.batch))

    def _attend(self, qkv: Tensor, layer: Layer, step: Step, tiles: AttentionTiles) -> Tensor:
        """By `tiles` of how the cache is cut up; what the kernel makes goes into its tensors."""
        assert isinstance(step.cache, StaticKVCache | PagedKVCache), "another has none to write to"
        cache = scales = step.cache.layers[layer.index]
        kv_max = 0
        if isinstance(step.cache, QuantizedKVCache | QuantizedPagedKVCache):
            scales, kv_max = step.cache.scales[layer.index], LARGEST[step.cache.scheme]
            cache = cache.view(torch.int8)
        pages = step.pages if isinstance(step.pages, DecodePages) else None
        norm = layer.qk_norm
        gains = qkv if norm is None else norm.weight
        each = tiles.tokens_each(self._heads, step.length)
        query_tiles, lanes = triton.cdiv(step.length, each), self._heads * each
        splits = tiles.splits_for(query_tiles)
        words = kv_max > 0 and pages is None and not self._exact and tiles.fits_words(lanes)
        block = tiles.block_for(kv_max > 0)
        if words:
            block = tiles.block_in_words(lanes, layer.head_dim)
        few, one = len(qkv) <= MAX_BATCH_ROWS, len(qkv) == 1
        if few:
            attended = self._attended[: len(qkv)]
        else:
            attended = torch.empty_like(qkv[:, : layer.num_heads * layer.head_dim])
        consumer = ActivationConsumer(None, layer.o)
        output = self._activations.output_for(consumer if one else None, layer.head_dim, 0)
        several = self._skinny_gemm.ready
        ready = several.output_for_heads(
            consumer if few and not one else None, attended, layer.head_dim
        )
        values, units, starts, _ = ready.buffers
        programs = step.batch * layer.num_kv_heads * query_tiles
        parts = self._parts_of(programs, programs * splits * lanes)
        decode_attention_kernel[programs, splits](
            qkv,
            gains[0],
            gains[0] if norm is None else gains[layer.num_heads],
            self._angles,
            step.positions,
            cache,
            scales,
            step.slots if pages is None else pages.places,
            step.slots if pages is None else pages.tables,
            attended,
            parts.sums,
            parts.row_max,
            parts.row_sum,
            parts.semaphore,
            output.values if one else values,
            output.steps,
            units,
            starts,
            0 if pages is not None else cache.shape[2],
            0 if pages is None else pages.tables.stride(0),
            0.0 if norm is None else norm.eps,
            KVH=layer.num_kv_heads,
            GROUP=layer.num_heads // layer.num_kv_heads,
            D=layer.head_dim,
            ROTARY=layer.rotary_dim or layer.head_dim,
            GATED=layer.gated,
            HEADS=self._heads,
            TOKENS=step.length,
            EACH=each,
            PAGE=0 if pages is None else PAGE_SIZE,
            BLOCK=block,
            KV_IN_WORDS=words,
            SPLITS=splits,
            SHORTEST=max(tiles.shortest, block),
            NORM=norm is not None,
            KV_MAX=kv_max,
            PRECISION=self._precision,
            ACT_FORMAT=int(output.act_format if one else ready.layout.act_format),
            ACT_GROUP=output.span,
            IN_CHUNKS=not one,
            RUN=ready.layout.run,
            AT_ONCE=tiles.parts_at_once(lanes, layer.head_dim, splits),
            WARPS=tiles.warps_for(lanes),
            **self._launch.options(tiles.warps_for(lanes)),
        )
        if one:
            self._activations.commit(attended, output)
        elif few:
            several.commit(attended, ready)
        return attended

    def o_residual(self, attended: Tensor, layer: Layer, hidden: Tensor) -> Tensor:
        after = None
        if layer.routing is None:
            after = ActivationConsumer(layer.mlp_norm, layer.gate_up)
        self._gemv(
            attended,
            ActivationConsumer(None, layer.o),
            hidden,
            after=after,
            bias=layer.o_bias,
            add=True,
        )
        return hidden

    def norm_gate_up(self, hidden: Tensor, layer: Layer) -> Tensor:
        activated = self._activated[: len(hidden)]
        consumer, after = (
            ActivationConsumer(layer.mlp_norm, layer.gate_up),
            ActivationConsumer(None, layer.down),
        )
        self._gemv(hidden, consumer, activated, after=after, gated=True)
        return activated

    def down_residual(self, activated: Tensor, layer: Layer, hidden: Tensor) -> Tensor:
        after = ActivationConsumer(layer.next_norm, layer.next_matrix)
        self._gemv(activated, ActivationConsumer(None, layer.down), hidden, after=after, add=True)
        return hidden

    def norm_head(self, hidden: Tensor, norm: RMSNorm, head: Matrix) -> Tensor:
        """Logits [N, V], float32."""
        logits = self._logits[: len(hidden)]
        self._gemv(hidden, ActivationConsumer(norm, head), logits)
        return logits

    def lm_head_argmax(
        self, hidden: Tensor, norm: RMSNorm, head: Matrix, sampling: SamplingBuffers
    ) -> None:
        self._gemv(hidden, ActivationConsumer(norm, head), self._logits, sampling=sampling)
        self._finish(self._best, sampling, None, drawn=False)

    def lm_head_rows(
        self, hidden: Tensor, norm: RMSNorm, head: Matrix, rows: RowBuffers, with_penalty: bool
    ) -> None:
        """Choose the likeliest token of each row.

        The product applies the repetition penalty of a lone row itself. It has one row's buffer of
        seen tokens, so several rows with a penalty are chosen from their logits.
        """
        if len(hidden) > 1 and with_penalty:
            self.choose_likeliest(self.norm_head(hidden, norm, head), rows, with_penalty)
            return
        sampling = rows if with_penalty else replace(rows, penalty=self._no_penalty)
        logits = self._logits[: len(hidden)]
        consumer = ActivationConsumer(norm, head)
        self._gemv(hidden, consumer, logits, sampling=sampling, input_ids=rows.token)
        self._finish(self._best, rows, rows.limit, drawn=False)

    def choose_likeliest(self, logits: Tensor, rows: RowBuffers, with_penalty: bool) -> None:
        best = self._likeliest(logits, rows, with_penalty)
        self._finish(best, rows, rows.limit, drawn=False)

    def _likeliest(self, logits: Tensor, rows: RowBuffers, with_penalty: bool) -> Tensor:
        """The keys of the likeliest tokens by logits [N, V], int64 [N]."""
        count, vocab_size = logits.shape
        assert logits.stride(1) == 1, "the scores of a row side by side"
        best = self._best_of(count)
        parts = triton.cdiv(8 * self._launch.num_processors, count)
        parts = min(parts, MOST_PARTS, triton.cdiv(vocab_size, LIKELIEST_BLOCK))
        likeliest_kernel[count, parts](
            logits,
            rows.seen,
            rows.penalty,
            best,
            logits.stride(0),
            rows.penalty.stride(0),
            vocab_size,
            PENALTY=with_penalty,
            PARTS=parts,
            BLOCK=LIKELIEST_BLOCK,
            **self._launch.options(LIKELIEST_WARPS),
        )
        return best

    def advance_rows(self, chosen: Tensor, rows: RowBuffers) -> None:
        self._finish(chosen, rows, rows.limit, drawn=True)

    def _finish(
        self, chosen: Tensor, rows: RowBuffers | SamplingBuffers, limit: Tensor | None, drawn: bool
    ) -> None:
        count = len(rows.token)
        stops = rows.stop_ids.numel() // count
        finish_token_kernel[count,](
            chosen,
            rows.token,
            rows.slot,
            rows.position,
            rows.step,
            limit,
            rows.done,
            rows.stop_ids,
            rows.seen,
            rows.seen.shape[-1],
            DRAWN=drawn,
            STOPS=triton.next_power_of_2(stops),
            NUM_STOPS=stops,
            **self._launch.options(num_warps=1),
        )

    def _best_of(self, rows: int) -> Tensor:
        """Where the keys of the likeliest tokens of so many rows go."""
        if rows <= MAX_BATCH_ROWS:
            return self._best
        if rows not in self._more_best:
            self._more_best[rows] = self._best.new_full((rows,), NOTHING_CHOSEN)
        return self._more_best[rows]

    def _parts_of(self, programs: int, parts: int) -> _Parts:
        """Buffers for so many programs a part, and so many lanes of parts in all."""
        own = self._parts
        if programs <= len(own.semaphore) and parts <= len(own.row_max):
            return own
        if (programs, parts) not in self._more_parts:
            made = self._make_parts(programs, parts, own.sums.device)
            self._more_parts[programs, parts] = made
        return self._more_parts[programs, parts]

    def _make_parts(self, programs: int, parts: int, device: torch.device) -> _Parts:
        return _Parts(
            sums=torch.zeros(parts, self._dim, device=device),
            row_max=torch.zeros(parts, device=device),
            # Lanes that only fill up divide by what is here.
            row_sum=torch.ones(parts, device=device),
            semaphore=torch.zeros(programs, dtype=torch.int32, device=device),
        )

    def lm_head_verify(
        self, hidden: Tensor, norm: RMSNorm, head: Matrix, sampling: SamplingBuffers, drafts: Drafts
    ) -> None:
        logits = self._logits[: len(hidden)]
        self._gemv(
            hidden,
            ActivationConsumer(norm, head),
            logits,
            sampling=sampling,
            input_ids=drafts.input_ids,
        )
        self._verify(self._best, len(hidden), sampling, drafts)

    def verify_rows(self, logits: Tensor, rows: RowBuffers, drafts: Drafts) -> None:
        best = self._likeliest(logits, rows, with_penalty=False)
        self._verify(best, len(logits) // len(rows.token), rows, drafts)

    def _verify(
        self, best: Tensor, size: int, rows: RowBuffers | SamplingBuffers, drafts: Drafts
    ) -> None:
        count = len(rows.token)
        stops = rows.stop_ids.numel() // count
        verify_drafts_kernel[count,](
            best,
            rows.token,
            rows.slot,
            rows.position,
            rows.step,
            rows.done,
            rows.stop_ids,
            rows.seen,
            drafts.input_ids,
            drafts.ids,
            drafts.last_slot,
            drafts.verify_output,
            rows.seen.shape[-1],
            drafts.ids.shape[-1],
            SIZE=size,
            STOPS=triton.next_power_of_2(stops),
            NUM_STOPS=stops,
            NGRAM=LONGEST_NGRAM,
            BLOCK=2048,
            **self._launch.options(num_warps=8),
        )

    def _gemv(
        self,
        x: Tensor,
        consumer: ActivationConsumer,
        y: Tensor,
        after: ActivationConsumer | None = None,
        bias: Tensor | None = None,
        gated: bool = False,
        add: bool = False,
        sampling: SamplingBuffers | RowBuffers | None = None,
        input_ids: Tensor | None = None,
    ) -> None:
        """y = the product of `consumer`, whose matrix is quantized or the [in, out] view of a
        contiguous [out, in] weight, with `x`; `after` reads y."""
        matrix, norm = consumer.matrix, consumer.norm
        if len(x) > 1:
            self._skinny_gemm(
                x, matrix, y, Epilogue(norm, bias, gated, add, sampling, input_ids, after)
            )
            return
        quantized = matrix if isinstance(matrix, QuantizedTensor) else None
        way = word_format(matrix)
        data = dense(matrix, x).t() if quantized is None else quantized.data
        assert data.is_contiguous(), "kernels read rows of the weight"
        rows, columns = data.shape if quantized is None else (quantized.rows, quantized.columns)
        rows = rows // 2 if gated else rows
        if way is not None:
            storage = way.storage
        else:
            storage = Storage.FLOAT if quantized is None else Storage.BYTES
        tiles = self._tiles_of(MatrixKind(rows, columns, storage, gated))
        programs = triton.cdiv(rows, tiles.rows)
        vector = self._activations.read(x, consumer)
        output = self._activations.output_for(after, tiles.rows, programs)
        ends = (
            bias,
            y,
            y if sampling is None else sampling.seen,
            y if sampling is None else sampling.penalty,
            self._best,
            None if output.norm is None else output.norm.weight,
            output.values,
            output.steps,
            output.squares,
            rows,
            0.0 if norm is None else norm.eps,
        )
        modes = {
            "K": columns,
            "ROWS": tiles.rows,
            "SHARES": vector.shares,
            "SWIGLU": gated,
            "ADD": add,
            "ARGMAX": sampling is not None,
            "ACT_FORMAT": int(output.act_format),
            "ACT_GROUP": output.span,
            **self._launch.options(tiles.num_warps),
        }
        if quantized is not None and way is not None:
            table, fp8 = quantized.codebook, quantized.scheme is Scheme.FP8
            gemv_quantized_kernel[programs,](
                vector.values.view(torch.int32), vector.steps, vector.squares,
                data.view(torch.int32), quantized.scale,
                quantized.zero_point if quantized.grouped else None,
                None if table is None else table.codes, *ends,
                BITS=way.bits, FP8=fp8, G=quantized.group, GROUPED=quantized.grouped,
                CODEBOOK_SCALE=1.0 if table is None else table.step,
                COUNT=max(tiles.block * way.bits // (BLOCK_WORDS * 32), 1),
                ASM=self._launch.fp8 if fp8 else self._launch.on_gpu, **modes,
            )  # fmt: skip
        else:
            gemv_kernel[programs,](
                x if vector.act_format is ActivationFormat.NONE else vector.values,
                vector.squares, data, None if quantized is None else quantized.scale, *ends,
                BLOCK=tiles.block, WHOLE=rows % tiles.rows == 0, **modes,
            )  # fmt: skip
        self._activations.commit(y, output)


def fused_ops(
    shape: TextShape,
    angles: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    own_attention: bool,
    tiles_of: TileChoice = default_tiles,
) -> DecoderOps:
    """The kernels for a model of `shape`; see `FusedOps`.

    Args:
        own_attention: whether attention is the kernel's too. It is not where half a head is no
            power of two of 16 or more.
    """
    dim = shape.head_dim
    fits = dim >= SMALLEST_HEAD_DIM and dim & (dim - 1) == 0
    return FusedOps(shape, angles, dtype, device, tiles_of).ops(own_attention and fits)
