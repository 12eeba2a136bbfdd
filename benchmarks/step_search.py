"""Which tiles serve each matrix of a decode step best: compiled in parallel, each timed inside the
whole step, the others being the best so far."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from benchmarks.measured_step import MeasuredStep, Tiles, text_shape
from qwencli.config import Quantization
from qwencli.engine.kernels.tiles import FEW_ROWS, GemvTiles, MatrixKind, Storage, default_tiles

SEARCH_REPLAYS, SEARCH_ROUNDS = 20, 4
# A thread's share of a program's weights: fewer leave the memory idle, more spill.
FEWEST_REGISTERS, MOST_REGISTERS = 4, 96
# Lanes that share a row's words. A matrix of more than FEW_ROWS has programs enough of a row each.
FEWEST_LANES = 8
# Tiles that this GPU's registers or shared memory cannot hold are left out of a search.
UNFIT = (OutOfResources, PTXASError)
# For several tokens: 4 lanes read 16 bytes of a row each, of two rows a thread. The vectors lie
# beside a tile.
REGISTERS_OF_A_CHUNK, MOST_OF_A_TILE = 8, 32
IN_WORDS = (Storage.INT8, Storage.FP8, Storage.INT4)
BITS = {Storage.FLOAT: 16, Storage.BYTES: 8, Storage.INT8: 8, Storage.FP8: 8, Storage.INT4: 4}


def candidates(matrix: MatrixKind) -> Iterator[GemvTiles]:
    return of_several_tokens(matrix) if matrix.tokens > 1 else of_one_token(matrix)


def of_one_token(matrix: MatrixKind) -> Iterator[GemvTiles]:
    """Tiles of which each thread reads 16 bytes of a row at a time, or 32."""
    bits = BITS[matrix.storage]
    row_bytes = matrix.columns * bits // 8
    streams = 2 if matrix.gated else 1
    in_words = matrix.storage in IN_WORDS
    # A program that hands its rows over makes whole blocks of them.
    rows_of_one = (8, 16, 4) if matrix.storage is not Storage.INT4 else (8, 16)
    if in_words and matrix.rows > FEW_ROWS:
        rows_of_one = (*rows_of_one, 2, 1)
    for rows, warps, wide in itertools.product(
        rows_of_one if in_words else (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2)
    ):
        block = int(warps * 32 * 16 * wide)
        if in_words:
            block //= rows  # of each row: a thread's words are of one row
        if block < 16 * FEWEST_LANES:
            continue
        held = streams * rows * -(-row_bytes // block) * block / (warps * 32 * 4)
        if (
            not FEWEST_REGISTERS <= held <= MOST_REGISTERS
            or block > 2 * row_bytes
            or matrix.rows // rows < 64
        ):
            continue
        yield GemvTiles(block * 8 // bits, rows, warps)


def of_several_tokens(matrix: MatrixKind) -> Iterator[GemvTiles]:
    """Rows that a matrix unit takes; each warp has one chunk of columns or more. A matrix of few
    rows is shared by more programs, or by more warps."""
    bits = BITS[matrix.storage]
    streams = 2 if matrix.gated else 1
    few = matrix.rows <= FEW_ROWS and not matrix.gated
    shared = itertools.product((4, 8), (1, 2, 4)) if few else itertools.product((2, 4, 8, 16), (1,))
    for (warps, splits), depth in itertools.product(shared, (1, 2, 4)):
        block = depth * warps * (512 // bits)
        if streams * depth * REGISTERS_OF_A_CHUNK > MOST_OF_A_TILE:
            continue
        if few and splits == depth == 1:  # too little on its way
            continue
        if block * splits <= matrix.columns:
            yield GemvTiles(block, 16, warps, splits)


def compile_all(
    model: str, quantization: Quantization, tokens: int, tiles: list[GemvTiles]
) -> float:
    """Compile every matrix kind's kernel for its candidates among `tiles`; runs in a process."""
    started = time.perf_counter()
    shape = text_shape(model)
    shape = replace(shape, text=replace(shape.text, num_layers=1))
    chosen = Tiles()
    with torch.inference_mode():
        step = MeasuredStep(shape, quantization, 512, chosen)
        step.us(256, tokens, 1, 1)
        for tile in tiles:
            kinds = [kind for kind in chosen.asked if tile in set(candidates(kind))]
            chosen.chosen = dict.fromkeys(kinds, tile)
            try:
                step.us(256, tokens, 1, 1)
            except UNFIT as error:
                print(f"{tile}: {error}", file=sys.stderr)
    return time.perf_counter() - started


def search(
    step: MeasuredStep,
    tiles: Tiles,
    context: int,
    tokens: int,
    model: str,
    quantization: Quantization,
) -> list[dict[str, Any]]:
    """Find each matrix's tiles; leaves the best in `tiles`. Returns all that was tried."""
    step.us(context, tokens, 1, 1)
    kinds = [kind for kind in tiles.asked if kind.tokens == tokens]
    wanted = sorted({tile for kind in kinds for tile in candidates(kind)}, key=str)
    workers = min(12, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        shares = [wanted[i::workers] for i in range(workers)]
        compiling = functools.partial(compile_all, model, quantization, tokens)
        took = list(pool.map(compiling, shares))
    print(f"{quantization}: {len(wanted)} tiles compiled in {max(took):.0f} s", file=sys.stderr)
    tried = []
    for kind in kinds:
        found = []
        for tile in dict.fromkeys([default_tiles(kind), *candidates(kind)]):
            tiles.chosen[kind] = tile
            try:
                us = statistics.median(step.us(context, tokens, SEARCH_REPLAYS, SEARCH_ROUNDS))
            except UNFIT as error:
                print(f"{kind} {tile}: {error}", file=sys.stderr)
                continue
            found.append((us, tile))
        us, best = min(found, key=lambda pair: pair[0])
        tiles.chosen[kind] = best
        tried.append(
            {
                "matrix": asdict(kind),
                "default_us": found[0][0],
                "best_us": us,
                "best": asdict(best),
                "tried": sorted([(round(us, 1), str(tile)) for us, tile in found])[:8],
            }
        )
        print(json.dumps(tried[-1]), file=sys.stderr)
    return tried
