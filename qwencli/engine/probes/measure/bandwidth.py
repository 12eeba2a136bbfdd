"""How fast this device reads its memory: the limit of decoding, which reads every weight once a
token."""

from __future__ import annotations

import torch

from qwencli.engine.probes.answers import Bandwidth, Work
from qwencli.engine.probes.measure.timing import compute_dtype, sustained

# Far beyond any cache, and a share of what is free.
BYTES_ON_GPU, BYTES_ON_CPU = 1 << 30, 1 << 28
COLUMNS = 8192
# Long enough for a GPU to leave its idle clocks.
DURATION_S = 1.0


def bandwidth(device: str, work: Work) -> Bandwidth:
    """Read by matrix-vector product (what decoding does) and by sum, and copy."""
    size = BYTES_ON_CPU
    if device.startswith("cuda"):
        size = min(BYTES_ON_GPU, torch.cuda.mem_get_info(device)[0] // 4)
    dtype = compute_dtype(device)
    rows = size // 2 // COLUMNS // dtype.itemsize
    with torch.inference_mode():
        matrix = torch.zeros(rows, COLUMNS, dtype=dtype, device=device)
        other = torch.empty_like(matrix)
        vector = torch.zeros(COLUMNS, dtype=dtype, device=device)
        out = torch.empty(rows, dtype=dtype, device=device)
        words = matrix.view(torch.int32)
        ways = {
            "matrix-vector product": lambda: torch.mv(matrix, vector, out=out),
            "sum": lambda: words.sum(dtype=torch.int32),
        }
        read = {
            name: matrix.nbytes / sustained(device, way, DURATION_S) for name, way in ways.items()
        }
        copy = 2 * matrix.nbytes / sustained(device, lambda: other.copy_(matrix), DURATION_S / 2)
    best = max(read, key=lambda name: read[name])
    return Bandwidth(read[best], best, copy)
