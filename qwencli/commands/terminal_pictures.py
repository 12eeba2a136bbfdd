"""Small pictures at a terminal: by kitty's, iTerm's or sixel graphics, else as half blocks."""

from __future__ import annotations

import base64
import functools
import io
import os
import re
import select
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING

from qwencli.messages import ImagePart, VisualPart

if TYPE_CHECKING:
    from PIL.Image import Image

# Of a picture, in cells of the terminal; a cell is about twice as high as it is wide.
COLUMNS, ROWS = 36, 12
# Pixels of a cell, where a terminal does not say.
_CELL = (8, 16)
# What a terminal has to answer within; over a network it takes longer than here.
_ANSWER_S = 0.4
# Asks for kitty's graphics, then for the device's attributes, which every terminal gives. What a
# terminal shows of a question that it does not know is erased.
_QUESTION = "\x1b7\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b8\x1b[J\x1b[c"
_ATTRIBUTES = re.compile(rb"\x1b\[\?([\d;]*)c")
_KITTY_OK = re.compile(rb"\x1b_Gi=31;OK\x1b\\")
_KITTY_ANSWER = re.compile(rb"\x1b_G.*?\x1b\\", re.DOTALL)
_SIXEL_ATTRIBUTE = b"4"
_CHUNK = 4096


class Graphics(Enum):
    KITTY = auto()
    ITERM = auto()
    SIXEL = auto()
    HALF_BLOCKS = auto()
    NONE = auto()


def show_pictures(parts: Sequence[VisualPart]) -> None:
    """Draw what is attached, small, where stderr is a terminal; of a video its first frame."""
    if not parts or not sys.stderr.isatty():
        return
    graphics = terminal_graphics()
    for part in parts:
        image = part.image if isinstance(part, ImagePart) else part.frames[0]
        sys.stderr.write(render_picture(image, graphics, shutil.get_terminal_size().columns))
    sys.stderr.flush()


def render_picture(image: Image, graphics: Graphics, columns: int) -> str:
    """What a terminal of `columns` shows as the picture, and a line feed."""
    if graphics is Graphics.NONE:
        return ""
    width, height = _fitted(image, min(COLUMNS, columns - 1), ROWS)
    return _DRAWN[graphics](image, width, height) + "\n"


@functools.cache
def terminal_graphics() -> Graphics:
    """What the terminal can show, by what it says of itself."""
    if os.environ.get("TERM", "dumb") in ("dumb", "linux") or "NO_COLOR" in os.environ:
        return Graphics.NONE
    named = {os.environ.get("TERM_PROGRAM"), os.environ.get("LC_TERMINAL")}
    if "TMUX" not in os.environ and named & {"iTerm.app", "iTerm2", "WezTerm", "mintty"}:
        return Graphics.ITERM
    answer = _query_terminal()
    if _KITTY_OK.search(answer):
        return Graphics.KITTY
    attributes = _ATTRIBUTES.search(answer)
    if attributes and _SIXEL_ATTRIBUTE in attributes[1].split(b";"):
        return Graphics.SIXEL
    return Graphics.HALF_BLOCKS


def _query_terminal() -> bytes:
    """What the terminal answers to `_QUESTION`; what a person typed meanwhile is not lost."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        return b""
    keyboard = sys.stdin.fileno()
    sys.stderr.write(_QUESTION)
    sys.stderr.flush()
    read, end = b"", time.monotonic() + _ANSWER_S
    while not _ATTRIBUTES.search(read) and (left := end - time.monotonic()) > 0:
        if select.select([keyboard], [], [], left)[0]:
            read += os.read(keyboard, 1024)
    _keep_keys(_ATTRIBUTES.sub(b"", _KITTY_ANSWER.sub(b"", read)))
    return read


def _fitted(image: Image, columns: int, rows: int) -> tuple[int, int]:
    """Cells that a picture takes, in its own proportions."""
    scale = min(columns / image.width, 2 * rows / image.height)
    return max(round(image.width * scale), 1), max(round(image.height * scale / 2), 1)


def _half_blocks(image: Image, columns: int, rows: int) -> str:
    """Two pixels a cell: the upper half block's colour and its background's."""
    from rich.color import Color
    from rich.console import Console
    from rich.style import Style

    system = Console(stderr=True)._color_system
    if system is None:
        return ""
    small = image.resize((columns, 2 * rows)).load()
    assert small is not None
    lines = []
    for row in range(rows):
        line = ""
        for column in range(columns):
            upper, lower = (Color.from_rgb(*_rgb(small[column, 2 * row + n])) for n in (0, 1))
            line += Style(color=upper, bgcolor=lower).render("\u2580", color_system=system)
        lines.append(line)
    return "\n".join(lines)


def _rgb(pixel: object) -> tuple[int, int, int]:
    assert isinstance(pixel, tuple)
    return pixel[0], pixel[1], pixel[2]


def _kitty(image: Image, columns: int, rows: int) -> str:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol/: PNG, in chunks."""
    data = base64.b64encode(_png(image, columns, rows)).decode()
    chunks = [data[at : at + _CHUNK] for at in range(0, len(data), _CHUNK)]
    text = ""
    for number, chunk in enumerate(chunks):
        first = f"a=T,f=100,q=2,c={columns},r={rows}," if number == 0 else ""
        text += f"\x1b_G{first}m={int(number + 1 < len(chunks))};{chunk}\x1b\\"
    return text


def _iterm(image: Image, columns: int, rows: int) -> str:
    """https://iterm2.com/documentation-images.html."""
    data = _png(image, columns, rows)
    size = f"size={len(data)};width={columns};height={rows}"
    return f"\x1b]1337;File=inline=1;{size}:{base64.b64encode(data).decode()}\x07"


def _sixel(image: Image, columns: int, rows: int) -> str:
    """DEC's sixels, 6 rows of pixels a band, each colour of a band on its own; run lengths."""
    import numpy as np

    cell_width, cell_height = _cell_size()
    small = image.resize((columns * cell_width, rows * cell_height)).quantize(64)
    pixels = np.asarray(small)  # [height, width] numbers of colours
    palette = (small.getpalette() or [])[: 3 * 64]
    height, width = pixels.shape
    text = f'\x1bP0;1q"1;1;{width};{height}'
    for number in range(len(palette) // 3):
        red, green, blue = (round(value * 100 / 255) for value in palette[3 * number :][:3])
        text += f"#{number};2;{red};{green};{blue}"
    bands = []
    for top in range(0, height, 6):
        band = pixels[top : top + 6]
        bits = 1 << np.arange(len(band))[:, None]
        masks = {number: ((band == number) * bits).sum(axis=0) for number in np.unique(band)}
        bands.append("$".join(f"#{number}{_runs(mask.tolist())}" for number, mask in masks.items()))
    return text + "-".join(bands) + "\x1b\\"


def _runs(masks: list[int]) -> str:
    text, at = "", 0
    while at < len(masks):
        length = 1
        while at + length < len(masks) and masks[at + length] == masks[at]:
            length += 1
        char = chr(63 + masks[at])
        text += f"!{length}{char}" if length > 3 else char * length
        at += length
    return text


def _cell_size() -> tuple[int, int]:
    if sys.platform != "win32":
        import fcntl
        import struct
        import termios

        try:
            asked = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, bytes(8))
        except OSError:
            return _CELL
        rows, columns, width, height = struct.unpack("HHHH", asked)
        if rows and columns and width >= columns and height >= rows:
            return min(width // columns, 32), min(height // rows, 64)
    return _CELL


def _png(image: Image, columns: int, rows: int) -> bytes:
    """Twice as fine as the cells of most terminals, so that it is sharp on fine screens."""
    small = image.copy()
    small.thumbnail((2 * columns * _CELL[0], 2 * rows * _CELL[1]))
    file = io.BytesIO()
    small.save(file, "PNG")
    return file.getvalue()


_DRAWN: dict[Graphics, Callable[[Image, int, int], str]] = {
    Graphics.KITTY: _kitty,
    Graphics.ITERM: _iterm,
    Graphics.SIXEL: _sixel,
    Graphics.HALF_BLOCKS: _half_blocks,
}


def _keep_keys(read: bytes) -> None:
    """Have the next prompt take these as if they had just been typed."""
    if sys.platform == "win32" or not read:
        return
    from prompt_toolkit.application import get_app_session
    from prompt_toolkit.input.typeahead import store_typeahead
    from prompt_toolkit.input.vt100_parser import Vt100Parser
    from prompt_toolkit.key_binding import KeyPress

    keys: list[KeyPress] = []
    Vt100Parser(keys.append).feed_and_flush(read.decode("utf-8", "replace"))
    store_typeahead(get_app_session().input, keys)
