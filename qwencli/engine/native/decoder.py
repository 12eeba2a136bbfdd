"""The text decoder of every family: embedding, layers, head.

It knows neither families (`shapes`), nor rotary positions (`rope`), nor what kind of cache it
has, nor how an operation is computed (`DecoderOps`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qwencli.engine.native.decoder_ops import REFERENCE_OPS, DecoderOps, Layer, Step
from qwencli.engine.native.shapes import TextShape
from qwencli.engine.native.weights import Tensors


@dataclass(frozen=True)
class DeepStack:
    """Features of the vision tower that the first layers add to the hidden state.

    Args:
        places: int64 [N], rows of the flattened [B * S, hidden] state.
        features: one [N, hidden] a layer, for the first layers in order.
    """

    places: torch.Tensor
    features: Sequence[torch.Tensor]


class Decoder:
    """Weights [out, in] of one model on one device, and the forward pass over them."""

    def __init__(self, shape: TextShape, weights: Tensors, ops: DecoderOps = REFERENCE_OPS) -> None:
        self.shape = shape
        self.ops = ops
        self.layers = [_layer(shape, weights, index) for index in range(shape.num_layers)]
        self._embed = weights["text.embed"]
        self._norm = weights["text.norm"]
        self._head = self._embed if shape.tied_head else weights["text.head"]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, S] -> hidden states [B, S, hidden]."""
        return F.embedding(ids, self._embed)

    def forward(
        self, hidden: torch.Tensor, step: Step, deepstack: DeepStack | None = None
    ) -> torch.Tensor:
        """Run all layers on `hidden` [B, S, hidden]; the result is not yet normed.

        Stores the keys and values of the S tokens at `step.slots`.
        """
        ops = self.ops
        for layer in self.layers:
            attended = ops.attend(ops.norm_qkv(hidden, layer), layer, step)
            hidden = ops.o_residual(attended, layer, hidden)
            hidden = ops.down_residual(ops.norm_gate_up(hidden, layer), layer, hidden)
            if deepstack is not None and layer.index < len(deepstack.features):
                hidden.flatten(0, 1).index_add_(
                    0, deepstack.places, deepstack.features[layer.index]
                )
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., hidden] of the last layer -> logits [..., V]."""
        return self.ops.norm_head(hidden, self._norm, self.shape.rms_norm_eps, self._head)


def _layer(shape: TextShape, weights: Tensors, index: int) -> Layer:
    at = f"text.{index}."
    qk_norm = None
    if shape.qk_norm:
        queries = weights[at + "q_norm"].expand(shape.num_heads, -1)
        keys = weights[at + "k_norm"].expand(shape.num_kv_heads, -1)
        qk_norm = torch.cat((queries, keys))
    return Layer(
        index=index,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        eps=shape.rms_norm_eps,
        attn_norm=weights[at + "attn_norm"],
        qkv=weights[at + "qkv"],
        qkv_bias=weights.get(at + "qkv_bias"),
        qk_norm=qk_norm,
        o=weights[at + "o"],
        o_bias=weights.get(at + "o_bias"),
        mlp_norm=weights[at + "mlp_norm"],
        gate_up=weights[at + "gate_up"],
        down=weights[at + "down"],
    )
