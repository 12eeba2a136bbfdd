"""Markdown that arrives in pieces, as lines for a terminal."""

from __future__ import annotations

import functools
import io
import itertools
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token
    from rich.console import Console, RenderableType

# Of a block of code that grows: lines after which its beginning is final.
_LONG_CODE, _KEPT_CODE = 40, 8
_NUMBER = re.compile(r"(\s*)\d{1,9}(?=[.)])")
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


class MarkdownStream:
    """Makes lines of what has come, each time it is asked.

    A block (paragraph, table, item of a list ...) is final once the next one has begun; only the
    last one is read and drawn again, so the work does not grow with the answer. Links keep their
    address in sight, and what looks like HTML is shown as it is written. A line that ends in the
    source ends on the screen: models write verses and addresses so.
    """

    def __init__(self) -> None:
        # What is not final, and whether it goes on with the block of the lines before.
        self._tail = ""
        self._goes_on = False
        self._anything = False

    def push(self, text: str) -> None:
        self._tail += text

    def lines(self, width: int, *, finish: bool = False) -> tuple[list[str], list[str]]:
        """(lines that are final since the last call, lines that may change yet)."""
        done: list[str] = []
        while (cut := self._cut()) is not None:
            done += self._taken(cut, width)
        if finish:
            done += self._rendered(self._tail, width)
            self._tail = ""
            return done, []
        return done, self._rendered(self._tail, width)

    def _taken(self, cut: _Cut, width: int) -> list[str]:
        """The lines of what is final now."""
        lines: list[str] = []
        for start, end in itertools.pairwise([0, *cut.ends]):
            more = self._rendered(self._tail[start:end] + cut.close, width)
            lines += more
            self._anything = self._anything or bool(more)
            self._goes_on = cut.inside
        self._tail = cut.open + self._tail[cut.ends[-1] :]
        if cut.number is not None:
            self._tail = _NUMBER.sub(rf"\g<1>{cut.number}", self._tail, count=1)
        return lines

    def _cut(self) -> _Cut | None:
        """Where the last block begins, or the last item of a list, or the rest of long code."""
        tokens = [token for token in _parser().parse(self._tail) if token.map]
        top = [token for token in tokens if token.level == 0 and token.nesting >= 0]
        if len(top) > 1:
            return _Cut(list(map(self._offset, top[1:])))
        if not top:
            return None
        [block] = top
        if block.type == "fence":
            return self._cut_code(block)
        items = [token for token in tokens if token.type == "list_item_open" and token.level == 1]
        if len(items) < 2:
            return None
        number = None
        if block.type == "ordered_list_open":
            number = int(block.attrs.get("start", 1)) + len(items) - 1
        return _Cut([self._offset(items[-1])], inside=True, number=number)

    def _cut_code(self, block: Token) -> _Cut | None:
        lines = self._tail.splitlines(keepends=True)
        assert block.map is not None
        start, end = block.map
        if end - start < _LONG_CODE or _closes(lines[end - 1], block.markup):
            return None
        at = sum(map(len, lines[: end - _KEPT_CODE]))
        return _Cut([at], inside=True, close=block.markup, open=lines[start])

    def _offset(self, token: Token) -> int:
        assert token.map is not None
        return sum(map(len, self._tail.splitlines(keepends=True)[: token.map[0]]))

    def _rendered(self, source: str, width: int) -> list[str]:
        if not source.strip():
            return []
        lines = _terminal_lines(_markdown(source), width)
        while lines and not _STYLE.sub("", lines[-1]).strip():
            lines.pop()
        while lines and not _STYLE.sub("", lines[0]).strip():
            lines.pop(0)
        gap = [""] if lines and self._anything and not self._goes_on else []
        return gap + lines


class _Cut:
    """Where the source is divided into what is final and what is not.

    Args:
        ends: characters of the source up to the end of each block that is final.
        inside: one block goes on behind it.
        number: of the item that follows, in an ordered list.
        close, open: what ends the block of code before, and begins it again behind.
    """

    def __init__(
        self,
        ends: list[int],
        *,
        inside: bool = False,
        number: int | None = None,
        close: str = "",
        open: str = "",
    ) -> None:
        self.ends, self.inside, self.number = ends, inside, number
        self.close, self.open = close, open


def dimmed(text: str, width: int) -> list[str]:
    """Plain text as dimmed lines of a terminal."""
    from rich.text import Text

    return _terminal_lines(Text(text, style="dim"), width)


def _closes(line: str, fence: str) -> bool:
    return line.strip().startswith(fence) and not line.strip().strip(fence[0])


def _terminal_lines(renderable: RenderableType, width: int) -> list[str]:
    console = _console(width)
    with console.capture() as captured:
        console.print(renderable)
    return [line.rstrip(" ") for line in captured.get().removesuffix("\n").split("\n")]


@functools.lru_cache(maxsize=2)
def _console(width: int) -> Console:
    from rich.console import Console
    from rich.theme import Theme

    # Its colours are those of the terminal that stdout is.
    colours = Console().color_system
    return Console(
        file=io.StringIO(),
        force_terminal=colours is not None,
        color_system=colours,  # type: ignore[arg-type]
        width=max(width, 10),
        legacy_windows=False,
        highlight=False,
        markup=False,
        emoji=False,
        theme=Theme({"markdown.code": "cyan", "markdown.link_url": "underline"}),
    )


@functools.cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    # Their lines would vanish: `[1]: https://...` under an answer is to be seen.
    return parser.disable("reference")


def _markdown(source: str) -> RenderableType:
    """rich's Markdown, plainer: headings at the left, code without a box, lines as they are."""
    from rich.markdown import CodeBlock, Heading, ListElement, Markdown
    from rich.syntax import Syntax

    class PlainHeading(Heading):
        def __rich_console__(self, console: Any, options: Any) -> Any:
            self.text.justify = "left"
            self.text.stylize("bold")
            yield self.text

    class PlainCode(CodeBlock):
        def __rich_console__(self, console: Any, options: Any) -> Any:
            yield Syntax(
                str(self.text).rstrip(),
                self.lexer_name,
                theme="ansi_dark",
                background_color="default",
                word_wrap=True,
            )

    class PlainList(ListElement):
        def __rich_console__(self, console: Any, options: Any) -> Any:
            if self.list_type == "bullet_list_open":
                yield from super().__rich_console__(console, options)
                return
            first = 1 if self.list_start is None else self.list_start
            # Room for two digits from the first item on: nobody knows yet how many there will be.
            last = max(first + len(self.items) - 1, 99)
            for number, item in enumerate(self.items, first):
                yield from item.render_number(console, options, number, last)

    class Plain(Markdown):
        elements = {  # noqa: RUF012 - as its base has it
            **Markdown.elements,
            "heading_open": PlainHeading,
            "fence": PlainCode,
            "code_block": PlainCode,
            "ordered_list_open": PlainList,
        }

    page = Plain("", hyperlinks=False)
    page.parsed = _parser().parse(source)
    for token in page.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return page
