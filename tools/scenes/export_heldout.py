"""Writes the beginning of the held-out set as files, which the benchmark's quality figure uses.

Files and not a renderer in the package: every Pillow draws its own digits, and exact rates can be
compared only over equal pictures. docs/scenes.md says more.

python -m tools.scenes.export_heldout qwencli/bench/assets/heldout --count 96
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tools.scenes.captions import long_caption
from tools.scenes.draw_pil import draw
from tools.scenes.heldout import MODES, heldout_rng
from tools.scenes.scene import sample_scene


def export(folder: Path, count: int, seed: int = 0) -> None:
    """Item `index` of `heldout` as a PNG, or as the JPEG that it is decoded from."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for index in range(count):
        scene = sample_scene(heldout_rng(seed, index))
        antialias, quality = MODES[index % len(MODES)]
        image = draw(scene, antialias=antialias)
        name = f"heldout-{index:03d}.{'jpg' if quality else 'png'}"
        if quality:
            image.save(folder / name, quality=quality, subsampling=2)
        else:
            image.save(folder / name, optimize=True)
        captions[name] = long_caption(scene)
    text = json.dumps(captions, indent=0)
    (folder / "captions.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=96)
    options = parser.parse_args()
    export(options.folder, options.count)


if __name__ == "__main__":
    main()
