"""Pre-quantized checkpoints on the GPU: kernels as compiled against matrices read back."""

from __future__ import annotations

import functools

import pytest
import torch

from qwencli.engine.kernels.fused_ops import fused_ops
from qwencli.engine.loading import weights
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.models.quant_formats import packed_format
from qwencli.models.shape_reader import read_shape
from tests.engine.quant.packed_formats import FORMATS
from tests.engine.quant.test_prequantized import TEXT, tensors_of, write

CUDA = torch.device("cuda")
WIDE = TEXT | {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 8,
    "head_dim": 128,
}


@torch.inference_mode()
def logits_of(loaded, config, fused):
    model = QwenModel(read_shape(config), loaded, 64, fused=fused)
    inputs = model.prepare([ModelPrompt([5, 9, 33, 70, 2, 41], [])])
    cache = model.static_cache()
    model.prefill(inputs, cache)
    plan = AttentionPlan(cache.length + 1, None)
    slot = torch.tensor([cache.length], device=CUDA)
    token = torch.tensor([7], device=CUDA)
    return model.decode_step(token, inputs.next_positions, slot, cache, plan)[0].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [TEXT, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("name", FORMATS)
def test_compiled_kernels_give_the_logits_of_the_matrices_read_back(tmp_path, name, config, dtype):
    said, writer, arguments, label = FORMATS[name]
    packed, _ = tensors_of(config, writer, arguments)
    loaded = weights.load(
        write(tmp_path, packed),
        read_shape(config),
        dtype,
        CUDA,
        packed=packed_format({"quantization_config": said}),
    )
    # Groups of a whole row are cut to 128 columns, so the label names what the rows allow.
    assert loaded.scheme.split("-g")[0] == label.split("-g")[0]
    plain = logits_of(loaded, config, None)
    fused = logits_of(loaded, config, functools.partial(fused_ops, own_attention=True))
    assert not torch.isnan(fused).any()
    # Every product rounds its vector to 8 bits, and random weights pass that on undamped.
    assert (plain - fused).norm() <= 0.06 * plain.norm()


def test_loading_on_the_gpu_gives_the_bytes_of_the_cpu(tmp_path):
    for name, (said, writer, arguments, _) in FORMATS.items():
        packed, _ = tensors_of(TEXT, writer, arguments)
        folder = write(tmp_path / name.replace(" ", "-"), packed)
        read = packed_format({"quantization_config": said})
        here, there = (
            weights.load(folder, read_shape(TEXT), torch.float32, device, packed=read)
            for device in (torch.device("cpu"), CUDA)
        )
        for key, matrix in here.matrices.items():
            for part, tensor in matrix.parts.items():
                other = there.matrices[key].parts[part].cpu()
                assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), (name, key)
