"""Text of tokens as they come: whole characters, thoughts apart, stop strings held back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from qwencli.engine.frontend.tokenizer import THOUGHT, THOUGHT_END, Tokenizer


class IncrementalDetokenizer:
    """Text of a growing list of ids; all pieces together equal `Tokenizer.decode` of all ids.

    A character that is spread over several tokens appears with the last of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with these tokens; of one often a word, or nothing."""
        return self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, ids)))

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for an unfinished character, or nothing."""
        return self._utf8.decode(b"", final=True)


class ThoughtSplitter:
    """Tells what a model thinks, between `<think>` and `</think>`, from its answer.

    Thoughts stand before the answer: a tag further on is a part of it. Text that may be the
    beginning of a tag is held back until that is decided, so the outcome does not depend on how
    the stream is cut into pieces.

    Args:
        inside: the prompt ends in a `<think>`, so that thoughts come first.
    """

    def __init__(self, *, inside: bool) -> None:
        self._inside, self._answering, self._thought = inside, False, inside
        self._held = ""

    @property
    def thinking(self) -> bool:
        """Whether what comes next is a thought, as far as that is decided."""
        return self._inside

    @property
    def answering(self) -> bool:
        """Whether thoughts are over: what comes is the answer."""
        return self._answering

    def push(self, text: str) -> tuple[str, str]:
        """(thoughts, answer) that are decided now."""
        if self._answering:
            return "", text
        self._held += text
        thoughts = ""
        while True:
            if self._inside:
                before, closed, after = self._held.partition(THOUGHT_END)
                if not closed:
                    cut = len(before) - _overlap(before, THOUGHT_END)
                    self._held = before[cut:]
                    return thoughts + before[:cut], ""
                thoughts += before
                self._inside, self._held = False, after
            start = self._held.lstrip()
            if start.startswith(THOUGHT):
                self._inside = self._thought = True
                self._held = start[len(THOUGHT) :]
            elif THOUGHT.startswith(start):
                return thoughts, ""
            else:
                self._answering = True
                return thoughts, self._take()

    def finish(self) -> tuple[str, str]:
        """What was held back when the text ends."""
        return (self._take(), "") if self._inside else ("", self._take())

    def _take(self) -> str:
        held, self._held = self._held, ""
        # Between thoughts and answer stand empty lines, which belong to neither.
        return held.lstrip() if self._thought and not self._inside else held


class StopStringBuffer:
    """Ends a stream of text at the stop string that is complete first, which is not shown.

    Text that may be the beginning of a stop string is held back until that is decided, so the
    outcome does not depend on how the stream is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.any, self.stopped = bool(self._stops), False

    def push(self, text: str) -> str:
        """The text that may be shown now. `stopped` says whether a stop string was reached."""
        if not self._stops:
            return text
        if self.stopped:
            return ""
        held = self._held + text
        hits = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if hits:
            self.stopped = True
            self._held = ""
            return held[: min(hits)[1]]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
