"""Text to token ids and back, for byte-level BPE tokenizers in Qwen's layout.

Control tokens (`<|im_end|>`, `<|image_pad|>` ...) are made from a template's own text alone.
Text that came from outside goes through a `ContentGuard`, after which its spelling of a control
token is encoded as the plain characters it is. Between two control tokens template and content
are encoded as one string, as the reference does, so ordinary conversations get equal ids.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from qwencli.errors import InputError, ModelFileError, PromptTooLongError
from qwencli.models.config_values import read_json_object

# Qwen's own pattern; a model with another one states it in tokenizer_config.json.
_PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How much longer a tokenizer's rules may make a text before it is split; Qwen's make it no longer.
_MOST_GROWTH = 64
# What splitting a request into tokens may take. With a model's own pattern it may grow with the
# square of a text's length; Qwen's takes ten seconds for some megabytes on a slow CPU.
_ENCODE_S = 8.0
_LONG_CHARS = 100_000
# Texts whose ids are kept, and how long they may be.
_RECENT_TEXTS, _RECENT_CHARS = 16, 4000
_DOWNLOAD = "download the model's files again"
# What Qwen's models put around their thoughts.
THOUGHT, THOUGHT_END = "<think>", "</think>"


def _byte_of_char() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in shown}
    hidden = (byte for byte in range(256) if byte not in set(shown))
    return table | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF_CHAR = _byte_of_char()
_STDERR, _STDERR_HELD = 2, threading.Lock()


@contextmanager
def _model_file_error(saying: str) -> Iterator[None]:
    """Whatever the Rust library fails with in here becomes a ModelFileError that begins so.

    It raises Exception itself, no subclass, for broken files, and panics where files are valid
    and make no sense: a BaseException, after some lines that it writes to stderr by itself.
    """
    try:
        with _panics_unheard():
            yield
    except BaseException as error:
        if isinstance(error, ModelFileError | InputError | MemoryError) or not (
            isinstance(error, Exception) or type(error).__name__ == "PanicException"
        ):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelFileError(f"{saying}: {reason}", _DOWNLOAD) from error


def _memory_file() -> IO[bytes]:
    # A file on disk costs every prompt 0.2 ms; this one, which Linux has, a tenth of it.
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stderr"), "w+b", buffering=0)
    return tempfile.TemporaryFile()


@contextmanager
def _panics_unheard() -> Iterator[None]:
    """Keeps what arrives on stderr meanwhile, and writes it there unless the block fails."""
    with _STDERR_HELD, _memory_file() as kept:
        try:
            stderr = os.dup(_STDERR)
        except OSError:  # closed
            yield
            return
        try:
            os.dup2(kept.fileno(), _STDERR)
            try:
                yield
            finally:
                os.dup2(stderr, _STDERR)
            kept.seek(0)
            if heard := kept.read():
                with suppress(OSError):
                    os.write(stderr, heard)
        finally:
            os.close(stderr)


@functools.lru_cache(16)
def _starts_of(special: tuple[str, ...]) -> re.Pattern[str]:
    """The first character of each spelling, where the second follows or the text ends."""
    starts = sorted({spelling[:2] for spelling in special if len(spelling) > 1})
    return re.compile(
        "|".join(rf"{re.escape(s[0])}(?={re.escape(s[1])}|\s*\Z)" for s in starts) or r"(?!)"
    )


class ContentGuard:
    """Marks outside text so that no control token can be read out of it, not even across parts.

    A character that none of `contents` holds is put behind each first character of a control
    token's spelling: where the second follows, and where the content ends (the next part could
    go on with it). `Tokenizer.encode` takes the character out again. All else stays as it is, so
    a template that looks into the content still sees it.
    """

    def __init__(self, special: Iterable[str], contents: Sequence[str]) -> None:
        used = set().union(*map(set, contents))
        # Unicode's noncharacters first: they mean nothing in any text.
        candidates = itertools.chain(range(0xFDD0, 0xFDF0), range(0xF0000, 0x10FFFE))
        self.mark = next(chr(code) for code in candidates if chr(code) not in used)
        self._starts = _starts_of(tuple(special))

    def protect(self, content: str) -> str:
        return self._starts.sub(lambda match: match[0] + self.mark, content)


class Tokenizer:
    """One model's tokenizer.

    Args:
        fast: byte-level BPE; this object takes it over.
    """

    def __init__(self, fast: FastTokenizer, source: Path | None = None) -> None:
        # Control tokens are found here, not there, because only part of a text may hold them.
        fast.encode_special_tokens = True
        # Some files carry settings of a training run; a prompt is never cut or filled up.
        fast.no_truncation()
        fast.no_padding()
        self._fast = fast
        self._source = source or Path("tokenizer.json")
        added = fast.get_added_tokens_decoder()
        self._special_ids = {
            token.content: id_ for id_, token in added.items() if token.special and token.content
        }
        # The ends of thoughts are special in some models, and needed in the text all the same.
        tags = (THOUGHT, THOUGHT_END)
        self._skipped = frozenset(
            id_ for token, id_ in self._special_ids.items() if token not in tags
        )
        self._markup = sorted(
            (token.content for token in added.values() if token.content not in (*tags, "")),
            key=len,
            reverse=True,
        )
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._bytes: dict[int, bytes] = {}
        patterns = _patterns([fast.normalizer, fast.pre_tokenizer])
        self._watched_from = 1 if patterns - {_PRETOKENIZE} else _LONG_CHARS
        self._refused_from = float("inf")
        # Of texts just read: a folder of pictures is asked about in the same words.
        self._recent: dict[tuple[str, str | None], tuple[int, ...]] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, or vocab.json and merges.txt; and tokenizer_config.json.

        Raises:
            ModelFileError: the files are not there, broken or contradict each other.
        """
        config_path = folder / "tokenizer_config.json"
        config = read_json_object(config_path) if config_path.is_file() else {}
        path = folder / "tokenizer.json"
        pieces = (folder / "vocab.json", folder / "merges.txt")
        if not path.is_file():
            path = pieces[0]
            if not all(piece.is_file() for piece in pieces):
                raise ModelFileError(
                    f"{folder} has neither tokenizer.json nor vocab.json with merges.txt", _DOWNLOAD
                )
        with _model_file_error(f"{path} cannot be read"):
            if path == pieces[0]:
                fast = _build(*pieces, config.get("pretokenize_regex") or _PRETOKENIZE)
            else:
                # Not from_file, which refuses a byte order mark; nor read_text, which looks for
                # line ends in all of it.
                fast = FastTokenizer.from_str(path.read_bytes().decode("utf-8-sig"))
        with _model_file_error(f"{config_path} cannot be read"):
            _add_missing(fast, config.get("added_tokens_decoder") or {}, config_path)
        if fast.normalizer is not None:
            _check_growth(json.loads(fast.normalizer.__getstate__()), path)
        return cls(fast, path)

    def has_token(self, token: str) -> bool:
        """Whether the vocabulary has a token of exactly this spelling."""
        return self._fast.token_to_id(token) is not None

    def token_id(self, token: str) -> int:
        """The id of a token by its exact spelling.

        Raises:
            ModelFileError: this vocabulary lacks it.
        """
        id_ = self._fast.token_to_id(token)
        if id_ is None:
            raise ModelFileError(f"{self._source} has no token {token}", _DOWNLOAD)
        return id_

    def to_json(self) -> str:
        """What tokenizer.json would hold, tokens that were added from elsewhere included."""
        text: str = self._fast.to_str()
        return text

    def added_token_at_start(self, text: str) -> str | None:
        """The added token, special or not, that `text` begins with; ends of thoughts are none."""
        return next((token for token in self._markup if text.startswith(token)), None)

    def guard(self, contents: Sequence[str]) -> ContentGuard:
        """A guard for texts from outside that are about to go into one template."""
        return ContentGuard(self._special_ids, contents)

    def encode(self, text: str, guard: ContentGuard | None = None) -> list[int]:
        """Ids of `text`, its control tokens recognised, except in what `guard` has protected.

        Added tokens that control nothing (`<think>`, `<tool_call>`) are recognised everywhere.

        Raises:
            ModelFileError: the model's rules fail on this text.
            InputError: they take longer than `_ENCODE_S`.
        """
        key = (text, guard.mark if guard else None)
        found = self._recent.get(key)
        if found is not None:
            return list(found)
        ids = self._encode(text, guard)
        if len(text) <= _RECENT_CHARS:
            if len(self._recent) >= _RECENT_TEXTS:
                self._recent.clear()
            self._recent[key] = tuple(ids)
        return ids

    def _encode(self, text: str, guard: ContentGuard | None) -> list[int]:
        ids: list[int] = []
        until_s = time.monotonic() + _ENCODE_S
        end = 0
        with _model_file_error(f"{self._source} cannot split this text into tokens"):
            for match in self._specials.finditer(text):
                self._extend(ids, text[end : match.start()], guard, until_s)
                ids.append(self._special_ids[match[0]])
                end = match.end()
            self._extend(ids, text[end:], guard, until_s)
        return ids

    def _extend(
        self, ids: list[int], plain: str, guard: ContentGuard | None, until_s: float
    ) -> None:
        if guard is not None:
            plain = plain.replace(guard.mark, "")
        if len(plain) >= self._watched_from:
            ids.extend(self._encode_in_time(plain, until_s))
        elif plain:
            ids.extend(self._fast.encode(plain, add_special_tokens=False).ids)

    def _encode_in_time(self, plain: str, until_s: float) -> list[int]:
        """Ids of a text; in a thread, because nothing stops the library once it has begun."""
        ended: list[list[int] | BaseException] = []

        def work() -> None:
            try:
                # Not encode(), which keeps every other thread from running.
                (found,) = self._fast.encode_batch([plain], add_special_tokens=False)
                ended.append(found.ids)
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                ended.append(error)

        if len(plain) < self._refused_from:
            left_s = max(until_s - time.monotonic(), 0)
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            thread.join(left_s)
            if not ended and left_s > _ENCODE_S / 2:
                # The thread goes on; no second one shall.
                self._refused_from = len(plain)
        if not ended:
            raise InputError(
                f"a text of {len(plain)} characters takes longer than {_ENCODE_S:.0f} s to split "
                "into tokens",
                "shorten it, or use another model",
            )
        if isinstance(ended[0], BaseException):
            raise ended[0]
        return ended[0]

    def check_length(self, text: str, guard: ContentGuard | None, most_tokens: int) -> None:
        """Raise PromptTooLongError for a long text of which a part has more than `most_tokens`.

        Splitting megabytes takes seconds, and others wait meanwhile. What a part becomes, the whole
        does too, but for the word that the cut is in. Parts grow, so that a text that fits is split
        once and a third.
        """
        part = 2 * most_tokens
        while _LONG_CHARS < len(text) > part:
            if len(self.encode(text[:part], guard)) > most_tokens + most_tokens // 4:
                raise PromptTooLongError(
                    f"a text of {len(text)} characters has more than the {most_tokens} tokens of a "
                    "request",
                    "shorten it",
                )
            part *= 4

    def token_bytes(self, id_: int, *, skip_special: bool = True) -> bytes:
        """What one token adds to the text. Ids that have no spelling give `<|id|>`.

        (A model's embedding has more rows than its vocabulary has words, and a dummy model speaks
        with a foreign tokenizer: different ids must stay different text.)
        """
        if skip_special and id_ in self._skipped:
            return b""
        known = self._bytes.get(id_)
        if known is None:
            token = self._fast.id_to_token(id_)
            known = self._bytes[id_] = f"<|{id_}|>".encode() if token is None else _spell(token)
        return known

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        parts = (self.token_bytes(id_, skip_special=skip_special) for id_ in ids)
        return b"".join(parts).decode("utf-8", errors="replace")


def _spell(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:  # an added token, kept in plain letters
        return token.encode()


def _build(vocab: Path, merges: Path, pattern: str) -> FastTokenizer:
    fast = FastTokenizer(BPE.from_file(str(vocab), str(merges)))
    fast.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    fast.decoder = decoders.ByteLevel()
    return fast


def _patterns(rules: Iterable[Any]) -> set[str]:
    """The regular expressions in a tokenizer's rules."""
    found, rest = set(), [json.loads(rule.__getstate__()) for rule in rules if rule is not None]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            if isinstance(item.get("Regex"), str):
                found.add(item["Regex"])
            rest += item.values()
        elif isinstance(item, list):
            rest += item
    return found


def _check_growth(normalizer: Any, path: Path) -> None:
    """Raise ModelFileError where replacements in a row make a short text fill the memory."""
    growth, rest = 1, [normalizer]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            added = [item[key] for key in ("content", "prepend") if isinstance(item.get(key), str)]
            for text in added:
                # A pattern may match between characters too.
                growth *= len(text) + 1
        if growth > _MOST_GROWTH:
            raise ModelFileError(
                f"{path}: its normalizer makes texts more than {_MOST_GROWTH} times as long",
                _DOWNLOAD,
            )
        rest += item.values() if isinstance(item, dict) else item if isinstance(item, list) else []


def _add_missing(fast: FastTokenizer, added: Any, path: Path) -> None:
    """Add what only tokenizer_config.json's `added_tokens_decoder` (id -> token) has."""
    try:
        by_id = {int(id_): entry for id_, entry in added.items()}
        tokens = {
            id_: AddedToken(
                entry["content"],
                special=entry.get("special", False),
                normalized=entry.get("normalized", False),
            )
            for id_, entry in sorted(by_id.items())
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: added_tokens_decoder is malformed", _DOWNLOAD) from error
    present = fast.get_added_tokens_decoder()
    fast.add_tokens([token for id_, token in tokens.items() if id_ not in present])
    for id_, token in tokens.items():
        if fast.token_to_id(token.content) != id_:
            raise ModelFileError(
                f"{path} gives {token.content} the id {id_}, "
                f"the vocabulary {fast.token_to_id(token.content)}",
                _DOWNLOAD,
            )
