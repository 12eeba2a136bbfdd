"""The head of Qwen3.5, 3.6 and 3.8 that drafts further tokens (MTP, multi-token prediction).

Item i of it is made of the hidden state of token i, behind the model's last norm, and the embedding
of token i + 1; it has the position and the slot of token i, and guesses token i + 2. Its result,
normed, stands for the hidden state that the model has not made yet: with it the next item guesses
token i + 3, and so on. It has one layer, whose keys and values lie in the pool of pages beside the
model's; embedding and output projection are the model's own. Where kernels read 4 bits as they
are, the head has the projection in 4 bits: most of what a draft reads is the projection, and a
draft that is guessed wrong for it costs time and no words.

`fc`, which joins the two, is never quantized: it is a sixteenth of what a draft reads of the output
projection, and every error of it would go into all that follows.

`tests/engine/native/mtp_reference.py` has it without caches, and names its sources.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qwencli.engine.layers.decoder import (
    Decoder,
    MatrixPicker,
    make_layer,
    make_norm,
    run_layer,
)
from qwencli.engine.loading.weights import Tensors
from qwencli.engine.ops.decoder_ops import DecoderOps, Matrix, Step
from qwencli.engine.quant.quantized_tensor import (
    QuantizedTensor,
    Scheme,
    group_of,
    quantize,
    stack,
)
from qwencli.models.shapes import TextShape

Tensor = torch.Tensor


class DraftHead:
    """Weights of one model's head on one device, and the forward pass over them.

    Args:
        decoder: of the same model.
        matrices, by_rows: see `Decoder`.
    """

    def __init__(
        self,
        shape: TextShape,
        weights: Tensors,
        matrices: Mapping[str, QuantizedTensor],
        by_rows: bool,
        decoder: Decoder,
    ) -> None:
        at, pick = "text.mtp.", MatrixPicker(weights, matrices, by_rows)
        self._projection = draft_projection(decoder.head) if by_rows else decoder.head
        self._norm_embedding = make_norm(shape, weights, at + "norm_embedding")
        self._norm_hidden = make_norm(shape, weights, at + "norm_hidden")
        self._fc = weights[at + "fc"].t()
        self.norm = make_norm(shape, weights, at + "norm")
        self.layer = make_layer(
            shape,
            weights,
            at,
            shape.draft_layer,
            pick,
            self.norm,
            decoder.head,
            attends=True,
            moe=shape.moe,
        )

    @property
    def quantized_matrices(self) -> list[QuantizedTensor]:
        """The quantized matrices of its layer."""
        own = self.layer.qkv, self.layer.o, self.layer.gate_up, self.layer.down
        return [part for part in own if isinstance(part, QuantizedTensor)]

    def forward(self, embeds: Tensor, hidden: Tensor, step: Step) -> Tensor:
        """Items of the embeddings [N, hidden] of the next tokens and of hidden states [N, hidden],
        which are normed: -> [N, hidden], not normed.

        Stores their keys and values where `step` says.
        """
        normed = step.ops.normed
        parts = normed(embeds, self._norm_embedding), normed(hidden, self._norm_hidden)
        return run_layer(self.layer, torch.mm(torch.cat(parts, 1), self._fc), step)

    def logits(self, out: Tensor, ops: DecoderOps) -> Tensor:
        """Logits [N, V] of the drafted tokens, from what `forward` made [N, hidden]."""
        return ops.norm_head(out, self.norm, self._projection)


def draft_projection(head: Matrix) -> Matrix:
    """An output projection in 4 bits; itself where it has no more, or cannot be cut into groups."""
    if not isinstance(head, QuantizedTensor):
        return head if group_of(len(head)) is None else quantize(head.t(), Scheme.INT4)
    if head.bits <= 4 or group_of(head.columns) is None:
        return head
    parts = [
        quantize(head.part(rows).dequantize(torch.float32), Scheme.INT4) for rows in head.pieces()
    ]
    made = stack(parts)
    assert made is not None, "all are of one kind"
    return made
