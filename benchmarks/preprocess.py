"""Times the preparation of pictures on the host and on a device, and prints one JSON line a case.

    python benchmarks/preprocess.py --device cuda --out results/FOLDER/preprocess.jsonl

Both paths run in turn, so that a change of clocks falls on both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from PIL import Image

from qwencli.engine.frontend.device_patches import DevicePatches
from qwencli.engine.frontend.preprocess import Patchify, patchify_on_host, preprocess
from qwencli.engine.frontend.processor_config import ImageProcessorConfig
from qwencli.messages import ImagePart

SIZES = ((448, 448), (1000, 1000), (1024, 1024), (4000, 3000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    arguments = parser.parse_args()
    config = ImageProcessorConfig.for_family("qwen3_vl").with_pixels(None, 1024 * 1024)
    paths: dict[str, Patchify] = {
        "host": patchify_on_host,
        arguments.device: DevicePatches(arguments.device),
    }
    for size in SIZES:
        noise = np.random.default_rng(0).integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
        part = ImagePart(Image.fromarray(noise), "noise")
        taken: dict[str, list[float]] = {name: [] for name in paths}
        for _ in range(arguments.rounds + 3):
            for name, patchify in paths.items():
                start = time.perf_counter()
                preprocess([part], config, patchify)
                taken[name].append(1e3 * (time.perf_counter() - start))
        median_ms = {name: statistics.median(times[3:]) for name, times in taken.items()}
        line = json.dumps({"size": size, "rounds": arguments.rounds, "median_ms": median_ms})
        print(line)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
