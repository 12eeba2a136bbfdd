"""How a kernel cuts up its work: from the shape alone, so the same choice every time.

The figures are the fastest of searches, each inside the whole decode step: for float weights over
the matrices of 2B, 4B and 8B models on one H200 (results/2026-11-23-h200-kernels, those of 2B and
4B again in results/2026-11-27-h200-typed-step), for int8, int4 and fp8 over those of a 4B model on
one H100 (results/2026-11-25-h100-step). Most others were within two percent. A thread reads 16
bytes of a row at a time. Those for several tokens are of 4 tokens and a 4B model on one H100
(results/2026-11-25-h100-tiles-step); shorter rows were not searched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

MOST_SPLITS = 32
# Of sequences of any length that take a step together: programs of attention for each
# multiprocessor, parts that a long sequence may have beside many, and blocks of a part that is not
# cut up any more.
PROGRAMS_OF_ROWS = 4
FEWEST_SPLITS = 4
MOST_BLOCKS = 8
MOST_SHARING = 4  # programs that share the columns of a product with several vectors


@dataclass(frozen=True)
class GemvTiles:
    """`rows` output rows a program, read `block` columns at a time by `num_warps` warps.

    Args:
        splits: programs that share the columns, of products with several vectors.
    """

    block: int
    rows: int
    num_warps: int
    splits: int = 1


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
    """`splits` parts of a sequence at most, of a multiple of `block` slots and of `shortest` at
    least.

    Lanes are queries that one program answers: those of the heads that share a key head, of one or
    more tokens.
    """

    block: int
    splits: int
    num_warps: int
    shortest: int = 0

    def block_for(self, quantized: bool) -> int:
        """A quantized cache's blocks are half as long where each value is converted by itself:
        whole ones spill registers (compiled for compute capability 8.0 to 12.0 by Triton 3.6.0)."""
        return max(self.block // 2, _SHORTEST_BLOCK) if quantized else self.block

    def fits_words(self, lanes: int) -> bool:
        """Whether registers hold a quantized cache as it is multiplied, see
        `quantized_kv_attention`."""
        return lanes <= _ROWS

    def block_in_words(self, lanes: int, head_dim: int) -> int:
        """Then twice the slots are as many bytes. They fit beside queries that take half the rows
        of an instruction, if heads are no larger than most models'. Each warp has two instructions'
        slots at least."""
        roomy = lanes <= _ROWS // 2 and head_dim <= 128
        return max(2 * self.block if roomy else self.block, _SHORTEST_BLOCK * self.warps_for(lanes))

    def tokens_each(self, heads: int, tokens: int) -> int:
        """How many of a sequence's new tokens one program takes, a power of two.

        As many as fill the rows of a matrix instruction: programs of twice the rows need twice the
        warps for their registers, so that a multiprocessor holds one, and one joins all parts.
        """
        return min(max(_ROWS // heads, 1), 1 << (tokens - 1).bit_length())

    def splits_for(self, query_tiles: int) -> int:
        """Programs that share the tokens of a sequence leave room for fewer parts of it."""
        return max(self.splits >> (query_tiles - 1).bit_length(), 1)

    def warps_for(self, lanes: int) -> int:
        """More queries than the rows of one matrix instruction are shared among more warps."""
        return self.num_warps if lanes <= _ROWS else 2 * self.num_warps

    def parts_at_once(self, lanes: int, head_dim: int, splits: int) -> int:
        """How many parts' results are joined at a time: as many as leave registers free."""
        values = self.warps_for(lanes) * 32 * _MOST_VALUES
        return min(max(values // (lanes * head_dim), 1), splits)


# What a product of matrices has to add up at least, and the rows that its instruction takes.
_SHORTEST_BLOCK = 16
_ROWS = 16
# Results of parts that a thread joins at a time. Twice as many spill (compiled for compute
# capability 8.0 to 12.0 by Triton 3.6.0).
_MOST_VALUES = 128
ANY = 1 << 30
# By (storage, gated): columns up to which a tile serves. A gated matrix is two that are read at
# once. `BYTES` are 8 bits whose products are float32; INT8, FP8 and INT4 round the vector in
# blocks, which costs a program more than a row does.
_BY_COLUMNS: Mapping[tuple[Storage, bool], tuple[tuple[int, GemvTiles], ...]] = {
    (Storage.FLOAT, False): (
        (1024, GemvTiles(256, 2, 1)),
        (2048, GemvTiles(512, 2, 2)),
        (3072, GemvTiles(1024, 2, 4)),
        (4096, GemvTiles(1024, 4, 4)),
        (6144, GemvTiles(2048, 8, 8)),
        (10240, GemvTiles(2048, 4, 8)),
        (ANY, GemvTiles(2048, 2, 8)),
    ),
    (Storage.FLOAT, True): (
        (2048, GemvTiles(1024, 4, 4)),
        (4096, GemvTiles(512, 1, 2)),
        (ANY, GemvTiles(1024, 1, 4)),
    ),
    (Storage.BYTES, False): (
        (1024, GemvTiles(512, 2, 1)),
        (3072, GemvTiles(1024, 4, 2)),
        (6144, GemvTiles(2048, 4, 4)),
        (ANY, GemvTiles(2048, 2, 4)),
    ),
    (Storage.BYTES, True): ((4096, GemvTiles(512, 1, 1)), (ANY, GemvTiles(1024, 1, 2))),
    (Storage.INT8, False): (
        (3072, GemvTiles(512, 16, 8)),
        (6144, GemvTiles(512, 8, 4)),
        (ANY, GemvTiles(1024, 16, 16)),
    ),
    (Storage.INT8, True): ((ANY, GemvTiles(256, 16, 8)),),
    (Storage.FP8, False): (
        (3072, GemvTiles(256, 16, 4)),
        (6144, GemvTiles(512, 16, 8)),
        (ANY, GemvTiles(512, 4, 4)),
    ),
    (Storage.FP8, True): ((ANY, GemvTiles(512, 4, 2)),),
    (Storage.INT4, False): (
        (3072, GemvTiles(512, 8, 4)),
        (6144, GemvTiles(1024, 16, 8)),
        (ANY, GemvTiles(1024, 8, 4)),
    ),
    (Storage.INT4, True): ((ANY, GemvTiles(512, 8, 4)),),
}
# A vocabulary's matrix has rows enough for small programs; one of a single warp adds up its rows
# without a barrier.
_MANY_ROWS = 1 << 16
_OF_MANY_ROWS: Mapping[Storage, tuple[tuple[int, GemvTiles], ...]] = {
    Storage.FLOAT: ((3072, GemvTiles(512, 2, 1)),),
    Storage.BYTES: ((ANY, GemvTiles(512, 2, 1)),),
    Storage.INT8: ((ANY, GemvTiles(512, 8, 4)),),
    Storage.FP8: ((ANY, GemvTiles(512, 8, 8)),),
    Storage.INT4: ((ANY, GemvTiles(512, 8, 4)),),
}

# For 2 to 8 tokens, likewise: 16 rows are what a matrix instruction takes. By columns at most.
_SEVERAL: Mapping[tuple[Storage, bool], tuple[tuple[int, GemvTiles], ...]] = {
    (Storage.FLOAT, False): ((ANY, GemvTiles(512, 16, 4)),),
    (Storage.FLOAT, True): ((3072, GemvTiles(256, 16, 4)), (ANY, GemvTiles(128, 16, 2))),
    (Storage.BYTES, False): ((ANY, GemvTiles(512, 16, 8)),),
    (Storage.BYTES, True): ((ANY, GemvTiles(512, 16, 8)),),
    (Storage.INT8, False): ((ANY, GemvTiles(512, 16, 4)),),
    (Storage.INT8, True): ((ANY, GemvTiles(256, 16, 4)),),
    (Storage.FP8, False): ((ANY, GemvTiles(512, 16, 4)),),
    (Storage.FP8, True): ((ANY, GemvTiles(256, 16, 4)),),
    (Storage.INT4, False): ((ANY, GemvTiles(1024, 16, 4)),),
    (Storage.INT4, True): ((3072, GemvTiles(512, 16, 4)), (ANY, GemvTiles(512, 16, 2))),
}
_SEVERAL_OF_MANY_ROWS: Mapping[Storage, GemvTiles] = {Storage.FLOAT: GemvTiles(256, 16, 4)}
# A matrix of so few rows has too few programs of 16. Where they end their rows together anyway
# (`splitk_epilogue`), more of them share the columns; others have more of them on the way.
FEW_ROWS = 4096
# Of rows this short each program reads its whole share before the wait for the kernel in front.
_BYTES_IN_ONE_TURN = (
    (ANY, 3072, GemvTiles(1024, 16, 4, splits=2)),
    (ANY, 6144, GemvTiles(1024, 16, 4, splits=4)),
)
# By rows and columns at most.
_SEVERAL_OF_FEW_ROWS: Mapping[Storage, tuple[tuple[int, int, GemvTiles], ...]] = {
    Storage.FLOAT: (
        (3072, 6144, GemvTiles(512, 16, 8, splits=4)),
        (3072, ANY, GemvTiles(1024, 16, 8)),
        (ANY, 6144, GemvTiles(512, 16, 4, splits=2)),
        (ANY, ANY, GemvTiles(512, 16, 4, splits=4)),
    ),
    Storage.INT8: (*_BYTES_IN_ONE_TURN, (ANY, ANY, GemvTiles(512, 16, 4, splits=4))),
    Storage.FP8: (*_BYTES_IN_ONE_TURN, (ANY, ANY, GemvTiles(512, 16, 4, splits=4))),
    Storage.INT4: (
        (3072, 3072, GemvTiles(1024, 16, 4, splits=2)),
        (3072, 6144, GemvTiles(512, 16, 4, splits=4)),
        (3072, ANY, GemvTiles(1024, 16, 8, splits=2)),
        (ANY, 6144, GemvTiles(2048, 16, 4, splits=2)),
        (ANY, ANY, GemvTiles(1024, 16, 4, splits=2)),
    ),
}


def default_tiles(matrix: MatrixKind) -> GemvTiles:
    """What the search found for the nearest shape."""
    if matrix.tokens > 1:
        return _tiles_of_several(matrix)
    by_columns = _BY_COLUMNS[matrix.storage, matrix.gated]
    if matrix.rows >= _MANY_ROWS:
        by_columns = (*_OF_MANY_ROWS[matrix.storage], *by_columns)
    return next(tiles for most, tiles in by_columns if matrix.columns <= most)


def _tiles_of_several(matrix: MatrixKind) -> GemvTiles:
    rows, columns, storage = matrix.rows, matrix.columns, matrix.storage
    few = _SEVERAL_OF_FEW_ROWS.get(storage)
    if few is not None and not matrix.gated and rows <= FEW_ROWS:
        return next(tiles for high, wide, tiles in few if rows <= high and columns <= wide)
    if rows >= _MANY_ROWS and storage in _SEVERAL_OF_MANY_ROWS:
        return _SEVERAL_OF_MANY_ROWS[storage]
    by_columns = _SEVERAL[storage, matrix.gated]
    return next(tiles for most, tiles in by_columns if columns <= most)


def attention_tiles(
    num_kv_heads: int, num_processors: int, exact: bool, rows: int = 1, head_dim: int = 128
) -> AttentionTiles:
    """As many parts, a power of two, as give every multiprocessor at most two programs.

    Args:
        exact: whether products are of float32, without matrix units. Their operands lie whole in
            registers: for one token and heads of 128, blocks of 64 slots spill 5,760 bytes a
            thread, these none (compiled for compute capability 9.0 by Triton 3.6.0).
        rows: sequences of any length. A long one beside short ones is still cut up, so there are
            programs without work; but parts are no shorter than equal rows need to fill the GPU.
        head_dim: heads of more than 128 take blocks half as long, shared among twice the warps:
            those of 256 spill otherwise (compiled for compute capability 8.6 by Triton 3.9.0).
    """
    pairs, splits, blocks = rows * num_kv_heads, 1, 1
    most = num_processors if rows == 1 else PROGRAMS_OF_ROWS * num_processors
    while splits * pairs <= most and splits < MOST_SPLITS:
        splits *= 2
    if rows > 1:
        splits = max(splits, FEWEST_SPLITS)
        while blocks * num_processors < 4 * pairs and blocks < MOST_BLOCKS:
            blocks *= 2
    if exact:
        block, num_warps = _SHORTEST_BLOCK, 8
    else:
        block, num_warps = (64, 4) if head_dim <= 128 else (32, 8)
    return AttentionTiles(block, splits, num_warps, blocks * block)


@dataclass(frozen=True)
class ProductTiles:
    """How `tiled_gemm` cuts up a product: `rows` of the matrix by `tokens` a program, `columns` of
    both at a time.

    Args:
        splits: programs that share the columns of a tile. stages: steps of the loop that are on
            their way. band: blocks of tokens that meet a block of rows in turn.
    """

    rows: int
    tokens: int
    columns: int
    num_warps: int
    splits: int = 1
    stages: int = 3
    band: int = 8


# Near the fastest of a sweep over the matrices of a 4B model on one H200, by the format of
# activations and by tokens (`benchmarks/quantized_products.py --sweep`). All take at most 99 KB of
# shared memory, which every card has.
_PRODUCTS: Mapping[str, tuple[tuple[int, ProductTiles], ...]] = {
    "FP8": (
        (16, ProductTiles(64, 16, 256, 4, stages=4)),
        (32, ProductTiles(64, 32, 256, 4, stages=4)),
        (128, ProductTiles(64, 64, 128, 4, stages=5)),
        (ANY, ProductTiles(64, 128, 128, 4, stages=4)),
    ),
    "INT8": (
        (16, ProductTiles(64, 16, 256, 4, stages=4)),
        (32, ProductTiles(64, 32, 256, 4, stages=4)),
        (128, ProductTiles(64, 64, 128, 4, stages=5)),
        (2048, ProductTiles(128, 64, 128, 4, stages=4)),
        (ANY, ProductTiles(128, 128, 128, 8, stages=3)),
    ),
    "FLOAT16": (
        (16, ProductTiles(64, 16, 128, 4, stages=3)),
        (32, ProductTiles(64, 32, 128, 4, stages=3)),
        (ANY, ProductTiles(64, 64, 128, 4, stages=3)),
    ),
}
# Up to this many rows int4 weights are unpacked in the product; for more, reading them back once
# is cheaper.
MOST_INT4_ROWS = 128
# The same where they have been read back before.
MOST_INT4_ROWS_BESIDE_DENSE = 16
# Programs a multiprocessor up to which columns are shared: unpacking keeps more of them busy.
_SHARING: Mapping[str, int] = {"FP8": 1, "INT8": 1, "FLOAT16": 3}
# Of more tokens the sums that programs exchange cost more than what they share.
_MOST_SHARING_TOKENS = 64
# torch's fp8 product shares no columns: it needs tiles of 128 by 128 enough for a device.
FP8_TILES_OF_TORCH = 150


def product_tiles(
    row_format: str, rows: int, columns: int, tokens: int, num_processors: int
) -> ProductTiles:
    """The tiles of a product of `tokens` rows of activations with a matrix [rows, columns]."""
    tiles = next(each for most, each in _PRODUCTS[row_format] if tokens <= most)
    count = -(-rows // tiles.rows) * -(-tokens // tiles.tokens)
    most = 1 if tiles.tokens > _MOST_SHARING_TOKENS else 8 if tiles.tokens <= 32 else 4
    splits = 1
    while (
        splits < most
        and count * splits * 2 <= _SHARING[row_format] * num_processors
        and columns // (splits * 2 * tiles.columns) >= tiles.stages
    ):
        splits *= 2
    return replace(tiles, splits=splits)


def scaled_mm_is_faster(rows: int, tokens: int) -> bool:
    """Whether torch's own fp8 product is."""
    return tokens > 128 and -(-rows // 128) * -(-tokens // 128) >= FP8_TILES_OF_TORCH


@dataclass(frozen=True)
class FlashTiles:
    """How attention of many queries is cut up.

    Args:
        queries, keys: of a block. num_warps: of a program. stages: blocks of keys on their way.
    """

    queries: int
    keys: int
    num_warps: int
    stages: int


# Most queries of the longest sequence -> tiles, in order.
FlashTilesBySize = Sequence[tuple[int, FlashTiles]]
# Capability, columns of a head, and whether it is causal.
FLASH: Mapping[tuple[tuple[int, int], int, bool], FlashTilesBySize] = {
    ((9, 0), 64, False): ((ANY, FlashTiles(64, 64, 4, 3)),),
    ((9, 0), 72, False): ((ANY, FlashTiles(128, 64, 8, 3)),),
    ((9, 0), 80, False): ((ANY, FlashTiles(128, 64, 8, 3)),),
    ((9, 0), 128, True): ((512, FlashTiles(64, 64, 4, 2)), (ANY, FlashTiles(128, 128, 8, 3))),
    ((9, 0), 256, True): ((ANY, FlashTiles(128, 64, 8, 2)),),
}


def flash_tiles(capability: tuple[int, int], dim: int, causal: bool) -> FlashTilesBySize | None:
    """How attention of many queries is cut up; None = torch's own is faster, or was not measured
    against it on such a GPU."""
    return FLASH.get((capability, dim, causal))
