"""Quantization of the transformers engine: bitsandbytes, every setting stated."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from qwencli.config import Quantization
from qwencli.engine.machine.packages import require

# bitsandbytes' 4-bit kernel for CPUs takes weights of whole tiles only: rows x columns.
CPU_TILE = (32, 64)


def quantization_config(
    quantization: Quantization,
    compute_dtype: torch.dtype,
    keep: list[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Any | None:
    """The transformers quantization config for a mode, or None for unquantized weights.

    bitsandbytes' own defaults are fp4 storage and float32 compute, which is neither what people
    mean by 4-bit nor fast; nf4 with compute in the model's dtype is stated here instead.

    Args:
        keep: modules of 4-bit models to leave unquantized; None = the output head.
        overrides: keywords of an experiment that replace ours.

    Raises:
        MissingDependencyError: bitsandbytes is missing or does not load here.
    """
    if quantization is Quantization.NONE:
        return None
    assert quantization is not Quantization.FP8, "refused before (`check_modes`)"
    # It logs one line per layer and token where it casts; that it casts is in our results.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    require(
        "bitsandbytes",
        f"--quantization {quantization}",
        "pip install -U bitsandbytes",
        "use --quantization none",
    )
    from transformers import BitsAndBytesConfig

    if quantization is Quantization.INT8:
        settings: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 6.0}
    else:
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_use_double_quant": False,
            "llm_int8_skip_modules": keep,
        }
    return BitsAndBytesConfig(**settings | dict(overrides or {}))


def unfit_for_cpu(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers that the 4-bit CPU kernel cannot take, and the output head."""
    rows, columns = CPU_TILE
    return ["lm_head"] + [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (module.out_features % rows or module.in_features % columns)
    ]


def scheme_of(model: torch.nn.Module) -> str:
    """The scheme found in the loaded model's own layers: "none", "bnb-int8", "bnb-nf4", "bnb-fp4"
    or, for checkpoints that came quantized another way, the method their config names."""
    for module in model.modules():
        kind = type(module).__name__
        if kind == "Linear4bit":
            return f"bnb-{getattr(module.weight, 'quant_type', '4bit')}"
        if kind == "Linear8bitLt":
            return "bnb-int8"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        return str(quantizer.quantization_config.quant_method.value)
    return "none"
