"""What a server serves, to whom, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwencli.config import SamplingOptions


@dataclass(frozen=True)
class ServerSettings:
    """Args:
    model: what the loaded model is called, and `aliases` what it answers to as well.
    api_key: None = nobody is asked for one.
    hosts: names that a `Host` header may have, without a port; None = any.
    allow_image_urls: fetch pictures from public http addresses.
    max_pixels: of a picture, before it is resized. max_images: of a request.
    max_tokens: of an answer. usual_tokens: where nobody says how long one may be.
    sampling: where a request says nothing.
    body_s, answer_s, write_s: within which a body must be here, an answer complete, and a piece
        of it taken.
    """

    model: str
    aliases: tuple[str, ...] = ()
    api_key: str | None = None
    hosts: tuple[str, ...] | None = ("localhost", "127.0.0.1", "::1")
    allow_image_urls: bool = False
    max_body_bytes: int = 64 << 20
    max_pixels: int = 50_000_000
    max_images: int = 32
    max_messages: int = 4096
    max_tokens: int = 8192
    usual_tokens: int = 1024
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    body_s: float = 60.0
    answer_s: float = 900.0
    write_s: float = 60.0
