"""How a kernel cuts up its work: from the shape alone, so the same choice every time.

The figures are the fastest of a search on one H200 over the matrices of 2B, 4B and 8B models, each
inside the whole decode step (results/2026-11-23-h200-kernels). Most others were within two
percent. A thread reads 16 bytes of a row at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MOST_SPLITS = 32


@dataclass(frozen=True)
class GemvTiles:
    """`rows` output rows a program, read `block` columns at a time by `num_warps` warps."""

    block: int
    rows: int
    num_warps: int


@dataclass(frozen=True)
class AttentionTiles:
    """`splits` parts of a sequence at most, of a multiple of `block` slots."""

    block: int
    splits: int
    num_warps: int


# Columns of the matrix up to which a tile serves; the last row serves the rest.
_BY_COLUMNS = (
    (1024, GemvTiles(256, 2, 1)),
    (2048, GemvTiles(512, 2, 2)),
    (3072, GemvTiles(1024, 2, 4)),
    (6144, GemvTiles(1024, 4, 4)),
)
_LONG_ROWS = GemvTiles(2048, 2, 8)
# Two matrices are read at once, so a program takes one row of each.
_GATED = GemvTiles(512, 1, 2)
_GATED_LONG_ROWS = GemvTiles(1024, 1, 4)


def gemv_tiles(columns: int, gated: bool = False, itemsize: int = 2) -> GemvTiles:
    """Tiles of a matrix [rows, columns]; `gated` reads two such matrices.

    Rows of as many bytes are cut alike, whatever the size of an item.
    """
    if itemsize == 1:
        tiles = gemv_tiles(-(-columns // 2), gated)
        return replace(tiles, block=2 * tiles.block)
    if gated:
        return _GATED if columns <= 4096 else _GATED_LONG_ROWS
    for most, tiles in _BY_COLUMNS:
        if columns <= most:
            return tiles
    return _LONG_ROWS


def int4_tiles(words: int, group_words: int, gated: bool = False) -> GemvTiles:
    """Tiles of a matrix of `words` a row; a block is whole groups."""
    tiles = gemv_tiles(2 * words, gated)
    return replace(tiles, block=max(tiles.block // 2, group_words))


def attention_tiles(num_kv_heads: int, num_processors: int) -> AttentionTiles:
    """As many parts, a power of two, as give every multiprocessor at most two programs."""
    splits = 1
    while splits * num_kv_heads <= num_processors and splits < MOST_SPLITS:
        splits *= 2
    return AttentionTiles(64, splits, 4)
