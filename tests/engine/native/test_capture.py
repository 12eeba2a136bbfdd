"""CUDA graphs can hold the steps, and their capture disturbs nothing: checked without a GPU.

Tensors on the device "meta" have no values. So a step on them asks for none, and what is on the
host stands out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qwencli.config import Attention, Quantization, SamplingParams
from qwencli.engine.loading import weights
from qwencli.engine.native.decode_state import DecodeState
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.sampler import LIKELIEST, SamplerKind
from qwencli.engine.quant.quantized_tensor import QuantizedTensor, Scheme
from qwencli.engine.spec_decode.ngram import MAX_VERIFY_TOKENS
from qwencli.engine.spec_decode.verify import EagerVerifier, GraphVerifier
from qwencli.models.quant_formats import packed_format
from qwencli.models.shape_reader import read_shape
from tests.checkpoints import ALONE, hub_config
from tests.engine.native.host_graphs import run_graphs_on_the_host
from tests.engine.quant.packed_formats import FORMATS
from tests.engine.quant.test_prequantized import TEXT, tensors_of, write

CPU = torch.device("cpu")
SLOTS = 600  # more than two length classes
aten = torch.ops.aten
# What waits for the device, or copies from or to memory of the host.
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
}
# How weights and caches are stored ends with the logits: what is chosen from them is chosen
# alike, and checked with every family.
OF_ITS_LOGITS: dict[str, Any] = {"kinds": LIKELIEST[:1], "sizes": (MAX_VERIFY_TOKENS,)}

# What makes its values on the host.
OF_THE_HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}


def tensors_among(values: Any) -> Iterator[torch.Tensor]:
    """Of an operator's arguments: tensors, numbers, and lists of them."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_among(value)
    elif isinstance(values, dict):
        yield from tensors_among(list(values.values()))


class Calls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in OF_THE_HOST, f"{func} copies from the host"
        return func(*args, **(kwargs or {}))


class Captured(TorchDispatchMode):
    """Fails where an operator cannot be part of a graph of the device "meta"."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert func not in WAITING, f"{func} waits for the host"
        if func in (aten.index.Tensor, aten.index_put_.default):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            assert not masks, f"{func} by a mask waits for the number of its values"
        tensors = list(tensors_among((args, kwargs, result)))
        # Operators take numbers as tensors of the host, which become arguments of a kernel.
        homes = {t.device.type for t in tensors if t.dim() > 0 or func is aten._to_copy.default}
        assert homes <= {"meta"}, f"{func} on {homes}"
        return result


def without_values(loaded: weights.LoadedWeights) -> weights.LoadedWeights:
    """The same layouts."""

    def moved(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        size, stride = tensor.shape, tensor.stride()
        return torch.empty_strided(size, stride, dtype=tensor.dtype, device="meta")

    def matrix(known: QuantizedTensor) -> QuantizedTensor:
        table = known.codebook and replace(
            known.codebook, values=moved(known.codebook.values), codes=moved(known.codebook.codes)
        )
        parts = {
            name: moved(getattr(known, name))
            for name in ("data", "scale", "zero_point", "g_idx_sort_indices")
        }
        return replace(known, **parts, codebook=table)

    return replace(
        loaded,
        tensors={name: moved(t) for name, t in loaded.tensors.items()},
        matrices={name: matrix(m) for name, m in loaded.matrices.items()},
    )


def run_as_captured(
    config: dict[str, Any],
    loaded: weights.LoadedWeights,
    kinds: Sequence[SamplerKind] = tuple(SamplerKind),
    sizes: Sequence[int] = (1, 2, MAX_VERIFY_TOKENS),
    **modes: Any,
) -> None:
    """Steps of a model: every kind, unless others are named, and every size that checks drafts.

    Not in inference mode: there operators that consist of others are seen as one.
    """
    with torch.no_grad():
        model = QwenModel(read_shape(config), without_values(loaded), SLOTS, **modes)
        state = DecodeState(model, model.static_cache(), SLOTS, with_drafts=True)
        masks = state.hold_logits().host.to("meta")
        with Calls(), Captured():
            for kind in kinds:
                state.advance_masked(kind, 256)
                if kind is not SamplerKind.LOGITS:
                    state.sampler.sample(state.logits, state.step, kind, masks)
            for kind in set(LIKELIEST).intersection(kinds):
                for size in sizes:
                    state.verify_masked(kind, size, 256)


@pytest.mark.parametrize("attention", [Attention.EAGER, Attention.SDPA])
@pytest.mark.parametrize("family", ALONE)
def test_steps_of_every_family_wait_for_nothing(family: str, attention: Attention) -> None:
    config = hub_config(family)
    run_as_captured(
        config, weights.dummy(read_shape(config), torch.float16, CPU), attention=attention
    )


@pytest.mark.parametrize("kv", [None, Scheme.INT8, Scheme.FP8])
@pytest.mark.parametrize("quantization", Quantization)
def test_steps_with_fewer_bits_wait_for_nothing(quantization: Any, kv: Scheme | None) -> None:
    loaded = weights.dummy(read_shape(TEXT), torch.float32, CPU, quantization)
    run_as_captured(TEXT, loaded, **OF_ITS_LOGITS, kv=kv)


@pytest.mark.parametrize("name", FORMATS)
def test_steps_of_prequantized_checkpoints_wait_for_nothing(tmp_path: Path, name: str) -> None:
    said, writer, arguments, _ = FORMATS[name]
    packed, _ = tensors_of(TEXT, writer, arguments)
    read = packed_format({"quantization_config": said})
    folder = write(tmp_path / "model", packed)
    loaded = weights.load(folder, read_shape(TEXT), torch.float32, CPU, packed=read)
    run_as_captured(TEXT, loaded, **OF_ITS_LOGITS)


@pytest.mark.parametrize(
    "step",
    [
        lambda t: t.argmax().item(),
        lambda t: t[t > 0],
        lambda t: t + torch.tensor([1.0], device=t.device),
        lambda t: t.index_select(0, torch.arange(2)),
        lambda t: t.cpu(),
    ],
)
def test_what_a_graph_cannot_hold_is_noticed(step: Callable[[torch.Tensor], Any]) -> None:
    values = torch.empty(4, device="meta")
    with Calls(), Captured(), pytest.raises((AssertionError, RuntimeError)):
        step(values)


@pytest.fixture
def graphs_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    run_graphs_on_the_host(monkeypatch)


@pytest.mark.usefixtures("graphs_of_the_host")
@torch.inference_mode()
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_captured_steps_choose_what_others_choose_and_spare_what_is_kept(penalty: float) -> None:
    """Graphs are captured with the slot at the cache's end, far beyond a short length class."""
    model = QwenModel(read_shape(TEXT), weights.dummy(read_shape(TEXT), torch.float32, CPU), SLOTS)
    sampling = SamplingParams(do_sample=False, max_new_tokens=200, repetition_penalty=penalty)
    prompt = torch.arange(40) % 7
    records = []
    for make in (EagerVerifier, GraphVerifier):
        state = DecodeState(model, model.static_cache(), SLOTS, with_drafts=True)
        for layer in state.cache.layers:
            layer[:, :, : len(prompt)].normal_(generator=torch.Generator().manual_seed(1))
        kept = [layer[:, :, : len(prompt)].clone() for layer in state.cache.layers]
        verifier = make(state)
        state.begin(sampling, prompt, [], torch.tensor([len(prompt)]))
        verifier.prepare(len(prompt), len(prompt) + 199, (1, 4, MAX_VERIFY_TOKENS))
        assert all(
            torch.equal(layer[:, :, : len(prompt)], old)
            for layer, old in zip(state.cache.layers, kept, strict=True)
        )
        state.begin(sampling, prompt, [], torch.tensor([len(prompt)]))
        rows, slot = [], len(prompt)
        for size in (1, 1, 4, MAX_VERIFY_TOKENS, MAX_VERIFY_TOKENS, 4) * 6:
            verifier.run(slot, size)
            rows.append(state.drafts.verify_output[: 2 + size].tolist())
            slot = int(state.slot)
        records.append(rows)
    assert records[0] == records[1]
    assert max(count for count, *_ in records[0]) > 1, "a text without a right draft proves little"
