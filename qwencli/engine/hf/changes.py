"""What an experiment has the transformers engine do otherwise. Ordinary use never does.

`qwencli bench study` sets `TransformersEngine.changes` to do again what programs around
transformers did or do, one thing at a time, and to measure what it costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Changes:
    """
    Args:
        load: keywords of `from_pretrained` that replace the engine's own.
        through_host: load in float32 into host memory first, and cast and move afterwards.
        quantization: keywords of `BitsAndBytesConfig` that replace the engine's own.
        generate: settings of `GenerationConfig` that replace the engine's own.
        no_grad: run under `torch.no_grad` in place of `torch.inference_mode`.
        release_through_host: move the model to host memory before dropping it.
    """

    load: Mapping[str, Any] = field(default_factory=dict)
    through_host: bool = False
    quantization: Mapping[str, Any] = field(default_factory=dict)
    generate: Mapping[str, Any] = field(default_factory=dict)
    no_grad: bool = False
    release_through_host: bool = False


AS_IS = Changes()
