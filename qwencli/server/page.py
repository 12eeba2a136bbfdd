"""The page at `/`, one file that asks this server alone: pictures, talk, and how fast it is."""

from __future__ import annotations

from pathlib import Path

from qwencli.html_page import json_element, page_around

PAGE_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_ASSETS = Path(__file__).with_name("page_assets")


def chat_page(model: str, asks_key: bool) -> str:
    """The page as HTML.

    Args:
        asks_key: whether people must type the server's key.
    """
    settings = json_element("settings", {"model": model, "asks_key": asks_key})
    return page_around(
        (_ASSETS / "body.html").read_text(encoding="utf-8") + settings,
        brand=f"qwencli · {model}",
        style=(_ASSETS / "page.css").read_text(encoding="utf-8"),
        script=(_ASSETS / "page.js").read_text(encoding="utf-8"),
        asks_server=True,
    )
