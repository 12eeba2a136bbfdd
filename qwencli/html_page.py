"""The frame of our HTML pages: colours for light and dark, the button between them, no network.

A page is one file, and all but the server's own open from file://. `bench report`, `dataset report`
and `serve` put into it what they have to say; their own style and scripts come after the frame's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

ASSETS = Path(__file__).with_name("html_assets")


def page_around(
    body: str,
    *,
    brand: str,
    style: str,
    script: str,
    title: str | None = None,
    links: str = "",
    header: str = "",
    after: str = "",
    asks_server: bool = False,
) -> str:
    """A whole page.

    Args:
        body, links, header, after: HTML; `after` stands behind the scripts.
        asks_server: whether its scripts may ask the server that it comes from; else nobody.
        brand, title: plain text; the title is the brand where none is given.
    """
    return Template(_asset("frame.html")).substitute(
        title=escape(title or brand),
        brand=escape(brand),
        connect="; connect-src 'self'" if asks_server else "",
        links=f"<nav>{links}</nav>" if links else "",
        header=header,
        style=_asset("theme.css") + style,
        body=body,
        script=_asset("theme.js") + script,
        after=after,
    )


def json_element(name: str, value: Mapping[str, Any]) -> str:
    """A value for scripts: JSON that cannot end the element it stands in, whatever it says."""
    text = json.dumps(
        value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str
    ).replace("<", "\\u003c")
    text = text.encode("utf-8", "replace").decode()
    return f'<script type="application/json" id="{name}">{text}</script>'


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
