"""How a kernel cuts up its work: from the shape alone, so the same choice every time.

The figures are the fastest of a search on one H200 over the matrices of 2B, 4B and 8B models, each
inside the whole decode step (results/2026-11-23-h200-kernels). Most others were within two
percent. A thread reads 16 bytes of a row at a time. Those for several tokens come from what the
compiler makes of them: the widest that leave room for two programs a multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

MOST_SPLITS = 32


@dataclass(frozen=True)
class GemvTiles:
    """`rows` output rows a program, read `block` columns at a time by `num_warps` warps."""

    block: int
    rows: int
    num_warps: int


class Storage(StrEnum):
    """How a kernel reads a matrix."""

    FLOAT = "float"
    BYTES = "bytes"
    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"


@dataclass(frozen=True)
class MatrixKind:
    """What the best tiles of a matrix depend on.

    Args:
        rows, columns: of the result and of the vector; `gated` reads two such matrices.
        tokens: vectors that the matrix is applied to at once.
    """

    rows: int
    columns: int
    storage: Storage = Storage.FLOAT
    gated: bool = False
    tokens: int = 1


@dataclass(frozen=True)
class AttentionTiles:
    """`splits` parts of a sequence at most, of a multiple of `block` slots."""

    block: int
    splits: int
    num_warps: int

    def block_for(self, quantized: bool) -> int:
        """A quantized cache's blocks are half as long: whole ones spill registers (compiled for
        compute capability 8.0 to 12.0 by Triton 3.6.0)."""
        return self.block // 2 if quantized else self.block

    def warps_for(self, lanes: int) -> int:
        """More queries than the rows of one matrix instruction are shared among more warps."""
        return self.num_warps if lanes <= 16 else 2 * self.num_warps


# At 16 bits a column. Columns up to which a tile serves; the last one serves the rest.
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
_BITS = {Storage.FLOAT: 16, Storage.BYTES: 8}
# Rounding the vector costs each program more than a row does.
_IN_BLOCKS = GemvTiles(2048, 8, 4)


# For 2 to 8 tokens, by storage: of a matrix, and of two that are read at once.
_SEVERAL = {
    Storage.FLOAT: (GemvTiles(512, 16, 8), GemvTiles(256, 16, 8)),
    Storage.BYTES: (GemvTiles(512, 16, 8), GemvTiles(512, 16, 8)),
    Storage.INT8: (GemvTiles(512, 16, 8), GemvTiles(512, 16, 8)),
    Storage.FP8: (GemvTiles(512, 16, 8), GemvTiles(512, 16, 8)),
    Storage.INT4: (GemvTiles(1024, 16, 8), GemvTiles(512, 16, 8)),
}


def default_tiles(matrix: MatrixKind) -> GemvTiles:
    """Rows of as many bytes are cut alike, whatever the size of an item."""
    if matrix.tokens > 1:
        return _SEVERAL[matrix.storage][matrix.gated]
    bits = _BITS.get(matrix.storage)
    if bits is None:
        return _IN_BLOCKS
    columns = -(-matrix.columns * bits // 16)
    if matrix.gated:
        tiles = _GATED if columns <= 4096 else _GATED_LONG_ROWS
    else:
        tiles = next((tiles for most, tiles in _BY_COLUMNS if columns <= most), _LONG_ROWS)
    return replace(tiles, block=16 * tiles.block // bits)


def attention_tiles(num_kv_heads: int, num_processors: int) -> AttentionTiles:
    """As many parts, a power of two, as give every multiprocessor at most two programs."""
    splits = 1
    while splits * num_kv_heads <= num_processors and splits < MOST_SPLITS:
        splits *= 2
    return AttentionTiles(64, splits, 4)
