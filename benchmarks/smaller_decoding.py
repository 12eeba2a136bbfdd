"""Processor time to open and prepare JPEG files with --max-pixels, whole and decoded smaller.

    python benchmarks/smaller_decoding.py OUT.json [--rounds 5] [--max-pixels 262144] [FILE...]

Without files: drawn edges, and noise with the frequencies of photographs, of 12 and 24 megapixels.
Both ways in turns; written are the medians and how far the pictures that a model sees differ.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from qwencli.engine.frontend.preprocess import preprocess
from qwencli.engine.frontend.processor_config import ImageProcessorConfig
from qwencli.engine.frontend.videos import open_visual

SIZES = ((4000, 3000), (6000, 4000))


def drawn(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(3)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for number in range(400):
        x, y, across, down = (int(value) for value in random.integers(0, height, 4))
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        if number % 2:
            draw.line((x, y, x + across, y + down), fill=colour, width=1 + number % 20)
        else:
            draw.ellipse((x, y, x + across, y + down), fill=colour)
    return image


def photograph(width: int, height: int) -> Image.Image:
    """Noise with as much of each frequency as photographs have."""
    random = np.random.default_rng(4)
    square = np.fft.rfftfreq(width)[None, :] ** 2 + np.fft.fftfreq(height)[:, None] ** 2
    square[0, 0] = 1
    planes = []
    for _ in range(3):
        waves = random.normal(size=square.shape) + 1j * random.normal(size=square.shape)
        plane = np.fft.irfft2(waves / np.sqrt(square), s=(height, width))
        planes.append(np.clip(128 + 60 * plane / plane.std(), 0, 255).astype(np.uint8))
    return Image.fromarray(np.stack(planes, -1))


def files_of(names: list[Path]) -> dict[str, bytes]:
    if names:
        return {name.name: name.read_bytes() for name in names}
    found = {}
    for width, height in SIZES:
        for make in (drawn, photograph):
            file = io.BytesIO()
            make(width, height).save(file, "JPEG", quality=90)
            found[f"{make.__name__} {width}x{height}"] = file.getvalue()
    return found


def prepared(data: bytes, most: int, smaller: bool) -> tuple[float, float, np.ndarray]:
    """Seconds of a processor to open and to prepare, and the patches."""
    config = ImageProcessorConfig.for_family("qwen3_vl").with_pixels(None, most)
    begun = time.process_time()
    part = open_visual(data, name="picture", max_pixels=most if smaller else None)
    opened = time.process_time()
    inputs = preprocess([part], config)
    return opened - begun, time.process_time() - opened, np.asarray(inputs.patches[0], np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-pixels", type=int, default=512 * 512)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, data in files_of(given.files).items():
        runs = [
            (prepared(data, given.max_pixels, False), prepared(data, given.max_pixels, True))
            for _ in range(given.rounds)
        ]
        row: dict[str, Any] = {"picture": name, "max_pixels": given.max_pixels}
        for way, which in (("whole", 0), ("smaller", 1)):
            row[f"{way}_open_ms"] = 1e3 * statistics.median(run[which][0] for run in runs)
            row[f"{way}_prepare_ms"] = 1e3 * statistics.median(run[which][1] for run in runs)
        off = np.abs(runs[0][0][2] - runs[0][1][2]) * 127.5
        rows.append(row | {"mean_of_255": float(off.mean()), "largest_of_255": float(off.max())})
        print(json.dumps(rows[-1]))
        given.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
