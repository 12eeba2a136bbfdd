"""The head that drafts tokens, and checks of drafts where tokens are drawn, in CUDA graphs."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qwencli.config import (
    DType,
    EngineName,
    Kernels,
    Quantization,
    SamplingOptions,
    Speculate,
)
from qwencli.engine.client import generate_many
from qwencli.engine.kernels.fused_ops import fused_ops
from qwencli.engine.layers.draft_head import draft_projection
from qwencli.engine.loading import weights
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.sampler import Sampler, SamplerKind
from qwencli.engine.ops.next_tokens import Candidates
from qwencli.engine.quant.quantized_tensor import QuantizedTensor
from qwencli.engine.spec_decode.mtp import ChosenTokens, draft
from qwencli.engine.spec_decode.policy import BatchDraftPolicy
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.shape_reader import read_shape
from tests.checkpoints import engine_config
from tests.engine.kernels.test_hybrid_step import CONFIG
from tests.engine.native.mtp_reference import with_head
from tests.engine.ops.test_next_tokens import VOCAB, sampler_of, tables

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
DRAFTS = 3


def captured(work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `work` gives as a graph; it may not wait for the device."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        made = work()
    graph.replay()
    torch.cuda.synchronize()
    return made


def loaded_on(device: torch.device, quantization: Quantization) -> QwenModel:
    """The same weights on both devices."""
    shape = read_shape(CONFIG).with_draft_head()
    made = weights.dummy(shape, torch.float32, CPU, quantization)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in made.tensors.items():
        if "norm" in name:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3)
        elif not name.endswith(("decay_log", "decay_bias")):
            tensor.mul_(5)
    sent = weights.LoadedWeights(
        {name: each.to(device) for name, each in made.tensors.items()},
        (),
        {name: _sent(each, device) for name, each in made.matrices.items()},
    )
    plain = QwenModel(shape, made, 200)
    assert plain.draft_head is not None
    projection = draft_projection(plain.decoder.head)
    assert isinstance(projection, QuantizedTensor)
    if device is CPU:
        plain.draft_head._projection = projection  # as kernels have it
        plain.rope.reach(200)
        return plain
    model = QwenModel(shape, sent, 200, fused=functools.partial(fused_ops, own_attention=True))
    assert model.draft_head is not None
    model.draft_head._projection = _sent(projection, device)
    return model


def _sent(matrix: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    zero = None if matrix.zero_point is None else matrix.zero_point.to(device)
    return QuantizedTensor(matrix.scheme, matrix.data.to(device), matrix.scale.to(device), zero)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize(
    "quantization", [Quantization.NONE, Quantization.INT4, Quantization.FP8, Quantization.INT8]
)
def test_a_captured_head_drafts_as_plain_operators_do(
    rows: int, size: int, quantization: Quantization
) -> None:
    found = []
    for device in (CPU, CUDA):
        model = loaded_on(device, quantization)
        generator = torch.Generator().manual_seed(7)
        cache = model.paged_cache(1 + 3 * rows)
        pool = cache.layers[model.shape.text.draft_layer]
        pool.copy_(torch.randn(pool.shape, generator=generator))
        width = model.shape.text.hidden_size
        hidden = torch.randn(rows * size, width, generator=generator).to(device)
        chosen = torch.randint(0, 60, (rows, size), generator=generator).to(device)
        slot = torch.tensor([9, 70, 130, 19, 64])[:rows].to(device)
        count = torch.tensor([1, size, 0, 1, size])[:rows].to(device)
        pages = torch.arange(1, 1 + 3 * rows, dtype=torch.int32).view(rows, 3).to(device)
        step = ChosenTokens(hidden, chosen, count, slot, slot, pages, 150)
        given: list[torch.Tensor] = []

        def work(model=model, cache=cache, step=step, given=given, device=device) -> torch.Tensor:
            given.clear()

            def choose(logits: torch.Tensor, ahead: int) -> torch.Tensor:
                given.append(logits.float().clone())
                return (torch.arange(len(logits), device=device) * 11 + 5 * ahead) % 60

            draft(model, cache, step, DRAFTS, choose)
            return torch.stack(given)

        found.append(work() if device is CPU else captured(work).cpu())
    plain, own = found
    # Kernels round the vectors that 4 bits multiply.
    near = 2e-2 if quantization is Quantization.NONE else 8e-2
    assert (plain - own).abs().max() <= near * plain.abs().max()


def on_device(sampler: Sampler, device: torch.device) -> Sampler:
    made = Sampler(VOCAB, 4, device, len(sampler.seen), with_drafts=True)
    for name in ("settings", "seen", "uniforms", "accept_uniforms", "draft_uniforms"):
        getattr(made, name).copy_(getattr(sampler, name))
    return made


@torch.inference_mode()
@pytest.mark.parametrize("kind", [SamplerKind.TOP_K, SamplerKind.FULL])
@pytest.mark.parametrize("looked_up", [False, True])
def test_captured_checks_of_drafts_are_those_of_the_cpu(kind: SamplerKind, looked_up: bool) -> None:
    model, drafter = tables(seed=3)
    rows = 20_000
    like = sampler_of(rows, temperature=0.9, top_k=5, top_p=0.95, repetition_penalty=1.3)
    found = []
    for device in (CPU, CUDA):
        sampler = on_device(like, device)
        of_model, of_drafter = model.to(device), drafter.to(device)
        first = (torch.arange(rows) % VOCAB).to(device)
        step = torch.zeros(rows, dtype=torch.int64, device=device)

        def work(
            sampler=sampler, of_model=of_model, of_drafter=of_drafter, first=first, step=step
        ) -> torch.Tensor:
            fed, made = [first], []
            for _ in range(2):
                token, candidates = sampler.draw_draft(of_drafter[fed[-1]], fed[1:], step)
                fed.append(token)
                made.append(candidates)
            proposal = None
            if not looked_up:
                proposal = Candidates(
                    torch.stack([each.ids for each in made], 1),
                    torch.stack([each.weights for each in made], 1),
                )
            input_ids = torch.stack(fed, 1)
            logits = of_model[input_ids].flatten(0, 1)
            return sampler.check(logits, input_ids, step, kind, proposal)

        found.append(work() if device is CPU else captured(work).cpu())
    # Sums in another order round otherwise at a few borders.
    assert (found[0] != found[1]).float().mean() < 1e-3


@pytest.mark.parametrize("kernels", [Kernels.TORCH, Kernels.TRITON])
def test_tokens_of_a_seed_and_behind_penalties_are_those_of_plain_steps(
    checkpoint, tmp_path, monkeypatch, kernels
) -> None:
    """In graphs of all sizes, beside a row that draws as it likes."""
    folder = with_head(checkpoint("qwen3_5"), tmp_path / "model")

    def ask(text: str, **sampling) -> GenerationRequest:
        options = SamplingOptions(**{"do_sample": False, "max_new_tokens": 48, **sampling})
        return GenerationRequest((user_message(text),), options, ignore_eos=True)

    drawn = {"do_sample": True, "temperature": 0.7}
    asked = [ask("hello"), ask("B " * 40, repetition_penalty=1.4), ask("Why? ", seed=5, **drawn)]
    asked += [ask("Or? ", seed=6, top_k=12, top_p=0.9, min_p=0.02, **drawn)]
    config = engine_config(
        folder, engine=EngineName.NATIVE, device="cuda", dtype=DType.FLOAT32, kernels=kernels
    )
    with NativeEngine(config) as engine:
        expected = [engine.generate(each).token_ids for each in asked]
    asked += [ask("Why? ", seed=-1, **drawn)]
    sizes = random.Random(3)
    monkeypatch.setattr(BatchDraftPolicy, "next", lambda *rest: sizes.choice((0, 1, 2, 4, 6)))
    monkeypatch.setattr(BatchDraftPolicy, "learn", lambda *rest: None)
    with NativeEngine(replace(config, speculate=Speculate.MTP)) as engine:
        for _ in range(3):
            found = list(generate_many(engine, asked))
            assert [each.token_ids for each in found[:4]] == expected
            assert len(found[4].token_ids) == 48
            assert all(each.speculation.num_drafted for each in found)
