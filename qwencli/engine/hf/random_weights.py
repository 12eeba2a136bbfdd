"""Random weights of true shape for `--load-format dummy`: speed without a download.

Each tensor is made when the loader asks for it, on the device it will live on, so a dummy load
holds no second copy. The draw depends on the tensor's name alone: the same model every time.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch

from qwencli.engine.hf.families import skeleton

INITIALIZER_RANGE = 0.02


class LazyRandomTensor:
    """Stands where the loader expects a safetensors slice: indexing it makes the tensor."""

    def __init__(
        self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.name, self.shape, self.dtype, self.device = name, shape, dtype, device

    def __getitem__(self, _: Any) -> torch.Tensor:
        if _is_norm_weight(self.name, self.shape):
            return torch.ones(self.shape, dtype=self.dtype, device=self.device)
        if self.name.endswith("bias"):
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(self.name.encode()))
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return tensor.normal_(0.0, INITIALIZER_RANGE, generator=generator)

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def _is_norm_weight(name: str, shape: torch.Size) -> bool:
    return len(shape) == 1 and name.endswith("weight")


def random_state_dict(
    model_class: Any, config: Any, dtype: torch.dtype, device: torch.device
) -> dict[str, LazyRandomTensor]:
    """Lazy random tensors for every weight of `model_class(config)`, tied ones once."""
    # named_parameters lists a tied weight once and leaves out computed buffers.
    return {
        name: LazyRandomTensor(name, parameter.shape, dtype, device)
        for name, parameter in skeleton(model_class, config).named_parameters()
    }
