"""Linear layers: bitsandbytes beside unquantized ones, and the patch embedding in both its forms.

One token through a model's widest matrix; the patch embedding as the convolution that checkpoints
describe, and as a linear layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from qwencli.engine.instruments.device_events import device_work
from qwencli.engine.instruments.probes.answers import LinearRun, LinearRuns, PatchEmbedding, Work
from qwencli.engine.instruments.probes.ask import first_line
from qwencli.engine.instruments.probes.measure.attention_runs import short
from qwencli.engine.instruments.timing import compute_dtype, seconds_per_call, still_works

# A picture of 448 x 448. A slow convolution takes 10 to 100 ms for that, which is long enough.
PATCHES = 784


def patch_embedding(device: str, work: Work) -> PatchEmbedding:
    """Times both; they are the same arithmetic, as the kernel's stride is its size.

    Raises:
        RuntimeError: the model has no vision tower, or the device cannot run one of the two.
    """
    if not (
        work.vision_hidden and work.in_channels and work.temporal_patch_size and work.patch_size
    ):
        raise RuntimeError("a text model has no patch embedding")
    size = (work.in_channels, work.temporal_patch_size, work.patch_size, work.patch_size)
    dtype = compute_dtype(device)
    with torch.inference_mode():
        patches = torch.randn(PATCHES, *size, dtype=dtype, device=device)
        weight = torch.randn(work.vision_hidden, *size, dtype=dtype, device=device)
        flat, matrix = patches.flatten(1), weight.flatten(1)

        def convolve() -> torch.Tensor:
            return F.conv3d(patches, weight, stride=size[1:])

        conv3d_s = seconds_per_call(device, convolve, samples=3)
        linear_s = seconds_per_call(device, lambda: F.linear(flat, matrix), samples=3)
        seen = device_work(device, convolve)
    names = tuple(short(name) for name in seen.names) if seen else ()
    return PatchEmbedding(PATCHES, conv3d_s * 1e3, linear_s * 1e3, names)


# More copies than a cache holds even at 4 bit, used in turn: decoding finds no weight there either.
CACHE_BYTES = 200 << 20
MOST_COPIES = 16

Layer = Callable[[torch.Tensor], torch.Tensor]
Make = Callable[[torch.Tensor, str], Layer]


def quantized_linears(device: str, work: Work) -> LinearRuns:
    """Time and error of each scheme; one that cannot run says why and leaves the others alone."""
    dtype = compute_dtype(device)
    rows, columns = work.intermediate, work.hidden
    token = torch.randn(1, columns, dtype=dtype, device=device)
    weight = torch.randn(rows, columns, dtype=dtype, device=device) / columns**0.5
    with torch.inference_mode():
        exact = token.float() @ weight.float().t()
    runs = tuple(
        _run(scheme, make, weight, token, exact, device) for scheme, make in SCHEMES.items()
    )
    return LinearRuns(rows, columns, runs)


def _run(
    scheme: str,
    make: Make,
    weight: torch.Tensor,
    token: torch.Tensor,
    exact: torch.Tensor,
    device: str,
) -> LinearRun:
    copies = max(1, min(MOST_COPIES, -(-4 * CACHE_BYTES // weight.nbytes)))
    try:
        layers = [make(weight, device) for _ in range(copies)]
        with torch.inference_mode():
            error = (layers[0](token).float() - exact).norm() / exact.norm()

            def one_pass() -> None:
                for layer in layers:
                    layer(token)

            us = seconds_per_call(device, one_pass) / copies * 1e6
    except (ImportError, OSError, RuntimeError, ValueError) as failure:
        if not still_works(device):
            raise
        return LinearRun(scheme, error=first_line(str(failure)) or type(failure).__name__)
    return LinearRun(scheme, us, float(error))


def _unquantized(weight: torch.Tensor, device: str) -> Layer:
    copy = weight.clone()
    return lambda x: torch.nn.functional.linear(x, copy)


def _nf4(weight: torch.Tensor, device: str) -> Layer:
    bnb = _bitsandbytes()
    rows, columns = weight.shape
    layer: Any = bnb.nn.Linear4bit(
        columns, rows, bias=False, compute_dtype=weight.dtype, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    placed: Layer = layer.to(device)
    return placed


def _int8(weight: torch.Tensor, device: str) -> Layer:
    bnb = _bitsandbytes()
    rows, columns = weight.shape
    layer: Any = bnb.nn.Linear8bitLt(
        columns, rows, bias=False, has_fp16_weights=False, threshold=6.0
    )
    layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    placed: Layer = layer.to(device).eval()
    return placed


def _bitsandbytes() -> Any:
    import bitsandbytes

    # It logs a line for each layer whose input it casts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return bitsandbytes


SCHEMES: Mapping[str, Make] = {"none": _unquantized, "bnb-nf4": _nf4, "bnb-int8": _int8}
