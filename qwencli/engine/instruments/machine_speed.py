"""What decoding on this machine depends on, as one JSON line, for callers that never import torch.

python -m qwencli.engine.instruments.machine_speed DEVICE
"""

from __future__ import annotations

import json
import sys
import time


def main(device: str) -> int:
    start = time.perf_counter()
    import torch  # noqa: F401  part of the start of every worker

    start_s = time.perf_counter() - start
    from qwencli.engine.instruments.timing import (
        LARGEST_BUFFER,
        SMALLEST_BUFFER,
        launch_times,
        read_bandwidth,
    )

    # Powers of four: 4 MB, which caches hold, to what none does.
    sizes = [SMALLEST_BUFFER << shift for shift in (0, 2, 4, 6)]
    by_size = [(size, read_bandwidth(device, size)) for size in sizes]
    answer = {
        "read_bandwidth": read_bandwidth(device, LARGEST_BUFFER),
        "by_size": by_size,
        "launch_rate": 1 / min(launch_times(device).eager),
        "start_s": start_s,
    }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
