"""Fills the tables of docs/experiments/ from results/; `--check` fails when one is stale.

A table stands between `<!-- table: KIND results/FOLDER FILE ... -->` and `<!-- end -->`. KIND is a
key of KINDS: what wrote such files, and which columns are shown of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import engine_tables
import serving_tables
from readme_tables import ROOT, write_or_check

FOLDER = ROOT / "docs" / "experiments"
MARK = re.compile(r"(<!-- table: ([\w-]+) ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)

KINDS: dict[str, Callable[[Sequence[Path]], str]] = {
    "comfyui-interference": serving_tables.comfyui_interference,
    "rows-step": engine_tables.rows_step,
    "verify-steps": engine_tables.verify_steps,
    "one-row-gate": engine_tables.one_row_gate,
    "captions-per-second": engine_tables.captions_per_second,
    "load-time": serving_tables.load_time,
    "scenes-evaluation": serving_tables.scenes_evaluation,
    "small-hybrid": engine_tables.small_hybrid,
    "planted-disturbances": serving_tables.planted_disturbances,
    "serve-soak": serving_tables.serve_soak,
    "warm-caption": serving_tables.warm_caption,
    "serve-answers": serving_tables.serve_answers,
    "mtp": engine_tables.mtp,
    "same-answers": engine_tables.same_answers,
    "products": engine_tables.products,
    "product-ways": engine_tables.product_ways,
    "tile-search": engine_tables.tile_search,
    "attention-cuts": engine_tables.attention_cuts,
    "serve-speed": serving_tables.serve_speed,
    "caption-folder": serving_tables.caption_folder,
    "warm-up": serving_tables.warm_up,
    "listing": serving_tables.listing,
    "warm-up-begins": serving_tables.warm_up_begins,
    "served-turns": serving_tables.served_turns,
    "request-cost": serving_tables.request_cost,
    "load-in-turns": serving_tables.load_in_turns,
    "side-by-side": engine_tables.side_by_side,
    "servers": serving_tables.servers,
    "cells": serving_tables.cells,
    "long-prompts": engine_tables.long_prompts,
    "prompt-attention": engine_tables.prompt_attention,
    "first-tokens": engine_tables.first_tokens,
    "first-tokens-in-turns": engine_tables.first_tokens_in_turns,
    "new-sizes": engine_tables.new_sizes,
    "rows-by-file": engine_tables.rows_by_file,
    "delta-cuts": engine_tables.delta_cuts,
    "kernels-by-card": engine_tables.kernels_by_card,
}


def render(text: str) -> str:
    """A page with its tables made anew."""

    def fill(found: re.Match[str]) -> str:
        folder, *names = found[3].split()
        files = [ROOT / folder / name for name in names]
        return f"{found[1]}\n{KINDS[found[2]](files)}\n\n{found[4]}"

    return MARK.sub(fill, text)


def main() -> None:
    pages = sorted(FOLDER.glob("*.md"))
    write_or_check({page: render(page.read_text(encoding="utf-8")) for page in pages})


if __name__ == "__main__":
    main()
