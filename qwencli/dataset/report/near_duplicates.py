"""Pictures that look alike: a hash of brightness steps, checked against colours.

Found are copies that were resized, compressed again, slightly cropped or changed in brightness or
colour as a whole. Not found are mirrored, turned or strongly cropped copies. Pictures of little
structure are alike only where their colours are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

HASH_BYTES, GRID = 16, 8
# Bits of 128 in which two pictures that look alike may differ, and how many of those that are set
# in one of them: a drawing on plain ground has few.
_MOST_BITS, _MOST_SHARE = 10, 0.2
# A step of brightness below this is noise of compression.
_STEP = 3
# Of 255: how far the colours of two pictures may lie apart as a whole, then in one cell of the
# grid; and their squared distance as a part of what the cells of each differ among themselves.
_MOST_SHIFT, _MOST_APART, _MOST_ENERGY = 40.0, 64.0, 0.08
# What noise may add to that distance.
_NOISE = 3.0
# Pairs that are checked for each picture; groups hang together through them.
_PAIRS = 32
_ROWS = 1024


def picture_hash(picture: Image) -> tuple[bytes, bytes]:
    """(hash, colours) of an RGB picture: 128 bits, and the mean colour of 8 x 8 cells.

    The hash is dHash in both directions: whether each of 8 x 8 places is brighter than the one to
    its left, and than the one above it.
    """
    import numpy as np
    from PIL.Image import Resampling

    # Without `reducing_gap`: what it rounds off makes copies of other sizes differ.
    small = picture.resize((GRID + 1, GRID + 1), Resampling.BILINEAR)
    grey = np.asarray(small.convert("L"), dtype=np.int16)
    across = grey[:GRID, 1:] - grey[:GRID, :-1] > _STEP
    down = grey[1:, :GRID] - grey[:-1, :GRID] > _STEP
    bits = np.concatenate([across.ravel(), down.ravel()])
    cells = picture.resize((GRID, GRID), Resampling.BILINEAR)
    return np.packbits(bits).tobytes(), cells.tobytes()


def group_alike(looks: Sequence[tuple[bytes, bytes] | None]) -> list[list[int]]:
    """Groups of indices of pictures that look alike, largest first; None looks like nothing.

    Two pictures are in one group where a chain of likenesses leads from one to the other.
    Compares all pairs, 10,000 pictures in a second or two.
    """
    import numpy as np

    known = [place for place, seen in enumerate(looks) if seen is not None]
    hashes = [seen[0] for seen in looks if seen is not None]
    colours = [seen[1] for seen in looks if seen is not None]
    if len(known) < 2:
        return []
    packed = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(known), HASH_BYTES)
    cells = np.frombuffer(b"".join(colours), np.uint8).reshape(len(known), -1)
    # Bits as +1 and -1: a product of two hashes is what is equal less what differs.
    signs = np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1
    parent = list(range(len(known)))
    for start in range(0, len(known), _ROWS):
        rows = signs[start : start + _ROWS]
        near = np.argwhere(rows @ signs[start:].T >= 8 * HASH_BYTES - 2 * _MOST_BITS)
        near = near[near[:, 0] < near[:, 1]]
        if len(near):
            # The first so many of each row.
            _, first = np.unique(near[:, 0], return_index=True)
            counts = np.diff(np.append(first, len(near)))
            rank = np.arange(len(near)) - np.repeat(first, counts)
            near = near[rank < _PAIRS] + start
            same = _same_steps(signs, near) & _same_colours(cells, near)
            for one, other in near[same].tolist():
                parent[_root(parent, other)] = _root(parent, one)
    groups: dict[int, list[int]] = {}
    for place in range(len(known)):
        groups.setdefault(_root(parent, place), []).append(known[place])
    found = [group for group in groups.values() if len(group) > 1]
    return sorted(found, key=lambda group: (-len(group), group))


def _same_steps(
    signs: npt.NDArray[np.float32], pairs: npt.NDArray[np.intp]
) -> npt.NDArray[np.bool_]:
    one, other = signs[pairs[:, 0]] > 0, signs[pairs[:, 1]] > 0
    share: npt.NDArray[np.bool_] = (one ^ other).sum(1) <= _MOST_SHARE * (one | other).sum(1)
    return share


def _same_colours(
    cells: npt.NDArray[np.uint8], pairs: npt.NDArray[np.intp]
) -> npt.NDArray[np.bool_]:
    import numpy as np

    one, other = (
        cells[pairs[:, side]].astype(np.float32).reshape(len(pairs), -1, 3) for side in (0, 1)
    )
    shift = (one - other).mean(axis=1)
    one = one - one.mean(axis=1, keepdims=True)
    other = other - other.mean(axis=1, keepdims=True)
    apart = one - other
    energy = (one**2).mean(axis=(1, 2)) + (other**2).mean(axis=(1, 2))
    same: npt.NDArray[np.bool_] = np.abs(shift).max(axis=1) <= _MOST_SHIFT
    same &= np.abs(apart).max(axis=(1, 2)) <= _MOST_APART
    same &= (apart**2).mean(axis=(1, 2)) <= _MOST_ENERGY * energy + _NOISE**2
    return same


def _root(parent: list[int], place: int) -> int:
    while parent[place] != place:
        parent[place] = parent[parent[place]]
        place = parent[place]
    return place
