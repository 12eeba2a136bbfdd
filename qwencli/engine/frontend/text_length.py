"""Texts that are far too long, found out without splitting them to their end."""

from __future__ import annotations

from qwencli.engine.frontend.tokenizer import ContentGuard, Tokenizer
from qwencli.errors import PromptTooLongError

# Shorter ones are split in a moment.
_LONG_CHARS = 100_000


def check_length(
    tokenizer: Tokenizer, text: str, guard: ContentGuard | None, most_tokens: int
) -> None:
    """Raise PromptTooLongError for a long text of which a part has more than `most_tokens`.

    Splitting megabytes takes seconds, and others wait meanwhile. What a part becomes, the whole
    does too, but for the word that the cut is in. Parts grow, so that a text that fits is split
    once and a third.
    """
    part = 2 * most_tokens
    while _LONG_CHARS < len(text) > part:
        if len(tokenizer.encode(text[:part], guard)) > most_tokens + most_tokens // 4:
            raise PromptTooLongError(
                f"a text of {len(text)} characters has more than the {most_tokens} tokens of a "
                "request",
                "shorten it",
            )
        part *= 4
