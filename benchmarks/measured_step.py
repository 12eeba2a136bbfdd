"""A decode step of random weights to measure: as the engine runs it, or without some kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from qwencli.config import KVDType, Quantization
from qwencli.engine.cache.kv_cache import KV_SCHEMES
from qwencli.engine.kernels.activation_buffers import ActivationConsumer
from qwencli.engine.kernels.fused_ops import FusedOps, TileChoice, fused_ops
from qwencli.engine.kernels.tiles import GemvTiles, MatrixKind, default_tiles
from qwencli.engine.loading import weights
from qwencli.engine.native.decode_state import DecodeState
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.sampler import SamplerKind
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.engine.ops.decoder_ops import DecoderOps, Drafts, Layer, Matrix, SamplingBuffers, Step
from qwencli.models.resolve import resolve_model
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape

CUDA = torch.device("cuda")
REPLAYS, ROUNDS = 40, 5
# Rows of a program that is left out.
SHARE_ROWS = 8


class Tiles:
    """The tiles a step uses: chosen ones, else the default. Remembers what it was asked."""

    def __init__(self) -> None:
        self.chosen: dict[MatrixKind, GemvTiles] = {}
        self.asked: dict[MatrixKind, None] = {}

    def __call__(self, matrix: MatrixKind) -> GemvTiles:
        self.asked[matrix] = None
        return self.chosen.get(matrix, default_tiles(matrix))

    def reuse(self, tokens: int) -> bool:
        """Take for `tokens` what was chosen for another number of several, if there was one."""
        before = {kind: tiles for kind, tiles in self.chosen.items() if kind.tokens > 1}
        for kind, tiles in before.items():
            self.chosen[replace(kind, tokens=tokens)] = tiles
        return bool(before)


def text_shape(model: str) -> ModelShape:
    config = resolve_model(model).hub_config
    assert config is not None, "built-in models carry their shape"
    return replace(read_shape(config), vision=None)


class MeasuredStep:
    """A model of random weights, and the time of its decode step."""

    def __init__(
        self,
        shape: ModelShape,
        quantization: Quantization,
        slots: int,
        tiles_of: TileChoice,
        kv_dtype: KVDType = KVDType.AUTO,
        device: torch.device = CUDA,
    ) -> None:
        loaded = weights.dummy(shape, torch.bfloat16, device, quantization)
        fused = functools.partial(fused_ops, own_attention=True, tiles_of=tiles_of)
        self.model = QwenModel(shape, loaded, slots, fused=fused, kv=KV_SCHEMES[kv_dtype])
        cache = self.model.static_cache()
        self.state = DecodeState(self.model, cache, slots, with_drafts=True)
        self.kernels: DecoderOps = self.model.step_ops
        self.own: FusedOps = self.kernels.norm_qkv.__self__  # type: ignore[attr-defined]

    def us(
        self, context: int, tokens: int = 1, replays: int = REPLAYS, rounds: int = ROUNDS
    ) -> list[float]:
        """Microseconds of a step of `tokens` at `context` tokens, one value a round."""
        graph = self._capture(context, tokens)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(rounds):
            self.begin(context)
            graph.replay()
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / replays)
        return times

    def without(self, name: str) -> None:
        """Leave one group of kernels out; "" = none."""
        own = self.own

        def attend(qkv: torch.Tensor, layer: Layer, step: Step) -> torch.Tensor:
            return pretend(own, own._attended[: len(qkv)], ActivationConsumer(None, layer.o))

        def gate_up(hidden: torch.Tensor, layer: Layer) -> torch.Tensor:
            return pretend(own, own._activated[: len(hidden)], ActivationConsumer(None, layer.down))

        def residual(x: torch.Tensor, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
            after = (
                ActivationConsumer(layer.mlp_norm, layer.gate_up)
                if name == "o_residual"
                else ActivationConsumer(layer.next_norm, layer.next_matrix)
            )
            return pretend(own, hidden, after)

        stand_ins: dict[str, dict[str, Callable[..., Any]]] = {
            "": {},
            "norm_qkv": {"norm_qkv": lambda hidden, layer: own.projected(layer.qkv, hidden)},
            "attend": {"attend": attend},
            "o_residual": {"o_residual": residual},
            "norm_gate_up": {"norm_gate_up": gate_up},
            "down_residual": {"down_residual": residual},
            "choose": {"lm_head_argmax": _choose_nothing, "lm_head_verify": _check_nothing},
        }
        self.model.step_ops = replace(self.kernels, **stand_ins[name])  # type: ignore[arg-type]

    def begin(self, context: int) -> None:
        """A step of one token moves on from `context`; one of several finds no room for tokens and
        stays there, so that all read what they should."""
        self.state.slot.fill_(context)
        self.state.position.fill_(context)
        self.state.token.fill_(7)
        self.state.done.zero_()
        self.state.sampler.penalty.fill_(1.0)
        assert self.state.drafts is not None, "made with them"
        self.state.drafts.last_slot.fill_(context)

    def run(self, tokens: int) -> None:
        """One greedy step, as a request takes it without drafts, or with `tokens` - 1 of them."""
        plan = AttentionPlan(len(self.state.slots), None)
        if tokens == 1:
            self.state.advance(SamplerKind.GREEDY, plan)
        else:
            self.state.verify(SamplerKind.GREEDY, tokens, plan)

    def _capture(self, context: int, tokens: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self.begin(context)
            self.run(tokens)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.run(tokens)
        return graph


def pretend(own: FusedOps, x: torch.Tensor, consumer: ActivationConsumer) -> torch.Tensor:
    """`x` as if a kernel had handed it over: whoever reads it finds what was there before."""
    if len(x) == 1:
        own._activations.commit(
            x, own._activations.output_for(consumer, SHARE_ROWS, x.shape[1] // SHARE_ROWS)
        )
    else:
        own._skinny_gemm.ready.commit(x, own._skinny_gemm.ready.output_for(consumer, x))
    return x


def _choose_nothing(
    hidden: torch.Tensor, norm: object, head: Matrix, sampling: SamplingBuffers
) -> None:
    """The step still moves on, so that attention reads what it would read."""
    for count in (sampling.slot, sampling.position):
        count.add_(1)


def _check_nothing(
    hidden: torch.Tensor, norm: object, head: Matrix, sampling: SamplingBuffers, drafts: Drafts
) -> None:
    """A step of several tokens stays where it is anyway, see `MeasuredStep.begin`."""
